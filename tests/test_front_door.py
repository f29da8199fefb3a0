"pp, tl, pl, get: scanpy's manners, and ranks that survive what people do to an AnnData"
import inspect, subprocess, sys
import anndata as ad, numpy as np, pytest
import geneformer_nb as gf
from geneformer_nb.core import GeneformerError, VocabularyError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.perturb.actions import KO

small = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)

@pytest.fixture(scope='module', params=['V1-like', 'V2-like'])
def vocab(request):
    v = Vocabulary.from_counts(gf.toy.simulate(90, 6, 80), symbols='symbol', cls_token=request.param == 'V2-like', max_len=60)
    return v

@pytest.fixture(scope='module')
def model(vocab): return Geneformer.new('nano', vocab, **small)

@pytest.fixture
def adata(): return gf.toy.simulate(90, 6, 80)

@pytest.fixture
def ranked(adata, vocab):
    gf.pp.tokenize(adata, vocabulary=vocab)
    return adata

def equal(a, b): return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.offsets, b.offsets)

def test_loads_on_first_use():
    code = "import sys, geneformer_nb as gf; assert 'pandas' not in sys.modules; print(gf.pp.tokenize.__name__, gf.get.cells.__name__)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split() == ['tokenize', 'ranked_cells']

@pytest.mark.parametrize('verb', ['pp.tokenize', 'tl.embed', 'tl.finetune', 'tl.predict', 'tl.perturb', 'tl.screen',
                                  'pl.embedding', 'pl.confusion', 'pl.ranks'])
def test_everything_after_adata_is_by_keyword(verb):
    module, name = verb.split('.')
    first, *rest = inspect.signature(getattr(getattr(gf, module), name)).parameters.values()
    assert first.name == 'adata' and {p.kind for p in rest} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}

@pytest.mark.parametrize('module', ['pp', 'tl', 'pl', 'get'])
def test_every_public_name_says_what_it_does(module):
    m = getattr(gf, module)
    for n in m.__all__: assert getattr(m, n).__doc__, n

def test_cells_come_back(ranked, vocab):
    assert equal(gf.get.cells(ranked, vocab), gf.data.tokenize(ranked, vocab))
    assert list(gf.get.cells(ranked, vocab).obs) == list(ranked.obs)

ways = dict(
    mask=lambda a: a[(a.obs.disease == 'dilated').to_numpy()], names=lambda a: a[a.obs_names[::-2]], genes=lambda a: a[:, :5],
    copied=lambda a: a[10:20].copy(), filtered=lambda a: a[a.obs.n_counts > a.obs.n_counts.median()].copy(),
    joined=lambda a: ad.concat([a[50:], a[:20]], uns_merge='same'), outer=lambda a: ad.concat([a[50:, :30], a[:20, 20:]], join='outer', uns_merge='same'),
    shuffled=lambda a: a[np.random.default_rng(0).permutation(a.n_obs)])

@pytest.mark.parametrize('way', list(ways))
def test_ranks_follow_their_cells(ranked, vocab, way):
    got, all_ = ways[way](ranked), gf.data.tokenize(ranked, vocab)
    assert equal(gf.get.cells(got, vocab), all_[all_.obs.index.get_indexer(got.obs_names)])

@pytest.mark.parametrize('kind', ['h5ad', 'zarr', 'h5ad backed'])
def test_ranks_survive_a_file(ranked, vocab, tmp_path, kind):
    want = gf.data.tokenize(ranked, vocab)
    del ranked.uns['toy']
    if kind == 'zarr': ranked.write_zarr(tmp_path/'a.zarr'); back = ad.read_zarr(tmp_path/'a.zarr')
    else: ranked.write_h5ad(tmp_path/'a.h5ad'); back = ad.read_h5ad(tmp_path/'a.h5ad', backed='r' if 'backed' in kind else None)
    assert equal(gf.get.cells(back, vocab), want) and back.uns['X_ranks']['vocabulary_hash'] == vocab.hash
    assert gf.get.match(back).value['matched'] == want.match.report()['matched']

def test_normalizing_afterwards_is_no_harm(ranked, vocab, model):
    want = gf.tl.embed(ranked, model=model, copy=True).obsm['X_geneformer']
    ranked.X = ranked.X.log1p() # the usual next step; the ranks are safe, the counts are gone
    gf.tl.embed(ranked, model=model)
    assert np.array_equal(ranked.obsm['X_geneformer'], want)
    del ranked.obsm['X_ranks']
    with pytest.raises(GeneformerError, match='log-normalized'): gf.tl.embed(ranked, model=model)

def test_copy_leaves_the_original_alone(adata, vocab, model):
    before = adata.copy()
    one = gf.pp.tokenize(adata, vocabulary=vocab, copy=True)
    two = gf.tl.embed(adata, model=model, copy=True)
    assert 'X_ranks' in one.obsm and 'X_geneformer' in two.obsm and one is not adata
    assert not list(adata.obsm) and list(adata.uns) == list(before.uns) and (adata.X != before.X).nnz == 0
    assert gf.pp.tokenize(adata, vocabulary=vocab) is None and gf.tl.embed(adata, model=model) is None

def test_without_ranks_or_with_others_the_counts_are_ranked(adata, vocab, model):
    gf.tl.embed(adata, model=model, key_added='a')
    gf.pp.tokenize(adata, vocabulary=vocab)
    gf.tl.embed(adata, model=model, key_added='b')
    other = Vocabulary(vocab.genes, vocab.medians*np.linspace(1, 5, len(vocab)), vocab.cls, vocab.max_len)
    gf.pp.tokenize(adata, vocabulary=other)
    gf.tl.embed(adata, model=model, key_added='c')
    np.testing.assert_allclose(adata.obsm['a'], adata.obsm['b'], atol=1e-6)
    np.testing.assert_allclose(adata.obsm['a'], adata.obsm['c'], atol=1e-6)
    with pytest.raises(VocabularyError, match='another vocabulary'): gf.get.cells(adata, vocab)

def test_a_whole_day(ranked, model, tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    gf.tl.embed(ranked, model=model)
    clf = gf.tl.finetune(ranked, model=model, label='disease', donor='donor', steps=2, batch=4)
    assert list(clf.scores.index)[0].startswith('Geneformer') and len(clf.scores) == 3
    gf.tl.predict(ranked, classifier=clf)
    assert ranked.obsm['geneformer_proba'].shape == (90, 3) and ranked.obs.geneformer_pred.notna().all()
    raw = gf.tl.perturb(ranked, model=clf.encoder, what=KO('TF01'), column='disease', start='dilated', states='non-failing', layer='last')
    assert (ranked.obs.disease.to_numpy()[raw.cell] == 'dilated').all() and 'shift_non-failing' in raw
    table = gf.perturb.summarize(raw, ranked.obs, donor='donor')
    assert list(gf.get.targets(table, 1).perturbation) == ['KO(TF01)'] and gf.get.embedding(ranked).shape == (90, 16)
    for ax in (gf.pl.embedding(ranked, color='disease'), gf.pl.confusion(ranked, label='disease'), gf.pl.targets(table), gf.pl.loss(clf)):
        assert isinstance(ax, matplotlib.axes.Axes)
    ranked.write_h5ad(tmp_path/'day.h5ad')
    assert {'X_ranks', 'X_geneformer', 'geneformer_proba'} <= set(ad.read_h5ad(tmp_path/'day.h5ad').obsm)

def test_several_layers_from_ranks_and_from_counts(ranked, adata, model):
    gf.tl.embed(ranked, model=model, layer=['last', -1], key_added='X_g')
    counted = ranked.copy(); del counted.obsm['X_ranks']
    gf.tl.embed(counted, model=model, layer=['last', -1], key_added='X_g')
    for l in ('last', -1):
        np.testing.assert_array_equal(ranked.obsm[f'X_g_{l}'], counted.obsm[f'X_g_{l}'])
        assert ranked.uns[f'X_g_{l}']['layer'] == str(l) and ranked.uns[f'X_g_{l}']['ranks'] == 'X_ranks'
    assert not np.allclose(ranked.obsm['X_g_last'], ranked.obsm['X_g_-1'])

def test_a_fine_tuned_model_is_perturbed_and_answers(ranked, model, tmp_path):
    from geneformer_nb.tasks.finetuning import CellClassifier
    clf = CellClassifier(model, ['sick', 'well'])
    gene = ranked.var['symbol'].iloc[0] if 'symbol' in ranked.var else model.vocabulary.genes[0]
    kw = dict(model=clf, what=gf.perturb.OE(gene), column='disease', start='hypertrophic', states='non-failing')
    raw, effects = gf.tl.perturb(ranked, affected=2, **kw)
    assert {'shift_non-failing', 'shift_p(sick)', 'cosine'} <= set(raw) and len(effects) == 2*len(raw)
    assert set(ranked.obs['disease'].iloc[raw.cell]) == {'hypertrophic'}
    np.testing.assert_allclose(raw['shift_p(sick)'], -raw['shift_p(well)'], atol=1e-7)
    kept = gf.tl.perturb(ranked, folder=tmp_path/'r', **kw)
    np.testing.assert_allclose(kept['shift_p(sick)'], raw['shift_p(sick)'], atol=1e-6)
    assert kept.cell.tolist() == raw.cell.tolist()

def test_the_official_number_of_the_last_layer_is_not_taken_for_none(ranked, model):
    raw = {l: gf.tl.perturb(ranked[:5], model=model, what=gf.perturb.each(), layer=l) for l in (0, 'last', None)}
    assert raw[0].equals(raw['last']) and not raw[0].cosine.equals(raw[None].cosine)

def test_an_empty_cell_keeps_its_row(adata, vocab, model):
    X = adata.X.toarray(); X[7] = 0
    adata.X = X
    with pytest.warns(UserWarning, match='empty'): gf.pp.tokenize(adata, vocabulary=vocab)
    with pytest.warns(UserWarning, match='nan'): gf.tl.embed(adata, model=model)
    assert np.flatnonzero(np.isnan(adata.obsm['X_geneformer']).any(1)).tolist() == [7]
    raw = gf.tl.perturb(adata, model=model, what=gf.perturb.each('detected', gf.perturb.OE))
    assert 7 not in set(raw.cell) and raw.cosine.notna().all()
    clf = gf.tl.finetune(adata, model=model, label='disease', donor='donor', steps=2, batch=4)
    gf.tl.predict(adata, classifier=clf)
    assert np.flatnonzero(adata.obs.geneformer_pred.isna()).tolist() == [7]

def test_sentences(ranked, model):
    for call in (lambda: gf.tl.embed(ranked, model=3), lambda: gf.tl.perturb('a.h5ad', model=model, what=KO('TF01')),
                 lambda: gf.tl.perturb(ranked, model=model, what=KO('TF01'), states='sick', column='disease'),
                 lambda: gf.tl.finetune(ranked, model=model, label='disease'), lambda: gf.get.embedding(ranked, 'X_umap'),
                 lambda: gf.pl.embedding(ranked), lambda: gf.get.targets(ranked), lambda: gf.get.match(ranked, 'nope')):
        with pytest.raises(GeneformerError) as e: call()
        assert '\n' not in str(e.value) and str(e.value)[-1] in '.)'

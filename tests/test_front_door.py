"pp, tl, pl, get: scanpy's manners, ranks that survive what people do to an AnnData, one record of the counts"
import inspect, subprocess, sys
import anndata as ad, numpy as np, pandas as pd, pytest, scanpy as sc
import geneformer_nb as gf
from geneformer_nb.core import CountsError, GeneformerError, VocabularyError
from geneformer_nb.data.ranks import find_record, recorded_counts
from sentences import says

small = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)

@pytest.fixture(scope='module', params=['V1-like', 'V2-like'])
def vocab(request):
    return gf.Vocabulary.from_counts(gf.toy.simulate(90, 6, 80), symbols='symbol', cls_token=request.param == 'V2-like', max_len=60)

@pytest.fixture(scope='module')
def model(vocab): return gf.Geneformer.new('nano', vocab, **small)

@pytest.fixture
def adata(): return gf.toy.simulate(90, 6, 80)

@pytest.fixture
def ranked(adata, model):
    gf.pp.tokenize(adata, model)
    return adata

def equal(a, b): return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.offsets, b.offsets)

# --- the grammar

def test_loads_on_first_use():
    code = "import sys, geneformer_nb as gf; assert 'pandas' not in sys.modules; print(gf.pp.tokenize.__name__, gf.get.cells.__name__)"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout.split() == ['tokenize', 'ranked_cells'], run.stderr

def test_the_top_shows_few_names():
    want = {'Geneformer', 'Vocabulary', 'Cells', 'KO', 'OE', 'Dose', 'drug', 'each', 'pairs', 'pretrain', 'pp', 'tl', 'pl', 'get', 'toy', 'datasets'}
    assert want <= set(dir(gf)) and len(dir(gf)) == len(want) + 9

places = {'pp.tokenize': 2, 'tl.embed': 2, 'tl.finetune': 2, 'tl.predict': 2, 'tl.perturb': 3, 'tl.screen': 2, 'pl.embedding': 1,
          'pl.confusion': 1, 'pl.ranks': 2}

@pytest.mark.parametrize('verb', places)
def test_adata_model_and_actions_may_be_positional_and_no_more(verb):
    module, name = verb.split('.')
    params = list(inspect.signature(getattr(getattr(gf, module), name)).parameters.values())
    assert params[0].name == 'adata'
    assert sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in params) == places[verb]

@pytest.mark.parametrize('module', ['pp', 'tl', 'pl', 'get'])
def test_help_names_every_parameter_with_its_sentence(module):
    m = getattr(gf, module)
    for n in m.__all__:
        f = getattr(m, n)
        assert f.__doc__, n
        for p in inspect.signature(f).parameters.values():
            if p.kind is p.VAR_KEYWORD: continue
            line = [i for i, l in enumerate(f.__doc__.splitlines()) if l.strip().split(':')[0].split('=')[0].lstrip('*') == p.name]
            assert line, f'{module}.{n}: {p.name} is not in the help'

def test_help_of_kwargs_lists_what_they_take():
    assert 'max_cells' in gf.tl.screen.__doc__ and 'of each donor' in gf.tl.screen.__doc__ and 'epochs' in gf.tl.finetune.__doc__

@pytest.mark.parametrize('call,near', [
    (lambda a, m: gf.pp.tokenize(a, m, counts_layr='x'), 'counts_layer'), (lambda a, m: gf.tl.embed(a, m, pol='cls'), 'pool'),
    (lambda a, m: gf.tl.finetune(a, m, lable='disease', donor='donor'), 'label'),
    (lambda a, m: gf.tl.finetune(a, m, label='disease', donor='donor', epocs=1), 'epochs'),
    (lambda a, m: gf.tl.perturb(a, m, gf.KO('TF01'), goals='x'), 'goal'),
    (lambda a, m: gf.tl.screen(a, m, label='disease', donor='donor', start='a', goal='b', out='x', max_cell=3), 'max_cells'),
    (lambda a, m: gf.pl.embedding(a, colour='disease'), 'color'), (lambda a, m: gf.get.targets(a, kinds='KO'), 'kind')])
def test_a_misspelt_argument_is_answered_by_the_nearest_right_one(adata, model, call, near):
    with says(GeneformerError, f'did you mean {near!r}?'): call(adata, model)

def test_genes_and_states_are_checked_before_the_first_cell_is_encoded(ranked, model, monkeypatch):
    from geneformer_nb.model.bert import Geneformer
    monkeypatch.setattr(Geneformer, 'hidden', lambda *a, **k: pytest.fail('a cell was encoded'))
    with says(VocabularyError, 'NOGENE'): gf.tl.perturb(ranked, model, gf.KO('NOGENE'), label='disease', goal='dilated')
    with says(GeneformerError, "'sick'"): gf.tl.perturb(ranked, model, gf.KO('TF01'), label='disease', goal='sick')
    with says(GeneformerError, 'label=…'): gf.tl.perturb(ranked, model, gf.KO('TF01'), start='dilated')
    with says(GeneformerError, "'age'"): gf.tl.perturb(ranked, model, gf.KO('TF01'), where=dict(age=3))

# --- ranks follow their cells

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
    got, every = ways[way](ranked), gf.data.tokenize(ranked, vocab)
    assert equal(gf.get.cells(got, vocab), every[every.obs.index.get_indexer(got.obs_names)])

@pytest.mark.parametrize('kind', ['h5ad', 'zarr', 'h5ad backed'])
def test_ranks_and_record_survive_a_file(ranked, vocab, tmp_path, kind):
    want = gf.data.tokenize(ranked, vocab)
    del ranked.uns['toy']
    if kind == 'zarr':
        ranked.write_zarr(tmp_path/'a.zarr')
        back = ad.read_zarr(tmp_path/'a.zarr')
    else:
        ranked.write_h5ad(tmp_path/'a.h5ad')
        back = ad.read_h5ad(tmp_path/'a.h5ad', backed='r' if 'backed' in kind else None)
    assert equal(gf.get.cells(back, vocab), want) and find_record(back, vocab) == find_record(ranked, vocab)
    assert gf.get.match(back).value['matched'] == want.match.report()['matched']

def test_ranks_of_two_vocabularies_live_side_by_side(ranked, vocab, model):
    other = gf.Vocabulary(vocab.genes, vocab.medians*np.linspace(1, 5, len(vocab)), vocab.cls, vocab.max_len, name='other')
    gf.tl.embed(ranked, model, key_added='before')
    gf.pp.tokenize(ranked, other)
    assert {'X_ranks', 'X_ranks_other'} <= set(ranked.obsm)
    gf.tl.embed(ranked, model, key_added='after')
    np.testing.assert_array_equal(ranked.obsm['before'], ranked.obsm['after'])
    assert not equal(gf.get.cells(ranked, vocab), gf.get.cells(ranked, other))
    with says(VocabularyError, '2 vocabularies'): gf.get.match(ranked)

def test_without_ranks_the_verb_says_how_to_make_them(adata, ranked, model, vocab):
    bare = gf.toy.simulate(30, 6, 80)
    for call in (lambda: gf.tl.embed(bare, model), lambda: gf.tl.finetune(bare, model, label='disease', donor='donor'),
                 lambda: gf.tl.perturb(bare, model, gf.KO('TF01')), lambda: gf.get.cells(bare, vocab)):
        with says(VocabularyError, 'gf.pp.tokenize(adata, model)'): call()
    with says(VocabularyError, "uns_merge='same'"): gf.tl.embed(ad.concat([ranked[:5], ranked[5:]]), model)

def test_ranks_cut_shorter_than_the_model_takes_are_refused(adata, vocab, model):
    short = gf.Vocabulary(vocab.genes, vocab.medians, vocab.cls, 20, name='short')
    assert short.hash == vocab.hash
    gf.pp.tokenize(adata, short)
    with says(VocabularyError, 'cut at 20'): gf.tl.embed(adata, model)

def test_copy_leaves_the_original_alone(adata, model):
    before = adata.copy()
    one = gf.pp.tokenize(adata, model, copy=True)
    two = gf.tl.embed(one, model, copy=True)
    assert 'X_ranks' in one.obsm and 'X_geneformer' in two.obsm and 'X_geneformer' not in one.obsm
    assert not list(adata.obsm) and list(adata.uns) == list(before.uns) and list(adata.obs) == list(before.obs)
    assert gf.pp.tokenize(adata, model) is None and gf.tl.embed(adata, model) is None

def test_too_many_ranks_for_memory_point_to_the_disk(adata, model):
    with says(GeneformerError, 'gf.data.tokenize_to'): gf.pp.tokenize(adata, model, max_gb=1e-6)

# --- one record of the counts: whatever reads counts reads those that were tokenized

def scanpy_style(adata):
    "The usual AnnData of scanpy: counts in a layer, X and raw log-normalized, symbols as names, ids in a column"
    a = adata.copy()
    a.var['gene_ids'] = a.var_names
    a.var.index = list(a.var.pop('symbol'))
    a.layers['counts'] = a.X.copy()
    sc.pp.normalize_total(a)
    sc.pp.log1p(a)
    a.raw = a
    return a

def test_normalizing_afterwards_leaves_ranks_and_is_noticed_by_baselines(ranked, model):
    want = gf.tl.embed(ranked, model, copy=True).obsm['X_geneformer']
    sc.pp.normalize_total(ranked)
    gf.tl.embed(ranked, model)
    assert np.array_equal(ranked.obsm['X_geneformer'], want)
    with says(CountsError, 'Ranks, embeddings and classifiers still work'): gf.tl.finetune(ranked, model, label='disease', donor='donor', steps=1)
    clf = gf.tl.finetune(ranked, model, label='disease', donor='donor', steps=1, baselines=False)
    assert len(clf.scores) == 1

def test_counts_that_were_subset_by_genes_are_noticed(ranked):
    with says(CountsError, 'has changed since'): recorded_counts(ranked[:, :40].copy())
    assert recorded_counts(ranked[10:20].copy()).X.shape == (10, 80)

def test_fractional_counts_pass_through_every_verb(adata, model):  # case 21
    adata.X = (adata.X*.9).tocsr()
    with says(CountsError, 'fractional=True'): gf.pp.tokenize(adata, model)
    gf.pp.tokenize(adata, model, fractional=True)
    gf.tl.embed(adata, model)
    clf = gf.tl.finetune(adata, model, label='disease', donor='donor', steps=1, batch=4)
    assert len(clf.scores) == 3
    gf.tl.perturb(adata, clf, gf.KO('TF01'))

def test_a_wrong_layer_called_counts_is_named_and_can_be_passed_over(adata, vocab):  # case 22
    want = gf.data.tokenize(adata, vocab)
    adata.layers['counts'] = adata.X.log1p()
    with says(CountsError, "layers['counts']", "'X'"): gf.pp.tokenize(adata, vocab)
    gf.pp.tokenize(adata, vocab, counts_layer='X')
    assert equal(gf.get.cells(adata, vocab), want) and recorded_counts(adata).source == 'X'

def test_a_refusal_lists_the_layers_there_are(adata, vocab):  # case 23
    adata.layers['raw_counts'] = adata.X.copy()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    with says(CountsError, 'raw_counts'): gf.pp.tokenize(adata, vocab)
    adata.layers['spliced'] = adata.layers['raw_counts']
    adata.X = None
    with says(CountsError, 'spliced'): gf.pp.tokenize(adata, vocab)

def test_ids_of_var_serve_raw_counts(adata, vocab):  # case 26
    want = gf.data.tokenize(adata, vocab)
    ids = list(adata.var_names)
    adata.var = pd.DataFrame(index=[f'gene {i}' for i in range(80)])
    adata.raw = adata.copy()
    adata.var['accession'] = ids
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    gf.pp.tokenize(adata[:, 3:].copy(), vocab, gene_ids='accession')
    gf.pp.tokenize(adata, vocab, gene_ids='accession')
    assert equal(gf.get.cells(adata, vocab), want)

def test_the_advice_of_a_refusal_can_be_followed(adata, model):  # case 45
    adata.obs['disease'] = adata.obs['disease'].astype(str)
    donor = adata.obs.donor.astype(str)
    adata.obs.loc[donor == donor.iloc[2], 'disease'] = 'rare one'
    gf.pp.tokenize(adata, model)
    with pytest.raises(GeneformerError) as e: gf.tl.finetune(adata, model, label='disease', donor='donor', steps=2)
    takes = {n for f in (gf.tl.finetune, gf.tasks.finetune) for n in inspect.signature(f).parameters}
    import re
    assert all(n in takes for n in re.findall(r'(\w+)=', str(e.value))), e.value

def test_a_layer_given_to_a_verb_that_reads_no_counts_is_refused(ranked, model):  # case 72
    for verb in (gf.tl.embed, gf.tl.finetune, gf.tl.predict, gf.tl.perturb):
        with says(GeneformerError, "no argument 'counts_layer'"): verb(ranked, model, counts_layer='corrected')

quick = dict(label='disease', donor='donor', start='hypertrophic', goal='non-failing', say=None, controls=(), max_cells=2, directions='KO',
             folds=2, report=False, pretraining=dict(steps=2, num_hidden_layers=1, hidden_size=16, num_attention_heads=1, intermediate_size=16),
             finetuning=dict(steps=2))

def screened(adata, out, model=None, **kw):
    gf.pp.tokenize(adata, model)
    return gf.tl.screen(adata, model, out=out, **(quick | kw))

@pytest.fixture(scope='module')
def cohort():
    a = gf.toy.simulate(120, 12, 60)
    a.var['symbol'] = ['MT-CO1', 'RPS4X', 'HBB'] + list(a.var['symbol'][3:])
    return a

def test_raw_takes_no_control_away_from_a_screen(cohort, tmp_path):  # case 51
    plain = screened(cohort.copy(), tmp_path/'plain')
    usual = screened(scanpy_style(cohort), tmp_path/'usual', known=['MT-CO1'])
    assert plain.table.expression.notna().all() and usual.table.expression.notna().all() and usual.table.coefficient.notna().all()
    assert set(plain.table.flag) == set(usual.table.flag) and 'mitochondrial' in set(usual.table.flag)
    assert 'MT-CO1' in set(usual.table.symbol) and len(usual.known)
    a, b = (s.table.set_index('gene_id')[['expression', 'coefficient']].sort_index() for s in (plain, usual))
    pd.testing.assert_frame_equal(a, b, check_index_type=False)

def test_names_of_genes_may_stand_twice_in_a_screen(cohort, tmp_path):  # case 49
    a = cohort.copy()
    a.var['gene_ids'] = a.var_names
    names = list(a.var['symbol'])
    a.var.index = [names[0]]*2 + names[2:]
    vocabulary = gf.Vocabulary.from_counts(cohort, symbols='symbol', max_len=64)
    for i, (model, where) in enumerate(((vocabulary, None), (vocabulary, dict(cell_type='cardiomyocyte')), (None, None))):
        b = a.copy()
        if model is None: del b.var['symbol']
        s = screened(b, tmp_path/str(i), model, where=where)
        assert s.table.gene_id.is_unique and s.table.perturbation.is_unique and s.table.coefficient.notna().all()
    assert set(cohort.var_names[:2]) <= set(s.table.gene_id.astype(str))

def test_the_most_variable_genes_are_those_of_the_counts(cohort, tmp_path):  # case 52
    a = cohort.copy()
    a.raw = a.copy()
    sc.pp.normalize_total(a)
    sc.pp.log1p(a)
    a = a[:, :45].copy()
    gf.pp.tokenize(a, top_genes=30)
    assert a.obsm['X_ranks'].shape[1] == 30 and find_record(a).source == 'raw.X'
    s = gf.tl.screen(a, out=tmp_path/'s', **quick)
    assert s.table.coefficient.notna().all() and s.table.gene_id.nunique() <= 30

def test_the_column_of_ids_named_once_serves_the_screen(cohort, tmp_path):  # case 70
    from geneformer_nb.cli import main
    a = cohort.copy()
    a.var['feature_id'] = a.var_names
    a.var.index = [str(i) for i in range(a.n_vars)]
    del a.var['symbol'], a.uns['toy']
    a.write_h5ad(tmp_path/'a.h5ad')
    words = f"screen {tmp_path/'a.h5ad'} --label disease --donor donor --start hypertrophic --goal non-failing --out {tmp_path/'s'}"
    words += ' --gene-ids feature_id --steps 2 --epochs 1 --directions KO --max-cells 2 --folds 2'
    assert main([*words.split(), '--controls', '']) == 0
    assert pd.read_csv(tmp_path/'s/targets.csv').gene_id.astype(str).str.startswith('TOYG').all()

# --- a day's work

def test_a_whole_day(ranked, model, tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    gf.tl.embed(ranked, model)
    clf = gf.tl.finetune(ranked, model, label='disease', donor='donor', steps=2, batch=4)
    assert list(clf.scores.index)[0].startswith('Geneformer') and len(clf.scores) == 3
    gf.tl.predict(ranked, clf)
    assert ranked.obsm['geneformer_proba'].shape == (90, 3) and ranked.obs.geneformer_pred.notna().all()
    shifts = gf.tl.perturb(ranked, clf.encoder, gf.KO('TF01'), label='disease', start='dilated', goal='non-failing', layer='last')
    assert (ranked.obs.disease.to_numpy()[shifts.cell] == 'dilated').all() and 'shift_non-failing' in shifts
    table = gf.tl.summarize(shifts, donor='donor')
    assert list(gf.get.targets(table, 1).perturbation) == ['KO(TF01)'] and gf.get.embedding(ranked).shape == (90, 16)
    for ax in (gf.pl.embedding(ranked, color='disease'), gf.pl.confusion(ranked, label='disease'), gf.pl.targets(table), gf.pl.loss(clf)):
        assert isinstance(ax, matplotlib.axes.Axes)
    ranked.write_h5ad(tmp_path/'day.h5ad')
    assert {'X_ranks', 'X_geneformer', 'geneformer_proba'} <= set(ad.read_h5ad(tmp_path/'day.h5ad').obsm)

def test_a_table_of_shifts_names_the_rows_of_the_anndata_that_was_given(ranked, model, tmp_path):
    ranked.obs_names = [f'barcode {i}' for i in range(90)][::-1]
    how = dict(label='disease', start='hypertrophic', goal='non-failing')
    here = gf.tl.perturb(ranked, model, gf.OE('TF01'), **how)
    kept = gf.tl.perturb(ranked, model, gf.OE('TF01'), out=tmp_path/'r', shard=7, **how)
    back = gf.get.shifts(tmp_path/'r')
    raw = pd.concat([pd.read_parquet(p) for p in sorted((tmp_path/'r').glob('shard-*.parquet'))])
    for t in (here, kept, back, raw):
        assert set(ranked.obs['disease'].iloc[t['cell']]) == {'hypertrophic'}
        assert list(ranked.obs_names[t['cell']]) == list(t['barcode'].astype(str))
    joined = back.merge(back.obs[['disease', 'donor']], left_on='barcode', right_index=True)
    assert len(joined) == len(back) and set(joined['disease']) == {'hypertrophic'}
    pd.testing.assert_frame_equal(gf.tl.summarize(back, donor='donor'), gf.tl.summarize(here, donor='donor'))

def test_several_tables_of_shifts_are_summarized_together(ranked, model):
    how = dict(label='disease', goal='non-failing')
    whole = gf.tl.perturb(ranked, model, gf.each(['TF01', 'TF02']), **how)
    vector = gf.model.state_embeddings(gf.get.cells(ranked, model.vocabulary), model, 'disease', ['non-failing'])
    parts = [gf.tl.perturb(ranked[rows].copy(), model, gf.each(['TF01', 'TF02']), goal=vector) for rows in (slice(0, 40), slice(40, 90))]
    a, b = gf.tl.summarize(whole, donor='donor'), gf.tl.summarize(parts, donor='donor')
    np.testing.assert_allclose(a['shift'], b['shift'], atol=1e-7)
    assert (a.n_cells == b.n_cells).all() and (a.n_donors == b.n_donors).all()
    with says(GeneformerError, 'carries no table of cells'): gf.tl.summarize([parts[0], pd.DataFrame(parts[1])], donor='donor')

def test_several_layers(ranked, model):
    gf.tl.embed(ranked, model, layer=['last', -1], key_added='X_g')
    for l in ('last', -1): assert ranked.uns[f'X_g_{l}']['layer'] == str(l) and ranked.uns[f'X_g_{l}']['ranks'] == 'X_ranks'
    assert not np.allclose(ranked.obsm['X_g_last'], ranked.obsm['X_g_-1'])

def test_a_fine_tuned_model_is_perturbed_and_answers(ranked, model, tmp_path):
    clf = gf.tasks.CellClassifier(model, ['sick', 'well'])
    what, how = gf.OE(ranked.var['symbol'].iloc[0]), dict(label='disease', start='hypertrophic', goal='non-failing')
    shifts, effects = gf.tl.perturb(ranked, clf, what, affected=2, **how)
    assert {'shift_non-failing', 'shift_p(sick)', 'cosine'} <= set(shifts) and len(effects) == 2*len(shifts)
    np.testing.assert_allclose(shifts['shift_p(sick)'], -shifts['shift_p(well)'], atol=1e-7)
    clf.save(tmp_path/'clf')
    kept = gf.tl.perturb(ranked, str(tmp_path/'clf'), what, out=tmp_path/'r', **how)
    np.testing.assert_allclose(kept['shift_p(sick)'], shifts['shift_p(sick)'], atol=1e-6)
    assert kept.cell.tolist() == shifts.cell.tolist()

def test_the_official_number_of_the_last_layer_is_not_taken_for_none(ranked, model):
    shifts = {l: gf.tl.perturb(ranked[:5].copy(), model, gf.each(), layer=l) for l in (0, 'last', None)}
    assert shifts[0].equals(shifts['last']) and not shifts[0].cosine.equals(shifts[None].cosine)

def test_an_empty_cell_keeps_its_row(adata, model):
    X = adata.X.toarray()
    X[7] = 0
    adata.X = X
    with pytest.warns(UserWarning, match='empty'): gf.pp.tokenize(adata, model)
    with pytest.warns(UserWarning, match='nan'): gf.tl.embed(adata, model)
    assert np.flatnonzero(np.isnan(adata.obsm['X_geneformer']).any(1)).tolist() == [7]
    shifts = gf.tl.perturb(adata, model, gf.each('detected', gf.OE))
    assert 7 not in set(shifts.cell) and shifts.cosine.notna().all()
    clf = gf.tl.finetune(adata, model, label='disease', donor='donor', steps=2, batch=4)
    gf.tl.predict(adata, clf)
    assert np.flatnonzero(adata.obs.geneformer_pred.isna()).tolist() == [7]

def test_sentences(ranked, model):
    for call in (lambda: gf.tl.embed(ranked, 3), lambda: gf.tl.perturb('a.h5ad', model, gf.KO('TF01')),
                 lambda: gf.tl.perturb(ranked, model, gf.KO('TF01'), goal='sick', label='disease'),
                 lambda: gf.tl.finetune(ranked, model, label='disease'), lambda: gf.get.embedding(ranked, 'X_umap'),
                 lambda: gf.pl.embedding(ranked), lambda: gf.get.targets(ranked), lambda: gf.tl.predict(ranked, 'nowhere'),
                 lambda: gf.get.shifts('nowhere'), lambda: gf.tl.embed(ranked, model, 'last')):
        with pytest.raises(GeneformerError) as e: call()
        assert '\n' not in str(e.value) and str(e.value)[-1] in '.)?'

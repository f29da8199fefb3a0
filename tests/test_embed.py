"Embeddings: what is chosen, counted and spread; files of any number in the order of their cells, killed, resumed, shared out"
import os, signal, subprocess, sys, time, tracemalloc, warnings
import anndata as ad, geneformer_nb as gf, numpy as np, pandas as pd, pytest
from sentences import quiet, says
from geneformer_nb.model.atlas import Embedded, embed_to
from geneformer_nb.data.cells import Cells
from geneformer_nb.model.gene_context import _mean_distances, context, umap
from geneformer_nb.evaluate.metrics import batch_check, scib
from geneformer_nb.core import CountsError, GeneformerError, StorageError, VocabularyError
from geneformer_nb.model.embed import cell_embeddings, encode_layers, gene_embeddings, gene_occurrences, pick_cells, state_embeddings
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.data.corpus import tokenize_to
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.toy import simulate

@pytest.fixture(scope='module')
def adata(): return simulate(n_cells=90, n_donors=6, n_genes=80, seed=3)
@pytest.fixture(scope='module')
def vocab(adata): return Vocabulary.from_counts(adata, symbols='symbol', name='toy', max_len=128)
@pytest.fixture(scope='module')
def model(vocab): return small(vocab)
@pytest.fixture(scope='module')
def cells(adata, vocab): return tokenize(adata, vocab)
def small(vocab): return Geneformer.new('nano', vocab, num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16)
def framed(adata):
    v = Vocabulary.from_counts(adata, symbols='symbol', name='framed', max_len=128, cls_token=True)
    return v, small(v), tokenize(adata, v)
def brute(model, cells, layer='second_to_last'):
    "{(cell, token): vector}, one cell at a time"
    out = {}
    for i in range(len(cells)):
        x = model.hidden(cells[i].tokens, [0, len(cells[i])], layer=layer).detach().numpy()
        for r, t in enumerate(cells[i].tokens): out[i, int(t)] = r, x[r]
    return out

def test_choice(cells):
    obs = cells.obs
    for n in (1, 7, 30):
        rows = pick_cells(obs, dict(disease=['dilated', 'hypertrophic']), n, seed=n)
        assert len(rows) == n and (np.diff(rows) > 0).all() and not (obs.disease.iloc[rows] == 'non-failing').any()
    assert (pick_cells(obs) == np.arange(len(obs))).all() and len(pick_cells(obs, max_cells=10**6)) == len(obs)
    assert (pick_cells(obs, max_cells=9, seed=1) != pick_cells(obs, max_cells=9, seed=2)).any()
    assert len(pick_cells(obs.assign(n=[1., 2., 3.] * 30), dict(n=2))) == 30
    with says(GeneformerError, "'healthy'", 'dilated'): pick_cells(obs, dict(disease='healthy'))
    with says(GeneformerError, 'No cell matches'): pick_cells(obs, dict(disease='dilated', donor=obs.donor[obs.disease != 'dilated'].iloc[0]))

@pytest.mark.parametrize('cls', [False, True])
def test_layers_in_one_pass(adata, cls, vocab, model, cells):
    m, c = (framed(adata)[1:]) if cls else (model, cells)
    layers = ['last', -1, -2]
    got = encode_layers(c, m, layers, budget=700)
    for l in layers: np.testing.assert_array_equal(got[l], m.encode(c, layer=l, budget=700))
    with pytest.raises(GeneformerError): encode_layers(c, m, [0, -9])
    assert not any(x._forward_hooks for x in m.hf.base_model.modules())
    with says(GeneformerError, 'no layer'): encode_layers(c, m, [])

def test_layers_of_cells_without_genes(cells, model):
    off = np.r_[0, 0, np.diff(cells.offsets)[:3].cumsum(), cells.offsets[3], cells.offsets[3]]
    c = Cells(cells.tokens[:off[-1]], off, vocabulary=cells.vocabulary)
    for budget in (1, 50, 10**6):
        for x in encode_layers(c, model, [0, -1], budget=budget).values():
            assert np.isnan(x).all(1).tolist() == [True, False, False, False, True, True]

def test_embed_keeps_every_cell(adata, model):
    a = adata.copy(); a.obs['filter_pass'] = np.arange(len(a)) % 2
    gf.pp.tokenize(a, model)
    gf.tl.embed(a, model)
    assert np.isfinite(a.obsm['X_geneformer']).all()
    gf.tl.embed(a, model, layer=[0, -1], key_added='v')
    assert {'v_0', 'v_-1'} <= set(a.obsm) and a.uns['v_0']['layer'] == '0'

def test_tables_of_cells(cells, model):
    t = cell_embeddings(cells, model, labels='donor', where=dict(cell_type='fibroblast'))
    at = np.flatnonzero(cells.obs.cell_type == 'fibroblast')
    assert list(t.index) == list(cells.obs.index[at]) and list(t.columns) == [*map(str, range(16)), 'donor']
    np.testing.assert_allclose(t.iloc[:, :16], model.encode(cells)[at], atol=1e-6)
    twice = cells[np.r_[0:5, 0:5]]
    assert cell_embeddings(twice, model, labels=['donor']).shape == (10, 17)
    assert set(cell_embeddings(twice, model, layer=[0, -1])) == {0, -1}

@pytest.mark.parametrize('cls', [False, True])
def test_genes_against_one_by_one(adata, vocab, model, cells, cls):
    v, m, c = framed(adata) if cls else (vocab, model, cells)
    c = c[:25]
    every = brute(m, c)
    genes = ['TF01', 'HK01', 'STRUCT01']
    x, told = gene_embeddings(c, m, genes=genes, by='disease', stats=True, budget=300)
    occ = gene_occurrences(c, m, genes, budget=300)
    assert sorted(v.token(genes)) == [v.token(g) for g in dict.fromkeys(x.index.get_level_values('gene')[:3])] or len(x) < 9
    for (state, gene), row in x.iterrows():
        own = [every[i, v.token(gene)] for i in range(len(c)) if c.obs.disease.iloc[i] == state and (i, v.token(gene)) in every]
        vecs = np.array([y for _, y in own], dtype=float)
        np.testing.assert_allclose(row, vecs.mean(0), atol=1e-5)
        u = vecs / np.linalg.norm(vecs, axis=1, keepdims=True)
        center = u.mean(0) / np.linalg.norm(u.mean(0))
        n, spread = told.loc[(state, gene)]
        assert n == len(own) and spread == pytest.approx(1 - (u @ center).mean(), abs=1e-5)
    assert len(occ) == sum(t in set(v.token(genes)) for _, t in every)
    for (name, gene, rank), row in occ.iterrows():
        r, y = every[list(c.obs.index).index(name), v.token(gene)]
        assert rank == r - cls
        np.testing.assert_allclose(row, y, atol=1e-5)

def test_no_special_tokens_and_unknown_genes(adata):
    v, m, c = framed(adata)
    assert not gene_embeddings(c, m).index.str.startswith('<').any()
    with pytest.raises(VocabularyError, match='NOSUCH'): gene_occurrences(c, m, 'NOSUCH')

def test_states(cells, model):
    x, col = model.encode(cells), cells.obs.disease.astype(str).to_numpy()
    for how, f in dict(mean=np.mean, median=np.median).items():
        s = state_embeddings(cells, model, 'disease', how=how)
        assert isinstance(s, dict) and s.n == {k: int((col == k).sum()) for k in s}
        for k in s: np.testing.assert_allclose(s[k], f(x[col == k], axis=0), atol=1e-5)
    s = state_embeddings(cells, model, 'disease', ['dilated', 'non-failing'], max_cells=4, seed=2)
    assert s.n == {'dilated': 4, 'non-failing': 4}
    with says(GeneformerError, "'mode'"): state_embeddings(cells, model, 'disease', how='mode')

@pytest.fixture(scope='module')
def files(adata, tmp_path_factory):
    f = tmp_path_factory.mktemp('atlas')
    for i, rows in enumerate((slice(0, 50), slice(50, 90))): adata[rows].write_h5ad(f/f'part{i}.h5ad')
    return f

def bytes_of(e): return [p.read_bytes() for p in e.paths]

def test_processes_give_the_same_bytes(files, model, tmp_path):
    kw = dict(obs=['cell_type'], rows=20, block=8)
    one = embed_to(files/'*.h5ad', model, tmp_path/'serial', **kw)
    two = embed_to(files/'*.h5ad', model, tmp_path/'two', executor='processes', workers=2, **kw)
    assert len(one.paths) == 5
    if os.environ.get('OMP_NUM_THREADS') == '1': assert bytes_of(one) == bytes_of(two)
    np.testing.assert_allclose(one.matrix(), two.matrix(), atol=1e-6)
    for i in (1, 0): last = embed_to(files/'*.h5ad', model, tmp_path/'shared', part=(i, 2), **kw)
    assert bytes_of(one) == bytes_of(last)

def test_killed_and_resumed(files, model, tmp_path):
    model.save_pretrained(tmp_path/'m')
    code = ("import sys, os, signal; from geneformer_nb.model import atlas\nwas, n = atlas._Shard.__call__, []\n"
            "def slow(self, i, path):\n    n.append(i)\n    if len(n) == 3: open(path, 'w').write('half'); os.kill(os.getpid(), signal.SIGKILL)\n    was(self, i, path)\n"
            "atlas._Shard.__call__ = slow\natlas.embed_to(sys.argv[1], sys.argv[2], sys.argv[3], rows=20)")
    run = subprocess.run([sys.executable, '-c', code, str(files/'*.h5ad'), str(tmp_path/'m'), str(tmp_path/'out')], capture_output=True, text=True,
                         env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert run.returncode == -signal.SIGKILL, run.stderr[-500:]
    assert len(list((tmp_path/'out').glob('shard-*.parquet'))) == 2
    with says(StorageError, 'not finished'): Embedded(tmp_path/'out')
    out = embed_to(files/'*.h5ad', Geneformer.from_pretrained(tmp_path/'m', device='cpu'), tmp_path/'out', rows=20)
    np.testing.assert_allclose(out.matrix(), embed_to(files/'*.h5ad', model, tmp_path/'again', rows=20).matrix(), atol=1e-6)
    assert not list((tmp_path/'out').glob('.shard*'))
    assert bytes_of(embed_to(files/'*.h5ad', Geneformer.from_pretrained(tmp_path/'m', device='cpu'), tmp_path/'out', rows=20)) == bytes_of(out)

def test_back_into_the_file_in_its_order(adata, model, files, tmp_path):
    a = adata[np.random.default_rng(0).permutation(90)].copy()
    a.obs_names = ['same'] * 90  # barcodes do not matter where rows are numbered
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a.write_h5ad(tmp_path/'a.h5ad')
        e = embed_to(tmp_path/'a.h5ad', model, tmp_path/'out', where=dict(disease=['dilated']), rows=40, block=16)
        back = ad.read_h5ad(e.to_h5ad(tmp_path/'b.h5ad', counts=tmp_path/'a.h5ad'))
    gf.pp.tokenize(a, model)
    gf.tl.embed(a, model)
    ill = (a.obs.disease == 'dilated').to_numpy()
    np.testing.assert_allclose(back.obsm['X_geneformer'][ill], a.obsm['X_geneformer'][ill], atol=1e-5)
    assert np.isnan(back.obsm['X_geneformer'][~ill]).all() and (back.X != a.X).nnz == 0
    again = embed_to(files/'part1.h5ad', model, tmp_path/'p1')
    with says(GeneformerError, "'part0.h5ad'", 'none of the files'): again.to_h5ad(tmp_path/'c.h5ad', counts=files/'part0.h5ad')

def test_one_of_several_files(adata, model, files, tmp_path):
    e = embed_to(files/'*.h5ad', model, tmp_path/'out', rows=30)
    back = ad.read_h5ad(e.to_h5ad(tmp_path/'b.h5ad', counts=files/'part1.h5ad', key_added='v'))
    np.testing.assert_allclose(back.obsm['v'], model.encode(tokenize(adata[50:], model.vocabulary)), atol=1e-5)
    z, wide = ad.read_zarr(e.to_zarr(tmp_path/'z.zarr', chunk=7)), pd.read_parquet(e.to_parquet(tmp_path/'w.parquet'))
    np.testing.assert_array_equal(z.obsm['X_geneformer'], e.matrix())
    np.testing.assert_array_equal(wide[[str(i) for i in range(16)]], e.matrix())
    assert list(z.obs_names) == list(adata.obs_names) == list(wide.barcode) and set(z.obs.file) == {'part0', 'part1'}

def test_tokens_in(adata, vocab, model, cells, files, tmp_path):
    corpus = tokenize_to(files/'*.h5ad', vocab, tmp_path/'c', rows=30)
    want = model.encode(cells)
    for i, data in enumerate((cells, corpus, corpus.folder, str(corpus.folder))):
        e = embed_to(data, model, tmp_path/str(i), rows=25, block=10)
        np.testing.assert_allclose(e.matrix(), want, atol=1e-5)
        assert list(e.obs.index) == list(adata.obs_names) and e.obs['row'].tolist() == list(range(90))
    e1 = embed_to(cells[:50][np.arange(50)[::-1]], model, tmp_path/'rev')
    back = ad.read_h5ad(e1.to_h5ad(tmp_path/'b.h5ad', counts=files/'part0.h5ad'))
    np.testing.assert_allclose(back.obsm['X_geneformer'], want[:50], atol=1e-5)
    with says(GeneformerError, 'Barcode', 'part0.h5ad'): e.to_h5ad(tmp_path/'x.h5ad', counts=files/'part0.h5ad')

def test_refused_before_the_work(adata, vocab, model, files, tmp_path):
    f = files/'part0.h5ad'
    with says(GeneformerError, "'illness'"): embed_to(f, model, tmp_path/'a', where=dict(illness=1))
    with says(GeneformerError, "'illness'"): embed_to(f, model, tmp_path/'a', obs=['illness'])
    with says(GeneformerError, 'in memory'): embed_to(adata, model, tmp_path/'a', executor='processes')
    with says(GeneformerError, 'one layer'): embed_to(f, model, tmp_path/'a', occurrences='TF01', layer=[0, -1])
    with says(GeneformerError, "'depth'"): embed_to(f, model, tmp_path/'a', depth=3)
    with says(GeneformerError, 'Geneformer'): embed_to(f, 3, tmp_path/'a')
    with says(GeneformerError, 'rows=0'): embed_to(f, model, tmp_path/'a', rows=0)
    with pytest.raises(VocabularyError): embed_to(f, model, tmp_path/'a', occurrences=['NOSUCH'])
    with pytest.raises(VocabularyError): embed_to(tokenize(adata, Vocabulary(vocab.genes, vocab.medians * 2)), model, tmp_path/'a')
    with pytest.raises(CountsError): embed_to(tmp_path/'none.h5ad', model, tmp_path/'a')
    assert not (tmp_path/'a').exists()
    embed_to(f, model, tmp_path/'b')
    with says(StorageError, 'layer'): embed_to(f, model, tmp_path/'b', layer='last')
    with says(StorageError, 'weights'): embed_to(f, Geneformer.new('nano', vocab, 5, num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16), tmp_path/'b')
    (tmp_path/'b'/'shard-00000.parquet').write_bytes(b'half')
    with pytest.raises((StorageError, ValueError, OSError)): Embedded(tmp_path/'b').matrix()

def test_memory_does_not_grow_with_cells(adata, vocab, model, tmp_path):
    peak = []
    for k in (20, 80):
        ad.concat([adata] * k, index_unique='-').write_h5ad(tmp_path/f'{k}.h5ad')
        tracemalloc.start()
        embed_to(tmp_path/f'{k}.h5ad', model, tmp_path/str(k), obs=[], rows=1000, block=250)
        peak.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peak[1] < 1.25 * peak[0], peak

def test_distance_of_states_is_of_all_pairs():
    rng = np.random.default_rng(0)
    for k, n in ((2, 9), (3, 30), (5, 60)):
        u = rng.normal(size=(n, 4)); u /= np.linalg.norm(u, axis=1, keepdims=True)
        code = np.r_[np.arange(k), np.arange(k), rng.integers(0, k, n - 2 * k)]
        d = 1 - u @ u.T
        pair = lambda s, t: d[np.ix_(code == s, code == t)][~np.eye(sum(code == s), dtype=bool)].mean() if s == t else d[np.ix_(code == s, code == t)].mean()
        b, w = _mean_distances(np.stack([u[code == s].sum(0) for s in range(k)]), np.bincount(code))
        assert b == pytest.approx(np.mean([pair(s, t) for s in range(k) for t in range(k) if s != t])) and w == pytest.approx(np.mean([pair(s, s) for s in range(k)]))

def test_interval_holds_nothing_where_there_is_nothing(cells, model):
    "Labels drawn at random: 95 % intervals hold 0 about 19 times in 20, and the shift is 0 on average"
    held, shifts = [], []
    for s in range(40):
        c = cells[:]
        c.obs = c.obs.assign(lot=np.random.default_rng(s).permutation(np.arange(len(c)) % 3))
        t = context(c, model, ['HK01', 'STRUCT01'], 'lot')
        held += list((t.low < 0) & (t.high > 0)); shifts += list(t['shift'] / t['within'])
    assert np.mean(held) > .85 and abs(np.mean(shifts)) < .02

def test_context_says_what_it_has_not(cells, model):
    t = context(cells, model, ['TF01', 'HK01'], 'donor', min_cells=10**6)
    assert (t.states == 0).all() and t['shift'].isna().all() and set(t.index) == {'TF01', 'HK01'}
    assert (context(cells, model, 'HK01', 'disease', unit='donor').low.notna()).all()
    with says(GeneformerError, "'kind'"): context(cells, model, 'HK01', 'kind')

def test_batches_apart_and_mixed(adata):
    rng, a = np.random.default_rng(0), adata.copy()
    a.obs['half'] = np.arange(len(a)) % 2
    a.obsm['mixed'] = rng.normal(size=(len(a), 5))
    a.obsm['apart'] = a.obsm['mixed'] + 20 * a.obs['half'].to_numpy()[:, None]
    a.obsm['mixed'][4] = np.nan
    t = batch_check(a, 'half', keys=['mixed', 'apart'], k=10)
    assert t.batch_mixing['apart'] < .01 and t.batch_silhouette['apart'] > .7 and t.batch_mixing['mixed'] > .8 and abs(t.batch_silhouette['mixed']) < .1
    assert (t.cells == len(a) - 1).all() and list(t.index) == ['mixed', 'apart', 'PCA of log counts', 'random numbers'] and t.label_silhouette.isna().all()
    try: import scib_metrics
    except ImportError:
        with says(GeneformerError, 'scib-metrics'): scib(a, 'half', 'cell_type', keys='apart')

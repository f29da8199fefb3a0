"Non-zero medians: the promise of the bins, merging in any order, shards that come back as they were, and refusals in sentences"
import anndata as ad, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse
from geneformer_nb.core import CountsError, GeneformerError, StorageError
from geneformer_nb.data.medians import Medians, bin_middle, bin_of, corpus_medians, n_bins, nonzero_medians

few = settings(max_examples=30, deadline=None, derandomize=True)
ids = [f'ENSG{i:011d}' for i in range(8)]
blocks = st.lists(st.tuples(st.integers(1, 5).flatmap(lambda n: arrays(np.int64, (n, 8), elements=st.integers(0, 30))),
                            st.permutations(range(8)), st.integers(1, 8)), min_size=1, max_size=5)

def _medians(X, names=ids, **kw): return Medians(names).add(sparse.csr_matrix(np.asarray(X, float)), **kw)
def _adata(X, names=ids, **obs):
    X = np.asarray(X, np.float32)
    return ad.AnnData(sparse.csr_matrix(X), pd.DataFrame(obs, [f'c{i}' for i in range(len(X))]), pd.DataFrame(index=list(names)))

@settings(max_examples=300, derandomize=True)
@given(st.floats(2**-10, 2**14, exclude_max=True))
def test_within_the_promise(v):
    assert abs(bin_middle()[bin_of(v)]/v - 1) < .0079

def test_bins_go_up_and_meet():
    edges = np.arange(n_bins, dtype=np.int64)
    v = np.geomspace(2**-10, 2**14, 100_000, endpoint=False)
    b = bin_of(v)
    assert (np.diff(b) >= 0).all() and set(np.unique(b)) == set(edges)
    assert (bin_of(bin_middle()) == edges).all()

def test_bins_at_known_values():
    "The layout of the bins is a file format: these numbers may not change"
    assert bin_of([2**-10, .5, 1, 1.015625, 2, 10_000, 2**14 - 1]).tolist() == [0, 576, 640, 641, 704, 1486, n_bins - 1]

def test_out_of_range_goes_to_the_ends():
    assert bin_of([1e-30, 9e-4, 16_384, 1e30, np.inf]).tolist() == [0, 0] + [n_bins - 1]*3
    m = _medians([[1]], ['A'], totals=[1e9]).table()
    assert m['median'].tolist() == [bin_middle()[0]] and m['n_cells'].tolist() == [1]

@few
@given(blocks)
def test_close_to_the_exact_median(parts):
    X = sparse.csr_matrix(np.concatenate([X for X, _, _ in parts]).astype(float))
    exact, n = nonzero_medians(X)
    t = Medians(ids).add(X).table().reindex(ids)
    assert (t['n_cells'].fillna(0) == n).all()
    seen = n > 0
    assert (np.abs(t['median'][seen]/exact[seen] - 1) < .0079).all()

def test_even_number_of_cells():
    "The two middle cells far apart: their mean, as numpy has it"
    t = _medians([[1, 9], [9, 1]], ['A', 'B']).table()
    assert np.abs(t['median']/5000 - 1).max() < .0079
    t = _medians([[1, 9], [9, 1], [2, 8], [8, 2]], ['A', 'B']).table()
    assert np.abs(t['median']/np.median([1000, 9000, 2000, 8000]) - 1).max() < .0079

@few
@given(blocks, st.randoms(use_true_random=False))
def test_order_changes_nothing(tmp_path_factory, parts, random):
    made = [Medians([ids[i] for i in p[:k]]).add(sparse.csr_matrix(X[:, p[:k]].astype(float))) for X, p, k in parts]
    d, files = tmp_path_factory.mktemp('m'), []
    for i in range(3):
        random.shuffle(made)
        total = Medians()
        for m in made: total.update(m)
        files.append(total.save(d/f'{i}.parquet').read_bytes())
    left = made[0]
    for m in made[1:]: left = left + m
    assert left.save(d/'sum.parquet').read_bytes() == files[0] == files[1] == files[2]

def test_adding_makes_a_new_one():
    a, b = _medians([[1, 2]], ['A', 'B']), _medians([[3]], ['C'])
    c = a + b
    assert (a.cells, b.cells, c.cells) == (1, 1, 2) and a.genes == ['A', 'B'] and c.table().index.tolist() == ['A', 'B', 'C']

def test_ids_are_joined():
    m = Medians(['ensg00000000001.7', 'ENSG00000000001.2', 'nan', '', None, 'TBX5', 'tbx5', 'AC0001.1'])
    assert m.genes == ['ENSG00000000001', 'TBX5', 'AC0001.1']
    m.add(sparse.csr_matrix([[1, 2, 50, 10, 10, 0, 5, 22]]))
    got = m.table()['median']
    assert np.abs(got[['ENSG00000000001', 'TBX5', 'AC0001.1']].to_numpy()/[300, 500, 2200] - 1).max() < .0079
    assert (Medians(['Tbx5']) + Medians(['TBX5'])).genes == (Medians(['TBX5']) + Medians(['Tbx5'])).genes == ['TBX5']

def test_aliases():
    m = Medians()
    assert m.columns(['GATA4', 'gata4', 'ENSG00000136574.13'], {'GATA4': 'ENSG00000136574'}).tolist() == [0, 0, 0]
    assert m.genes == ['ENSG00000136574']

def test_stored_zeros_and_empty_cells():
    X = sparse.csr_matrix(([0., 3, 2], [0, 1, 1], [0, 2, 2, 3]), (3, 2))
    m = Medians(['A', 'B']).add(X)
    assert m.cells == 3 and m.table().index.tolist() == ['B'] and m.table()['n_cells'].tolist() == [2]
    assert Medians(['A']).add(sparse.csr_matrix((0, 1))).table().empty

def test_saved_and_read_again(tmp_path):
    m = _medians(np.random.default_rng(0).poisson(1., (50, 8)))
    m.left_out, m.unmarked = 3, 2
    k = Medians.load(m.save(tmp_path/'m.parquet'))
    assert k.table().equals(m.table()) and repr(k) == repr(m) and '3' in repr(m) and '50 cells' in repr(m)
    assert k.save(tmp_path/'k.parquet').read_bytes() == (tmp_path/'m.parquet').read_bytes()
    t = pd.read_parquet(tmp_path/'m.parquet')
    assert list(t) == ['gene_id', 'bin', 'n'] and (t['n'] > 0).all() and t['gene_id'].is_monotonic_increasing
    e = Medians.load(Medians().save(tmp_path/'e.parquet'))
    assert e.cells == 0 and e.table().empty

def test_what_is_no_medians(tmp_path):
    for name, write in dict(text=lambda f: f.write_text('x'), other=lambda f: pd.DataFrame(dict(a=[1])).to_parquet(f),
                            gone=lambda f: None).items():
        write(f := tmp_path/f'{name}.parquet')
        with pytest.raises(StorageError, match=f"'{name}.parquet' holds no medians"): Medians.load(f)

def test_sizes_and_totals_are_checked():
    X = sparse.csr_matrix([[1., 2], [0, 3]])
    with pytest.raises(CountsError, match='2 cells × 2 genes, but there are 2 totals and 1 columns'): Medians(['A']).add(X)
    with pytest.raises(CountsError, match='1 totals'): Medians(['A', 'B']).add(X, totals=[3])
    with pytest.raises(CountsError, match='Cell 1 has counts and a total of 0'): Medians(['A', 'B']).add(X, totals=[3, 0])
    m = Medians(['A', 'B']).add(X)
    m.cells = 2**32 - 2
    for more in (lambda: m.add(X), lambda: m.update(Medians(['A', 'B']).add(X))):
        with pytest.raises(GeneformerError, match='4,294,967,295 cells'): more()

@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(1)
    for i, (names, n) in enumerate([(ids, 40), (ids[3:], 30), (ids[::-1], 50)]):
        a = _adata(rng.poisson(2., (n, len(names))), names, **({} if i else dict(filter_pass=np.arange(n) % 4 > 0)))
        a.write_h5ad(tmp_path/f'{i}.h5ad')
    return [tmp_path/f'{i}.h5ad' for i in range(3)]

def test_resumed_with_the_same_bytes(files, tmp_path):
    kw = dict(out=tmp_path/'out', rows=16)
    m = corpus_medians(files, **kw)
    assert (m.cells, m.left_out, m.unmarked) == (110, 10, 80)
    first = {f.name: f.read_bytes() for f in (tmp_path/'out').glob('*.parquet')}
    assert len(first) == 3 + 2 + 4 + 1
    for gone in ('shard-00002.parquet', 'shard-00008.parquet', 'medians.parquet'): (tmp_path/'out'/gone).unlink()
    assert corpus_medians(files, **kw).table().equals(m.table())
    assert {f.name: f.read_bytes() for f in (tmp_path/'out').glob('*.parquet')} == first

def test_shards_executors_and_order_change_nothing(files, tmp_path):
    whole = corpus_medians(files).table()
    for rows in (1, 7, 1000): assert corpus_medians(files[::-1], rows=rows).table().equals(whole)
    assert corpus_medians(files, out=tmp_path/'p', rows=50, executor='processes', workers=2).table().equals(whole)
    parts = [corpus_medians(files, out=tmp_path/'j', rows=20, part=(i, 2)) for i in range(2)]
    assert parts[0].cells < parts[1].cells == 110 and parts[1].table().equals(whole)
    assert Medians.load(tmp_path/'j/medians.parquet').table().equals(whole)

def test_a_half_finished_part_has_no_summary(files, tmp_path):
    corpus_medians(files, out=tmp_path/'h', rows=20, part=(0, 2))
    assert not (tmp_path/'h/medians.parquet').exists()

def test_other_settings_are_another_run(files, tmp_path):
    corpus_medians(files, out=tmp_path/'o')
    for kw, says in ((dict(rows=5), 'rows was 16384'), (dict(keep=None), "keep was 'filter_pass'"), (dict(aliases={'A': 'B'}), 'aliases was None')):
        with pytest.raises(StorageError, match=says): corpus_medians(files, out=tmp_path/'o', **kw)

@pytest.mark.parametrize('flag', [[True, False, True], [1, 0, 1], [1., 0., 1.], ['True', 'False', 'True'], ['1', '0', '1']], ids=repr)
def test_marks_of_quality(flag):
    X = [[1, 9], [5, 5], [2, 8]]
    got = corpus_medians(_adata(X, ['A', 'B'], filter_pass=flag))
    assert (got.cells, got.left_out, got.unmarked) == (2, 1, 0)
    assert got.table().equals(_medians([X[0], X[2]], ['A', 'B']).table())
    assert corpus_medians(_adata(X, ['A', 'B'], filter_pass=flag), keep=None).cells == 3
    assert corpus_medians(_adata(X, ['A', 'B']), keep=np.array([True, False, True])).table().equals(got.table())

def test_marks_that_are_none():
    a = _adata([[1, 9], [5, 5]], ['A', 'B'], filter_pass=['good', 'bad'], part=[1., np.nan])
    with pytest.raises(CountsError, match=r"obs\['filter_pass'\] of 'AnnData' says 'good' at 'c0'"): corpus_medians(a)
    with pytest.raises(CountsError, match="says 'nan' at 'c1'"): corpus_medians(a, keep='part')
    with pytest.raises(CountsError, match='3 values of type bool, and the data 2 cells'): corpus_medians(a, keep=np.ones(3, bool))

def test_logged_and_fractional_counts():
    X = np.array([[1., 3], [2, 2]])
    a = _adata(np.log1p(X/X.sum(1, keepdims=True)*1e4), ['A', 'B'])
    assert np.abs(corpus_medians(a, logged=True).table()['median']/_medians(X, ['A', 'B']).table()['median'] - 1).max() < .016
    with pytest.raises(CountsError, match='whole numbers'): corpus_medians(_adata(X/3, ['A', 'B']))
    assert corpus_medians(_adata(X/3, ['A', 'B']), fractional=True).cells == 2

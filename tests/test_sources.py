"One cohort in every kind of file, and damaged ones: the same tokens, names and columns, or a sentence"
import resource, tempfile, threading
from pathlib import Path
import anndata as ad, h5py, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import sparse
from geneformer_nb.core import CountsError, GeneformerError, GeneMatchError
from geneformer_nb.data.counts import counts_of
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.data.sources import blocks, read_any, sources
from geneformer_nb.data.corpus import tokenize_to
from geneformer_nb.data.tokenizer import tokenize
from sentences import quiet, says, tokens

n, g = 13, 10
ids = [f'ENSG{i:011d}' for i in range(g)]
voc = Vocabulary(ids, np.linspace(.5, 2, g), max_len=8, symbols={i: f'S{k}' for k, i in enumerate(ids)},
                 aliases={f'S{k}': i for k, i in enumerate(ids)}, name='ten')

def made(seed=0, n=n, **obs):
    "Cells c0 … of sparse counts; obs of every type a table holds"
    odd = np.arange(n) % 2 == 1
    table = dict(donor=[f'D{i % 3}' for i in range(n)],
                 state=pd.Categorical(np.where(odd, 'ill', 'well'), ['well', 'ill'], ordered=True),
                 kind=pd.Categorical([None if o else 'x' for o in odd]), passed=odd, age=np.arange(n, dtype='i4'),
                 share=np.where(odd, np.nan, .5).astype('f4'),
                 maybe=pd.array([None if o else 7 for o in odd], dtype='Int64'),
                 perhaps=pd.array([None if o else True for o in odd], dtype='boolean'),
                 city=[f'Zürich {i}' for i in range(n)])
    X = np.random.default_rng(seed).poisson(1.3, (n, g))
    X[:, 0] += 1 # no cell is empty
    a = ad.AnnData(sparse.csr_matrix(X.astype(np.float32)), pd.DataFrame(table | obs, index=[f'c{i}' for i in range(n)]),
                   pd.DataFrame(dict(ensembl_id=ids), index=[f'S{i}' for i in range(g)]))
    a.strings_to_categoricals() # as writing would
    return a

@pytest.fixture(scope='module')
def cohort(): return made()
@pytest.fixture(scope='module')
def want(cohort): return tokenize(cohort, voc)

def same(got, want, obs=True):
    assert tokens(got) == tokens(want) and len(want) and list(got.obs.index) == list(want.obs.index)
    if obs: pd.testing.assert_frame_equal(got.obs, want.obs)

def with_X(a, X):
    out = a.copy()
    out.X = X
    return out

def test_the_cohort_by_hand(cohort, want):
    "Values by falling count over median, ties by token, cut to 8"
    for row, t in zip(cohort.X.toarray(), tokens(want)):
        assert t == [2 + k for k in sorted(np.flatnonzero(row), key=lambda k: (-row[k]/voc.medians[k], k))[:8]]

# --- one cohort, many kinds

layouts = dict(csr=lambda X: X, csc=lambda X: X.tocsc(), dense=lambda X: X.toarray())

@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('kind', ['memory', 'view', 'backed', 'h5ad', 'gzip', 'lzf', 'zarr2', 'zarr3', 'dask'])
def test_every_anndata(cohort, want, kind, layout, tmp_path):
    a = with_X(cohort, layouts[layout](cohort.X))
    if kind == 'view':
        big = ad.concat([cohort, cohort[:3]], merge='same')
        big.X = layouts[layout](big.X)
        big.obs_names_make_unique()
        data = big[:n]
        assert data.is_view
        data.obs['state'] = a.obs['state'] # concat forgets the order of categories
    elif kind == 'dask':
        da = pytest.importorskip('dask.array')
        X = da.from_array(cohort.X.toarray(), chunks=(4, g))
        data = with_X(a, X.map_blocks(dict(csr=sparse.csr_matrix, csc=sparse.csc_matrix, dense=np.asarray)[layout]))
    elif kind.startswith('zarr'):
        with quiet(), ad.settings.override(zarr_write_format=int(kind[-1])): a.write_zarr(data := tmp_path/'a.zarr')
        assert (data/'zarr.json').exists() == (kind == 'zarr3')
    elif kind != 'memory':
        a.write_h5ad(data := tmp_path/'a.h5ad', compression=kind if kind in ('gzip', 'lzf') else None)
        if kind == 'backed': data = ad.read_h5ad(data, backed='r')
    else: data = a
    same(tokenize(data, voc, block=5), want)
    if kind == 'h5ad': same(tokenize(str(data), voc, block=5), want)

def loom(path, a, **layers):
    with h5py.File(path, 'w') as f:
        f['matrix'] = a.X.toarray().T
        for k, X in layers.items(): f[f'layers/{k}'] = X.toarray().T
        text = h5py.string_dtype()
        f.create_dataset('row_attrs/Gene', data=a.var_names.to_numpy(object), dtype=text)
        f['row_attrs/ensembl_id'] = a.var.ensembl_id.to_numpy('S')
        f.create_dataset('col_attrs/CellID', data=a.obs_names.to_numpy(object), dtype=text)
        f.create_dataset('col_attrs/city', data=a.obs.city.to_numpy(object), dtype=text)
        f['col_attrs/age'], f['col_attrs/share'] = a.obs.age.to_numpy(), a.obs.share.to_numpy()
        f['col_attrs/umap'] = np.zeros((n, 2))
    return path

def test_loom(cohort, want, tmp_path):
    got = tokenize(loom(tmp_path/'a.loom', cohort), voc, block=5, obs=['city', 'age', 'share'])
    same(got, want, obs=False)
    pd.testing.assert_frame_equal(got.obs, want.obs[['city', 'age', 'share', 'n_counts']].astype(dict(city=object)))
    twice = with_X(cohort, cohort.X * 0)
    same(tokenize(loom(tmp_path/'b.loom', twice, spliced=cohort.X), voc, counts_layer='spliced'), want, obs=False)

def tenx(path, a, version=3, antibodies=2):
    "A CellRanger .h5: the matrix by cells in columns; version 3 with antibody rows between the genes"
    rows = np.arange(g + antibodies*(version == 3))
    gene = rows[:g] if version == 2 else np.delete(rows, [3, 7][:antibodies])
    X = sparse.lil_matrix((len(rows), n), dtype=np.int32)
    X[gene] = a.X.T.astype(int)
    if version == 3 and antibodies: X[3] = 99
    X = X.tocsc()
    ids_, names = np.full(len(rows), b'CD3_TotalSeqB', dtype='S20'), np.full(len(rows), b'CD3', dtype='S20')
    ids_[gene], names[gene] = a.var.ensembl_id.to_numpy('S'), a.var_names.to_numpy('S')
    with h5py.File(path, 'w') as f:
        m = f.create_group('matrix' if version == 3 else 'GRCh38')
        for k in ('data', 'indices', 'indptr'): m[k] = getattr(X, k)
        m['shape'], m['barcodes'] = np.array(X.shape), a.obs_names.to_numpy('S')
        if version == 2: m['genes'], m['gene_names'] = ids_, names
        else:
            m['features/id'], m['features/name'] = ids_, names
            m['features/feature_type'] = np.where(np.isin(rows, gene), b'Gene Expression', b'Antibody Capture')
    return path

@pytest.mark.parametrize('version,antibodies', [(2, 0), (3, 0), (3, 2)])
def test_10x_h5(cohort, want, version, antibodies, tmp_path):
    f = tenx(tmp_path/'filtered.h5', cohort, version, antibodies)
    got = tokenize(f, voc, block=5)
    same(got, want, obs=False)
    assert got.match.report()['genes'] == got.match.report()['id'] == g and got.obs.n_counts.equals(want.obs.n_counts)
    assert (read_any(f).X != cohort.X).nnz == 0

@pytest.mark.parametrize('zipped', [True, False])
def test_10x_folder(cohort, want, zipped, tmp_path):
    import gzip
    from scipy.io import mmwrite
    def write(name, text): (gzip.open(tmp_path/f'{name}.gz', 'wb') if zipped else open(tmp_path/name, 'wb')).write(text)
    mmwrite(tmp_path/'m.mtx', cohort.X.T.astype(int))
    write('matrix.mtx', (tmp_path/'m.mtx').read_bytes()); (tmp_path/'m.mtx').unlink()
    rows = list(zip(cohort.var.ensembl_id, cohort.var_names))
    if zipped: write('features.tsv', ''.join(f'{i}\t{s}\tGene Expression\n' for i, s in rows).encode())
    else: write('genes.tsv', ''.join(f'{i}\t{s}\n' for i, s in rows).encode())
    write('barcodes.tsv', '\n'.join(cohort.obs_names).encode() + b'\n')
    same(tokenize(tmp_path, voc, block=5), want, obs=False)

def test_where_the_counts_lie(cohort, want, tmp_path):
    "The rule: a layer named counts, else X, else raw.X; whichever holds counts"
    logs = np.log1p(cohort.X * 1.5)
    in_layer, in_raw, named = (with_X(cohort, logs) for _ in range(3))
    in_layer.layers['counts'] = cohort.X
    in_raw.raw = cohort
    named.layers['umi'] = cohort.X
    for a, layer in ((in_layer, None), (in_raw, None), (named, 'umi')):
        a.write_h5ad(tmp_path/'a.h5ad')
        for data in (a, tmp_path/'a.h5ad'): same(tokenize(data, voc, counts_layer=layer, block=5), want)
    with says(CountsError, 'counts_layer=…'): tokenize(named, voc)

def old_table(g, df, text):
    "A table as anndata 0.7 wrote it: categories in a group of their own, found by reference"
    g.attrs.update({'encoding-type': 'dataframe', 'encoding-version': '0.1.0', '_index': 'index'})
    g.attrs.create('column-order', list(df.columns), dtype=text)
    g.create_dataset('index', data=df.index.to_numpy(object), dtype=text)
    for c in df:
        if isinstance(df[c].dtype, pd.CategoricalDtype):
            names = g.create_dataset(f'__categories/{c}', data=df[c].cat.categories.to_numpy(object), dtype=text)
            names.attrs['ordered'] = bool(df[c].cat.ordered)
            g[c] = df[c].cat.codes.to_numpy()
            g[c].attrs['categories'] = names.ref
        elif df[c].dtype == object: g.create_dataset(c, data=df[c].to_numpy(object), dtype=text)
        else: g[c] = df[c].to_numpy()

def test_files_of_anndata_07(cohort, want, tmp_path):
    "Categories were kept by reference then: their names are read, not their codes, of cells and of genes"
    keep = ['donor', 'state', 'kind', 'passed', 'age', 'city']
    cats = cohort.var.assign(ensembl_id=cohort.var.ensembl_id.astype('category'))
    for var in (cohort.var, cats):
        with h5py.File(tmp_path/'a.h5ad', 'w') as f:
            text = h5py.string_dtype()
            old_table(f.create_group('obs'), cohort.obs[keep].astype(dict(city=object)), text)
            old_table(f.create_group('var'), var, text)
            x = f.create_group('X')
            x.attrs.update({'encoding-type': 'csr_matrix', 'encoding-version': '0.1.0', 'shape': cohort.shape})
            for k in ('data', 'indices', 'indptr'): x[k] = getattr(cohort.X, k)
        got = tokenize(tmp_path/'a.h5ad', voc, block=5)
        same(got, want, obs=False)
        for c in keep: assert got.obs[c].astype(str).tolist() == want.obs[c].astype(str).tolist(), c
        assert got.obs.state.cat.ordered

@pytest.mark.parametrize('what', ['beyond', 'below', 'broken', 'twice', 'short'])
def test_a_damaged_table_of_cells(cohort, what, tmp_path):
    "Codes that are those of no category, a category that stands twice, a column that ends early"
    cohort.write_h5ad(tmp_path/'cut.h5ad')
    with h5py.File(tmp_path/'cut.h5ad', 'a') as f:
        g = f['obs/state']
        if what == 'beyond': g['codes'][2] = 9
        elif what == 'below': g['codes'][2] = -2
        elif what == 'broken': x = g['codes'][()]; del g['codes']; g['codes'] = x + .5
        elif what == 'twice': g['categories'][0] = g['categories'][1]
        else: x = f['obs/age'][()]; del f['obs/age']; f['obs'].create_dataset('age', data=x[:-2]).attrs.update({'encoding-type': 'array', 'encoding-version': '0.2.0'})
    with says(CountsError, "'cut.h5ad' cannot be read", 'damaged'): tokenize(tmp_path/'cut.h5ad', voc)

# --- several inputs

@pytest.fixture
def parts(cohort, tmp_path):
    d = tmp_path/'atlas'
    d.mkdir()
    for name, a, b in (('part1', 0, 3), ('part2', 3, 5), ('part10', 5, n)): cohort[a:b].copy().write_h5ad(d/f'{name}.h5ad')
    (d/'README.txt').write_text('about'); (d/'notes').mkdir()
    return d

@pytest.mark.parametrize('kind', ['list', 'folder', 'pattern', 'nested', 'AnnDatas', 'iterator', 'paths'])
def test_several_inputs(cohort, want, parts, kind):
    files = [parts/f'part{i}.h5ad' for i in (1, 2, 10)]
    cuts = [cohort[:3], cohort[3:5], cohort[5:]]
    data = dict(list=files, folder=parts, pattern=f'{parts}/part*.h5ad', AnnDatas=cuts, iterator=iter(cuts),
                paths=iter(files), nested=[files[0], [str(files[1])], f'{parts}/part10*'])[kind]
    got = tokenize(data, voc, block=2)
    same(got, want, obs=False)
    if kind in ('list', 'folder', 'pattern', 'nested'):
        assert got.obs.file.tolist() == ['part1']*3 + ['part2']*2 + ['part10']*8
    assert got.obs.drop(columns='file', errors='ignore').astype(str).equals(want.obs.astype(str))

def test_order_of_genes_differs_between_files(cohort, want, tmp_path):
    cohort[:6].write_h5ad(tmp_path/'1.h5ad'); cohort[6:, ::-1].copy().write_h5ad(tmp_path/'2.h5ad')
    same(tokenize(tmp_path, voc), want, obs=False)

def test_other_columns_in_one_file(cohort, tmp_path):
    "What only some files have is left out and said; what was asked for must be in all"
    cohort.write_h5ad(tmp_path/'1.h5ad')
    b = made(1); b.obs = b.obs[['age', 'donor']].assign(extra=1); b.write_h5ad(tmp_path/'2.h5ad')
    with pytest.warns(UserWarning, match='city.*not in every file'): got = tokenize(tmp_path, voc)
    assert list(got.obs) == ['donor', 'age', 'n_counts', 'file'] and len(got) == 2*n
    for call in (lambda **k: tokenize(tmp_path, voc, **k), lambda **k: tokenize_to(tmp_path, voc, tmp_path/'o', **k)):
        with says(GeneformerError, "'city'", "'2.h5ad'"): call(obs=['city'])

def test_the_same_barcodes_in_two_files(cohort, tmp_path):
    cohort.write_h5ad(tmp_path/'1.h5ad'); made(1).write_h5ad(tmp_path/'2.h5ad')
    got = tokenize(tmp_path, voc)
    assert list(got.obs.index) == list(cohort.obs_names)*2 and got.obs.file.tolist() == ['1']*n + ['2']*n
    assert tokens(got) == tokens(tokenize(cohort, voc)) + tokens(tokenize(made(1), voc))
    with says(CountsError, "'1.h5ad'", 'twice'): tokenize([tmp_path/'1.h5ad', tmp_path/'1.h5ad'], voc)

def test_files_of_one_name_are_told_apart(cohort, tmp_path):
    "CellRanger calls every sample filtered_feature_bc_matrix.h5"
    for k, a in dict(left=cohort, right=made(1)).items(): (tmp_path/k).mkdir(); tenx(tmp_path/k/'filtered.h5', a)
    got = tokenize([tmp_path/'left/filtered.h5', tmp_path/'right/filtered.h5'], voc)
    assert got.obs.file.nunique() == 2 and len(got.match) == 2

def test_one_of_two_anndatas_is_of_another_species(cohort):
    other = made(1); other.var['ensembl_id'] = [f'ENSMUSG{i}' for i in range(g)]
    with quiet(), says(GeneMatchError, 'ENSMUSG0'): tokenize([cohort, other], voc)

def test_more_files_than_may_be_open(cohort, tmp_path):
    "Files are let go of: a corpus has more of them than a process may hold open"
    for i in range(30):
        one = cohort[[i % n]].copy()
        one.obs_names = [f'of file {i}']
        one.write_h5ad(tmp_path/f'{i}.h5ad')
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path('/proc/self/fd').iterdir())) + 24, hard))
    try: got = tokenize(tmp_path, voc, workers=1), tokenize_to(tmp_path, voc, tmp_path/'out', workers=1)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(x) for x in got] == [30, 30]

# --- damage

def edited(a, path, edit):
    a.write_h5ad(path)
    with h5py.File(path, 'r+') as f: edit(f)
    return path

def put(key, i, value):
    def edit(f): f[key][i] = value
    return edit

def table(key, df):
    def edit(f):
        from anndata.io import write_elem
        del f[key]; write_elem(f, key, df)
    return edit

damage = {'column beyond the last gene': put('X/indices', 3, 500), 'just beyond': put('X/indices', 3, g),
          'negative column': put('X/indices', 3, -1),
          'rows that fall': put('X/indptr', 5, 0), 'rows beyond the end': put('X/indptr', -1, 9999),
          'more genes in var': table('var', pd.concat([made().var]*2).reset_index()),
          'fewer genes in var': table('var', made().var[:6]), 'more cells in obs': table('obs', made(n=20).obs),
          'fewer cells in obs': table('obs', made().obs[:6])}

@pytest.mark.parametrize('block', [4, 100])
@pytest.mark.parametrize('layout', ['csr', 'csc'])
@pytest.mark.parametrize('what', damage)
def test_a_damaged_matrix_is_refused(cohort, what, layout, block, tmp_path):
    "Whole or in blocks, by cells or by genes: never clipped, never out of bounds, always a sentence with the file"
    # in CSC the indices are cells
    edit = put('X/indices', 3, n) if layout == 'csc' and what == 'just beyond' else damage[what]
    f = edited(with_X(cohort, layouts[layout](cohort.X)), tmp_path/'bad.h5ad', edit)
    with says(CountsError, 'bad.h5ad'): tokenize(f, voc, block=block)

@pytest.mark.parametrize('column', [-1, g, 10**6])
def test_columns_out_of_range_in_memory(cohort, column):
    X = cohort.X.copy(); X.indices[3] = column
    for call in (lambda a: tokenize(a, voc), counts_of):
        with says(CountsError): call(with_X(cohort, X))

@pytest.mark.parametrize('dtype', ['int32', 'int64', 'uint32', 'uint64'])
def test_width_of_indices(cohort, want, dtype, tmp_path):
    def widen(f):
        for k in ('X/indices', 'X/indptr'): x = f[k][()].astype(dtype); del f[k]; f[k] = x
    same(tokenize(edited(cohort, tmp_path/'a.h5ad', widen), voc, block=5), want)

@pytest.mark.parametrize('dtype', ['float32', 'float64', 'uint8', 'int16', 'int64'])
def test_entries_stored_twice_and_zeros_are_summed(dtype):
    "200 + 100 of one gene in one cell, unsorted, beside stored zeros; a byte holds no more than 255"
    X = sparse.csr_matrix((np.array([100, 7, 0, 200, 30], dtype='float64'), [4, 2, 5, 4, 0], [0, 5]), (1, g))
    X.data = X.data.astype(dtype)
    a = ad.AnnData(sparse.csr_matrix((1, g)), var=pd.DataFrame(index=ids)); a.X = X
    got = tokenize(a, voc)
    assert got.obs.n_counts.tolist() == [337] and tokens(got) == [[6, 2, 4]]

def test_an_adata_is_left_as_it_is(cohort):
    "Unsorted, with entries stored twice: what is summed is a copy"
    X = sparse.csr_matrix((np.ones(4, np.float32), [4, 2, 4, 0], [0, 4]), (1, g))
    a = ad.AnnData(X, var=pd.DataFrame(index=ids))
    before = a.X.indices.tolist(), a.X.data.tolist()
    tokenize(a, voc)
    assert (a.X.indices.tolist(), a.X.data.tolist()) == before == ([4, 2, 4, 0], [1]*4)

@pytest.mark.parametrize('share', [0, .05, .5, .95])
def test_a_truncated_file(cohort, share, tmp_path):
    cohort.write_h5ad(tmp_path/'whole.h5ad')
    whole = (tmp_path/'whole.h5ad').read_bytes()
    (tmp_path/'cut.h5ad').write_bytes(whole[:int(share*len(whole))])
    for call in (lambda f: tokenize(f, voc), lambda f: tokenize_to(f, voc, tmp_path/'o'), read_any):
        with says(CountsError, "'cut.h5ad'", 'damaged'): call(tmp_path/'cut.h5ad')

def test_a_piece_that_cannot_be_unpacked(tmp_path):
    "A flipped byte inside a compressed piece shows only when it is read"
    f = tmp_path/'bad.h5ad'
    made(n=200).write_h5ad(f, compression='gzip')
    with h5py.File(f) as h: at = h['X/data'].id.get_chunk_info(0)
    b = bytearray(f.read_bytes()); b[at.byte_offset + 8:at.byte_offset + 40] = b'\xff'*32; f.write_bytes(b)
    for call in (lambda: tokenize(f, voc), lambda: tokenize_to(f, voc, tmp_path/'o')):
        with says(CountsError, 'bad.h5ad'): call()
    assert not list(tmp_path.glob('o/*.arrow'))

def no_X(a): a = a.copy(); a.X = None; return a

@pytest.mark.parametrize('what', ['empty', 'no X', 'NaN', 'other genes'])
def test_one_bad_file_among_several_is_named(cohort, what, tmp_path):
    bad = dict(empty=lambda: cohort[:0].copy(), NaN=lambda: with_X(cohort, cohort.X*np.nan))
    strange = pd.DataFrame(index=[f'X{i}' for i in range(g)])
    bad |= {'no X': lambda: no_X(cohort), 'other genes': lambda: ad.AnnData(cohort.X, cohort.obs, strange)}
    for name, a in {'1': cohort, '2bad': bad[what](), '3': made(1)}.items(): a.write_h5ad(tmp_path/f'{name}.h5ad')
    for call in (lambda: tokenize(tmp_path, voc), lambda: tokenize_to(tmp_path, voc, tmp_path/'o')):
        with quiet(), says(GeneformerError, '2bad'): call()
    assert not (tmp_path/'o/state.json').exists()

def test_a_failure_lets_go_of_the_lock(cohort, tmp_path):
    "While the error of a damaged file is held, as a notebook holds its last one, other threads still read other files"
    f = loom(tmp_path/'bad.loom', cohort)
    with h5py.File(f, 'r+') as h: h['col_attrs/bad'] = np.full(n, b'\xff')
    cohort.write_h5ad(tmp_path/'good.h5ad')
    with pytest.raises(CountsError, match='bad.loom') as held: tokenize(f, voc)
    t = threading.Thread(target=lambda: tokenize(tmp_path/'good.h5ad', voc), daemon=True)
    t.start(); t.join(15)
    assert held.value.__cause__ is not None and not t.is_alive()

def test_files_that_hide(cohort, want, tmp_path):
    "A Mac leaves ._part.h5ad beside every file it copies"
    cohort.write_h5ad(tmp_path/'a.h5ad'); (tmp_path/'._a.h5ad').write_bytes(b'\0\5\x16\7')
    same(tokenize(tmp_path, voc), want)

# --- properties

few = settings(max_examples=15, deadline=None, derandomize=True)
cuts = st.lists(st.integers(1, n - 1), unique=True, max_size=5).map(sorted)

@few
@given(cuts, st.integers(1, 9), st.integers(0, 99))
def test_slices_make_the_whole(where, block, seed):
    a = made(seed)
    edges = [0, *where, n]
    pieces = [a[x:y] for x, y in zip(edges, edges[1:])]
    whole = tokenize(a, voc)
    assert sum((tokens(tokenize(p, voc, block=block)) for p in pieces), []) == tokens(whole)
    assert tokens(tokenize(iter(pieces), voc, block=block)) == tokens(whole)

@few
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_any_shards_and_blocks_make_the_whole(rows, block, workers, seed, several):
    a = made(seed)
    data = [a[:5], a[5:]] if several else a
    with tempfile.TemporaryDirectory() as d:
        got = tokenize_to(data, voc, f'{d}/o', rows=rows, block=block, workers=workers, counts=True, uncropped=True)
        want = tokenize(data, voc, counts=True, uncropped=True)
        c = got.cells()
        assert tokens(c) == tokens(want) and list(c.obs.index) == list(want.obs.index)
        assert c.obs.n_counts.tolist() == want.obs.n_counts.tolist()
        for k in want.lists: assert all(np.array_equal(x, y) for x, y in zip(c.lists[k], want.lists[k])), k
        assert len(got.shards) == sum(-(-len(x)//rows) for x in (data if several else [a]))

@few
@given(st.integers(0, 99), st.integers(1, 9))
def test_blocks_hold_every_count_once(seed, size):
    a = made(seed)
    got = list(blocks(a, size))
    assert (sparse.vstack([b.X for b in got]) != a.X).nnz == 0
    assert [i for b in got for i in b.obs.index] == list(a.obs_names)
    assert all(len(b.obs) == size for b in got[:-1])

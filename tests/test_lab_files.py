"Files as labs have them: the tokens of the same AnnData in memory, or a sentence that helps"
import gzip, warnings
import anndata as ad, h5py, numpy as np, pandas as pd, pytest, scanpy as sc
from scipy import sparse
import geneformer_nb as gf
from geneformer_nb.core import CountsError, GeneformerError, GeneMatchError
from geneformer_nb.data.cells import Cells
from geneformer_nb.data.corpus import tokenize_to
from geneformer_nb.data.sources import read_any
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.vocabulary import Vocabulary, match_genes
from sentences import quiet, says, tokens

n, g = 12, 40
ids = [f'ENSG{100 + i:011d}' for i in range(g)]
symbols = [f'GENE{i}' for i in range(g - 3)] + ['CD4', 'CD8A', 'MS4A1']
human = Vocabulary(ids, np.linspace(.5, 2, g), True, 64, dict(zip(ids, symbols)), dict(zip(symbols, ids)), 'human')
barcodes = [f'AAAC{i:04d}-1' for i in range(n)]

def counts(genes=g, seed=0):
    X = np.random.default_rng(seed).poisson(1.5, (n, genes)).astype(np.float32)
    X[:, 0] += 1
    return sparse.csr_matrix(X)

def made(index='id', **var):
    return ad.AnnData(counts(), pd.DataFrame(index=barcodes), pd.DataFrame(var, index=ids if index == 'id' else symbols))

@pytest.fixture(scope='module')
def want(): return tokens(tokenize(made(), human))

def ranks(*args, **options):
    with quiet(): return tokens(tokenize(*args, **options))

# --- how files are written

@pytest.mark.parametrize('kind', ['h5ad', 'zarr'])
def test_names_written_as_nullable_strings(kind, want, tmp_path):
    "anndata 0.13 and pandas 3 write them as groups"
    a = made()
    a.obs_names, a.var_names = pd.Index(barcodes, dtype='string'), pd.Index(ids, dtype='string')
    a.obs['donor'] = pd.array(['x', None]*(n//2), dtype='string')
    path = tmp_path/f'a.{kind}'
    with quiet(), ad.settings.override(allow_write_nullable_strings=True): getattr(a, f'write_{kind}')(path)
    if kind == 'h5ad':
        with h5py.File(path) as f: assert f['var/_index'].attrs['encoding-type'] == 'nullable-string-array'
    got = tokenize(path, human)
    assert tokens(got) == want and list(got.obs.index) == barcodes
    assert list(got.obs.donor.isna()) == [False, True]*(n//2)
    assert read_any(path).shape == (n, g)
    tokenize_to(path, human, tmp_path/'out', rows=5)
    back = Cells.load(tmp_path/'out', human)
    assert tokens(back) == want and list(back.obs.donor.isna()) == [False, True]*(n//2)

def write_10x(path, ids=ids, names=symbols, types=None, genomes=None, X=None, more=()):
    X = counts() if X is None else X
    with h5py.File(path, 'w') as f:
        group = f.create_group('matrix')
        for k, t in dict(data='i4', indices='i8', indptr='i8').items(): group[k] = getattr(X, k).astype(t)
        group['shape'], group['barcodes'] = np.array([X.shape[1], X.shape[0]], 'i4'), np.array(barcodes, 'S')
        table = group.create_group('features')
        columns = dict(id=ids, name=names, feature_type=types or ['Gene Expression']*len(ids), genome=genomes or ['GRCh38']*len(ids))
        for k, v in columns.items(): table[k] = np.array(v, 'S')
        for k in more: f.create_group(k)['x'] = np.ones(3)
    return path

def test_cellbender(want, tmp_path):
    f = write_10x(tmp_path/'filtered.h5', more=('droplet_latents', 'global_latents', 'metadata'))
    assert ranks(f, human) == want and read_any(f).shape == (n, g)

def write_mtx(folder, zipped=True, prefix='', columns=3, genes='features.tsv', transposed=False):
    folder.mkdir(exist_ok=True)
    def put(name, text):
        if zipped: (folder/f'{prefix}{name}.gz').write_bytes(gzip.compress(text.encode()))
        else: (folder/f'{prefix}{name}').write_text(text)
    M = counts().T.tocoo()
    put('matrix.mtx', f'%%MatrixMarket matrix coordinate integer general\n%\n{g} {n} {M.nnz}\n'
        + ''.join(f'{i + 1} {j + 1} {int(x)}\n' for i, j, x in zip(M.row, M.col, M.data)))
    put(genes, ''.join('\t'.join([i, s, 'Gene Expression'][:columns]) + '\n' for i, s in zip(ids, symbols)))
    put('barcodes.tsv', ''.join(f'{b}\n' for b in barcodes))
    return folder

@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('genes', ['features.tsv', 'genes.tsv'])
@pytest.mark.parametrize('columns', [1, 2, 3])
@pytest.mark.parametrize('prefix', ['', 'GSM1_'])
def test_folders_of_10x_star_kb_and_geo(zipped, genes, columns, prefix, want, tmp_path):
    folder = write_mtx(tmp_path/'sample', zipped, prefix, columns, genes)
    assert ranks(folder, human) == want
    tokenize_to(folder, human, tmp_path/'out', rows=5)
    assert tokens(Cells.load(tmp_path/'out', human)) == want

def test_a_folder_of_several_prefixes_is_several_samples(want, tmp_path):
    write_mtx(tmp_path/'geo', prefix='GSM1_'), write_mtx(tmp_path/'geo', prefix='GSM2_')
    with says(CountsError, 'GSM1_', 'GSM2_'): tokenize(tmp_path/'geo', human)

def test_a_folder_that_lacks_a_file_names_it(tmp_path):
    folder = write_mtx(tmp_path/'sample')
    (folder/'barcodes.tsv.gz').unlink()
    with says(CountsError, 'barcodes.tsv'): tokenize(folder, human)

def test_an_anndata_saved_as_h5(want, tmp_path):
    made().write_h5ad(tmp_path/'saved.h5')
    assert ranks(tmp_path/'saved.h5', human) == want and read_any(tmp_path/'saved.h5').shape == (n, g)

def test_names_of_cells_that_are_integers(want, tmp_path):
    made().write_h5ad(path := tmp_path/'a.h5ad')
    with h5py.File(path, 'r+') as f:
        del f['obs/_index']
        x = f['obs'].create_dataset('_index', data=np.arange(n))
        x.attrs['encoding-type'], x.attrs['encoding-version'] = 'array', '0.2.0'
    got = tokenize(path, human)
    assert tokens(got) == want and list(got.obs.index) == [str(i) for i in range(n)]

def test_h5ad_of_anndata_06(want, tmp_path):
    X = counts()
    with h5py.File(tmp_path/'old.h5ad', 'w') as f:
        group = f.create_group('X')
        for k in ('data', 'indices', 'indptr'): group[k] = getattr(X, k)
        group.attrs['h5sparse_format'], group.attrs['h5sparse_shape'] = 'csr', np.array(X.shape)
        f['obs'] = np.array([(b.encode(), i % 2) for i, b in enumerate(barcodes)], dtype=[('index', 'S12'), ('kind', 'i1')])
        f['var'] = np.array([(s.encode(), i.encode()) for s, i in zip(symbols, ids)], dtype=[('index', 'S20'), ('gene_ids', 'S20')])
        f.create_group('uns')['kind_categories'] = np.array(['T', 'B'], dtype=h5py.string_dtype())
    with quiet(): got = tokenize(tmp_path/'old.h5ad', human)
    assert tokens(got) == want and list(got.obs.kind[:2]) == ['T', 'B']

def test_a_compression_filter_that_is_not_here_is_named(tmp_path):
    made().write_h5ad(path := tmp_path/'z.h5ad')
    with h5py.File(path, 'r+') as f:
        data = f['X/data'][()]
        del f['X/data']
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((len(data),))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # Zstandard, not part of HDF5
        d = h5py.h5d.create(f['X'].id, b'data', h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((len(data),)), properties)
        d.write_direct_chunk((0,), data.tobytes())
    with says(CountsError, 'filter', 'hdf5plugin'): tokenize(path, human)

# --- several modalities

def test_mudata(want, tmp_path):
    mudata = pytest.importorskip('mudata')
    with quiet():
        m = mudata.MuData(dict(rna=made(), prot=ad.AnnData(np.ones((n, 2), np.float32), pd.DataFrame(index=barcodes), pd.DataFrame(index=['a', 'b']))))
        m.write(tmp_path/'m.h5mu')
    assert ranks(m, human) == want and ranks(tmp_path/'m.h5mu', human) == want
    with says(GeneformerError, "['rna']"): gf.pp.tokenize(m, human)

def test_what_looks_like_mudata_without_rna():
    class Many:
        mod = dict(atac=made(), prot=made())
    with says(CountsError, 'atac', 'prot'): tokenize(Many(), human)

def test_anncollection():
    from anndata.experimental import AnnCollection
    with quiet(): both = AnnCollection([made(), made()], index_unique='-')
    with says(CountsError, 'AnnCollection'): tokenize(both, human)

antibodies = ['CD4', 'CD8A', 'MS4A1']

@pytest.mark.parametrize('column', ['feature_types', 'feature_type'])
@pytest.mark.parametrize('index', ['id', 'symbol'])
@pytest.mark.parametrize('how', ['memory', 'h5ad', 'verb'])
def test_rows_that_are_not_genes_are_left_out(column, index, how, want, tmp_path):
    X = sparse.hstack([counts(), sparse.csr_matrix(np.full((n, 3), 300, np.float32))]).tocsr()
    var = pd.DataFrame({column: ['Gene Expression']*g + ['Antibody Capture']*3}, index=(ids if index == 'id' else symbols) + antibodies)
    if index == 'symbol': var['gene_ids'] = ids + antibodies
    a = ad.AnnData(X, pd.DataFrame(index=barcodes), var)
    if how == 'h5ad': a.write_h5ad(data := tmp_path/'a.h5ad')
    else: data = a
    if how == 'verb':
        with pytest.warns(UserWarning, match='3 rows .*Antibody Capture'): gf.pp.tokenize(a, human)
        got = tokens(gf.get.cells(a, human))
    else: got = ranks(data, human)
    assert got == want

def test_the_10x_file_and_its_anndata_agree(want, tmp_path):
    X = sparse.hstack([counts(), sparse.csr_matrix(np.full((n, 3), 300, np.float32))]).tocsr()
    f = write_10x(tmp_path/'cite.h5', ids + antibodies, symbols + antibodies, ['Gene Expression']*g + ['Antibody Capture']*3, ['GRCh38']*(g + 3), X)
    with quiet():
        a = sc.read_10x_h5(f, gex_only=False)
        a.var_names_make_unique()
    assert ranks(f, human) == ranks(a, human) == want

# --- names of genes

def test_ids_of_the_census(want):
    a = made('symbol', soma_joinid=range(g), feature_id=ids, feature_name=symbols)
    a.var_names = [str(i) for i in range(g)]
    assert ranks(a, human) == want

@pytest.mark.parametrize('where', ['other column', 'index beside gene_ids'])
def test_a_refusal_names_the_column_that_would_match(where):
    a = made('id' if where != 'other column' else 'symbol', other=ids, gene_ids=[str(i) for i in range(g)])
    a.var_names = ids if where != 'other column' else [f'x{i}' for i in range(g)]
    if where != 'other column': del a.var['other']
    with says(GeneMatchError, "gene_ids='other'" if where == 'other column' else "gene_ids='index'", '100 %'): tokenize(a, human)

@pytest.mark.parametrize('name', ['{}.14', '{}.14_PAR_Y', '{}_PAR_Y', '{}.3-1', 'GRCh38_{}', 'hg38_{}', 'GRCh38___{}'])
def test_versions_copies_and_prefixes_of_an_id(name):
    m = match_genes([name.format(i) for i in ids], human)
    want = [human.gene_number(i) for i in ids] if hasattr(human, 'gene_number') else range(g)
    assert list(m.index) == list(want), m.how

def test_a_version_after_an_underscore_is_no_species():
    m = match_genes(['GENE1_GENE2', 'XX_ENSG00000000100', ids[0]], human)
    assert list(m.index) == [-1, -1, 0]

def test_two_genomes_in_one_10x_file(want, tmp_path):
    mouse = [f'mm10___ENSMUSG{i:011d}' for i in range(g)]
    f = write_10x(tmp_path/'b.h5', [f'GRCh38_{i}' for i in ids] + mouse, [f'GRCh38_{s}' for s in symbols] + [f'mm10___{s.capitalize()}' for s in symbols],
                  genomes=['GRCh38']*g + ['mm10']*g, X=sparse.hstack([counts(), counts(seed=1)]).tocsr())
    with pytest.warns(UserWarning, match='[Ss]econd species|mouse|another species'): got = tokenize(f, human)
    assert tokens(got) == want

def test_mouse_symbols_beside_human_ones_are_told():
    b = ad.AnnData(sparse.hstack([counts(), counts()[:, ::-1]]).tocsr(), pd.DataFrame(index=barcodes),
                   pd.DataFrame(index=symbols + [s.capitalize() for s in symbols]))
    with pytest.warns(UserWarning, match='mouse'): tokenize(b, human)

def test_orthologs_with_swapped_columns_are_named():
    a = made()
    a.var_names = [f'ENSMUSG{i:011d}' for i in range(g)]
    table = pd.DataFrame(dict(mouse=list(a.var_names), human=ids))
    tokenize(a, human, orthologs=table)
    with says(GeneMatchError, 'table of orthologs', 'columns'): tokenize(a, human, orthologs=table[['human', 'mouse']])

def test_accession_of_a_velocyto_loom(tmp_path):
    twice = list(symbols)
    twice[1] = twice[0]
    X = counts().toarray().T
    with h5py.File(tmp_path/'v.loom', 'w') as f:
        f['matrix'] = X
        for k, v in dict(Gene=twice, Accession=ids, Chromosome=['1']*g).items(): f.require_group('row_attrs')[k] = np.array(v, 'S')
        f.create_group('col_attrs')['CellID'] = np.array(barcodes, 'S')
        for k in ('spliced', 'unspliced'): f.require_group('layers')[k] = X
        f.create_group('col_graphs'), f.create_group('row_graphs')
        f.attrs['LOOM_SPEC_VERSION'] = '3.0.0'
    assert ranks(tmp_path/'v.loom', human) == ranks(made(), human)

def test_a_symbol_of_two_genes_names_both():
    V = Vocabulary(ids, np.ones(g), symbols=dict(zip(ids, ['TWIN', 'TWIN', *symbols[2:]])), aliases=dict(zip(symbols[2:], ids[2:])))
    with says(GeneformerError, ids[0], ids[1]): V.token('TWIN')

# --- which counts

def test_counts_of_few_genes_beside_raw_counts_of_all_are_told(want):
    a = made()
    a.raw = a.copy()
    few = a[:, :10].copy()
    with pytest.warns(UserWarning, match='raw'): got = tokenize(few, human)
    with quiet(): assert tokens(tokenize(few, human, counts_layer='raw.X')) == want

@pytest.mark.parametrize('kind', ['f8', 'f4', 'f2', 'i8', 'i4', 'i2', 'i1', 'u8', 'u2', 'u1'])
@pytest.mark.parametrize('layout', [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_every_number_type(kind, layout, want):
    if kind == 'f2' and layout is not np.asarray: pytest.skip('scipy has no sparse matrix of float16')
    a = made()
    a.X = layout(a.X.toarray().astype(kind))
    assert ranks(a, human) == want

@pytest.mark.parametrize('column', [pd.Categorical(['5']*n), pd.Categorical([5]*n), ['a']*n, pd.array([None]*n, dtype='Int64')], ids=str)
def test_n_counts_of_any_type_is_computed_and_told(column, tmp_path):
    a = made()
    a.obs['n_counts'] = column
    a.write_h5ad(path := tmp_path/'a.h5ad')
    for f in (lambda: tokenize(a, human), lambda: tokenize(path, human), lambda: tokenize_to(path, human, tmp_path/'out')):
        with pytest.warns(UserWarning, match='n_counts'): f()

# --- the same cells twice

def cellranger(folder):
    folder.mkdir()
    write_mtx(folder/'filtered_feature_bc_matrix')
    write_mtx(folder/'raw_feature_bc_matrix')
    for name in ('filtered', 'raw'): write_10x(folder/f'{name}_feature_bc_matrix.h5')
    return folder

def test_outs_of_cell_ranger_are_refused(tmp_path):
    outs = cellranger(tmp_path/'outs')
    for f in (lambda: tokenize(outs, human), lambda: tokenize_to(outs, human, tmp_path/'out')):
        with says(CountsError, 'filtered_feature_bc_matrix', 'twice'): f()

def test_one_file_named_twice_is_refused(tmp_path):
    f = write_10x(tmp_path/'a.h5')
    with says(CountsError, 'twice'): tokenize([f, f], human)

def test_copies_of_the_same_cells_are_told(tmp_path):
    a, b = write_10x(tmp_path/'a.h5'), write_10x(tmp_path/'b.h5')
    with says(CountsError, 'a.h5', 'b.h5', 'same cells'): tokenize([a, b], human)

def test_other_cells_of_the_same_barcodes_are_two_samples(tmp_path):
    a, b = write_10x(tmp_path/'a.h5'), write_10x(tmp_path/'b.h5', X=counts(seed=5))
    with quiet(): assert len(tokenize([a, b], human)) == 2*n

# --- in memory

@pytest.mark.parametrize('what', ['backed', 'view of backed'])
def test_backed_anndata_goes_through_the_verbs(what, want, tmp_path):
    made().write_h5ad(path := tmp_path/'a.h5ad')
    model = gf.Geneformer.new('nano', human, num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    a = ad.read_h5ad(path, backed='r')
    rows = slice(None) if what == 'backed' else slice(2, 8)
    if what != 'backed': a = a[rows]
    b = gf.pp.tokenize(a, human, copy=True)
    assert tokens(gf.get.cells(b, human)) == want[rows]
    c = gf.tl.embed(b, model, copy=True)
    assert np.isfinite(c.obsm['X_geneformer']).all()

def test_dataset_dict_names_its_splits(want, tmp_path):
    import datasets
    tokenize(made(), human).save(tmp_path/'x')
    datasets.load_from_disk(str(tmp_path/'x')).train_test_split(.5, seed=0).save_to_disk(str(tmp_path/'both'))
    assert len(Cells.load(tmp_path/'both/train', human)) == n//2
    with says(GeneformerError, 'train', 'test'): Cells.load(tmp_path/'both', human)

def test_dataset_after_shuffle_select_and_cast(tmp_path):
    import datasets
    tokenize(made(), human).save(tmp_path/'x')
    d = datasets.load_from_disk(str(tmp_path/'x')).add_column('y', list('ab'*(n//2))).class_encode_column('y').shuffle(seed=0).select(range(8))
    d.with_format('torch').save_to_disk(str(tmp_path/'e'), num_shards=3)
    got = Cells.load(tmp_path/'e', human)
    assert list(got.obs.index) == list(d['barcode']) and tokens(got) == [list(x) for x in d['input_ids']]
    assert list(got.obs.y) == [d.features['y'].int2str(v) for v in d['y']]

def test_numbers_stay_numbers_in_the_folder(tmp_path):
    a = made()
    a.obs['age'], a.obs['smoker'] = pd.array([41, None]*(n//2), dtype='Int64'), pd.array([True, None]*(n//2), dtype='boolean')
    a.obs['stage'] = pd.Categorical([3, 1]*(n//2))
    tokenize(a, human).save(tmp_path/'x')
    o = Cells.load(tmp_path/'x', human).obs
    assert [o[k].iloc[0] for k in ('age', 'smoker', 'stage')] == [41, True, 3]
    assert o.age.isna().sum() == o.smoker.isna().sum() == n//2

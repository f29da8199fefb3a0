"Neighbors of the files of labs: other names, other tools, the same kinds"
import gzip, json, os, shutil, subprocess, sys
from pathlib import Path
import anndata as ad, h5py, numpy as np, pandas as pd, pytest
from anndata.io import write_elem
from scipy import sparse
from scipy.io import mmwrite
import geneformer_nb as gf
from geneformer_nb import cli
from geneformer_nb.core import CountsError, GeneformerError, GeneMatchError
from geneformer_nb.data.cells import Cells
from geneformer_nb.data.corpus import tokenize_to
from geneformer_nb.data.counts import gene_rows, id_column, plain_id
from geneformer_nb.data.sources import Source, read_any
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.vocabulary import Vocabulary, match_genes
from sentences import quiet, says, tokens
from test_lab_files import barcodes, counts, g, human, ids, made, n, ranks, symbols, want, write_10x, write_mtx  # noqa: F401

tiny = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)

# --- kinds of files

@pytest.mark.parametrize('group', ['background_removed', 'GRCh38', 'hg19'])
def test_the_layout_before_cell_ranger_3(group, want, tmp_path):
    X = counts()
    with h5py.File(tmp_path/'old.h5', 'w') as f:
        for k, t in dict(data='i4', indices='i8', indptr='i8').items(): f[f'{group}/{k}'] = getattr(X, k).astype(t)
        for k, v in dict(genes=ids, gene_names=symbols, barcodes=barcodes).items(): f[f'{group}/{k}'] = np.array(v, 'S')
        f[f'{group}/shape'] = [g, n]
        f['metadata/x'] = [1]
    assert ranks(tmp_path/'old.h5', human) == want

def kb(folder, zipped=False):
    folder.mkdir()
    end = '.gz' if zipped else ''
    mmwrite(folder/'cells_x_genes.mtx', counts().astype(int))
    if zipped:
        (folder/'cells_x_genes.mtx.gz').write_bytes(gzip.compress((folder/'cells_x_genes.mtx').read_bytes()))
        (folder/'cells_x_genes.mtx').unlink()
    (folder/'cells_x_genes.genes.txt').write_text(''.join(f'{i}.7\n' for i in ids))
    (folder/'cells_x_genes.barcodes.txt').write_text('\n'.join(barcodes) + '\n')
    return folder

@pytest.mark.parametrize('zipped', [False, True])
def test_cells_by_genes_of_kb(zipped, want, tmp_path):
    folder = kb(tmp_path/'kb', zipped)
    assert ranks(folder, human) == want and read_any(folder).shape == (n, g)
    (folder/'cells_x_genes.genes.txt').unlink()
    with says(CountsError, 'features.tsv'): tokenize(folder, human)

def test_a_heading_in_the_tables(want, tmp_path):
    folder = write_mtx(tmp_path/'geo', zipped=False)
    for name, head in {'features.tsv': 'gene_id\tsymbol\ttype\n', 'barcodes.tsv': 'barcode\n'}.items():
        (folder/name).write_text(head + (folder/name).read_text())
    assert ranks(folder, human) == want

def test_several_samples_by_their_matrices(want, tmp_path):
    folder = write_mtx(tmp_path/'geo', prefix='GSM1_')
    write_mtx(folder, prefix='GSM2_')
    (folder/'GSM2_barcodes.tsv.gz').write_bytes(gzip.compress(''.join(f'other{i}\n' for i in range(n)).encode()))
    got = tokenize(f'{folder}/*matrix.mtx.gz', human)
    assert tokens(got) == want*2 and got.obs.file.nunique() == 2
    assert ranks(folder/'GSM2_matrix.mtx.gz', human) == want

def test_files_that_do_not_belong_together(tmp_path):
    folder = write_mtx(tmp_path/'a', zipped=False)
    (folder/'barcodes.tsv').write_text('one\n')
    with says(CountsError, 'belong together'): tokenize(folder, human)

def test_a_matrix_that_is_missing_is_named(tmp_path):
    folder = write_mtx(tmp_path/'a')
    (folder/'matrix.mtx.gz').unlink()
    with says(CountsError, 'matrix.mtx'): tokenize(folder, human)

@pytest.mark.parametrize('rna', ['rna', 'gex', 'RNA'])
def test_h5mu(rna, want, tmp_path):
    with h5py.File(tmp_path/'m.h5mu', 'w') as f:
        write_elem(f, f'mod/{rna}', made())
        write_elem(f, 'mod/prot', ad.AnnData(np.ones((n, 2), np.float32), pd.DataFrame(index=barcodes), pd.DataFrame(index=['a', 'b'])))
    with pytest.warns(UserWarning, match=f'{rna} is taken'): assert tokens(tokenize(tmp_path/'m.h5mu', human)) == want
    with quiet(): assert read_any(tmp_path/'m.h5mu').shape == (n, g)

def test_h5mu_without_rna(tmp_path):
    with h5py.File(tmp_path/'m.h5mu', 'w') as f:
        for k in ('atac', 'prot'): write_elem(f, f'mod/{k}', made())
    with says(CountsError, 'atac', 'prot', "mdata['atac']"): tokenize(tmp_path/'m.h5mu', human)

class Many:
    def __init__(self, **mod): self.mod = mod

def test_what_holds_modalities_in_memory(want):
    m = Many(rna=made(), prot=made())
    assert ranks(m, human) == want
    for f in (lambda: gf.pp.tokenize(m, human), lambda: gf.get.cells(m, human)):
        with says(GeneformerError, "mdata['rna']"): f()

def test_an_hdf5_file_of_something_else(tmp_path):
    with h5py.File(tmp_path/'molecule_info.h5', 'w') as f: f['barcodes'], f['count'] = [1], [2]
    with says(CountsError, 'no file of counts', 'molecule_info.h5'): tokenize(tmp_path/'molecule_info.h5', human)

@pytest.mark.parametrize('names', [pd.CategoricalIndex(barcodes), pd.Index(barcodes, dtype='string')], ids=['categories', 'nullable'])
def test_names_of_any_encoding(names, want, tmp_path):
    made().write_h5ad(path := tmp_path/'a.h5ad')
    with h5py.File(path, 'r+') as f, ad.settings.override(allow_write_nullable_strings=True):
        del f['obs/_index']
        write_elem(f['obs'], '_index', names._data if hasattr(names, '_data') and not isinstance(names, pd.CategoricalIndex) else pd.Categorical(names))
    got = tokenize(path, human)
    assert tokens(got) == want and list(got.obs.index) == barcodes

# --- rows that are no genes

@pytest.mark.parametrize('words,left', [
    (['rna']*3 + ['prot'], [True]*3 + [False]), (['GEX', 'gex', 'Gene Expression', 'CRISPR Guide Capture'], [True]*3 + [False]),
    (['gene', 'gene', 'Peaks', None], [True, True, False, True]), (['protein_coding', 'lncRNA', 'miRNA', 'IG_C_gene'], None),
    (['', 'Multiplexing Capture', '', 'ADT'], [True, False, True, False]), (['Gene Expression']*4, None)])
@pytest.mark.parametrize('column', ['feature_types', 'feature.type', 'modality', 'Modalities'])
def test_what_a_row_is(words, left, column):
    mark, _ = gene_rows(pd.DataFrame({column: pd.Categorical(words)}, index=list('abcd')))
    assert (None if mark is None else list(mark)) == left

def test_nothing_but_peaks():
    with says(CountsError, '40 Peaks'): tokenize(made(feature_types=['Peaks']*g), human)

def test_a_record_keeps_to_the_genes():
    a = made(feature_types=['Gene Expression']*(g - 5) + ['Antibody Capture']*5)
    with pytest.warns(UserWarning) as said: gf.pp.tokenize(a, human)
    assert sum('5 Antibody Capture' in str(w.message) for w in said) == 1
    record = gf.data.ranks.find_record(a, human)
    c = gf.data.ranks.recorded_counts(a, record)
    assert c.X.shape == (n, g - 5) and len(gf.data.ranks.recorded_match(a, c, human)) == g - 5 and record.match['genes'] == g - 5
    assert np.allclose(a.obs['X_ranks_counts'], a.X[:, :g - 5].sum(1).A1 if hasattr(a.X.sum(1), 'A1') else np.asarray(a.X[:, :g - 5].sum(1)).ravel())

# --- names of genes

@pytest.mark.parametrize('name', ['GRCh38_CD4', 'hg19_CD4', 'GRCh38_____CD4', 'GRCh38-2020-A_CD4', 'GRCh38.p13_CD4', 'human_CD4', 'hg38|CD4'])
def test_genomes_before_symbols(name):
    m = match_genes([name, f'{name}X'], human)
    assert list(m.index) == [symbols.index('CD4'), -1] and list(m.how) == ['prefix stripped', 'unknown']

@pytest.mark.parametrize('name', ['mm10_CD4', 'mm10___Cd4', 'mouse_CD4', 'GRCm39_CD4', 'ENSMUSG00000000100', 'mm10___ENSMUSG00000000100.3', 'rn6_CD4'])
def test_other_genomes_are_no_human_genes(name): assert list(match_genes([name], human).how) == ['another species']

@pytest.mark.parametrize('name', ['PIGA-AS1', 'RAT1-CD4', 'RN7SL-CD4', 'CHM13', 'HLA-A', 'CD4-1', 'CD4_CD8A', 'CD4.1-2'])
def test_names_that_only_look_like_it(name): assert list(match_genes([name], human).how) == ['unknown']

def test_plain_ids():
    assert [plain_id(x) for x in (' ENSG00000182378.14_PAR_Y', 'mm10___ENSMUSG00000051951', 'ENSG00000182378-1', 'HLA-A', 'TOYG1.2', 'GRCh38_CD4')] == [
        'ENSG00000182378', 'ENSMUSG00000051951', 'ENSG00000182378', 'HLA-A', 'TOYG1.2', 'GRCh38_CD4']

def test_order_of_the_columns_of_ids():
    var = pd.DataFrame(dict(Accession=ids, feature_id=ids, gene_ids=ids, ensembl_id=ids, other=ids))
    for c in ('ensembl_id', 'gene_ids', 'feature_id', 'Accession'):
        assert id_column(var) == c
        var = var.drop(columns=c)
    assert id_column(var) == 'index'

def test_the_copies_on_y_are_summed(want):
    a = ad.AnnData(sparse.hstack([counts(), counts()]).tocsr(), pd.DataFrame(index=barcodes), pd.DataFrame(index=ids + [f'{i}.3_PAR_Y' for i in ids]))
    got = tokenize(a, human)
    assert tokens(got) == want and got.match.summed == g

def test_a_little_of_another_species_is_not_told():
    few = sparse.csr_matrix((np.ones(1, np.float32), ([0], [0])), (n, 12))
    a = ad.AnnData(sparse.hstack([counts(), few]).tocsr(), pd.DataFrame(index=barcodes), pd.DataFrame(index=ids + [f'ENSMUSG{i:011d}' for i in range(12)]))
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        tokenize(a, human)

def test_mouse_alone():
    a = made()
    a.var_names = [f'ENSMUSG{i:011d}' for i in range(g)]
    with quiet(), says(GeneMatchError, 'another species', 'orthologs'): tokenize(a, human)
    b = made('symbol')
    b.var_names = [s.capitalize() for s in symbols]
    with pytest.warns(UserWarning, match='those of the mouse'): tokenize(b, human)

def test_orthologs_of_genes_that_are_not_human():
    a = made()
    a.var_names = [f'ENSMUSG{i:011d}' for i in range(g)]
    table = pd.DataFrame(dict(mouse=list(a.var_names), version=[f'v{i}' for i in range(g)], human=ids))
    with says(GeneMatchError, 'table of orthologs', 'columns'): tokenize(a, human, orthologs=table)

def test_the_column_is_named_for_raw_and_in_the_verb():
    a = made('symbol', ids=ids)
    a.var_names = [f'x{i}' for i in range(g)]
    a.raw = a.copy()
    a.X = np.log1p(a.X)
    for f in (lambda: tokenize(a, human), lambda: gf.pp.tokenize(a, human)):
        with quiet(), says(GeneMatchError, "gene_ids='ids'"): f()
    with quiet(): assert len(tokenize(a, human, gene_ids='ids')) == n

def test_the_terminal_speaks_of_options(tmp_path, capsys):
    a = made('symbol', ids=ids)
    a.var_names = [f'x{i}' for i in range(g)]
    a.write_h5ad(tmp_path/'a.h5ad')
    human.save(tmp_path)
    with quiet(): assert cli.main(['tokenize', str(tmp_path/'a.h5ad'), '--vocabulary', str(tmp_path), '--out', str(tmp_path/'o')]) == 2
    assert "--gene-ids 'ids'" in capsys.readouterr().err

official = Path(os.environ.get('GENEFORMER_NB_DATA', '/nowhere'))/'data/official'
needs_official = pytest.mark.skipif(not official.is_dir(), reason='the official dictionaries are not here')

@needs_official
def test_retired_symbols_in_v1():
    v = Vocabulary.official('V1', official)
    m = match_genes(['GNB2L1', 'IL8', 'MUT', 'TBX5', 'NOGENE'], v)
    assert m.report()['symbol of a later dictionary'] == 3 and m.report()['matched'] == 4
    assert v.symbol([v.genes[i] for i in m.index[:3]]) == ['RACK1', 'CXCL8', 'MMUT'] and v.token('IL8') == v.token('CXCL8')
    assert Vocabulary.from_json(v.to_json()).newer == v.newer and v.subset(np.arange(9)).newer.keys() <= v.newer.keys()

@needs_official
def test_dictionaries_under_earlier_names(tmp_path):
    kinds = 'token_dictionary', 'gene_median_dictionary', 'gene_name_id_dict', 'ensembl_mapping_dict'
    for k in kinds:
        (tmp_path/'a/geneformer').mkdir(parents=True, exist_ok=True), (tmp_path/'b').mkdir(exist_ok=True)
        shutil.copy(official/f'geneformer/{k}_gc104M.pkl', tmp_path/f'a/geneformer/{k}_gc95M.pkl')
        shutil.copy(official/f'geneformer/gene_dictionaries_30m/{k}_gc30M.pkl', tmp_path/f'b/{k}.pkl')
    for version, folder in dict(V2='a', V1='b').items():
        assert Vocabulary.official(version, tmp_path/folder).hash == Vocabulary.official(version, official).hash
    f = tmp_path/'a/geneformer/token_dictionary_gc95M.pkl'
    f.write_bytes(f.read_bytes() + b' ')
    with says(GeneformerError, 'token_dictionary_gc104M.pkl'): Vocabulary.official('V2', tmp_path/'a')

# --- the same cells twice

def test_filtered_and_raw_of_starsolo(tmp_path):
    write_mtx(tmp_path/'filtered', zipped=False)
    raw = write_mtx(tmp_path/'raw', zipped=False)
    lines = (raw/'barcodes.tsv').read_text().splitlines()
    (raw/'barcodes.tsv').write_text('\n'.join(lines + ['empty1', 'empty2']) + '\n')
    head = (raw/'matrix.mtx').read_text().splitlines()
    head[2] = f"{g} {n + 2} {head[2].split()[2]}"
    (raw/'matrix.mtx').write_text('\n'.join(head) + '\n')
    with says(CountsError, 'filtered', 'raw', 'same cells'): tokenize(tmp_path, human)

def test_outs_with_what_is_no_matrix(tmp_path):
    for name in ('filtered', 'raw'): write_10x(tmp_path/f'{name}_feature_bc_matrix.h5')
    with h5py.File(tmp_path/'molecule_info.h5', 'w') as f: f['barcodes'] = [1]
    with says(CountsError, 'filtered_feature_bc_matrix.h5', 'twice'): tokenize(tmp_path, human)

def test_samples_of_the_same_numbers_as_names(tmp_path):
    some = []
    for seed in range(3):
        a = ad.AnnData(counts(seed=seed), var=pd.DataFrame(index=ids))
        some.append(a)
    assert len(tokenize(some, human)) == 3*n
    with says(CountsError, 'same cells'): tokenize([*some, some[1].copy()], human)

def test_the_same_cells_in_another_order_of_genes(tmp_path):
    with says(CountsError, 'same cells'): tokenize([made(), made()[::-1, ::-1].copy()], human)

# --- tables

def test_numbers_from_a_file_stay_numbers(tmp_path):
    a = made()
    a.obs['age'], a.obs['smoker'] = pd.array([41, None]*(n//2), dtype='Int64'), pd.array([True, None]*(n//2), dtype='boolean')
    a.obs['stage'], a.obs['grade'] = pd.Categorical([3, None]*(n//2)), pd.Categorical([1.5, 2.5]*(n//2))
    a.write_h5ad(tmp_path/'a.h5ad')
    tokenize_to(tmp_path/'a.h5ad', human, tmp_path/'x', rows=5, block=2)
    o = Cells.load(tmp_path/'x', human).obs
    assert [o[k].iloc[0] for k in ('age', 'smoker', 'stage', 'grade')] == [41, True, 3, 1.5]
    assert [int(o[k].isna().sum()) for k in ('age', 'smoker', 'stage', 'grade')] == [n//2]*3 + [0]
    import datasets
    assert datasets.load_from_disk(str(tmp_path/'x')).features['age'].dtype == 'int64'

def test_class_labels_with_holes(tmp_path):
    import datasets
    d = datasets.Dataset.from_dict(dict(input_ids=[[2, 3], [3]], y=[1, None]), features=datasets.Features(dict(
        input_ids=datasets.Sequence(datasets.Value('int32')), y=datasets.ClassLabel(names=['a', 'b']))))
    d.save_to_disk(str(tmp_path/'d'))
    o = Cells.load(tmp_path/'d').obs
    assert o.y.iloc[0] == 'b' and o.y.isna().tolist() == [False, True]

def test_a_part_of_a_backed_adata_is_refused(tmp_path):
    made().write_h5ad(tmp_path/'a.h5ad')
    a = ad.read_h5ad(tmp_path/'a.h5ad', backed='r')
    with says(GeneformerError, 'copy=True'): gf.pp.tokenize(a[:3], human)
    gf.pp.tokenize(a, human)
    assert 'X_ranks' in a.obsm

# --- checkpoints

@pytest.fixture
def checkpoint(tmp_path):
    model = gf.Geneformer.new('nano', human, **tiny)
    model.save_pretrained(tmp_path/'m')
    return model, tmp_path/'m'

@pytest.mark.parametrize('more', [dict(_attn_implementation='flash_attention_2'), dict(attn_implementation='flash_attention_2'),
                                  dict(use_flash_attn=True, auto_map={'AutoModel': 'x.Y'}, quantization_config=dict(load_in_8bit=True)),
                                  dict(torch_dtype='float16', dtype='bfloat16', strange={'a': [1]})])
def test_fields_of_a_config_that_do_not_matter(more, checkpoint):
    model, folder = checkpoint
    conf = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(conf | more))
    cells = tokenize(made(), human)
    assert np.allclose(gf.Geneformer.from_pretrained(folder).encode(cells, show=False), model.encode(cells, show=False), atol=1e-6)

@pytest.mark.parametrize('before,after', [('LayerNorm.weight', 'LayerNorm.gamma'), ('LayerNorm.bias', 'LayerNorm.beta'), ('bert.', 'module.bert.'),
                                          ('bert.', '_orig_mod.module.bert.')])
def test_names_of_tensors(before, after, checkpoint):
    from safetensors.torch import load_file, save_file
    model, folder = checkpoint
    T = load_file(folder/'model.safetensors')
    renamed = {(k.replace(before, after) if before != 'bert.' else after.replace('bert.', '') + k): v for k, v in T.items()}
    assert set(renamed) != set(T)
    save_file(renamed, folder/'model.safetensors', metadata=dict(format='pt'))
    cells = tokenize(made(), human)
    assert np.allclose(gf.Geneformer.from_pretrained(folder).encode(cells, show=False), model.encode(cells, show=False), atol=1e-6)

@pytest.mark.parametrize('end', ['.zarr', '.h5ad'])
def test_embed_writes_what_the_name_says(end, checkpoint, tmp_path):
    made().write_h5ad(tmp_path/'a.h5ad')
    assert cli.main(['embed', str(tmp_path/'a.h5ad'), '--model', str(checkpoint[1]), '--out', str(tmp_path/f'out{end}')]) == 0
    assert read_any(tmp_path/f'out{end}').obsm['X_geneformer'].shape == (n, 16) and (tmp_path/f'out{end}').is_dir() == (end == '.zarr')

@pytest.mark.parametrize('where', ['obs', 'var', 'raw/var'])
def test_reserved_names_of_columns(where, checkpoint, tmp_path, capsys):
    a = made()
    a.raw = a.copy()
    a.write_h5ad(tmp_path/'a.h5ad')
    with h5py.File(tmp_path/'a.h5ad', 'r+') as f:
        if f[where].attrs['_index'] == '_index': f[where].attrs['column-order'] = np.array(['_index'], dtype=h5py.string_dtype())
    assert cli.main(['embed', str(tmp_path/'a.h5ad'), '--model', str(checkpoint[1]), '--out', str(tmp_path/'out.h5ad')]) == 0
    assert "'index_'" in capsys.readouterr().out and read_any(tmp_path/'out.h5ad').n_obs == n

def test_what_cannot_be_written_is_refused_before_the_work(checkpoint, tmp_path):
    a = made()
    a.obs['odd'] = pd.Series([1, 'x', None, 2.5]*3, index=a.obs_names, dtype=object)
    with says(GeneformerError, 'odd'): cli.make_writable(a)

# --- plots and processes

def test_ranks_of_a_barcode_that_stands_twice():
    a = made()
    gf.pp.tokenize(a, human)
    a.obs_names = [barcodes[0]]*2 + barcodes[2:]
    with pytest.warns(UserWarning, match='first of them'): gf.pl.ranks(a, human, cell=barcodes[0])
    gf.pl.ranks(a, human, cell=barcodes[3:5])

def test_processes_without_a_guard(tmp_path):
    made().write_h5ad(tmp_path/'a.h5ad')
    human.save(tmp_path)
    (tmp_path/'s.py').write_text(f"""from geneformer_nb.data.corpus import tokenize_to
from geneformer_nb.data.vocabulary import Vocabulary
tokenize_to({str(tmp_path/'a.h5ad')!r}, Vocabulary.load({str(tmp_path)!r}), {str(tmp_path/'o')!r}, rows=5, executor='processes', workers=2)""")
    said = subprocess.run([sys.executable, str(tmp_path/'s.py')], capture_output=True, text=True)
    last = said.stderr.strip().splitlines()[-1]
    assert said.returncode and '__main__' in last and 'GeneformerError' in last, said.stderr

def test_a_vocabulary_of_another_species_knows_its_own():
    import warnings
    a = made()
    a.var_names = [f'mm10___ENSMUSG{i:011d}' for i in range(g)]
    v = Vocabulary.from_counts(a[:, :g//2].copy())
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        got = tokenize(a, v)
    assert got.match.report()['matched'] == g//2 and got.match.report()['another species'] == 0

def test_a_table_of_genes_beside_files_of_counts(want, tmp_path):
    made().write_h5ad(tmp_path/'a.h5ad')
    (tmp_path/'genes.tsv').write_text('x\n')
    assert ranks(tmp_path, human) == want

def test_a_zarr_of_any_name(want, tmp_path):
    made().write_zarr(tmp_path/'store')
    assert ranks(tmp_path/'store', human) == want and read_any(tmp_path/'store').shape == (n, g)

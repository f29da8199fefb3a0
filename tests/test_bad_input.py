"Bad input: each kind is refused, or mended and reported, in a sentence that names what is wrong and what to do"
import os, pickle, shutil, tempfile, warnings
import anndata as ad, geneformer_nb as gf, numpy as np, pandas as pd, pytest
from scipy import sparse
from geneformer_nb.data.cells import Cells
from geneformer_nb.core import (CountsError, GeneformerError, GeneMatchError, LeakError, MissingDataError, StorageError,
                                VocabularyError)
from geneformer_nb.model.embed import state_embeddings
from geneformer_nb.evaluate.splits import audit_split, split_donors
from geneformer_nb.tasks.finetuning import finetune
from geneformer_nb.data.vocabulary import Vocabulary, safe_unpickle
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.perturb.actions import KO, OE, each, perturb
from geneformer_nb.perturb.shards import perturb_to
from geneformer_nb.train.pretraining import pretrain
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.toy import simulate
from sentences import says

small = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)

@pytest.fixture(scope='module')
def cohort(): return simulate(n_cells=60, n_donors=6, n_genes=80, seed=0)
@pytest.fixture(scope='module')
def vocab(cohort): return Vocabulary.from_counts(cohort, symbols='symbol', name='toy', max_len=128)
@pytest.fixture(scope='module')
def cells(cohort, vocab): return tokenize(cohort, vocab)
@pytest.fixture(scope='module')
def model(vocab): return Geneformer.new('nano', vocab, **small)

def with_X(adata, X):
    out = adata.copy()
    out.X = X
    return out

def with_names(adata, names):
    out = adata.copy()
    out.var_names = list(names)
    return out

def equal(a, b): return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.offsets, b.offsets)

# --- genes

def test_unknown_ids_all(cohort, vocab):
    with says(GeneMatchError, '0.0%', 'X1', vocab.genes[0], vocab.symbols[vocab.genes[0]], "gene_ids='symbol'"):
        tokenize(with_names(cohort, [f'X{i}' for i in range(80)]), vocab)

def test_unknown_ids_some_are_counted(cohort, vocab, cells):
    got = tokenize(with_names(cohort, [g if i % 4 else f'X{i}' for i, g in enumerate(cohort.var_names)]), vocab)
    report = got.match.report()
    assert (report['genes'], report['matched'], report['unknown']) == (80, 60, 20) and 50 < report['% of counts matched'] < 100
    lost = set(vocab.token(list(cohort.var_names[::4])))
    for i in range(len(cells)): assert got[i].tokens.tolist() == [t for t in cells[i].tokens if t not in lost]

def test_symbols_are_mapped_and_reported(cohort, vocab, cells):
    got = tokenize(with_names(cohort, cohort.var.symbol), vocab)
    assert equal(got, cells) and got.match.report()['symbol or retired id'] == 80

def test_symbols_without_a_vocabulary_that_has_them(cohort, vocab):
    bare = Vocabulary(vocab.genes, vocab.medians, name='bare')
    with says(GeneMatchError, 'bare', cohort.var.symbol.iloc[0], bare.genes[0], 'knows no symbols'):
        tokenize(with_names(cohort, cohort.var.symbol), bare)

def test_version_suffixes_are_stripped_and_reported(cohort, vocab, cells):
    got = tokenize(with_names(cohort, [f'{g}.{i}' for i, g in enumerate(cohort.var_names)]), vocab)
    assert equal(got, cells) and got.match.report()['version stripped'] == 80

def test_duplicates_and_lower_case_are_summed(cohort, vocab, cells):
    "Half of every count in a second row of the same gene, written in lower case or with a version"
    X = cohort.X.toarray()
    part = np.floor(X/2)
    twice = ad.AnnData(np.hstack([X - part, part]).astype(np.float32), cohort.obs.copy())
    twice.var_names = list(cohort.var_names) + [g.lower() if i % 2 else f'{g}.3' for i, g in enumerate(cohort.var_names)]
    got = tokenize(twice, vocab)
    assert equal(got, cells) and got.match.summed == 80 and got.match.report()['summed into another row'] == 80

def test_missing_ids_are_counted(cohort, vocab):
    got = tokenize(with_names(cohort, ['nan', ''] + list(cohort.var_names[2:])), vocab)
    assert got.match.report()['no id'] == 2

def test_a_column_of_ids_that_is_not_there(cohort, vocab):
    with says(GeneMatchError, "'hugo'", 'symbol', "gene_ids='index'"): tokenize(cohort, vocab, gene_ids='hugo')

# --- counts

def bad_value(adata, value):
    X = adata.X.copy()
    X.data[10] = value
    cell = adata.obs_names[np.searchsorted(X.indptr, 10, 'right') - 1]
    return with_X(adata, X), cell, adata.var_names[X.indices[10]]

@pytest.mark.parametrize('value,words', [(np.nan, ('NaN', 'set missing values to 0')), (np.inf, ('infinity',)),
                                         (-1, ('negative', 'counts_layer=…')), (.5, ('whole numbers', 'logged=True', 'fractional=True'))])
@pytest.mark.parametrize('where', ['memory', 'file'])
def test_bad_counts_name_the_cell_and_the_gene(cohort, vocab, value, words, where, tmp_path):
    bad, cell, gene = bad_value(cohort, value)
    if where == 'file': bad.write_h5ad(tmp_path/'bad.h5ad')
    with says(CountsError, cell, gene, *words): tokenize(bad if where == 'memory' else tmp_path/'bad.h5ad', vocab)

def test_log_normalized(cohort, vocab, cells):
    X = cohort.X.astype(np.float64)
    log = with_X(cohort, sparse.csr_matrix(X.multiply(1e4/X.sum(1))).log1p())
    with says(CountsError, 'log-normalized', 'logged=True'): tokenize(log, vocab)
    got = tokenize(log, vocab, logged=True)
    assert got.lengths.tolist() == cells.lengths.tolist()
    for i in range(len(cells)): same_but_for_ties(cohort.X[[i]], got[i].tokens, cells[i].tokens, vocab)

def same_but_for_ties(row, a, b, vocab):
    "Same genes, and the same order wherever two values differ by more than rounding"
    value = np.zeros(vocab.n_tokens)
    value[len(vocab.specials):] = row.toarray()[0]/vocab.medians
    assert sorted(a) == sorted(b)
    np.testing.assert_allclose(value[a], value[b], rtol=1e-5)

def test_normalized_without_log(cohort, vocab):
    with says(CountsError, 'whole numbers', 'normalized'): tokenize(with_X(cohort, cohort.X*1.37), vocab)

def test_counts_said_to_be_logs(cohort, vocab):
    with says(CountsError, 'logged=True', 'logged=False'): tokenize(cohort, vocab, logged=True)

def test_scaled_real_cells_are_refused():
    from geneformer_nb.data.datasets import load
    a = load('pbmc68k_reduced')
    v = Vocabulary.from_counts(a, logged=True)
    with says(CountsError, 'negative', 'z-scored'): tokenize(ad.AnnData(a.X, a.obs, a.var), v)
    with says(CountsError, 'raw.X', 'logged=True'): tokenize(a, v) # logs are taken only when they are said to be logs
    assert len(tokenize(a, v, logged=True)) == 700

def test_a_layer_that_is_not_there(cohort, vocab):
    with says(CountsError, "'spliced'", 'layers here: none'): tokenize(cohort, vocab, counts_layer='spliced')

def test_few_counts_said_to_be_logs(cohort, vocab):
    "None is too large for a logarithm, but all are whole"
    with says(CountsError, 'whole numbers', 'logged=False'): tokenize(with_X(cohort, cohort.X.minimum(9)), vocab, logged=True)

@pytest.mark.parametrize('dtype', [object, str, complex])
def test_values_that_are_no_numbers(cohort, vocab, dtype):
    with says(CountsError, 'type', 'astype'): tokenize(ad.AnnData(cohort.X.toarray().astype(dtype), var=cohort.var), vocab)

layouts = dict(csr=lambda X: X, csc=lambda X: X.tocsc(), dense=lambda X: X.toarray(), whole=lambda X: X.toarray().astype(int),
               double=lambda X: X.astype(np.float64), half=lambda X: X.minimum(2000).toarray().astype(np.float16),
               array=lambda X: sparse.csr_array(X), unsorted=lambda X: backwards(X), zeros=lambda X: with_zeros(X))

def backwards(X):
    "The same matrix with the entries of each row in falling order of column"
    X = X.copy()
    for a, b in zip(X.indptr, X.indptr[1:]): X.indices[a:b], X.data[a:b] = X.indices[a:b][::-1].copy(), X.data[a:b][::-1].copy()
    X.has_sorted_indices = False
    return X

def with_zeros(X):
    "The same matrix with every entry stored"
    full = sparse.csr_matrix(np.ones(X.shape, np.float32))
    full.data = X.toarray().ravel()
    return full

@pytest.mark.parametrize('kind', ['memory', 'file', 'backed'])
@pytest.mark.parametrize('layout', list(layouts))
def test_layout_does_not_matter(cohort, vocab, cells, layout, kind, tmp_path):
    a = with_X(cohort, layouts[layout](cohort.X))
    if kind != 'memory': a.write_h5ad(tmp_path/'a.h5ad')
    got = tokenize(dict(memory=lambda: a, file=lambda: tmp_path/'a.h5ad', backed=lambda: ad.read_h5ad(tmp_path/'a.h5ad', backed='r'))[kind](),
                   vocab, block=17)
    assert equal(got, cells) and list(got.obs.index) == list(cells.obs.index)

# --- emptiness

def hollow(adata, i):
    X = adata.X.toarray()
    X[i] = 0
    return with_X(adata, sparse.csr_matrix(X))

def test_an_empty_cell_is_dropped_and_named(cohort, vocab, cells):
    with pytest.warns(UserWarning, match=cohort.obs_names[5]) as w: got = tokenize(hollow(cohort, 5), vocab)
    assert 'dropped' in str([str(x.message) for x in w]) and list(got.obs.index) == list(np.delete(cohort.obs_names, 5))
    assert equal(got, cells[np.delete(np.arange(60), 5)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        assert tokenize(hollow(cohort, 5), vocab, keep_empty=True).lengths[5] == 0

def test_an_empty_cell_is_embedded_as_nan(cohort, model):
    a = hollow(cohort, 5)
    with pytest.warns(UserWarning, match='nan'):
        gf.pp.tokenize(a, model)
        gf.tl.embed(a, model)
    assert np.flatnonzero(np.isnan(a.obsm['X_geneformer']).any(1)).tolist() == [5]

@pytest.mark.parametrize('rows,columns', [(slice(0), slice(None)), (slice(None), slice(0))], ids=['no cells', 'no genes'])
def test_an_empty_anndata(cohort, vocab, model, rows, columns):
    empty = cohort[rows, columns].copy()
    with says(CountsError, 'empty', f'{empty.n_obs} cells × {empty.n_vars} genes'): tokenize(empty, vocab)
    with says(CountsError, 'empty'): Vocabulary.from_counts(empty)
    with says(CountsError, 'empty'): gf.pp.tokenize(empty, model)

def test_an_empty_file(cohort, vocab, tmp_path):
    cohort[:0].copy().write_h5ad(tmp_path/'none.h5ad')
    with says(CountsError, 'empty', '0 cells'): tokenize(tmp_path/'none.h5ad', vocab)

def test_nothing_but_zeros(cohort, vocab):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        with says(CountsError, 'All 60 cells are empty'): tokenize(with_X(cohort, cohort.X*0), vocab)

# --- perturbations

@pytest.mark.parametrize('what', [KO('GATA4'), OE('GATA4'), KO('TF01', 'GATA4'), each('GATA4'), each(['TF01', 'GATA4'], OE)], ids=str)
def test_a_gene_that_is_not_in_the_vocabulary(model, cells, what):
    with says(VocabularyError, 'GATA4', "'toy'", 'ids like'): perturb(model, cells, what)

def test_a_near_miss_is_suggested(model, cells):
    with says(VocabularyError, 'TF011', 'Did you mean', 'TF01'): perturb(model, cells, KO('TF011'))

def test_a_gene_that_is_in_no_cell(model, cells, vocab, tmp_path):
    t = vocab.token('TF01')
    lack = cells[[i for i in range(len(cells)) if t not in cells[i].tokens]]
    assert 0 < len(lack) < 60
    for what in (KO('TF01'), each('TF01')):
        with says(GeneformerError, 'Nothing to perturb', f'none of the {len(lack)} cells', '1 genes' if what == each('TF01') else 'TF01'):
            perturb(model, lack, what)
    assert len(perturb(model, lack, OE('TF01'))) == len(lack) # what is not there can be brought in

def test_words_that_are_no_perturbation(model, cells):
    for what in ('TF01', None, 5, KO):
        with says(GeneformerError, 'no perturbation', "KO('GENE')"): perturb(model, cells, what)
    for call in (lambda: KO(), lambda: OE(5), lambda: KO(['TF01'])):
        with says(GeneformerError, 'takes gene names'): call()

# --- a checkpoint and another vocabulary

def test_cells_of_another_vocabulary(cohort, vocab, model):
    other = Vocabulary(vocab.genes, vocab.medians*2, name='other')
    foreign = tokenize(cohort, other)
    for call in (lambda: model.encode(foreign), lambda: perturb(model, foreign, each()),
                 lambda: finetune(model, foreign, 'disease', 'donor'), lambda: state_embeddings(foreign, model, 'disease')):
        with says(VocabularyError, "'toy'", vocab.hash, other.hash, 'model.vocabulary'): call()

def test_a_checkpoint_of_another_size(model, vocab, tmp_path):
    model.save_pretrained(tmp_path/'m')
    other = Vocabulary(vocab.genes[:-1], vocab.medians[:-1], max_len=128, name='other')
    with says(VocabularyError, '82', '81', "'other'"): Geneformer.from_pretrained(tmp_path/'m', vocabulary=other)
    other.save(tmp_path/'m')
    with says(VocabularyError, '82', '81'): Geneformer.from_pretrained(tmp_path/'m')

def test_a_checkpoint_without_a_vocabulary(model, tmp_path):
    model.save_pretrained(tmp_path/'m')
    (tmp_path/'m/vocabulary.json').unlink()
    with says(VocabularyError, "'m'", '82 tokens', 'vocabulary=…'): Geneformer.from_pretrained(tmp_path/'m')

def test_a_vocabulary_that_was_edited(vocab, tmp_path):
    f = vocab.save(tmp_path)
    f.write_text(f.read_text().replace(vocab.genes[3], 'TOYG99999999999'))
    with says(VocabularyError, 'vocabulary.json', 'changed', vocab.hash): Vocabulary.load(tmp_path)

def test_cells_saved_and_loaded_with_another_vocabulary(cells, vocab, tmp_path):
    cells.save(tmp_path/'c')
    with says(VocabularyError, vocab.hash): Cells.load(tmp_path/'c', Vocabulary(vocab.genes, vocab.medians*2))

def test_official_cells_loaded_without_their_vocabulary(cohort, tmp_path):
    "A V2 folder of the official code does not say that its cells are framed; they must not pass for cells of genes only"
    two = Vocabulary.from_counts(cohort, cls_token=True, max_len=128)
    tokenize(cohort[:9].copy(), two).save(tmp_path/'v2.dataset')
    (tmp_path/'v2.dataset/geneformer_nb.json').unlink()
    m = Geneformer.new('nano', two, **small)
    with says(VocabularyError, '<cls>', 'Cells.load'): m.encode(Cells.load(tmp_path/'v2.dataset'))
    assert len(m.encode(Cells.load(tmp_path/'v2.dataset', two))) == 9

@pytest.mark.parametrize('what', ['V1', None, 5])
def test_no_vocabulary(cohort, what):
    with says(VocabularyError, 'model.vocabulary', type(what).__name__): tokenize(cohort, what)

# --- pickles

class Code:
    def __reduce__(self): return os.system, ('echo this ran > ran.txt',)

def test_a_pickle_with_code_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f = tmp_path/'token_dictionary_gc104M.pkl'
    f.write_bytes(pickle.dumps({'<pad>': 0, '<mask>': 1, 'A': Code()}))
    with says(VocabularyError, f'{os.system.__module__}.system', 'code', 'not opened'): safe_unpickle(f)
    (tmp_path/'geneformer').mkdir(); f.rename(tmp_path/'geneformer'/f.name)
    with says(VocabularyError, 'code'): Vocabulary.official('V2', tmp_path)
    assert not (tmp_path/'ran.txt').exists()

def test_what_only_looks_like_a_pickle(tmp_path):
    (tmp_path/'x.pkl').write_text('version https://git-lfs.github.com/spec/v1\n')
    with says(VocabularyError, 'x.pkl', 'git-lfs'): safe_unpickle(tmp_path/'x.pkl')

def test_dictionaries_that_are_not_there(tmp_path):
    with says(MissingDataError, 'token_dictionary_gc104M.pkl', 'huggingface.co/ctheodoris/Geneformer'):
        Vocabulary.official('V2', tmp_path)

# --- donors and states

def test_a_donor_in_both_splits(model, cells):
    split = np.where(np.arange(60) < 30, 'train', 'test')
    for call in (lambda: audit_split(cells.obs, split, 'donor', 'disease'),
                 lambda: finetune(model, cells, 'disease', 'donor', split=split)):
        with says(LeakError, '6 donors', "'D01'", 'split_donors'): call()

def test_a_cell_in_both_splits(cells):
    twice = pd.concat([cells.obs.iloc[:3], cells.obs.iloc[:3]]).assign(id=1)
    with says(LeakError): audit_split(twice, ['train']*3 + ['test']*3, 'donor')

def test_a_class_of_one_donor(cells):
    few = cells.obs[cells.obs.donor.isin(['D01', 'D02', 'D03', 'D04'])]
    with says(LeakError, 'one donor', 'D0'): split_donors(few, 'donor', 'disease')

def test_donors_that_are_not_known(cells):
    some = cells.obs.assign(donor=cells.obs.donor.astype(object).where(np.arange(60) > 2))
    with pytest.warns(UserWarning, match="3 of 60 cells have no 'donor'"): split = split_donors(some, 'donor', 'disease')
    assert (split == '').sum() == 3
    with says(GeneformerError, "'donor'", '3 of 60'): audit_split(some, np.where(split == '', 'test', split), 'donor')

def test_no_donor_is_named(model, cells):
    with says(GeneformerError, 'donor=…', 'split'): finetune(model, cells, 'disease')

def test_a_state_that_is_not_in_the_column(model, cells):
    with says(GeneformerError, "disease = 'healthy'", 'dilated, hypertrophic, non-failing'):
        state_embeddings(cells, model, 'disease', ['healthy'])
    with says(GeneformerError, "'illness'", 'disease'): state_embeddings(cells, model, 'illness')

def test_a_state_vector_of_another_model(model, cells):
    for vector in (np.zeros(7), np.full(16, np.nan), None):
        with says(GeneformerError, "'goal'", '16 numbers', 'state_embeddings'): perturb(model, cells, each(), states=dict(goal=vector))

# --- disks and folders

@pytest.fixture
def idle(monkeypatch):
    "No model may run: what is wrong must be said before the work"
    def work(*a, **kw): raise AssertionError('the work began before the folder was checked')
    monkeypatch.setattr(Geneformer, 'hidden', work)

jobs = dict(pretrain=lambda model, cells, f: pretrain(cells, 'nano', f, steps=1, **small),
            perturb_to=lambda model, cells, f: perturb_to(f, model, cells, each()),
            save=lambda model, cells, f: model.save_pretrained(f))

@pytest.mark.parametrize('job', list(jobs))
def test_a_folder_that_cannot_be_written(model, cells, tmp_path, idle, job):
    (tmp_path/'file').write_text('mine')
    with says(StorageError, 'file', 'Choose another folder'): jobs[job](model, cells, tmp_path/'file'/'results')
    assert (tmp_path/'file').read_text() == 'mine'

@pytest.mark.parametrize('job', list(jobs))
def test_a_folder_without_rights(model, cells, tmp_path, idle, monkeypatch, job):
    def no(*a, **kw): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(tempfile, 'NamedTemporaryFile', no) # rights do not bind root, so they are played
    with says(StorageError, 'results', 'Permission denied', 'Choose another folder'): jobs[job](model, cells, tmp_path/'results')

@pytest.mark.parametrize('job', ['pretrain', 'save'])
def test_a_full_disk(model, cells, tmp_path, idle, monkeypatch, job):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with says(StorageError, 'results', '0.0 GB free', 'free some space'): jobs[job](model, cells, tmp_path/'results')

def test_a_disk_that_fills_while_writing(cells, tmp_path, monkeypatch):
    "What stood there stays as it was, and nothing half-written is left"
    import pyarrow as pa
    cells[:5].save(tmp_path/'c')
    def full(*a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pa.ipc, 'new_stream', full)
    with says(StorageError, 'No space left', 'Free some space'): cells.save(tmp_path/'c')
    monkeypatch.undo()
    assert equal(Cells.load(tmp_path/'c'), cells[:5]) and os.listdir(tmp_path) == ['c']

def test_a_folder_of_something_else_is_not_replaced(cells, tmp_path):
    (tmp_path/'thesis').mkdir(); (tmp_path/'thesis/chapter.txt').write_text('mine')
    with says(StorageError, "'thesis'", 'new folder'): cells.save(tmp_path/'thesis')
    assert (tmp_path/'thesis/chapter.txt').read_text() == 'mine'

def test_results_of_another_run(model, cells, tmp_path):
    perturb_to(tmp_path/'r', model, cells[:2], each())
    with says(StorageError, "'r'", 'actions was', 'another folder'): perturb_to(tmp_path/'r', model, cells[:2], each(op=OE))

# --- files

@pytest.mark.parametrize('name', ['counts.csv', 'counts.rds'])
def test_a_file_of_another_kind(vocab, tmp_path, name):
    (tmp_path/name).write_text('x')
    with says(CountsError, name, '.h5ad', 'scanpy'): tokenize(tmp_path/name, vocab)

def test_a_file_that_is_not_there(vocab, tmp_path):
    with says(CountsError, 'gone.h5ad'): tokenize(tmp_path/'gone.h5ad', vocab)

@pytest.mark.parametrize('name', ['a.h5ad', 'a.loom', 'a.h5', 'a.zarr'])
def test_a_damaged_file(vocab, tmp_path, name):
    (tmp_path/name).write_text('half a download')
    with says(CountsError, f"'{name}' cannot be read", 'damaged'): tokenize(tmp_path/name, vocab)

def test_what_is_neither_data_nor_a_path(cohort, vocab):
    for what in (None, 5, cohort.X, [1]):
        with says(CountsError, 'AnnData or the path', type(what[0] if isinstance(what, list) else what).__name__): tokenize(what, vocab)

def test_damaged_cells_and_vocabularies(cells, vocab, tmp_path):
    cells.save(tmp_path/'c'); f = tmp_path/'c/data-00000-of-00001.arrow'
    f.write_bytes(f.read_bytes()[:500])
    with says(StorageError, "'c' is damaged"): Cells.load(tmp_path/'c')
    vocab.save(tmp_path/'v.json').write_text('{')
    with says(VocabularyError, 'v.json', 'vocabulary=…'): Vocabulary.load(tmp_path/'v.json')

def test_a_folder_that_holds_no_cells_or_no_model(tmp_path):
    with says(StorageError, 'state.json'): Cells.load(tmp_path)
    with says(MissingDataError, 'config.json', 'path on the hub'): Geneformer.from_pretrained(tmp_path)

# --- what runs long must not fail at its end, and what is wrong must not pass

def test_a_checkpoint_given_another_vocabulary_of_its_size(model, vocab, tmp_path):
    model.save_pretrained(tmp_path/'m')
    other = Vocabulary(vocab.genes, vocab.medians*2, max_len=128, name='other')
    with says(VocabularyError, "'m'", "'toy'", "'other'", 'leave vocabulary'): Geneformer.from_pretrained(tmp_path/'m', vocabulary=other)
    assert Geneformer.from_pretrained(tmp_path/'m', vocabulary=vocab).vocabulary.hash == vocab.hash

def test_a_damaged_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path/'m')
    weights = tmp_path/'m/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:999])
    with says(MissingDataError, "'m'", 'fetch it again'): Geneformer.from_pretrained(tmp_path/'m')
    (tmp_path/'m/config.json').write_text('{')
    with says(MissingDataError, 'config.json'): Geneformer.from_pretrained(tmp_path/'m')

def test_pretraining_a_model_of_another_vocabulary(cells, vocab):
    two = Vocabulary(vocab.genes, vocab.medians, cls=True, max_len=128)
    with says(VocabularyError, vocab.hash, two.hash): pretrain(cells, Geneformer.new('nano', two, **small), steps=1)

def test_an_anndata_where_cells_are_wanted(cohort, model):
    for call in (lambda: model.encode(cohort), lambda: perturb(model, cohort, each()), lambda: finetune(model, cohort, 'disease', 'donor'),
                 lambda: pretrain(cohort, 'nano', steps=1)):
        with says(GeneformerError, 'tokenize(adata, model.vocabulary)', 'AnnData'): call()

def test_a_path_where_an_anndata_is_wanted(model, idle):
    with says(GeneformerError, 'AnnData', 'str', 'read_any'): gf.tl.embed('cohort.h5ad', model)

def test_baselines_of_other_cells(cohort, model, cells, idle):
    for other in (cohort[::-1].copy(), cohort[:30].copy()):
        with says(GeneformerError, 'same order', 'cells.obs.index'): finetune(model, cells, 'disease', 'donor', adata=other)

def test_one_gene_twice_in_a_perturbation(model, cells, vocab):
    for what in (OE('TF01', 'TF01'), KO('TF01') + OE('TF01'), KO('TF01', vocab.gene(vocab.token('TF01')))):
        with says(GeneformerError, 'one gene twice'): perturb(model, cells, what)
    both = perturb(model, cells[:4], each(['TF01', 'tf01'], OE))
    assert len(both) == 4 and not both.duplicated(['cell', 'gene_id']).any()

def test_a_cell_of_one_gene_tells_nothing(model, vocab):
    two = Cells([5, 7, 8, 9], [0, 1, 4], vocabulary=vocab)
    raw = perturb(model, two, [each(), each('detected', OE)], states=dict(goal=np.ones(16)))
    assert raw.cell.eq(1).all() and raw.notna().all().all()
    with says(GeneformerError, 'Nothing to perturb'): perturb(model, two[:1], each())

def test_more_genes_than_a_cell_holds(model, cells, cohort):
    short = Vocabulary(cells.vocabulary.genes, cells.vocabulary.medians, max_len=20)
    with says(GeneformerError, '25 genes', '20 tokens'):
        perturb(Geneformer.new('nano', short, **small), tokenize(cohort, short), OE(*short.genes[:25]))

def test_states_that_are_names(model, cells):
    with says(GeneformerError, 'state_embeddings'): perturb(model, cells, each(), states='dilated')
    assert list(state_embeddings(cells, model, 'disease', 'dilated')) == ['dilated']

def test_cells_without_a_state_are_no_state(model, cells):
    some = cells[list(range(20))]
    some.obs = some.obs.assign(disease=[None]*5 + ['dilated']*15)
    assert list(state_embeddings(some, model, 'disease')) == ['dilated']

def test_a_full_disk_before_a_screen(model, cells, tmp_path, idle, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with says(StorageError, 'results', 'free some space'): perturb_to(tmp_path/'results', model, cells, each())

def test_a_damaged_shard(model, cells, tmp_path):
    perturb_to(tmp_path/'r', model, cells[:2], each(), shard=1)
    (tmp_path/'r/shard-00001.parquet').write_bytes(b'')
    with says(StorageError, 'shard-00001.parquet', 'delete it'): perturb_to(tmp_path/'r', model, cells[:2], each(), shard=1)

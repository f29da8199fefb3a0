"What the official tokenizer gets wrong, one test a bug, and what each of its options is called here"
import ast, os, pickle, tracemalloc
from pathlib import Path
import anndata as ad, h5py, numpy as np, pandas as pd, pyarrow as pa, pytest
from scipy import sparse
import geneformer_nb
from geneformer_nb.data.cells import Cells
from geneformer_nb.core import CountsError, GeneformerError, GeneMatchError, StorageError, VocabularyError
from geneformer_nb.data.vocabulary import Vocabulary, match_genes
from geneformer_nb.data.sources import Source
from geneformer_nb.data.corpus import tokenize_to
from geneformer_nb.data.tokenizer import tokenize
from sentences import quiet, says, tokens

# Six genes and three cells that can be ranked in the head: counts over medians are
#   a: 4, 2, 1, -, .5, -  so tokens 2 3 4 6;  b: -, 1, 1, 1, 1, -  so a tie of four;  c: 1, -, -, -, -, 2  so tokens 7 2
ids = [f'ENSG{i:011d}' for i in range(1, 7)]
six = Vocabulary(ids, [1, 2, 4, 1, 2, 4], max_len=8, symbols=dict(zip(ids, 'ABCDEF')), aliases=dict(zip('ABCDEF', ids)),
                 name='six')
framed = Vocabulary(ids, six.medians, True, 8, name='framed')
X3 = np.array([[4, 4, 4, 0, 1, 0], [0, 2, 4, 1, 2, 0], [1, 0, 0, 0, 0, 8]], np.float32)
by_hand = [[2, 3, 4, 6], [3, 4, 5, 6], [7, 2]]

def three(X=X3, names=ids, **obs):
    cells = [*'abc'] if len(X) == 3 else [f'c{i}' for i in range(len(X))]
    var = pd.DataFrame(dict(ensembl_id=list(names)), index=[f'row{i}' for i in range(len(names))])
    return ad.AnnData(sparse.csr_matrix(X), pd.DataFrame(obs, index=cells), var)

# --- the bugs, by their numbers in the comparison with the official code

def called(names):
    "The three cells under other names: other cells"
    a = three()
    a.obs_names = [*names]
    return a

def test_bug_03_ties_go_to_the_lower_token():
    "Four equal values in cell b, and 500 in a cell of a larger vocabulary, in every order of the columns"
    assert tokens(tokenize(three(), six)) == by_hand
    many = Vocabulary([f'G{i}' for i in range(500)], np.ones(500))
    order = np.random.default_rng(0).permutation(500)
    for o in (np.arange(500), order, order[::-1]):
        a = ad.AnnData(sparse.csr_matrix(np.full((2, 500), 3, np.float32)),
                       var=pd.DataFrame(index=[f'G{i}' for i in o]))
        assert tokens(tokenize(a, many)) == [list(range(2, 502))] * 2

@pytest.mark.parametrize('again', [ids[1], ids[1].lower(), f'{ids[1]}.7', 'B', 'b'])
def test_bug_04_rows_of_one_gene_are_summed(again):
    "Gene B in a second row: 2 + 8 counts put it first in cell b; no token is said twice"
    got = tokenize(three(np.column_stack([X3, [0, 8, 0]]), [*ids, again]), six)
    assert tokens(got) == [[2, 3, 4, 6], [3, 4, 5, 6], [7, 2]] and got.match.summed == 1
    got = tokenize(three(np.column_stack([X3, [0, 0, 16]]), [*ids, again]), six)
    assert tokens(got) == [[2, 3, 4, 6], [3, 4, 5, 6], [3, 7, 2]]
    assert all(len(set(t)) == len(t) for t in tokens(got))

def test_bug_05_without_collapsing():
    "Works where every gene has one row, and names the genes that have two"
    assert tokens(tokenize(three(), six, collapse=False)) == by_hand
    with says(GeneMatchError, 'collapse=False', '1 genes', ids[1], f'{ids[1]}.7'):
        tokenize(three(np.column_stack([X3, X3[:, 0]]), [*ids, f'{ids[1]}.7']), six, collapse=False)

def test_bug_06_versions_are_stripped_and_nothing_is_written_of_nothing(tmp_path):
    got = tokenize(three(names=[f'{g}.{i}' for i, g in enumerate(ids)]), six)
    assert tokens(got) == by_hand and got.match.report()['version stripped'] == 6
    for call in (lambda a: tokenize(a, six), lambda a: tokenize_to(a, six, tmp_path/'out')):
        with says(GeneMatchError, '0.0%', 'ENSX1', ids[0]): call(three(names=[f'ENSX{i}' for i in range(6)]))
    assert not (tmp_path/'out'/'state.json').exists() and not list(tmp_path.glob('out/*.arrow'))

@pytest.mark.parametrize('kind', ['memory', 'folder'])
def test_bug_07_an_empty_cell_without_attributes(kind, tmp_path):
    a = three(np.vstack([X3, np.zeros(6), X3[0]]))
    with pytest.warns(UserWarning, match='1 of 5 cells.*c3'):
        got = tokenize(a, six, obs=[]) if kind == 'memory' else tokenize_to(a, six, tmp_path/'o', obs=[]).cells()
    assert tokens(got) == by_hand + by_hand[:1] and list(got.obs.index) == ['c0', 'c1', 'c2', 'c4']
    assert list(got.obs) == ['n_counts']

def test_bug_08_what_is_no_count_is_refused_and_n_counts_is_computed():
    for X in (np.log1p(X3), X3 / X3.sum(1, keepdims=True) * 100):
        with says(CountsError, 'whole numbers', "cell 'a'"): tokenize(three(X), six)
    with pytest.warns(UserWarning, match='n_counts.*in 2 of 3 cells'):
        got = tokenize(three(n_counts=[13., 1, 1]), six, counts=True)
    assert tokens(got) == by_hand and got.obs.n_counts.tolist() == [13, 9, 9]
    np.testing.assert_allclose(got.lists['counts'][0][8:], [8/9*1e4, 1/9*1e4])

def test_bug_09_dots_in_a_name_stay(tmp_path):
    three().write_h5ad(tmp_path/'run.v1.2.h5ad'); called('def').write_h5ad(tmp_path/'run.v1.3.h5ad')
    out = tokenize_to([tmp_path/'run.v1.2.h5ad', tmp_path/'run.v1.3.h5ad'], six, tmp_path/'cells.v1.2')
    assert out.folder.name == 'cells.v1.2' and out.cells().obs.file.tolist() == ['run.v1.2']*3 + ['run.v1.3']*3
    assert tokenize(three(), six).save(tmp_path/'saved.v1.2.dataset').name == 'saved.v1.2.dataset'
    assert six.save(tmp_path/'voc.v1.2') == tmp_path/'voc.v1.2'/'vocabulary.json'
    assert {p.name for p in tmp_path.iterdir()} == {
        'cells.v1.2', 'run.v1.2.h5ad', 'run.v1.3.h5ad', 'saved.v1.2.dataset', 'voc.v1.2'}

def test_bug_11_every_cell_in_order_with_its_name(tmp_path):
    "1,200 cells of falling and rising length"
    a = three(X3[np.arange(1200) % 3])
    for got in (tokenize(a, six, block=100), tokenize_to(a, six, tmp_path/'o', rows=500, block=100).cells()):
        assert list(got.obs.index) == [f'c{i}' for i in range(1200)] and tokens(got) == by_hand * 400

def test_bug_13_genes_outside_the_vocabulary_are_named():
    with says(VocabularyError, '2 of 3', 'GATA4', 'TBX5', "'six'", 'ids like'): six.token(['A', 'GATA4', 'TBX5'])

def test_bug_22_a_missing_gene_is_never_none():
    got = match_genes(['A', 'GATA4', None, np.nan, ''], six)
    assert got.index.tolist() == [0, -1, -1, -1, -1]
    assert got.how.tolist() == ['symbol or retired id', 'unknown', 'no id', 'no id', 'no id']
    with says(VocabularyError, '1 of 1', 'None'): six.token([None])

chapters = [f'data/{f}' for f in 'counts sources vocabulary medians cells arrow tokenizer corpus'.split()] + ['core', 'jobs', 'cli']

@pytest.mark.parametrize('module', chapters)
def test_bug_23_no_raise_without_an_error(module):
    "A bare raise stands only where an exception is being handled"
    tree = ast.parse((Path(geneformer_nb.__file__).parent/f'{module}.py').read_text())
    bare = lambda t: {r.lineno for r in ast.walk(t) if isinstance(r, ast.Raise) and r.exc is None}
    handled = [bare(h) for h in ast.walk(tree) if isinstance(h, ast.ExceptHandler)]
    assert bare(tree) == set().union(*handled)

def held(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

def test_bug_25_nothing_is_replaced_untold(tmp_path):
    "Things that are no cells, cells of another run, and cells that were saved, all stay as they are"
    (tmp_path/'thesis').mkdir(); (tmp_path/'thesis/chapter.txt').write_text('1')
    tokenize_to(three(), six, tmp_path/'corpus'); tokenize(three(), six).save(tmp_path/'cells')
    before = held(tmp_path)
    other = three(X3[::-1])
    for folder, words in dict(thesis=['other things'], corpus=['another run'], cells=["'cells'"]).items():
        with says(StorageError, *words): tokenize_to(other, six, tmp_path/folder)
    with says(StorageError, 'other things'): tokenize(other, six).save(tmp_path/'thesis')
    assert held(tmp_path) == before

def test_bug_30_nothing_written_is_a_pickle(tmp_path):
    "Only Arrow and JSON; and a pickle in place of a vocabulary is not opened"
    tokenize_to(three(), six, tmp_path/'corpus'); tokenize(three(), six).save(tmp_path/'cells')
    assert {Path(p).suffix for p in held(tmp_path)} == {'.arrow', '.json', '.jsonl'}
    assert not any(b[:1] == b'\x80' for b in held(tmp_path).values())
    class Code:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    for name in ('vocabulary.json', 'token_dictionary_gc104M.pkl'): (tmp_path/name).write_bytes(pickle.dumps(Code()))
    for call in (lambda: Vocabulary.load(tmp_path), lambda: Vocabulary.official('V2', tmp_path)):
        with says(VocabularyError): call()
    assert not (tmp_path/'ran').exists()

def peak(n, folder):
    "Most memory that Python and numpy held while n cells went from a file to a folder"
    three(X3[np.arange(n) % 3]).write_h5ad(folder/f'{n}.h5ad')
    tracemalloc.start()
    tokenize_to(folder/f'{n}.h5ad', six, folder/f'{n}', rows=1000, block=100, workers=1, obs=[])
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top

def test_bug_36_only_the_rows_wanted_are_read(tmp_path, monkeypatch):
    a = three(X3[np.arange(90) % 3]); a.obs['donor'] = 'd'; a.write_h5ad(tmp_path/'a.h5ad')
    monkeypatch.setattr(ad, 'read_h5ad', lambda *x, **k: pytest.fail('the whole file was read'))
    read, old = [], Source.block
    def block(self, a, b, columns=None, buffer=None): read.append((a, b, columns)); return old(self, a, b, columns, buffer)
    monkeypatch.setattr(Source, 'block', block)
    tokenize_to(tmp_path/'a.h5ad', six, tmp_path/'o', rows=50, block=20, workers=1, obs=[])
    assert [r[:2] for r in read] == [(0, 20), (20, 40), (40, 50), (50, 70), (70, 90)]
    assert all('donor' not in r[2] for r in read)

def test_bug_41_memory_does_not_grow_and_no_cache_is_hidden(tmp_path, monkeypatch):
    homes = 'HOME', 'TMPDIR', 'HF_HOME', 'XDG_CACHE_HOME'
    for k in homes: (tmp_path/k).mkdir(); monkeypatch.setenv(k, str(tmp_path/k))
    peak(1000, tmp_path)
    small, large = peak(2000, tmp_path), peak(16000, tmp_path)
    assert large < small + 16 * 14000, (small, large) # eight times the cells: no more than their row pointers
    assert [p for k in homes for p in (tmp_path/k).rglob('*')] == []

def test_bug_40_sixty_duplicate_rows_are_one_sum():
    "Each gene in eleven rows gives what the sums give, and the rows are visited once: no gene by gene loop"
    r = np.random.default_rng(0)
    part = r.integers(0, 4, (200, 66)).astype(np.float32)
    whole = part.reshape(200, 11, 6).sum(1)
    got = tokenize(three(part, ids * 11), six)
    assert got.match.summed == 60 and tokens(got) == tokens(tokenize(three(whole), six))

def test_bug_42_partial_and_old_results_are_never_mixed(tmp_path, capsys, monkeypatch):
    "A run that stops keeps its shards and is no data set; half a file is no shard; the next run finishes it"
    import geneformer_nb.data.corpus as stream
    for k in ('IN_TEST', 'GENEFORMER_NB_QUIET'): monkeypatch.delenv(k, raising=False)
    a, done, old = three(X3[np.arange(60) % 3]), [], stream.write_shard
    def stops(i, *x, **k):
        if len(done) == 2: Path(x[0]).write_bytes(b'half'); raise KeyboardInterrupt
        old(i, *x, **k); done.append(i)
    monkeypatch.setattr(stream, 'write_shard', stops)
    with pytest.raises(KeyboardInterrupt): tokenize_to(a, six, tmp_path/'o', rows=20)
    assert [p.name for p in sorted((tmp_path/'o').glob('*.arrow'))] == ['shard-00000.arrow', 'shard-00001.arrow']
    with says(StorageError, 'state.json'): Cells.load(tmp_path/'o')
    made = []
    monkeypatch.setattr(stream, 'write_shard', lambda i, *x, **k: (made.append(i), old(i, *x, **k)))
    got = tokenize_to(a, six, tmp_path/'o', rows=20)
    assert made == [2] and tokens(got.cells()) == by_hand * 20 and 'tokenizing' in capsys.readouterr().err
    assert not list((tmp_path/'o').glob('.*'))

# --- the options of TranscriptomeTokenizer

def on_disk(cells, tmp):
    "{column: (Arrow type, values)} of cells once they are in a folder"
    t = pa.ipc.open_stream(cells.save(tmp/'cells')/'data-00000-of-00001.arrow').read_all()
    return {c: (str(t.schema.field(c).type).replace('element', 'item'), t[c].to_pylist()) for c in t.column_names}

def custom_attr_name_dict(tmp):
    a = three(cell_type=['x', 'y', 'z'], donor=[1, 2, 3], age=[.5, 1, 2])
    got = on_disk(tokenize(a, six, obs=dict(cell_type='type', donor='who')), tmp)
    assert got['type'] == ('string', ['x', 'y', 'z']) and got['who'] == ('int64', [1, 2, 3]) and 'age' not in got
    assert list(got) == ['input_ids', 'length', 'barcode', 'type', 'who', 'n_counts']
    assert got['barcode'][1] == ['a', 'b', 'c']

def columns(tmp):
    got = on_disk(tokenize(three(), framed), tmp)
    assert got['input_ids'] == ('list<item: int32>', [[2, 4, 5, 6, 8, 3], [2, 5, 6, 7, 8, 3], [2, 9, 4, 3]])
    assert got['length'] == ('int64', [6, 6, 4])

def nproc(tmp):
    a = three(X3[np.arange(100) % 3])
    for n in (1, 2, 4): assert tokens(tokenize(a, six, block=7, workers=n)) == (by_hand * 34)[:100]

def chunk_size(tmp):
    a = three(X3[np.arange(20) % 3])
    for n in (1, 3, 20, 999):
        out = tokenize_to(a, six, tmp/f'{n}', rows=n, block=n)
        assert tokens(tokenize(a, six, block=n)) == tokens(out.cells()) == (by_hand * 7)[:20]

def model_input_size(tmp):
    assert tokens(tokenize(three(), six, max_len=3)) == [[2, 3, 4], [3, 4, 5], [7, 2]]
    assert tokens(tokenize(three(), framed, max_len=4)) == [[2, 4, 5, 3], [2, 5, 6, 3], [2, 9, 4, 3]]
    with says(VocabularyError, 'max_len=9', '8 tokens'): tokenize(three(), six, max_len=9)

def special_token(tmp):
    assert tokens(tokenize(three(), framed, special=False)) == [[t + 2 for t in c] for c in by_hand]
    assert tokens(tokenize(three(), framed, special=True))[2] == [2, 9, 4, 3]
    with says(VocabularyError, 'special=True', "'six'"): tokenize(three(), six, special=True)

def collapse_gene_ids(tmp): test_bug_05_without_collapsing()

def use_h5ad_index(tmp):
    a = three(); a.var = pd.DataFrame(dict(ensembl_id=list(ids[::-1])), index=ids)
    assert tokens(tokenize(a, six, gene_ids='index')) == by_hand != tokens(tokenize(a, six))

def keep_counts(tmp):
    got = on_disk(tokenize(three(), framed, counts=True), tmp)['counts']
    assert got[0] == 'list<item: double>' and [len(c) for c in got[1]] == [6, 6, 4]
    shares = [0, 4/13, 4/13, 4/13, 1/13, 0], [0, 2/9, 4/9, 1/9, 2/9, 0], [0, 8/9, 1/9, 0]
    np.testing.assert_allclose(np.concatenate(got[1]), np.concatenate(shares) * 1e4)

def keep_uncropped_input_ids(tmp):
    got = on_disk(tokenize(three(), framed, uncropped=True, max_len=4), tmp)
    assert got['input_ids_uncropped'] == ('list<item: int32>', [[4, 5, 6, 8], [5, 6, 7, 8], [9, 4]])
    assert got['length_uncropped'] == ('int64', [4, 4, 2])
    assert got['length'][1] == [4, 4, 4]

def filter_pass(tmp):
    with pytest.warns(UserWarning, match='1 of 3 cells have filter_pass = 0'):
        got = tokenize(three(filter_pass=[1, 0, 1]), six)
    assert tokens(got) == by_hand[::2] and list(got.obs.index) == ['a', 'c']
    assert tokens(tokenize(three(filter_pass=[1, 0, 1]), six, keep=None)) == by_hand
    with quiet(): assert tokens(tokenize(three(good=[False, True, True]), six, keep='good')) == by_hand[1:]

def official_files(folder, sub, tag, special):
    "Dictionaries laid out as the official ones"
    words = dict(token_dictionary={w: np.int16(i) for i, w in enumerate([*special, *ids])},
                 gene_median_dictionary=dict(zip(ids, map(float, six.medians))),
                 ensembl_mapping_dict={**{g: g for g in ids}, 'OLD1': ids[0]},
                 gene_name_id_dict=dict(zip('ABCDEF', ids)))
    (folder/'geneformer'/sub).mkdir(parents=True, exist_ok=True)
    for k, d in words.items(): (folder/'geneformer'/sub/f'{k}_{tag}.pkl').write_bytes(pickle.dumps(d))

def model_version(tmp):
    official_files(tmp, '', 'gc104M', ['<pad>', '<mask>', '<cls>', '<eos>'])
    official_files(tmp, 'gene_dictionaries_30m', 'gc30M', ['<pad>', '<mask>'])
    one, two = (Vocabulary.official(k, tmp) for k in ('V1', 'V2'))
    assert (one.max_len, one.cls, two.max_len, two.cls) == (2048, False, 4096, True)
    assert tokens(tokenize(three(), one)) == by_hand and tokens(tokenize(three(), two))[2] == [2, 9, 4, 3]

def gene_median_file(tmp):
    own = Vocabulary.from_dicts({'<pad>': 0, '<mask>': 1, **{g: i + 2 for i, g in enumerate(ids)}},
                                dict(zip(ids, [4, 2, 1, 1, 2, 4])), max_len=8)
    assert tokens(tokenize(three(), own)) == [[4, 3, 2, 6], [4, 3, 5, 6], [7, 2]]

def token_dictionary_file(tmp):
    own = Vocabulary.from_dicts({'<pad>': 0, '<mask>': 1, **{g: 7 - i for i, g in enumerate(ids)}},
                                dict(zip(ids, six.medians)), max_len=8)
    assert tokens(tokenize(three(), own)) == [[7, 6, 5, 3], [3, 4, 5, 6], [2, 7]]

def gene_mapping_file(tmp):
    own = Vocabulary.from_dicts({'<pad>': 0, '<mask>': 1, **{g: i + 2 for i, g in enumerate(ids)}},
                                dict(zip(ids, six.medians)), aliases=dict(OLD1=ids[0]), max_len=8)
    got = tokenize(three(names=['old1', *ids[1:]]), own)
    assert tokens(got) == by_hand and got.match.report()['symbol or retired id'] == 1

def input_identifier(tmp):
    called('abc').write_h5ad(tmp/'heart_1.h5ad'); called('def').write_h5ad(tmp/'heart_2.h5ad'); three(X3[::-1]).write_h5ad(tmp/'brain_1.h5ad')
    got = tokenize(f'{tmp}/heart_*.h5ad', six)
    assert tokens(got) == by_hand * 2 and got.obs.file.tolist() == ['heart_1']*3 + ['heart_2']*3

def file_format(tmp):
    three().write_h5ad(tmp/'1.h5ad'); called('def').write_zarr(tmp/'2.zarr')
    with h5py.File(tmp/'3.loom', 'w') as f:
        f['matrix'], f['row_attrs/ensembl_id'], f['col_attrs/CellID'] = X3.T, np.array(ids, 'S'), np.array([*'ghi'], 'S')
    assert tokens(tokenize(tmp, six)) == by_hand * 3

def use_generator(tmp):
    twice = lambda: (three() for _ in range(2))
    assert tokens(tokenize(twice(), six)) == tokens(tokenize_to(twice(), six, tmp/'o').cells()) == by_hand * 2

def target_sum(tmp):
    "No counterpart: counts are per 10,000, and ranks do not depend on it"
    got = tokenize(three(X3 * 1000), six, counts=True)
    assert tokens(got) == by_hand and got.lists['counts'][0][:4].sum() == pytest.approx(1e4)

options = {'custom_attr_name_dict': 'obs={…}', 'columns': 'folder', 'nproc': 'workers', 'chunk_size': 'block, rows',
           'model_input_size': 'max_len', 'special_token': 'special', 'collapse_gene_ids': 'collapse',
           'use_h5ad_index': "gene_ids='index'", 'keep_counts': 'counts', 'keep_uncropped_input_ids': 'uncropped',
           'filter_pass': 'keep', 'model_version': 'Vocabulary.official', 'gene_median_file': 'from_dicts medians',
           'token_dictionary_file': 'from_dicts tokens', 'gene_mapping_file': 'from_dicts aliases',
           'input_identifier': 'pattern', 'file_format': 'any ending', 'use_generator': 'iterator',
           'target_sum': 'none'}

@pytest.mark.parametrize('official,ours', options.items(), ids=[f'{k} is {v}' for k, v in options.items()])
def test_option(official, ours, tmp_path): globals()[official](tmp_path)

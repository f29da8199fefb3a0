"A corpus to shards: the same bytes whoever does it, killed or not, and folders that `datasets` reads and writes"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd, pyarrow as pa, pytest
from scipy import sparse
import geneformer_nb
from geneformer_nb.data.cells import Cells
from geneformer_nb.cli import main
from geneformer_nb.core import CountsError, GeneformerError, StorageError, VocabularyError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.data.corpus import Corpus, tokenize_to
from geneformer_nb.data.tokenizer import tokenize
from test_sources import made, voc
from sentences import quiet, says, tokens
from test_tokenizer_bugs import by_hand, framed, held, six, three

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "Two files of 13 and 20 cells"
    d = tmp_path_factory.mktemp('corpus')
    made().write_h5ad(d/'part2.h5ad'); made(1, 20).write_h5ad(d/'part10.h5ad')
    return d

how = dict(rows=4, block=3, counts=True, uncropped=True)

@pytest.fixture(scope='module')
def serial(corpus, tmp_path_factory):
    "What one process writes"
    return tokenize_to(corpus, voc, tmp_path_factory.mktemp('serial')/'o', **how)

def bytes_of(folder):
    "{file: content} but for the manifest, which says when the run began"
    return {k: b for k, b in held(folder).items() if k != 'manifest.json'}

def test_by_hand_and_in_memory(corpus, serial):
    assert len(serial) == 33 and [s[1] for s in serial.shards['rows']] == [4, 8, 12, 13, 4, 8, 12, 16, 20]
    whole = tokenize(corpus, voc, counts=True, uncropped=True)
    assert tokens(serial.cells()) == tokens(whole) == sum((tokens(c) for c in serial.parts()), [])
    assert serial.cells().obs.file.tolist() == ['part2']*13 + ['part10']*20

# --- tables as they lie in a file

def kinds_of_obs(n=13):
    "A column of every kind, with gaps where a kind has them"
    i = np.arange(n)
    return pd.DataFrame(dict(word=[f'w{k}' for k in i], cat=pd.Categorical([None if k % 5 == 0 else 'ab'[k % 2] for k in i]), codes=pd.Categorical(i % 3),
        order=pd.Categorical(['lo', 'hi', 'lo'] * 4 + ['hi'], ['lo', 'hi'], ordered=True), parts=pd.Categorical(i / 2), whole=i, small=i.astype(np.int8), large=i.astype(np.uint64) + 2**63,
        part=i / 3, half=np.where(i % 4 == 0, np.nan, i / 3).astype(np.float32), ok=i % 2 == 0, gaps=pd.array([None if k == 2 else k for k in i], dtype='Int64'),
        maybe=pd.array([None if k == 3 else k % 2 == 0 for k in i], dtype='boolean'), n_counts=i), index=[f'{k}-ä' for k in i])

@pytest.mark.parametrize('options', [dict(), dict(obs={'cat': 'type', 'word': 'word'}), dict(keep='ok'), dict(uncropped=True, counts=True)])
@pytest.mark.parametrize('empty', [False, True])
def test_a_file_and_its_anndata_give_the_same_bytes(options, empty, tmp_path):
    "From a file the columns go to Arrow as they are, from an AnnData by way of pandas"
    a = made()
    a.obs = kinds_of_obs()
    if empty: a.X[4] = 0
    a.write_h5ad(tmp_path/'a.h5ad')
    with quiet(): got = [tokenize_to(data, voc, tmp_path/f'{i}', rows=5, block=2, **options)
                         for i, data in enumerate((tmp_path/'a.h5ad', ad.read_h5ad(tmp_path/'a.h5ad')))]
    assert len(got[0]) == (7 if 'keep' in options else 13) - empty
    for f in sorted(got[0].folder.glob('*.arrow')): assert f.read_bytes() == (got[1].folder/f.name).read_bytes(), f.name
    pd.testing.assert_frame_equal(got[0].cells().obs, got[1].cells().obs)

def test_pandas_is_loaded_by_who_needs_it(tmp_path):
    for name in 'ab':
        a = made()
        a.obs = kinds_of_obs().drop(columns=['gaps', 'maybe', 'parts'])
        a.obs_names = [f'{name}{i}' for i in range(a.n_obs)]
        a.write_h5ad(tmp_path/f'{name}.h5ad')
    code = f"""import sys
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.data.corpus import tokenize_to
c = tokenize_to({str(tmp_path/'*.h5ad')!r}, Vocabulary.load({str(tmp_path/'v.json')!r}), {str(tmp_path/'o')!r})
print(c, 'pandas' in sys.modules, len(c.shards), 'pandas' in sys.modules)"""
    voc.save(tmp_path/'v.json')
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=os.environ | dict(GENEFORMER_NB_QUIET='1'))
    assert said.stdout.split("'")[-1].split() == ['False', '2', 'True'], said

# --- one corpus, many hands

@pytest.mark.parametrize('executor', ['threads', 'processes', 'dask', 'job array', 'job array backwards'])
def test_the_same_bytes_whoever_does_it(corpus, serial, executor, tmp_path):
    go = lambda **k: tokenize_to(corpus, voc, tmp_path/'o', **how | k)
    if executor == 'threads': go(workers=3)
    elif executor == 'processes': go(executor='processes', workers=2)
    elif executor == 'dask':
        distributed = pytest.importorskip('distributed', reason='dask.distributed is not installed')
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
                                      dashboard_address=None) as cluster, distributed.Client(cluster):
            go(executor='dask')
    else:
        tasks = [0, 1, 2] if executor == 'job array' else [2, 1, 0]
        for i in tasks[:-1]: assert go(part=(i, 3)) is None and not (tmp_path/'o/state.json').exists()
        assert len(go(part=(tasks[-1], 3))) == 33
    assert bytes_of(tmp_path/'o') == bytes_of(serial.folder) and len(bytes_of(tmp_path/'o')) == 9 + 5

def test_a_finished_run_is_left_alone(corpus, serial):
    times = {p.name: p.stat().st_mtime_ns for p in serial.folder.iterdir()}
    assert len(tokenize_to(corpus, voc, serial.folder, **how)) == 33
    assert {p.name: p.stat().st_mtime_ns for p in serial.folder.iterdir()} == times

def test_the_same_options_spelled_out_are_the_same_run(corpus, tmp_path):
    "The command line names every option, a notebook only those it changes"
    tokenize_to(corpus, voc, tmp_path/'o', rows=4)
    assert len(tokenize_to(corpus, voc, tmp_path/'o', rows=4, counts=False, keep='filter_pass', collapse=True,
                           special=None)) == 33

@pytest.mark.parametrize('kept', [[0], [0, 2, 4, 6, 8], [8], range(8)], ids=str)
def test_resumed_from_any_shards(corpus, serial, kept, tmp_path):
    "As left by a run that was stopped: some shards with their lines, and no data set yet"
    tokenize_to(corpus, voc, tmp_path/'o', part=(99, 100), **how)
    lines = (serial.folder/'shards.jsonl').read_text().splitlines()
    for i in kept:
        shutil.copy(serial.folder/f'shard-{i:05d}.arrow', tmp_path/'o')
        (tmp_path/f'o/shard-{i:05d}.json').write_text(lines[i])
    before = {i: (tmp_path/f'o/shard-{i:05d}.arrow').stat().st_mtime_ns for i in kept}
    tokenize_to(corpus, voc, tmp_path/'o', **how)
    assert bytes_of(tmp_path/'o') == bytes_of(serial.folder)
    assert before == {i: (tmp_path/f'o/shard-{i:05d}.arrow').stat().st_mtime_ns for i in kept}

# --- killed

many = Vocabulary([f'G{i}' for i in range(2000)], np.linspace(.5, 2, 2000), name='many')

@pytest.fixture(scope='module')
def large(tmp_path_factory):
    "6,000 cells of 300 genes in one file, 60 shards; and what an undisturbed run makes of them"
    d = tmp_path_factory.mktemp('large')
    r = np.random.default_rng(0)
    genes = r.random((6000, 2000)).argsort(1)[:, :300].ravel()
    X = sparse.csr_matrix((r.integers(1, 6, 6000*300).astype(np.float32), genes, np.arange(6001)*300), (6000, 2000))
    ad.AnnData(X, var=pd.DataFrame(index=many.genes)).write_h5ad(d/'large.h5ad')
    many.save(d)
    assert main(words(d, d/'whole')) == 0
    return d

def words(d, out, *more): return ['tokenize', str(d/'large.h5ad'), '--vocabulary', str(d/'vocabulary.json'), '--out',
                                  str(out), '--rows', '100', *more]

def command(d, out):
    "The same by two worker processes, as a command of its own"
    return [sys.executable, '-c', 'import sys; from geneformer_nb.cli import main; sys.exit(main())',
            *words(d, out, '--executor', 'processes', '--workers', '2')]

surroundings = dict(os.environ, OMP_NUM_THREADS='1', GENEFORMER_NB_QUIET='1',
                    PYTHONPATH=str(Path(geneformer_nb.__file__).parent.parent))

def workers_of(pid):
    "Processes that multiprocessing started for one"
    out = []
    for p in Path('/proc').iterdir():
        try:
            if not p.name.isdigit() or 'spawn_main' not in (p/'cmdline').read_text(): continue
            if int((p/'stat').read_text().rsplit(')', 1)[1].split()[1]) == pid: out.append(int(p.name))
        except OSError: pass
    return out

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='children are found in /proc')
@pytest.mark.parametrize('victim', ['worker', 'main'])
def test_killed_and_run_again(large, victim, tmp_path):
    """A worker's death is one sentence and status 2, the main one's takes its workers along; finished shards stay, and
    the same command ends the work"""
    out = tmp_path/'o'
    with open(tmp_path/'err', 'w+') as err, subprocess.Popen(command(large, out), env=surroundings,
        stdout=subprocess.DEVNULL, stderr=err) as p:
        end = time.time() + 30
        while not list(out.glob('shard-*.arrow')) and time.time() < end and p.poll() is None: time.sleep(.01)
        workers = workers_of(p.pid)
        os.kill(workers[0] if victim == 'worker' else p.pid, signal.SIGKILL)
        status = p.wait(30)
        said = (tmp_path/'err').read_text()
    try:
        left = {f.name: f.read_bytes() for f in out.glob('shard-*.arrow')}
        assert 0 < len(left) < 60 and len(workers) == 2 and not (out/'state.json').exists()
        if victim == 'worker':
            assert status == 2 and said.startswith('geneformer-nb: A worker process died') and said.count('\n') == 1
        else: assert status == -signal.SIGKILL
        end = time.time() + 15
        while any(map(alive, workers)) and time.time() < end: time.sleep(.05)
        assert not any(map(alive, workers)), 'a worker outlives the command'
    finally:
        for w in filter(alive, workers): os.kill(w, signal.SIGKILL)
    assert main(command(large, out)[3:]) == 0
    assert bytes_of(out) == bytes_of(large/'whole') and left.items() <= bytes_of(out).items()

# --- changed since

def changed(a, what):
    a = a.copy()
    if what == 'counts': a.X[0, 0] += 1
    elif what == 'ids': a.var['ensembl_id'] = a.var.ensembl_id.to_numpy()[::-1]
    elif what == 'obs': a.obs['age'] += 1
    elif what == 'order': a = a[::-1].copy()
    else: a = a[:-1].copy()
    return a

@pytest.mark.parametrize('what', ['counts', 'ids', 'obs', 'order', 'fewer'])
@pytest.mark.parametrize('kind', ['memory', 'file', 'iterator'])
def test_changed_input_is_refused(what, kind, tmp_path):
    "Half done, then another input: refused, and what stands there is not touched"
    def go(a, **k):
        if kind == 'file': a.write_h5ad(tmp_path/'a.h5ad')
        return tokenize_to(dict(memory=lambda: a, file=lambda: tmp_path/'a.h5ad', iterator=lambda: iter([a]))[kind](),
                           voc, tmp_path/'o', **k)
    go(made(), **({} if kind == 'iterator' else dict(rows=4, part=(0, 2))))
    before = held(tmp_path/'o')
    with says(StorageError, "'o'", 'choose another folder'):
        go(changed(made(), what), **({} if kind == 'iterator' else dict(rows=4)))
    assert held(tmp_path/'o') == before

@pytest.mark.parametrize('other', [dict(max_len=5), dict(obs=['age']), dict(keep=None), dict(counts=True),
                                   dict(uncropped=True), dict(gene_ids='index'), dict(rows=3),
                                   dict(orthologs={'ENSG00000000000': 'ENSG00000000000'}), dict(special=False)],
                                   ids=str)
def test_another_option_is_refused(corpus, other, tmp_path):
    cells = Vocabulary(voc.genes, voc.medians, True, 8, voc.symbols, voc.aliases)
    tokenize_to(corpus, cells, tmp_path/'o', rows=4, part=(0, 2))
    with says(StorageError, 'carried' if 'obs' in other else [*other][0]):
        tokenize_to(corpus, cells, tmp_path/'o', **dict(rows=4) | other)
    with says(StorageError, 'vocabulary'): tokenize_to(corpus, voc, tmp_path/'o', rows=4)

def test_logs_and_fractions_of_the_same_numbers_are_two_runs(tmp_path):
    a = made(); a.X = a.X.log1p()
    tokenize_to(a, voc, tmp_path/'o', rows=4, part=(0, 2), fractional=True)
    with says(StorageError, "'o'"): tokenize_to(a, voc, tmp_path/'o', rows=4, logged=True)

def test_a_table_of_orthologs_that_changed(tmp_path):
    f = tmp_path/'table.csv'
    pairs = pd.DataFrame(dict(gene=voc.genes, human=voc.genes))
    pairs.to_csv(f, index=False)
    tokenize_to(made(), voc, tmp_path/'o', rows=4, part=(0, 2), orthologs=str(f))
    pairs.assign(human=pairs.human[::-1].to_numpy()).to_csv(f, index=False)
    with says(StorageError, 'orthologs'): tokenize_to(made(), voc, tmp_path/'o', rows=4, orthologs=str(f))

# --- streams

def test_a_stream_that_breaks_goes_on(tmp_path):
    a = made()
    cuts = [a[:4], a[4:9], a[9:]]
    def breaks(): yield from cuts[:2]; raise ConnectionError('the census is away')
    with pytest.raises(ConnectionError): tokenize_to(breaks(), voc, tmp_path/'o')
    assert len(list((tmp_path/'o').glob('*.arrow'))) == 2 and not (tmp_path/'o/state.json').exists()
    got = tokenize_to(iter(cuts), voc, tmp_path/'o')
    assert tokens(got.cells()) == tokens(tokenize(a, voc)) and got.shards.kept.tolist() == [4, 5, 4]

def test_a_stream_that_is_shorter_the_second_time(tmp_path):
    "Blocks of the first try must not lie beside those of the second"
    a = made()
    def breaks(): yield a[:4]; yield a[4:9]; raise ConnectionError
    with pytest.raises(ConnectionError): tokenize_to(breaks(), voc, tmp_path/'o')
    with says(StorageError, "'o'"): tokenize_to(iter([a[:4]]), voc, tmp_path/'o')

def test_a_stream_whose_columns_change(tmp_path):
    "Broken numbers after whole ones are not cut, and a column that ends is named"
    x, y, z = (three(score=s) for s in ([1, 2, 3], [1.5, 2, np.nan], [*'abc']))
    for k, later in enumerate((y, z)):
        try: got = tokenize_to(iter([x, later]), six, tmp_path/f'{k}').cells().obs.score.tolist()
        except GeneformerError as e: assert 'score' in str(e)
        else: assert [str(s) for s in got[3:5]] == [str(s) for s in later.obs.score[:2]]
    for call in (lambda: tokenize_to(iter([x, three()]), six, tmp_path/'o', obs=['score']),
                 lambda: tokenize(iter([x, three()]), six, obs=['score'])):
        with says(GeneformerError, "'score'"): call()

# --- datasets

def test_datasets_opens_what_we_write(corpus, serial, tmp_path):
    datasets = pytest.importorskip('datasets')
    tokenize(made(), voc, counts=True, uncropped=True).save(tmp_path/'saved')
    for folder, n, more in ((serial.folder, 33, ['file']), (tmp_path/'saved', 13, [])):
        d = datasets.load_from_disk(str(folder))
        f, c = d.features, Cells.load(folder)
        assert len(d) == n
        assert {'input_ids', 'length', 'counts', 'input_ids_uncropped', 'length_uncropped', 'barcode', 'n_counts',
                'age', 'donor', *more} <= set(f)
        kind = lambda k: f[k].feature.dtype if hasattr(f[k], 'feature') else f[k].dtype
        assert [kind(k) for k in ('input_ids', 'length', 'counts', 'input_ids_uncropped', 'length_uncropped', 'barcode',
                                  'n_counts', 'age', 'passed')] == [
            'int32', 'int64', 'float64', 'int32', 'int64', 'string', 'float64', 'int64', 'bool']
        assert [list(x) for x in d['input_ids']] == tokens(c) and list(d['length']) == c.lengths.tolist()
        assert list(d['barcode']) == list(c.obs.index)
        values, ends = c.lists['input_ids_uncropped']
        assert [list(x) for x in d['input_ids_uncropped']] == [x.tolist() for x in np.split(values, ends[1:-1])]
        assert d.filter(lambda x: x['length'] > 0).num_rows == n

def folder_of(path, spelling='Sequence', files=1, large=False, side=True, barcode=True, special=False):
    "A folder as some version of `datasets` leaves it: 3.x writes Sequence, later ones List; both know LargeList"
    lists = [[2, *t, 3] if special else t for t in [[5, 4, 7], [6], [4, 5]]]
    cols = dict(input_ids=pa.array(lists, (pa.large_list if large else pa.list_)(pa.int32())),
                length=pa.array([len(t) for t in lists]),
                cell_type=pa.array(['x', None, 'y'])) | (dict(barcode=pa.array([*'abc'])) if barcode else {})
    value = lambda d: dict(dtype=d, _type='Value')
    features = dict(input_ids=dict(feature=value('int32'), _type='LargeList' if large else spelling),
                    length=value('int64'), cell_type=value('string'))
    features |= dict(barcode=value('string')) if barcode else {}
    t = pa.table(cols).replace_schema_metadata(dict(huggingface=json.dumps(dict(info=dict(features=features)))))
    path.mkdir()
    names = [f'data-{i:05d}-of-{files:05d}.arrow' for i in range(files)]
    for i, name in enumerate(names):
        piece = t.slice(*((0, 3) if files == 1 else (i, 1)))
        with pa.ipc.new_stream(str(path/name), t.schema) as out: out.write_table(piece)
    (path/'state.json').write_text(json.dumps(dict(_data_files=[dict(filename=f) for f in names], _fingerprint='0'*16,
        _format_columns=None,
        _format_kwargs={}, _format_type=None, _output_all_columns=False, _split=None)))
    if side: (path/'dataset_info.json').write_text(json.dumps(dict(citation='', description='', features=features,
        homepage='', license='')))
    return path

@pytest.mark.parametrize('large', [False, True], ids=['list', 'large_list'])
@pytest.mark.parametrize('files', [1, 3])
@pytest.mark.parametrize('spelling', ['Sequence', 'List'])
@pytest.mark.parametrize('side,barcode', [(True, True), (False, False)])
def test_we_open_what_datasets_writes(spelling, files, large, side, barcode, tmp_path):
    f = folder_of(tmp_path/'d', spelling, files, large, side, barcode)
    c = Cells.load(f, six)
    assert tokens(c) == [[5, 4, 7], [6], [4, 5]] and c.tokens.dtype == np.int32 and not c.special
    assert list(c.obs.index) == ([*'abc'] if barcode else [*'012'])
    assert c.obs.cell_type.tolist() == ['x', None, 'y'] and list(c.obs) == ['cell_type']
    assert sum((tokens(p) for p in Cells.parts(f, six)), []) == tokens(c)

def test_specials_are_seen_in_a_folder_that_does_not_say(tmp_path):
    f = folder_of(tmp_path/'d', special=True)
    assert Cells.load(f, framed).special and not Cells.load(f).special

@pytest.mark.parametrize('large', [False, True], ids=['List', 'LargeList'])
def test_we_open_what_the_installed_datasets_writes(large, tmp_path):
    datasets = pytest.importorskip('datasets')
    ints = (datasets.LargeList if large else datasets.List)(datasets.Value('int32'))
    d = datasets.Dataset.from_dict(dict(input_ids=by_hand*4, length=[len(t) for t in by_hand]*4, who=[*'abc']*4),
                                   datasets.Features(input_ids=ints, length=datasets.Value('int64'),
                                       who=datasets.Value('string')))
    d.save_to_disk(str(tmp_path/'d'), num_shards=3)
    d.select([5, 1, 9]).save_to_disk(str(tmp_path/'e')) # rows by number
    assert tokens(Cells.load(tmp_path/'d', six)) == by_hand*4
    assert Cells.load(tmp_path/'d').obs.who.tolist() == [*'abc']*4
    assert tokens(Cells.load(tmp_path/'e', six)) == [by_hand[i] for i in (2, 1, 0)]

bad_columns = {'no list': pa.array([1, 2]), 'words': pa.array([['a'], ['b']]),
               'broken numbers': pa.array([[1.5], [2.]]),
               'nothing in a list': pa.array([[1, None], [2]], pa.list_(pa.int32())),
               'numbers too large': pa.array([[2**40 + 5], [4]]), 'no tokens': None}

@pytest.mark.parametrize('what', bad_columns)
def test_a_folder_of_something_else(what, tmp_path):
    f = folder_of(tmp_path/'odd')
    t = pa.table(dict(length=[1, 1]) if bad_columns[what] is None else dict(input_ids=bad_columns[what]))
    with pa.ipc.new_stream(str(f/'data-00000-of-00001.arrow'), t.schema) as out: out.write_table(t)
    for call in (lambda: Cells.load(f, six), lambda: Cells.load(f), lambda: list(Cells.parts(f, six))):
        with says(GeneformerError, "'odd'"): call()

# --- bad input

wrong = [dict(rows=0), dict(rows=-1), dict(rows=1.5), dict(rows='x'), dict(block=0), dict(block=-1), dict(block='x'),
         dict(workers=-1), dict(workers='x'),
         dict(part=(5, 3)), dict(part=(0, 0)), dict(part=3), dict(part=(-1, 3)), dict(part='0/3'), dict(executor='x'),
         dict(executor=None), dict(min_match='x'),
         dict(min_match=2), dict(max_len='x'), dict(max_len=5.5), dict(max_len=0), dict(max_len=10**9),
         dict(special=True), dict(keep='passsed'), dict(obs='nope'),
         dict(obs=5), dict(obs=dict(donor='n_counts')), dict(obs=dict(donor='x', city='x')), dict(gene_ids='nope'),
         dict(counts_layer='nope'),
         dict(orthologs='nope.csv'), dict(orthologs=5), dict(orthologs={}), dict(threads=1)]

@pytest.mark.parametrize('options', wrong, ids=str)
def test_wrong_options_are_refused_before_the_work(corpus, options, tmp_path):
    "By `tokenize` too, where it has the option; nothing is written"
    with quiet(), says(GeneformerError): tokenize_to(corpus, voc, tmp_path/'o', **options)
    assert not list(tmp_path.rglob('*.arrow')) and not (tmp_path/'o/manifest.json').exists()
    if not {'rows', 'part', 'executor', 'threads'} & set(options):
        with quiet(), says(GeneformerError): tokenize(corpus, voc, **options)

@pytest.mark.parametrize('data', [None, 5, [], {}, '', b'x', 'nope.h5ad', '*.nope', [None], range(3), np.zeros((3, 3)),
                                  pd.DataFrame(), iter([]), iter([5])], ids=lambda x: repr(x)[:20])
def test_inputs_that_are_none(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with says(CountsError): tokenize_to(data, voc, tmp_path/'o')

def test_tables_of_orthologs_that_are_none(tmp_path):
    contents = {'empty.csv': b'', 'one.csv': b'gene\na\nb\n', 'header.csv': b'gene,human\n',
                'random.csv': bytes(range(128, 256)), 'open.csv': b'gene,human\n"a,b\n'}
    for name, b in contents.items(): (tmp_path/name).write_bytes(b)
    for table in [*(tmp_path/n for n in contents), tmp_path, '', np.array([['a', 'b']])[:0], {'a': None},
                  pd.DataFrame(dict(a=['b']))]:
        with says(GeneformerError): tokenize(made(), voc, orthologs=table)

@pytest.mark.parametrize('folder', [None, 5, '/dev/null', '/proc/none/x', ''])
def test_folders_that_cannot_be(folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'x').touch()
    for call in (lambda: tokenize_to(corpus, voc, folder), lambda: tokenize(corpus, voc).save(folder),
                 lambda: Cells.load(folder), lambda: Corpus(folder)):
        with says(GeneformerError): call()
    assert [p.name for p in tmp_path.iterdir()] == ['x']

def test_paths_of_every_kind(tmp_path, monkeypatch):
    "Blanks, other alphabets, links and the home; a corpus in its own folder is refused, a folder inside it is not"
    home = tmp_path/'Ünï cødé ✓'
    (home/'data').mkdir(parents=True); (home/'real').mkdir()
    monkeypatch.setenv('HOME', str(home))
    made().write_h5ad(home/'data/a b.h5ad')
    (home/'link').symlink_to(home/'real'); (home/'link.h5ad').symlink_to(home/'data/a b.h5ad')
    want = tokens(tokenize(made(), voc))
    for data, out in ((home/'data', home/'data/out'), (home/'data', home/'data/out'), ('~/data', '~/out'),
                      (home/'link.h5ad', home/'link'), (f'{home}/data/*.h5ad', home/'p q')):
        assert tokens(tokenize_to(data, voc, out).cells()) == want
    assert (home/'out/state.json').exists() and (home/'link').is_symlink() and (home/'real/state.json').exists()
    (home/'saved').mkdir(); (home/'other').symlink_to(home/'saved')
    assert tokens(Cells.load(tokenize(made(), voc).save(home/'other'))) == want and (home/'other').is_symlink()
    assert (home/'saved/state.json').exists()
    with says(StorageError, "'data'"): tokenize_to(home/'data', voc, home/'data')
    with says(CountsError, 'twice'): tokenize([home/'link.h5ad', home/'data/a b.h5ad'], voc)

def test_columns_that_bear_our_names(corpus, tmp_path):
    "The user's column called file is not replaced in silence; those of the folder are said to be left out"
    with pytest.warns(UserWarning, match='length'): got = tokenize_to(made(length=1), voc, tmp_path/'a').cells()
    assert 'length' not in got.obs
    with pytest.warns(UserWarning, match='file'): tokenize([made(file='mine'), made(1, file='mine')], voc)

@pytest.mark.parametrize('words,said', [('nope.h5ad', 'nope.h5ad'), ('{c} --shard 3/3', '--shard'),
                                        ('{c} --shard x', '--shard'), ('{c} --executor x', 'executor'),
                                        ('{c} --rows 0', '0'),
                                        ('{c} --max-len 999', '--max-len'), ('{c} --obs nope', 'nope'),
                                        ('{c} --keep nope', 'nope'), ('{c} --orthologs nope.csv', 'nope.csv'),
                                        ('{c} --counts-layer x', 'layer'),
                                        ('{c} --gene-ids x', 'var'), ('{c} --workers -1', 'workers'),
                                        ('{c} --min-match 5', '--min-match'), ('{c} --vocabulary nope', 'nope'),
                                        ('{c} --vocabulary V3:.', 'vocabulary'), ('{c} --vocabulary V2:.',
                                            'token_dictionary'), ('{c} --logged', 'logged')])
def test_the_command_says_one_sentence(corpus, words, said, tmp_path, capsys):
    voc.save(tmp_path)
    args = words.format(c=corpus).split()
    status = main(['tokenize', *args, '--out', str(tmp_path/'o'), *([] if '--vocabulary' in args else ['--vocabulary',
        str(tmp_path)])])
    err = capsys.readouterr().err
    line = [l for l in err.splitlines() if l.startswith('geneformer-nb: ')]
    assert status == 2 and len(line) == 1 and said in line[0] and 'Traceback' not in err
    assert not list((tmp_path).glob('o/*.arrow'))

def test_the_command_does_what_the_function_does(corpus, serial, tmp_path, capsys):
    voc.save(tmp_path)
    status = main(['tokenize', str(corpus), '--out', str(tmp_path/'o'), '--vocabulary', str(tmp_path), '--rows', '4',
                   '--keep-counts', '--uncropped'])
    assert status == 0 and '33 cells' in capsys.readouterr().out
    assert tokens(Cells.load(tmp_path/'o')) == tokens(serial.cells())

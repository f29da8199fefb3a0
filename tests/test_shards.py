"Screens in shards: the same bytes whoever makes them, whatever interrupts them"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from geneformer_nb.core import GeneformerError, StorageError
from geneformer_nb.perturb.engine import Engine, fit_budget
from geneformer_nb.tasks.finetuning import CellClassifier
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer, Reader
from geneformer_nb.perturb.actions import KO, OE, Dose, drug, each, pairs, perturb
from geneformer_nb.perturb.shards import gene_effects, perturb_to
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.toy import simulate

def toy(max_len=64):
    adata = simulate(n_cells=12, seed=3)
    vocab = Vocabulary.from_counts(adata, symbols='symbol', name='toy', max_len=max_len)
    return tokenize(adata, vocab), Geneformer.new('nano', vocab, seed=1, initializer_range=.2)

@pytest.fixture(scope='module')
def made(): return toy()

def bytes_of(folder): return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob('shard-*.parquet'))}

what = [each(), each(['TF01', 'TF02'], Dose, down=.5), KO('TF01') + OE('TF03')]

@pytest.fixture(scope='module')
def serial(made, tmp_path_factory):
    cells, model = made
    folder = tmp_path_factory.mktemp('serial')/'r'
    return perturb_to(folder, model, cells, what, shard=3, affected=2), bytes_of(folder)

@pytest.mark.parametrize('executor', ['processes', 'dask'])
def test_same_bytes_by_any_executor(made, serial, tmp_path, executor):
    cells, model = made
    table = perturb_to(tmp_path/'r', model, cells, what, shard=3, affected=2, executor=executor, workers=2)
    pd.testing.assert_frame_equal(table, serial[0])
    assert bytes_of(tmp_path/'r') == serial[1] and len(serial[1]) == 4

def test_a_fine_tuned_model_travels_to_processes(made, tmp_path):
    cells, model = made
    clf = CellClassifier(model, ['a', 'b'], pool='attention', seed=2)
    one = perturb_to(tmp_path/'one', clf, cells[:4], KO('TF01'), shard=2)
    two = perturb_to(tmp_path/'two', clf, cells[:4], KO('TF01'), shard=2, executor='processes', workers=2)
    pd.testing.assert_frame_equal(one, two)
    assert 'shift_p(a)' in one

script = '''
import sys; sys.path.insert(0, {here!r})
import geneformer_nb.perturb.shards as s
from test_shards import toy, what
cells, model = toy()
run = s.run_plan
def slow(*a, **kw):
    import time
    print('shard', flush=True); time.sleep(.4)
    return run(*a, **kw)
s.run_plan = slow
s.perturb_to({folder!r}, model, cells, what, shard=3, affected=2)
'''

def test_killed_and_resumed(made, serial, tmp_path):
    cells, model = made
    folder = tmp_path/'r'
    run = subprocess.Popen([sys.executable, '-c', script.format(here=str(Path(__file__).parent), folder=str(folder))], stdout=subprocess.PIPE, text=True)
    for _ in range(3): assert run.stdout.readline() == 'shard\n'  # the third has begun
    os.kill(run.pid, signal.SIGKILL); run.wait()
    done = bytes_of(folder)
    assert 0 < sum(len(Path(n).parts) for n in done) and not (folder/'shard-00003.parquet').exists()
    pd.testing.assert_frame_equal(perturb_to(folder, model, cells, what, shard=3, affected=2), serial[0])
    assert bytes_of(folder) == serial[1]
    assert not list(folder.rglob('.shard-00003*'))

def test_tasks_of_a_job_array(made, serial, tmp_path):
    cells, model = made
    for i in range(3): perturb_to(tmp_path/'r', model, cells, what, shard=3, affected=2, part=(i, 3))
    assert bytes_of(tmp_path/'r') == serial[1]

def test_the_batch_size_of_the_first_run_stays(made, tmp_path, monkeypatch):
    cells, model = made
    perturb_to(tmp_path/'r', model, cells[:4], each(), shard=2, part=(0, 2))
    kept = json.loads((tmp_path/'r/manifest.json').read_text())['facts']['budget']
    monkeypatch.setattr('geneformer_nb.perturb.shards.fit_budget', lambda m: kept//2)  # as on a device with less memory
    perturb_to(tmp_path/'r', model, cells[:4], each(), shard=2)
    with pytest.raises(StorageError, match='budget was'): perturb_to(tmp_path/'r', model, cells[:4], each(), shard=2, budget=kept//2)

def test_other_weights_of_the_head_are_another_run(made, tmp_path):
    cells, model = made
    perturb_to(tmp_path/'r', CellClassifier(model, ['a', 'b'], seed=2), cells[:2], KO('TF01'))
    with pytest.raises(StorageError, match='weights was'): perturb_to(tmp_path/'r', CellClassifier(model, ['a', 'b'], seed=3), cells[:2], KO('TF01'))

def test_long_lists_that_differ_in_the_middle_are_another_run(made, tmp_path):
    cells, model = made
    names = [g for g in model.vocabulary.genes]
    perturb_to(tmp_path/'r', model, cells[:2], each(names, OE))
    with pytest.raises(StorageError, match='actions was'): perturb_to(tmp_path/'r', model, cells[:2], each(names[:100] + names[101:], OE))

def test_no_memory(made, monkeypatch):
    cells, model = made
    want, hidden = perturb(model, cells[:3], what), Geneformer.hidden
    def tight(self, tokens, offsets, **kw):
        if len(tokens) > 700: raise torch.OutOfMemoryError('full')
        return hidden(self, tokens, offsets, **kw)
    monkeypatch.setattr(Geneformer, 'hidden', tight)
    with pytest.warns(UserWarning, match='did not fit'): got = perturb(model, cells[:3], what)
    np.testing.assert_allclose(got.cosine, want.cosine, atol=1e-6)
    assert got.perturbation.astype(str).tolist() == want.perturbation.astype(str).tolist()
    def full(self, tokens, offsets, **kw): raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    monkeypatch.setattr(Geneformer, 'hidden', full)
    with pytest.warns(UserWarning, match='halved'), pytest.raises(GeneformerError, match='does not fit in the memory of cpu'): perturb(model, cells[:3], what)
    def broken(self, tokens, offsets, **kw): raise RuntimeError('something else')
    monkeypatch.setattr(Geneformer, 'hidden', broken)
    with pytest.raises(RuntimeError, match='something else'): perturb(model, cells[:3], what)

def test_the_unperturbed_cell_is_encoded_once(made, monkeypatch):
    cells, model = made
    sizes, hidden = [], Geneformer.hidden
    def watch(self, tokens, offsets, **kw): sizes.append(len(offsets) - 1); return hidden(self, tokens, offsets, **kw)
    monkeypatch.setattr(Geneformer, 'hidden', watch)
    perturb(model, cells[:2], each(), budget=1_000)
    n = cells[:2].lengths
    assert sum(sizes) == 2 + n.sum()

@pytest.mark.parametrize('free,budget', [(100e9, 2**20), (1e9, 2**18), (1e6, 2**13)])
def test_budget_from_the_memory_of_a_gpu(made, monkeypatch, free, budget):
    class Stub(Reader):
        device, config = torch.device('cuda'), made[1].config
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (free, free))
    got = fit_budget(Stub())
    assert got & (got - 1) == 0 and 2**13 <= got <= 2**20
    if free in (100e9, 1e6): assert got == budget

def test_workers_take_gpus_in_turn(monkeypatch):
    import multiprocessing
    from geneformer_nb.perturb.shards import _own_device
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    for number, want in ((1, 'cuda:0'), (4, 'cuda:3'), (5, 'cuda:0')):
        class Worker: _identity = (number,)
        monkeypatch.setattr(multiprocessing, 'current_process', lambda: Worker)
        assert _own_device(torch.device('cuda')) == want
    assert _own_device(torch.device('cpu')) == torch.device('cpu')

def test_drugs_pass_over_what_is_not_there(made):
    cells, model = made
    v, x = model.vocabulary, cells[0].tokens
    here, absent = v.symbol(int(x[3])), next(s for s in v.symbols.values() if v.token(s) not in x)
    one, same = (perturb(model, cells[:1], w) for w in (drug('a', inhibits=[here, absent]), KO(here)))
    assert one.cosine[0] == same.cosine[0] and one.kind[0] == 'drug' and one.perturbation[0] == 'a'
    assert one.gene_id[0] == '+'.join(v.gene(v.token([here, absent])))
    with pytest.raises(GeneformerError, match='Nothing to perturb'): perturb(model, cells[:1], drug('b', inhibits=absent))
    got = perturb(model, cells[:1], drug('c', inhibits=[here], activates=[absent]))
    np.testing.assert_allclose(got.cosine, perturb(model, cells[:1], KO(here) + OE(absent)).cosine)
    both = perturb(model, cells[:1], drug('a', inhibits=[here, absent]) + OE('TF01'))  # still a drug beside something else
    np.testing.assert_allclose(both.cosine, perturb(model, cells[:1], KO(here) + OE('TF01')).cosine)
    assert both.perturbation[0] == 'a + OE(TF01)' and both.kind[0] == 'drug+OE'
    with pytest.raises(GeneformerError, match='Nothing to perturb'): perturb(model, cells[:1], drug('b', inhibits=absent) + OE('TF01'))
    each_too = perturb(model, cells[:1], each() + drug('a', inhibits=[here, absent]))
    assert len(each_too) == len(cells[0]) - 1

def test_words_that_make_no_sense_are_told(made):
    cells, model = made
    for what, says in ((KO('*'), 'each'), ([], 'nothing to do'), (None, 'no perturbation')):
        with pytest.raises(GeneformerError, match=says): perturb(model, cells, what)
    for budget in (0, -1, 'many', 1.5):
        with pytest.raises(GeneformerError, match='whole number'): perturb(model, cells, each(), budget=budget)
    for f in (lambda: Dose('A'), lambda: Dose('A', up=1.5), lambda: Dose('A', up=.5, down=.5), lambda: Dose('A', quartiles=4), lambda: KO('A', ranks='up'),
              lambda: drug('', ['A']), lambda: drug('x'), lambda: each([]), lambda: pairs(['A'])):
        with pytest.raises(GeneformerError): f()

def test_pairs_that_do_more_than_their_parts(made):
    from geneformer_nb.perturb.stats import excess
    cells, model = made
    x = cells[0].tokens[:3]
    names = [model.vocabulary.symbol(int(t)) for t in x]
    table = excess(perturb(model, cells[:4], pairs(names)))
    assert 1 <= len(table) <= 3 and table.n_cells.ge(1).all()
    anchored = perturb(model, cells[:1], pairs('detected', with_=names[0]))
    assert len(anchored) == 2*len(cells[0]) and len(excess(anchored)) == len(cells[0]) - 1

def test_gene_effects_in_shards(made, serial, tmp_path):
    cells, model = made
    perturb_to(tmp_path/'r', model, cells[:4], each(), shard=3, affected=True)
    got = pd.concat(gene_effects(tmp_path/'r', model), ignore_index=True)
    table, want = perturb(model, cells[:4], each(), affected=True)
    np.testing.assert_allclose(got.cosine, want.cosine, atol=1e-6)
    assert got.cell.tolist() == table.cell[want.row].tolist() and got.affected.tolist() == list(model.vocabulary.gene(want.affected.to_numpy()))
    some = pd.concat(gene_effects(tmp_path/'r', model, affected=['TF01']), ignore_index=True)
    assert set(some.affected) == {model.vocabulary.gene(model.vocabulary.token('TF01'))}
    with pytest.raises(StorageError, match='affected=True'): list(gene_effects(tmp_path, model))

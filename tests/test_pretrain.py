"Pretraining that is killed at any moment ends with the weights of one that was left alone, to the bit"
import json, os, signal, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.core import GeneformerError, VocabularyError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.train.batching import Batches, Rows, by_tokens, share_out
from geneformer_nb.model.bert import Geneformer, weights_digest
from geneformer_nb.train.pretraining import MaskedRanks, Recipe, evaluate_masked, pretrain, recipes
from geneformer_nb.train.small_model import RankFrequency, summarize_masked

SMALL = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64)

def cohort(n=70, genes=40, seed=0):
    "Cells of 5 to 40 ranks"
    rng = np.random.default_rng(seed)
    v = Vocabulary([f'G{i}' for i in range(genes)], np.ones(genes), max_len=genes, name='forty')
    return Cells(*ragged([2 + rng.permutation(genes)[:rng.integers(5, genes + 1)] for _ in range(n)]), vocabulary=v)

WAYS = dict(batch=dict(steps=14, batch=12, save_every=4), budget=dict(epochs=2, budget=200, save_every=4))

def child(folder, way, at):
    "Pretrain into a folder, dying at a step, in the middle of a checkpoint, or before the model is saved"
    from transformers import Trainer, TrainerState
    def dies(owner, name, when):
        old = getattr(owner, name)
        def new(self, *a, **k):
            if when(self, *a): os.kill(os.getpid(), signal.SIGKILL)
            return old(self, *a, **k)
        setattr(owner, name, new)
    if at[:4] == 'step': dies(Trainer, 'training_step', lambda t, *_: t.state.global_step == int(at[4:]))
    if at[:4] == 'save': dies(TrainerState, 'save_to_json', lambda s, *_: s.global_step == int(at[4:]))
    if at == 'end': dies(Geneformer, 'save_pretrained', lambda *_: True)
    print(weights_digest(pretrain(cohort(), 'nano', folder, seed=2, **WAYS[way], **SMALL)))

def family(folder):
    "Each way once whole, and once killed four times; all are forks of one process that has imported everything"
    import transformers.trainer
    torch.set_num_threads(1)
    steps = np.random.default_rng().integers(1, 12, 2)
    out = {}
    for way in WAYS:
        for name, plan in (('whole', ['']), ('killed', [f'step{min(steps)}', 'save8', f'step{max(steps)}', 'end', ''])):
            for at in plan:
                if not (pid := os.fork()):
                    try: child(f'{folder}/{way}-{name}', way, at)
                    except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)
                    os._exit(0)
                status = os.waitpid(pid, 0)[1]
                assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), f'{way} {name} {at}'
        out[way] = [weights_digest(Geneformer.from_pretrained(f'{folder}/{way}-{n}')) for n in ('whole', 'killed')]
        out[way] += [Path(f'{folder}/{way}-{n}/history.json').read_text() for n in ('whole', 'killed')]
    print('RESULT' + json.dumps(dict(steps=steps.tolist(), **out)))

def test_killed_runs_end_as_if_left_alone(tmp_path):
    "SIGKILL at two random steps, in the middle of a checkpoint, and after the last one; cells a step and tokens a step"
    env = os.environ | dict(OMP_NUM_THREADS='1', GENEFORMER_NB_QUIET='1', CUDA_VISIBLE_DEVICES='')
    run = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, env=env)
    lines = [l for l in run.stdout.splitlines() if l.startswith('RESULT')]
    assert lines, run.stdout + run.stderr
    got = json.loads(lines[0][6:])
    for way in WAYS:
        whole, killed, log, log_killed = got[way]
        assert whole == killed, f"{way}: weights differ after SIGKILL at steps {got['steps']}"
        assert log == log_killed, f'{way}: histories differ'

# ---- batches

@pytest.mark.parametrize('kw', [dict(batch=7), dict(batch=100), dict(budget=150), dict(budget=10_000)], ids=str)
@pytest.mark.parametrize('processes,passes', [(1, 1), (2, 1), (3, 2)])
def test_every_cell_once_an_epoch(kw, processes, passes):
    lengths = cohort().lengths
    rows = np.arange(3, 68)
    everyone = [Batches(lengths, rows, seed=5, processes=processes, process=p, passes=passes, **kw) for p in range(processes)]
    for epoch in (0, 1):
        for b in everyone: b.epoch = epoch
        parts = [list(b) for b in everyone]
        assert all(len(p) == len(everyone[0]) for p in parts), 'every process takes as many passes'
        assert all(p for part in parts for p in part), 'nobody is without a cell to look at'
        seen = [i for part in parts for p in part for e, i in p if i >= 0]
        assert sorted(seen) == rows.tolist()
        alone = Batches(lengths, rows, seed=5, **kw).epoch_batches(epoch)
        for k, b in enumerate(alone):
            dealt = [i for part in parts for p in part[k * passes:(k + 1) * passes] for e, i in p if i >= 0]
            assert sorted(dealt) == sorted(b.tolist()), 'the same step, however many share it'

def test_orders_differ_by_epoch_and_seed():
    lengths, rows = cohort().lengths, np.arange(70)
    a = [Batches(lengths, rows, budget=200, seed=s).epoch_batches(e) for s, e in ((0, 0), (0, 1), (7, 0))]
    assert len({str([x.tolist() for x in b]) for b in a}) == 3
    assert len({len(b) for b in a}) == 1, 'as many steps whatever the order'

def test_budget_is_kept_within_a_cell():
    rng = np.random.default_rng(0)
    for n, longest in ((1, 30), (50, 30), (3000, 2048)):
        lengths = rng.integers(1, longest + 1, n); lengths[0] = longest
        for budget in (2 * longest, 5 * longest, 10**9):
            b = by_tokens(rng.permutation(n), lengths, budget)
            even = lengths.sum() / len(b)
            assert len(b) == -(-lengths.sum() // budget) and sorted(np.concatenate(b)) == list(range(n))
            assert all(len(x) and abs(lengths[x].sum() - even) <= longest for x in b)
    with pytest.raises(GeneformerError, match='too few'): by_tokens(np.arange(3), np.array([5, 5, 5]), 9)

def test_shares_are_even():
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 2049, 64)
    load = [lengths[s].sum() for s in share_out(range(64), lengths, 4)]
    assert max(load) - min(load) < 100 and max(load) / np.mean(load) < 1.01

def test_masks_depend_on_seed_epoch_and_cell_alone():
    cells = cohort()
    c = MaskedRanks(cells, cells.vocabulary, seed=4)
    def labels(b): return [b['labels'][x:y].tolist() for x, y in zip(b['offsets'], b['offsets'][1:])]
    alone = {i: labels(c([(2, i)]))[0] for i in (5, 9, 30)}
    assert labels(c([(2, 30), (2, 5), (2, 9)])) == [alone[30], alone[5], alone[9]]
    assert labels(c([(3, 5)]))[0] != alone[5]

# ---- training

def test_accumulated_steps_are_larger_steps():
    cells = cohort()
    kw = dict(model='nano', steps=6, dropout=0., **SMALL)
    one = pretrain(cells, batch=12, **kw)
    for batch, passes in ((6, 2), (4, 3)):
        m = pretrain(cells, batch=batch, args=dict(gradient_accumulation_steps=passes), **kw)
        far = max(float((a - b).abs().max()) for a, b in zip(one.hf.state_dict().values(), m.hf.state_dict().values()))
        assert far < 1e-5, f'{passes} passes of {batch}: {far}'

def test_epochs_are_whole_when_the_last_batch_is_short():
    "33 cells in batches of 32 are two steps an epoch"
    m = pretrain(cohort(33), 'nano', epochs=3, batch=32, holdout=0., **SMALL)
    assert m.history.step.max() == 6 and m.history.epoch.max() == 3

def test_recipes():
    cells = cohort()
    with pytest.raises(GeneformerError, match='small, V1, V2'): pretrain(cells, recipe='V3')
    v1 = pretrain(cells, recipe='V1', steps=1, num_hidden_layers=1)
    assert v1.config.hidden_size == 256 and v1.config.attention_probs_dropout_prob == .02
    house = pretrain(cells, steps=1, **SMALL)
    assert house.config.attention_probs_dropout_prob == 0.
    kept = pretrain(cells, steps=1, attention_dropout=None, **SMALL)
    assert kept.config.attention_probs_dropout_prob == .02, 'None leaves what the preset says'
    assert all(isinstance(r, Recipe) for r in recipes.values()) and list(recipes) == ['small', 'V1', 'V2']
    own = pretrain(cells, recipe=Recipe(steps=1, batch=4, holdout=0.), **SMALL)
    assert len(own.history) == 1 and own.history.eval_loss.isna().all()

@pytest.mark.parametrize('wrong,near', [(dict(lrr=1), 'lr'), (dict(attention_dropot=0.), 'attention_dropout'), (dict(hidden_sise=8), 'hidden_size'),
                                        (dict(args=dict(max_grad_nrm=1.)), 'max_grad_norm')], ids=str)
def test_a_misspelt_argument_is_named_before_any_work(tmp_path, wrong, near):
    with pytest.raises(GeneformerError, match=f"did you mean '{near}'"): pretrain(cohort(), 'nano', tmp_path/'m', **wrong)
    assert not (tmp_path/'m').exists()

def test_fields_of_a_preset_are_refused_for_a_model():
    m = Geneformer.new('nano', cohort().vocabulary, **SMALL)
    with pytest.raises(GeneformerError, match='hidden_size'): pretrain(cohort(), m, steps=1, hidden_size=8)

def test_other_vocabulary_and_longer_cells_are_refused():
    cells = cohort()
    m = Geneformer.new('nano', Vocabulary(cells.vocabulary.genes, cells.vocabulary.medians, max_len=20), **SMALL)
    with pytest.raises(VocabularyError, match='takes 20'): pretrain(cells, m, steps=1)
    other = Geneformer.new('nano', Vocabulary(cells.vocabulary.genes, cells.vocabulary.medians * 2, max_len=40), **SMALL)
    with pytest.raises(VocabularyError, match='another vocabulary'): pretrain(cells, other, steps=1)

def test_rows_of_an_official_folder(tmp_path):
    "A folder that does not say which vocabulary it is of is read once, and checked"
    cells = cohort()
    folder = cells.save(tmp_path/'cells')
    (folder/'geneformer_nb.json').unlink()
    rows = Rows(folder, cells.vocabulary)
    assert all((rows.tokens(i) == cells[i].tokens).all() for i in range(len(cells)))
    with pytest.raises(VocabularyError): Rows(folder, Vocabulary(cells.vocabulary.genes[:20], np.ones(20), max_len=40))

def test_frequency_baseline_by_hand():
    v = Vocabulary(['a', 'b'], [1., 1.], max_len=2)
    known = Cells([2, 3, 2, 3, 3, 2], [0, 2, 4, 6], vocabulary=v)      # a leads twice, b once
    counted = RankFrequency(known, edges=(0, 1), strength=2)
    held = Cells([2, 3] * 20, np.arange(0, 41, 2), vocabulary=v)
    found = evaluate_masked(Geneformer.new('nano', v, **SMALL), held, counted, mask=.9)
    assert np.allclose(found.frequency, -np.log(3 / 5))   # (2 + 1) of (3 + 2), at either rank
    table = summarize_masked(found, (0, 1))
    assert table['n'].sum() == 2 * table.loc['all', 'n'] and np.allclose(table.frequency, -np.log(3 / 5))

if __name__ == '__main__': family(sys.argv[1])

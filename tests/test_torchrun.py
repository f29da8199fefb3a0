"Two processes, with whole and with spread weights: the same model as one process makes, written once, and resumed"
import json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.train.pretraining import pretrain

SMALL = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, dropout=0.)
BATCH, BUDGET = dict(epochs=2, batch=8, save_every=3), dict(epochs=2, budget=200, save_every=3)
RUNS = dict(ddp=BATCH, fsdp=BATCH | dict(args=dict(fsdp=True)), budget=BUDGET, tiny=dict(steps=2, batch=1))

def cohort():
    rng = np.random.default_rng(0)
    v = Vocabulary([f'G{i}' for i in range(40)], np.ones(40), max_len=40, name='forty')
    return Cells(*ragged([2 + rng.permutation(40)[:rng.integers(5, 41)] for _ in range(45)]), vocabulary=v)

def job(folder):
    "What each process does: every run, the first two of them interrupted once; notes which cells it was given"
    from transformers import Trainer
    from geneformer_nb.train.pretraining import MaskedRanks
    rank, step, draw = int(os.environ['RANK']), Trainer.training_step, MaskedRanks.__call__
    for name, kw in RUNS.items():
        seen = []
        def stops(self, *a, **k):
            if self.state.global_step == 5: raise KeyboardInterrupt
            return step(self, *a, **k)
        def notes(self, rows): seen.extend(rows); return draw(self, rows)
        if name in ('ddp', 'fsdp'):
            Trainer.training_step = stops
            try: pretrain(cohort(), 'nano', f'{folder}/{name}', device='cpu', **kw, **SMALL)
            except KeyboardInterrupt: pass
            Trainer.training_step = step
        else: MaskedRanks.__call__ = notes
        m = pretrain(cohort(), 'nano', f'{folder}/{name}', device='cpu', **kw, **SMALL)
        MaskedRanks.__call__ = draw
        assert type(m.hf).__name__ == 'BertForMaskedLM' and not any(hasattr(p, 'full_tensor') for p in m.hf.parameters())
        again = pretrain(cohort(), 'nano', f'{folder}/{name}', device='cpu', **kw, **SMALL)   # finished: both read it
        assert all(torch.equal(a, b) for a, b in zip(m.hf.state_dict().values(), again.hf.state_dict().values()))
        Path(f'{folder}/{name}-{rank}.json').write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp('torchrun')
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    env |= dict(OMP_NUM_THREADS='1', GENEFORMER_NB_QUIET='1', CUDA_VISIBLE_DEVICES='')
    out = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__, str(folder)],
                         capture_output=True, text=True, env=env, timeout=300)
    assert not out.returncode, out.stdout[-2000:] + out.stderr[-6000:]
    return folder

def _alone(name): return pretrain(cohort(), 'nano', device='cpu', **{k: v for k, v in RUNS[name].items() if k != 'args'}, **SMALL)

@pytest.mark.parametrize('name', RUNS)
def test_two_processes_make_the_model_of_one(done, name):
    "Within 1e-5 at weights of up to 1: sums are taken in another order"
    one, two = _alone(name), Geneformer.from_pretrained(done/name)
    assert one.hf.state_dict().keys() == two.hf.state_dict().keys()
    far = {k: float((a - b).abs().max()) for (k, a), b in zip(one.hf.state_dict().items(), two.hf.state_dict().values())}
    assert max(far.values()) < 1e-5, max(far, key=far.get)
    log = json.loads((done/name/'history.json').read_text())
    assert np.allclose([h['eval_loss'] for h in log if h['eval_loss']], one.history.eval_loss.dropna(), atol=1e-4), 'one evaluation of all, whoever does it'

def test_every_cell_once_an_epoch(done):
    seen = [tuple(x) for r in (0, 1) for x in json.loads((done/f'budget-{r}.json').read_text())]
    held = {i for e, i in seen if sum(j == i and f == 0 for f, j in seen) > 1}                # evaluated several times, under epoch 0
    train = set(range(45)) - held
    for epoch in (0, 1): assert sorted(i for e, i in seen if e == epoch and i >= 0 and i not in held) == sorted(train)
    assert len(held) == 2

def test_written_once(done):
    for name in ('ddp', 'fsdp'):
        files = {p.name for p in (done/name).iterdir()}
        assert {'config.json', 'model.safetensors', 'vocabulary.json', 'history.json', 'manifest.json'} <= files
        assert not any('part' in f for f in files)
        log = json.loads((done/name/'history.json').read_text())
        steps = [h['step'] for h in log if h['loss'] is not None]
        assert steps == sorted(set(steps))

def test_command_line(tmp_path):
    "One process, from a folder of cells, a folder of a model, and options"
    cells = cohort(); cells.save(tmp_path/'cells')
    Geneformer.new('nano', cells.vocabulary, **SMALL).save_pretrained(tmp_path/'start')
    words = [sys.executable, '-m', 'geneformer_nb.cli', 'pretrain', tmp_path/'cells', '--out', tmp_path/'m', '--model', tmp_path/'start', '--steps', '2',
             '--batch', '8', '--device', 'cpu', '--vocabulary', tmp_path/'start', '--arg', 'max_grad_norm=0.5']
    env = os.environ | dict(OMP_NUM_THREADS='1', GENEFORMER_NB_QUIET='1')
    out = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env)
    assert not out.returncode and 'BertForMaskedLM' in out.stdout, out.stdout + out.stderr
    call = (f"from geneformer_nb.model.bert import Geneformer; from geneformer_nb.train.pretraining import pretrain; pretrain({str(tmp_path/'cells')!r}, "
            f"Geneformer.from_pretrained({str(tmp_path/'start')!r}), {str(tmp_path/'called')!r}, steps=2, batch=8, device='cpu', args=dict(max_grad_norm=.5))")
    subprocess.run([sys.executable, '-c', call], check=True, capture_output=True, env=env)  # a process like that of the command
    same, got = (Geneformer.from_pretrained(tmp_path/m) for m in ('called', 'm'))
    assert all(torch.equal(a, b) for a, b in zip(same.hf.state_dict().values(), got.hf.state_dict().values()))
    out = subprocess.run([*map(str, words), '--mask', '2'], capture_output=True, text=True, env=env)
    assert out.returncode and out.stderr.strip().startswith('geneformer-nb: mask lies between'), out.stderr

if __name__ == '__main__': job(sys.argv[1])

"""What each choice buys in pretraining, and how fast a step is by length of cells and size of batch.

  python benchmarks/waterfall.py                                          five rounds, in turn, each in a process of its own
  python benchmarks/waterfall.py --write benchmarks/waterfall.csv         and write every measurement
  python benchmarks/waterfall.py --rounds 1 --only grid --scratch FOLDER  part of it; inputs are kept in FOLDER

V1-10M over 25,426 tokens, random weights, float32 where not said otherwise, two threads. A round runs every variant once; a
step is timed after one that sets things up. The loss of every variant, before training and without dropout, is compared first.
"""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import cases, naive
from run import peak_memory


def fused(hf):
    "Hidden places only, and no attention dropout, so that the fused kernel can be taken"
    naive.hidden_only(hf)
    for l in hf.bert.encoder.layer: l.attention.self.dropout.p = 0.


def compiled(model):
    for l in model.hf.bert.encoder.layer: l.compile(dynamic=True)
    return model


CASE = cases.Pretrain()
FUSED = dict(args=dict(optim='adamw_torch_fused'))
OURS = 'no padding: ours'
VARIANTS = {  # name: what is run; each of the first four adds one thing to the one before; fused AdamW is not the default on a CPU, the rest changes one thing in it
    'plain Trainer': lambda f, o: CASE.reference(f, o),
    'head on hidden genes only': lambda f, o: CASE.reference(f, o, naive.hidden_only),
    'no attention dropout: fused attention': lambda f, o: CASE.reference(f, o, fused),
    OURS: lambda f, o: CASE.ours(f, o),
    'fused AdamW': lambda f, o: CASE.ours(f, o, **FUSED),
    'fused AdamW, attention dropout .02': lambda f, o: CASE.ours(f, o, attention_dropout=.02, **FUSED),
    'fused AdamW, bfloat16': lambda f, o: CASE.ours(f, o, dtype='bfloat16', **FUSED),
    'fused AdamW, compiled layers': lambda f, o: CASE.ours(f, o, compiled, **FUSED)}
STEP = dict(cells=4, tokens=1900)
GRID = [(n, t) for t in (2048, 8192) for n in (128, 256, 512, 1024, 1900)]


def one(scratch, variant, size):
    "Figures of one variant in a fresh process"
    folder = CASE.prepare(scratch, **size)
    env = os.environ | {k: '2' for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')} | dict(GENEFORMER_NB_QUIET='1', HF_HUB_OFFLINE='1')
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        done = subprocess.run([sys.executable, __file__, '--child', variant, str(folder), out], env=env, capture_output=True, text=True)
        if done.returncode: raise SystemExit(f'{variant} failed:\n{done.stderr[-3000:]}')
        got = json.loads((Path(out)/'got.json').read_text())
    tokens = sum(map(len, cases.cells_of(folder)))
    return dict(variant=variant, **size, step_tokens=tokens, **got, tokens_per_second=tokens / got['seconds'])


def child(variant, folder, out):
    seconds, loss = VARIANTS[variant](Path(folder), Path(out))
    (Path(out)/'got.json').write_text(json.dumps(dict(seconds=seconds, loss=float(loss[0]), peak_gb=peak_memory() / 1e9)))


def write(path, table):
    "The measurements of this run; those of parts that were not run stay"
    import pandas as pd
    old = pd.read_csv(path) if Path(path).exists() else table[:0]
    pd.concat([old[~old['part'].isin(table['part'])], table]).round(4).to_csv(path, index=False)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--only', choices=['steps', 'grid'])
    p.add_argument('--scratch', help='folder for inputs, kept')
    p.add_argument('--write', help='.csv for the measurements; parts that are not run stay as they were')
    p.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(*a.child)
    import pandas as pd
    rows = []
    if a.scratch: Path(a.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        def add(part, variant, size, i):
            rows.append(dict(part=part, round=i) | one(Path(a.scratch or tmp), variant, size))
            if a.write: write(a.write, pd.DataFrame(rows))
            print(part, i, variant, {k: rows[-1][k] for k in ('cells', 'tokens')}, f"{rows[-1]['seconds']:.2f} s", flush=True)
        for i in range(a.rounds if a.only != 'grid' else 0):
            for v in list(VARIANTS)[::1 if i % 2 == 0 else -1]: add('steps', v, STEP, i)
            loss = [r['loss'] for r in rows]
            assert max(loss) - min(loss) < 1e-3, f'the variants do not compute the same loss: {loss}'
        for i in range(min(3, a.rounds) if a.only != 'steps' else 0):
            for n, t in GRID: add('grid', OURS, dict(cells=max(1, t // n), tokens=n), i)
            for n, t in GRID:
                if t == 8192: add('grid', 'plain Trainer', dict(cells=t // n, tokens=n), i)
    table = pd.DataFrame(rows)
    print(table.groupby(['part', 'variant', 'cells', 'tokens'], sort=False)[['seconds', 'tokens_per_second', 'peak_gb']].median().round(2).to_string())


if __name__ == '__main__': main()

"""Ours against a plain reference, in alternating pairs, each in a process of its own.

  python benchmarks/run.py                      all benchmarks, 3 pairs each
  python benchmarks/run.py tokenize_5k --pairs 5
  python benchmarks/run.py --write              and write benchmarks/RESULTS.md after each (other rows stay)
  python benchmarks/run.py --quick              tiny sizes, one pair: do the answers agree? The times mean nothing

Nothing is reported before both answers were found equal. Model benchmarks run on one thread (--threads); the others
use no more on either side. Inputs are made once in --scratch (default: a temporary folder, removed at the end).
"""
import argparse, json, os, platform, re, resource, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import cases

V1, small = dict(preset='V1-10M'), dict(preset='nano', genes=300)
BENCHMARKS = {  # name: (title, case, size, tiny size)
    'tokenize_5k': ('tokenize, file to folder, whole process', cases.Tokenize, dict(cells=5_000),
                    dict(cells=60, genes=500, detected=100)),
    'tokenize_20k': ('tokenize, file to folder, whole process', cases.Tokenize, dict(cells=20_000), None),
    'tokenize_20k_arrays': ('the same, reference hands over numpy arrays, not lists', cases.TokenizeArrays,
                            dict(cells=20_000), None),
    'tokenize_loop': ('ours file to folder, reference reads and ranks only, whole process', cases.TokenizeLoop,
                      dict(cells=20_000), dict(cells=60, genes=500, detected=100)),
    'tokenize_1_thread': ('tokenize, numpy arrays, one thread on both sides, whole process', cases.TokenizeOne, dict(cells=20_000), None),
    'tokenize_500k': ('tokenize, ours alone: memory as cells grow', cases.TokenizeMany, dict(cells=500_000), None),
    'tokenize_retired': ('tokenize, 60 retired ids to sum, whole process', cases.Tokenize,
                         dict(cells=5_000, retired=60),
                         dict(cells=60, genes=500, detected=100, retired=6)),
    'rank': ('ranking alone, in memory', cases.Rank, dict(cells=5_000), dict(cells=60, genes=500, detected=100)),
    'embed_1918': ('cell embeddings, V1-10M shape', cases.Embed, dict(cells=4, tokens=1918, **V1), None),
    'embed_256': ('cell embeddings, V1-10M shape', cases.Embed, dict(cells=32, tokens=256, batch=32, **V1),
                  dict(cells=3, tokens=70, **small)),
    'embed_1918_half': ('the same in bfloat16, reference in float32', cases.EmbedHalf, dict(cells=4, tokens=1918, **V1), None),
    'embed_256_half': ('cell embeddings in bfloat16, reference in float32, V1-10M shape', cases.EmbedHalf, dict(cells=32, tokens=256, batch=32, **V1),
                       dict(cells=3, tokens=70, **small)),
    'delete_256': ('deletion, first 64 genes of a cell, V1-10M shape', cases.Perturb,
                   dict(tokens=256, variants=64, batch=32, **V1), dict(tokens=70, variants=9, **small)),
    'delete_2048': ('deletion, first 16 genes of a cell, V1-10M shape', cases.Perturb,
                    dict(tokens=2048, variants=16, **V1), None),
    'delete_256_half': ('deletion in bfloat16, reference in float32, V1-10M shape', cases.PerturbHalf, dict(tokens=256, variants=64, batch=32, **V1),
                        dict(tokens=70, variants=9, **small)),
    'delete_2048_half': ('the same in bfloat16, reference in float32', cases.PerturbHalf, dict(tokens=2048, variants=16, **V1), None),
    'delete_512_map': ('deletion, first 17 genes of a cell, V1-10M shape; reference starts four processes for each cell, as the official default does',
                       cases.PerturbByMap, dict(tokens=512, variants=17, batch=17, **V1), dict(tokens=70, variants=9, **small)),
    'first_order': ('first-order shifts of every gene of a cell, V1-10M shape; reference: our exact engine, 32 genes extrapolated to all',
                    cases.FirstOrder, dict(tokens=2048, variants=32, **V1), dict(tokens=70, variants=9, **small)),
    'attention_512': ('attention received by each gene in every head, V1-10M shape; reference keeps all matrices', cases.Attention,
                      dict(cells=16, tokens=512, **V1), dict(cells=3, tokens=70, **small)),
    'attention_1900': ('attention received by each gene in every head, V1-10M shape; reference keeps all matrices', cases.Attention,
                       dict(cells=4, tokens=1900, **V1), None),
    'pretrain_2048': ('pretraining, seconds a step, V1-10M shape, two threads', cases.Pretrain, dict(cells=4, tokens=1900, **V1), None),
    'pretrain_256': ('pretraining, seconds a step, V1-10M shape, two threads', cases.Pretrain, dict(cells=32, tokens=256, **V1),
                     dict(cells=3, tokens=70, **small)),
    'genes_2000': ('classifier of genes, seconds a step, V1-10M shape, 4 of 6 layers frozen', cases.FinetuneGenes,
                   dict(cells=4, tokens=1960, **V1), dict(cells=3, tokens=70, **small)),
    'genes_2000_half': ('the same, ours in bfloat16, reference in float32', cases.FinetuneGenesHalf, dict(cells=4, tokens=1960, **V1), None),
    'shift': ('goal-state statistics, as the official code defines them', cases.Shift, dict(cells=100, genes=400),
              dict(cells=10, genes=20))}
GPU = [('cell embeddings on a GPU', 'any'), ('deletion of every gene on a GPU', 'any'), ('ranking on a GPU', 'any')] + [
    (f'pretraining on a GPU, share of the bfloat16 peak (model FLOP utilisation), {m}', 'any') for m in ('V1-10M', 'V2-104M', 'V2-316M')]


def peak_memory():
    "Most bytes this process held; on Linux not by getrusage, which hands the parent's peak down to a child"
    status = Path('/proc/self/status')
    if status.exists(): return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def child(name, role, folder, out):
    "Run one role of one benchmark; its figures go to OUT/ROLE.json, its answer to OUT/ROLE.npy"
    import numpy as np
    got = getattr(BENCHMARKS[name][1](), role)(Path(folder), Path(out))
    if isinstance(got[1], np.ndarray): np.save(f'{out}/{role}.npy', got[1])
    words = got[1] if isinstance(got[1], str) else ''
    Path(out, f'{role}.json').write_text(json.dumps(dict(work=got[0], peak=peak_memory(), words=words)))


def run_child(name, role, folder, out, threads):
    "Figures of one fresh process, its whole time among them"
    env = os.environ | dict(GENEFORMER_NB_QUIET='1', HF_HUB_OFFLINE='1')
    env.pop('PYTHONDONTWRITEBYTECODE', None)  # modules are compiled once, as they are where a package is installed
    if issubclass(BENCHMARKS[name][1], cases.Embed):
        env |= {k: str(getattr(BENCHMARKS[name][1], 'threads', threads)) for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    for old in Path(out).glob(f'{role}*'):  # or a second run would find its work done
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    t = time.perf_counter()
    done = subprocess.run([sys.executable, str(HERE/'run.py'), '--child', name, role, str(folder), str(out)], env=env,
                          capture_output=True, text=True)
    t = time.perf_counter() - t
    if done.returncode: raise SystemExit(f'{name}, {role} failed:\n{done.stderr[-3000:]}')
    return json.loads(Path(out, f'{role}.json').read_text()) | dict(process=t)


def compare(name, folder, out):
    "What `equal` says about the answers of the last pair"
    import numpy as np
    files = [Path(out, f'{r}.npy') for r in ('ours', 'reference')]
    return BENCHMARKS[name][1]().equal(folder, Path(out), *(np.load(f) for f in files if f.exists()))


def pair(one, i):
    "Figures of ours and of the reference; which goes first changes from pair to pair"
    got = {role: one(role) for role in (('ours', 'reference'), ('reference', 'ours'))[i % 2]}
    return got['ours'], got['reference']


def bench(name, scratch, pairs, threads, quick):
    "All figures of one benchmark"
    title, case, size, tiny = BENCHMARKS[name]
    folder = case().prepare(scratch, **(tiny if quick else size))
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        def one(role): return run_child(name, role, folder, out, threads)
        if quick and name != 'rank':  # the times mean nothing: no process of their own
            for role in ('ours', 'reference'): child(name, role, folder, out)
            runs = []
        elif case.alone: runs = [(one('ours'), None) for _ in range(pairs)]
        else: runs = [pair(one, i) for i in range(1 if quick else pairs)]
        equal = compare(name, folder, out)
        bound = None if quick else one('bound')
    key = 'process' if case.whole else 'work'
    return dict(title=title, size=size, key=key, equal=equal, bound=bound, threads=threads, ours=[a for a, _ in runs],
                reference=[b for _, b in runs if b])


# ---- the table

def spread(x, unit='', digits=None):
    "median (lowest-highest)"
    d = digits if digits is not None else 3 if statistics.median(x) < .1 else 2 if statistics.median(x) < 10 else 1
    return f'{statistics.median(x):.{d}f}{unit} ({min(x):.{d}f}-{max(x):.{d}f})'


def size_words(s):
    words = [f'{s["cells"]:,} cells'] if 'cells' in s else ['1 cell']
    if 'tokens' in s: words.append(f'{s["tokens"]:,} tokens')
    elif 'genes' in s: words.append(f'{s["genes"]:,} genes')
    else: words.append('20,000 genes')
    return ' x '.join(words)


def row(name, r):
    "One line of the table"
    if not r['reference']: return row_alone(name, r)
    ours, ref = ([x[r['key']] for x in r[k]] for k in ('ours', 'reference'))
    ratio = [b / a for a, b in zip(ours, ref)]
    memory = ' / '.join(f'{max(x["peak"] for x in r[k]) / 1e9:.2f}' for k in ('ours', 'reference'))
    far = statistics.median(ours) / r['bound']['work']
    limit = f'{r["bound"]["words"]}: {r["bound"]["work"]:.2g} s in all, ours takes {far:.1f} times that; {cpu()}'
    return [r['title'], size_words(r['size']), spread(ours, ' s'), spread(ref, ' s'), spread(ratio, ' x', 1),
            f'{memory} GB', limit, f'`python benchmarks/run.py {name} --pairs {len(ratio)}`']


def row_alone(name, r):
    "One line of a benchmark that only we can run"
    ours = [x['process'] for x in r['ours']]
    rate = r['size']['cells'] / statistics.median(ours)
    return [r['title'], size_words(r['size']), spread(ours, ' s'), 'not measured', 'not measured', f'{max(x["peak"] for x in r["ours"]) / 1e9:.2f} GB',
            f'{rate:,.0f} cells/s; {r["bound"]["words"]}; {cpu()}', f'`python benchmarks/run.py {name} --pairs {len(ours)}`']


HEAD = '''# Benchmarks

{machine}

How to read it: **ours** and **reference** are seconds, median (lowest-highest) of as many runs as the command says
pairs. Both ran in turn, each in a fresh process, on the same input, and gave the same answer before anything was
written down. **ratio** is reference divided by ours, pair by pair. **peak memory** is that of the whole process,
ours / reference. **limit** is what the work cannot do without, measured in the same run, and how far ours is from
it. Whole-process rows include starting Python and all imports; nothing is compiled when it first runs. The other
rows leave out starting, importing and loading. Rows with a model use {threads} thread(s), those of pretraining two,
float32 where nothing else is said, and random weights; bfloat16 on a processor with instructions for it (AMD EPYC, avx512_bf16). On an AMD
processor ours multiplies matrices with oneDNN and the reference with what torch takes by itself (nbs/07b_cpu_kernels.ipynb); the limit is that of the faster. Tokenizing is one process on both sides; ours uses as many threads as there are cores, the reference is one
loop, and one row has one thread on both sides.

The reference, `benchmarks/naive.py`, is what a careful user would write: a numpy loop over cells that hands lists
to `datasets`; the stock model on padded batches with its masked-LM head; `scipy.stats.ranksums` gene by gene. The
official code's own figures on a comparable 2-core machine, carried here as facts and not measured by this script:
tokenizer 614 cells/s (5,000 cells) to 1,224 cells/s (20,000 cells), 70 cells/s with 60 ids to collapse, peak memory
1.2 to 2.7 GiB, where a plain numpy loop in memory ranked 4,247 cells/s; embeddings 1.69 cells/s at 1,918 tokens on
two threads; deletion of every gene 8.5 a second at 256 tokens and 0.94 a second at 2,048, on one thread. Ratios
carry over to another machine, seconds do not.

| benchmark | size | ours | reference | ratio | peak memory | limit | command |
|---|---|---|---|---|---|---|---|
'''


def cpu():
    "The name of the processor"
    info = Path('/proc/cpuinfo')
    return next((l.split(':')[1].strip() for l in (info.read_text().splitlines() if info.exists() else ()) if 'model name' in l), platform.processor())


def machine():
    import torch
    from importlib.metadata import version
    return (f'Measured on {os.cpu_count()}-core {platform.machine()} cloud machines, shared, no GPU; the last words of a limit name the processor.\n'
            f'Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}, transformers '
            f'{version("transformers")}, numpy {version("numpy")}. Load average when this was written: '
            f'{os.getloadavg()[0]:.1f}\n(these benchmarks alone make 1 to 2; above that the times are too long and '
            'their spread too wide).')


def write(rows, threads):
    "RESULTS.md: the rows that were run, the others as they stood"
    path = HERE/'RESULTS.md'
    before = path.read_text() if path.exists() else ''
    old = {m[2]: m[1] for m in re.finditer(r'^(\|.*`python benchmarks/run.py (\w+)[^`]*` \|)$', before, re.M)}
    new = {n: ' | '.join(['', *cells, '']).strip() for n, cells in rows.items()}
    lines = [(old | new)[n] for n in BENCHMARKS if n in old | new]
    lines += [f'| {t} | {s} ' + '| not measured ' * 4 + '| no GPU here | - |' for t, s in GPU]
    path.write_text(HEAD.format(machine=machine(), threads=threads) + '\n'.join(lines) + '\n')


def main(argv=None):
    p = argparse.ArgumentParser(prog='run.py', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', metavar='name', help=', '.join(BENCHMARKS))
    p.add_argument('--quick', action='store_true', help='tiny sizes, only whether the answers agree')
    p.add_argument('--pairs', type=int, default=3, help='pairs of runs (default 3)')
    p.add_argument('--threads', type=int, default=1, help='threads of the model benchmarks (default 1)')
    p.add_argument('--write', action='store_true', help='write the rows into RESULTS.md')
    p.add_argument('--scratch', help='folder for inputs, kept; default a temporary one')
    p.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.child: return child(*a.child)
    if lost := set(a.names) - set(BENCHMARKS):
        p.error(f'no benchmark {", ".join(lost)}; there are {", ".join(BENCHMARKS)}')
    rows = {}
    if a.scratch: Path(a.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        for name in a.names or [n for n in BENCHMARKS if not a.quick or BENCHMARKS[n][3]]:
            t = time.perf_counter()
            r = bench(name, Path(a.scratch or tmp), a.pairs, a.threads, a.quick)
            print(f'{name}: answers agree ({r["equal"]})', flush=True)
            if a.quick: continue
            rows[name] = row(name, r)
            print('  ' + '\n  '.join(rows[name][2:7]) + f'\n  ({time.perf_counter() - t:.0f} s in all)', flush=True)
            if a.write: write(rows, a.threads)


if __name__ == '__main__': main()

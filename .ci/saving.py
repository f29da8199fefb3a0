"Run a notebook and store its true outputs: small, repeatable, without traces of the machine"
import json, os, re, subprocess, sys, tempfile, time, warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARN_KB, FAIL_KB = 400, 1000
LOCAL = re.compile(r'(?<![\w.:/-])/(?:tmp|work|root|home|Users|private|mnt|opt)/[\w.-]')
PLOT_REPR = re.compile(r'\s*\[?(<(Axes|Figure|matplotlib|seaborn|mpl_toolkits)|Text\()')
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*(\w[\w-]*)(:?)\s*(.*?)\s*$')

def directives(source):
    "{name: value} of the `#| ...` lines at the head of a cell, and the code below them"
    found, lines = {}, source.splitlines()
    while lines and (m := DIRECTIVE.match(lines[0])):
        found[m[1]] = m[3]
        lines.pop(0)
    return found, '\n'.join(lines)

def data_folder():
    "The folder of real data, or None"
    d = os.environ.get('GENEFORMER_NB_DATA')
    return Path(d) if d and Path(d).is_dir() else None

def why_skip(source, flags=()):
    "Why a cell is not run, or None when it is"
    from nbdev.config import get_config
    d, _ = directives(source)
    if d.get('eval', '').lower() == 'false': return 'eval: false'
    if 'nbdev_export(' in source: return 'nbdev_export'
    run = set(flags) | ({'realdata'} if data_folder() else set())
    held = [f for f in get_config().tst_flags.split() if f in d and f not in run]
    return ' '.join(held) or None

def local_paths(text):
    "Absolute paths of this machine that `text` shows"
    here = [str(ROOT), str(Path.home()), tempfile.gettempdir(), str(data_folder() or ROOT)]
    own = '|'.join(re.escape(h) for h in here if len(h) > 1)
    hits = [m[0] for m in LOCAL.finditer(text)] + re.findall(rf'(?<![\w.:/-])(?:{own})/', text)
    return sorted(set(hits))

def output_text(o):
    "Everything readable in one output"
    readable = lambda kind: kind.startswith('text') or 'json' in kind or 'svg' in kind
    parts = [o.get('text', '')] + [v for k, v in o.get('data', {}).items() if readable(k)]
    return '\n'.join(''.join(p) if isinstance(p, list) else str(p) for p in parts)

def _tidy(outs):
    "Drop progress bars, warnings and widget states; keep one rich form and its text"
    kept = []
    for o in outs:
        if o['output_type'] == 'stream' and o['name'] == 'stderr': continue
        if o['output_type'] == 'stream':
            text = ''.join(o['text'])
            text = '\n'.join(l.rpartition('\r')[2].rstrip() for l in text.split('\n'))
            if not text.strip(): continue
            o = dict(o, text=text.splitlines(True))
        for k in list(o.get('data', {})):
            if 'widget' in k: o['data'].pop(k)
        if 'data' in o and not o['data']: continue
        if list(o.get('data', {})) == ['text/plain'] and PLOT_REPR.match(''.join(o['data']['text/plain'])): continue
        if 'data' in o and 'image/png' in o['data']: o['data']['text/plain'] = ['<Figure>']
        kept.append(o)
    return kept

def _shell():
    "A capture shell with inline figures of modest size"
    from execnb.shell import CaptureShell
    shell = CaptureShell(mpl_format='png')
    shell.set_path(ROOT/'nbs')
    sys.path.insert(0, str(ROOT))
    shell.run("import matplotlib as _m; _m.rcParams.update({'figure.dpi': 100, 'savefig.dpi': 100}); del _m")
    return shell

def save(path, flags=()):
    "Run one notebook in this process and store its outputs; raises SystemExit with the traceback"
    from execnb.nbio import _dict2obj, nb2str, read_nb
    from nbdev.clean import clean_nb
    from checking import mixed_imports
    warnings.simplefilter('ignore')
    before, start = path.read_bytes(), time.time()
    nb, skipped, ran = read_nb(path), [], 0
    os.chdir(ROOT/'nbs')
    shell = _shell()
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != 'code': continue
        why = why_skip(cell.source, flags)
        if why:
            stored = '' if cell.get('outputs') else ', no output stored'
            if why != 'nbdev_export': skipped.append(f'cell {i} ({why})' + stored)
            continue
        shell._cell_idx = i + 1
        outs = shell.run(directives(cell.source)[1])
        if shell.exc: sys.exit(shell.prettytb(fname=path.name))
        cell.outputs = _dict2obj(_tidy(outs))
        ran += 1
    for i, cell in enumerate(nb.cells):
        for o in cell.get('outputs', []) if cell.cell_type == 'code' else []:
            bad = local_paths(output_text(o))
            if bad: sys.exit(f'{path.name}: not saved, cell {i} shows paths of this machine: {bad}. '
                             'Print a name instead of a path:\n' + cell.source[:300])
        if cell.cell_type == 'code' and mixed_imports(cell.source):
            print(f'{path.name}: cell {i} mixes an import with code. The site build runs such a cell alone: '
                  'put the import in a cell of its own:\n    ' + directives(cell.source)[1].splitlines()[0],
                  file=sys.stderr)
    clean_nb(nb)
    kb = outputs_kb(nb)
    if kb > FAIL_KB: sys.exit(f'{path.name}: not saved, its outputs take {kb:.0f} kB (limit {FAIL_KB}).')
    if kb > WARN_KB: print(f'{path.name}: outputs take {kb:.0f} kB, aim below {WARN_KB}.', file=sys.stderr)
    if path.read_bytes() != before:
        sys.exit(f'{path.name}: not saved, it was changed on disk while it ran; save again.')
    tmp = path.with_name(f'.{path.name}.part')
    tmp.write_text(nb2str(nb), encoding='utf-8')
    os.replace(tmp, path)
    print(f'{path.name}: {ran} cells in {time.time()-start:.0f} s, outputs {kb:.0f} kB'
          + (f"; kept as they were: {'; '.join(skipped)}" if skipped else ''))

def outputs_kb(nb):
    "Size of all stored outputs"
    return sum(len(json.dumps(c['outputs'], default=str)) for c in nb['cells'] if c['cell_type'] == 'code') / 1000

def save_all(paths, flags):
    "Each notebook in a process of its own, so that none sees what another left behind"
    paths = paths or sorted((ROOT/'nbs').glob('[0-9i]*.ipynb'))
    if 'realdata' in flags and not data_folder():
        print('realdata cells need GENEFORMER_NB_DATA to name the data folder.', file=sys.stderr)
        return 1
    os.chdir(ROOT)
    if len(paths) == 1:
        save(paths[0], flags)
        return 0
    nb = Path(__file__).with_name('nb.py')
    cmd = lambda p: [sys.executable, nb, 'save', p, '--flags', ' '.join(flags)]
    failed = [p.name for p in paths if subprocess.run(cmd(p), stdin=subprocess.DEVNULL).returncode]
    if failed: print('failed:', *failed, file=sys.stderr)
    return int(bool(failed))

"The house: README, wheel, light import, commands, and nothing of the machine it was written on"
import json, os, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'.ci'))
import readme, saving

def _run(*cmd, **kw): return subprocess.run(cmd, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kw)

def _committed():
    if shutil.which('git') is None or not (ROOT/'.git').exists(): pytest.skip('not a git checkout')
    files = _run('git', 'ls-files', cwd=ROOT).stdout.split('\n')
    return [f for f in files if f and (ROOT/f).is_file()]

def test_readme_in_sync(): assert readme.faults() == []

def test_readme_links_and_pictures_exist():
    import re
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\((?!https?:|#)([^)#\s]+)', text): assert (ROOT/link).exists(), link
    assert not re.findall(r'!\[\s*\]', text), 'a picture without alternative text'

def test_readme_writer():
    cell = lambda kind, s, outs=(): dict(cell_type=kind, source=[s], outputs=list(outs))
    printed = dict(output_type='stream', name='stdout', text=['2\n', '3\n'])
    nb = dict(cells=[cell('markdown', '# T\n\n[a](01_a.ipynb) [b](https://x.org) ![p](images/p.png) [c](#d)'),
                     cell('code', '#| hide\n1'), cell('code', '#| eval: false\n1+1', [printed])])
    md = readme.render(nb)
    assert '[a](nbs/01_a.ipynb) [b](https://x.org) ![p](nbs/images/p.png) [c](#d)' in md
    assert '```python\n1+1\n```\n\n    2\n    3\n' in md and 'hide' not in md

LIGHT = """import json, sys, geneformer_nb
heavy = 'torch transformers scanpy anndata datasets seaborn sklearn statsmodels pandas numpy dask matplotlib'
print(json.dumps(dict(heavy=[h for h in heavy.split() if h in sys.modules], names=dir(geneformer_nb),
                      core=geneformer_nb.core.__name__, version=geneformer_nb.__version__)))"""

def test_import_is_light():
    run = _run(sys.executable, '-c', LIGHT, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout)
    assert got['core'] == 'geneformer_nb.core' and {'pp', 'Geneformer', 'data'} <= set(got['names'])
    run = _run(sys.executable, '-c', LIGHT.replace('geneformer_nb.core.__name__', '""'), cwd=ROOT)
    assert json.loads(run.stdout)['heavy'] == []

def test_unknown_name_is_an_attribute_error():
    import geneformer_nb
    with pytest.raises(AttributeError, match='no attribute'): geneformer_nb.nothing_of_that_name

@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    d = tmp_path_factory.mktemp('wheel')
    junk = shutil.ignore_patterns('__pycache__', '.*')
    shutil.copytree(ROOT/'geneformer_nb', d/'src/geneformer_nb', ignore=junk)
    for f in ('settings.ini', 'setup.py', 'README.md', 'MANIFEST.in', 'LICENSE', 'CHANGELOG.md', 'constraints.txt'):
        shutil.copy(ROOT/f, d/'src')
    run = _run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', d, d/'src')
    assert run.returncode == 0, run.stderr[-2000:]
    return next(d.glob('*.whl'))

def test_wheel_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        entry = z.read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
        meta = z.read(next(n for n in names if n.endswith('METADATA'))).decode()
    assert {f'geneformer_nb/{p.name}' for p in (ROOT/'geneformer_nb').glob('*.py')} <= set(names)
    assert {f'geneformer_nb/screen/html/{p.name}' for p in (ROOT/'geneformer_nb/screen/html').iterdir()} <= set(names)
    assert 'geneformer-nb = geneformer_nb.cli:main' in entry and 'geneformer_nb._modidx:d' in entry
    assert 'Provides-Extra: scale' in meta
    assert 'License: Apache-2.0' in meta or 'License-Expression: Apache-2.0' in meta

def test_wheel_imports_on_its_own(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as z: z.extractall(tmp_path)
    code = 'from geneformer_nb import core; print(core.__file__, core.in_words(42))'
    run = _run(sys.executable, '-c', code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert run.returncode == 0 and str(tmp_path) in run.stdout and '42 s' in run.stdout, run.stderr

def test_no_path_of_a_machine_in_committed_files():
    found = []
    for f in _committed():
        try: text = (ROOT/f).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        if f.endswith('.ipynb'):  # sources and readable outputs; pictures are letters by chance
            cells = json.loads(text)['cells']
            outputs = [saving.output_text(o) for c in cells for o in c.get('outputs', [])]
            text = '\n'.join([''.join(c['source']) for c in cells] + outputs)
        found += [f'{f}: {p}' for p in saving.local_paths(text)]
    assert found == []

def test_no_pickles_weights_or_data_committed():
    bad = ('.pkl', '.pickle', '.pt', '.bin', '.ckpt', '.safetensors', '.h5ad', '.parquet', '.arrow', '.loom')
    assert [f for f in _committed() if f.endswith(bad)] == []
    assert [f for f in _committed() if (ROOT/f).stat().st_size > 1_500_000] == []

def test_commands_are_executable():
    for f in ('.ci/run', '.ci/setup'): assert os.access(ROOT/f, os.X_OK), f

def test_license_and_changelog():
    assert 'Apache License' in (ROOT/'LICENSE').read_text() and 'Unreleased' in (ROOT/'CHANGELOG.md').read_text()

@pytest.mark.parametrize('beside,preset,says', [
    (True, None, 'real data: here'), (False, None, 'not here'), (True, '', 'not here')],
    ids=['beside', 'absent', 'set empty'])
def test_make_finds_the_data_folder(tmp_path, beside, preset, says):
    if shutil.which('make') is None: pytest.skip('no make')
    (tmp_path/'checkout').mkdir()
    if beside: (tmp_path/'shared').mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ('GENEFORMER_NB_DATA', 'MAKEFLAGS', 'MAKEOVERRIDES')}
    if preset is not None: env['GENEFORMER_NB_DATA'] = preset
    run = _run('make', '-s', '-C', str(tmp_path/'checkout'), '-f', str(ROOT/'Makefile'), 'data', env=env)
    assert says in run.stdout, run.stdout + run.stderr
    assert ('--flags realdata' in run.stdout) == (says == 'real data: here')

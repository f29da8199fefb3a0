"The notebooks are the source: clean, in sync with the modules, fit for the site, pinned to versions that work"
import json, os, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'.ci'))
import checking, saving, sidebar, style

NBS = checking.notebooks()
ids = lambda p: p.stem

@pytest.mark.parametrize('nb', NBS, ids=ids)
def test_clean(nb): assert checking.unclean(nb) is None

@pytest.mark.parametrize('nb', NBS, ids=ids)
def test_fit_for_the_site(nb): assert list(checking.page_faults(nb)) == []

def test_a_page_without_outputs_is_a_fault(tmp_path):
    nb = json.loads(NBS[-1].read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'code': c['outputs'] = []
    bare = tmp_path/NBS[-1].name
    bare.write_text(json.dumps(nb))
    assert [f for f in checking.page_faults(bare) if 'its page is bare' in f]

def test_style_of_modules(): assert [*style.import_faults(), *style.module_faults()] == []

@pytest.mark.parametrize('nb', NBS, ids=ids)
def test_style_of_notebooks(nb): assert list(style.notebook_faults(nb)) == []

def test_the_gate_of_style_sees_what_it_should(tmp_path):
    "One module and one cell for each fault"
    (tmp_path/'data').mkdir()
    (tmp_path/'data/a.py').write_text("from ..screen.run import screen\nfrom ..core import _secret\nx = 1; y = 2\n"
                                      f"z = 1 if x else 2 if y else 3\n{'w' * 90} = 'too long a line'\n")
    found = [*style.import_faults(tmp_path), *style.module_faults(tmp_path)]
    for word in ('stands above', 'private name _secret', 'joins statements', 'nests conditional', 'columns'):
        assert sum(word in f for f in found) == 1, (word, found)
    cells = [f"#| export\ndef f():\n{'    a = 1' + chr(10)}" + '    a = 1\n' * 31, f"print('{'x' * 90}')", f"#| hide\nprint('{'x' * 90}')"]
    found = list(style.notebook_faults(_notebook(tmp_path/'n.ipynb', *cells)))
    assert len(found) == 2 and 'has 32 lines' in found[0] and 'shows a line' in found[1], found

def test_lines_of_a_signature_do_not_count():
    long = 'def f(\n' + ''.join(f'    a{i}, # one\n' for i in range(40)) + '):\n    "What it does"\n    return 1'
    fields = '@dataclass\nclass A:\n' + ''.join(f'    a{i}: int = 0 # one\n' for i in range(40))
    assert style.code_lines(long) == 1 and style.code_lines(fields) == 1

def test_modules_in_sync(): assert checking.out_of_sync() == []

def test_sidebar_lists_every_notebook_once(): assert sidebar.faults() == []

def test_sidebar_is_in_the_order_of_the_book():
    assert sidebar.listed() == [(s if s != 'Start' else '', n) for s, n in sidebar.planned()]

def test_pages_have_unique_addresses():
    pages = [checking.page(n) for n in NBS]
    assert len(set(pages)) == len(pages)

def test_quarto_file_is_linked():
    "nbdev reads nbs/_quarto.yml only; the real file is at the root"
    assert (ROOT/'nbs/_quarto.yml').resolve() == ROOT/'_quarto.yml'

def test_pins_of_nbdev():
    "nbdev 2.4.14 fails to start with newer fastcore, execnb or ghapi"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    pins = {'nbdev==2.4.14', 'fastcore<2', 'execnb<0.2', 'ghapi<2'}
    assert pins <= set(ini['DEFAULT']['dev_requirements'].split())
    assert pins <= set((ROOT/'constraints.txt').read_text().split())
    assert 'fastcore' in ini['DEFAULT']['requirements'].split(), 'users need fastcore, without our pin'

def test_import_cells():
    mixed = checking.mixed_imports
    assert mixed('import os\nos.getcwd()') and mixed('def f(): import os\nf()')
    assert not mixed('import os\nfrom pathlib import Path') and not mixed('os.getcwd()')
    assert not mixed('#| export\nimport os\nos.getcwd()') and not mixed('#| eval: false\nimport os\nos.getcwd()')

def _notebook(path, *cells):
    "A small notebook; a cell is its source, or source and stored text"
    cells = [c if isinstance(c, tuple) else (c, None) for c in cells]
    out = lambda t: [dict(output_type='stream', name='stdout', text=[t])] if t else []
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=out(t), execution_count=None)
             for i, (s, t) in enumerate(cells)]
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))
    return path

def _save(path, *more, **env):
    env = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run([sys.executable, ROOT/'.ci/nb.py', 'save', path, *more], capture_output=True, text=True,
                          env=env, stdin=subprocess.DEVNULL)

def _outputs(path): return [c['outputs'] for c in json.loads(path.read_text())['cells']]

def test_save_stores_true_outputs(tmp_path):
    nb = _notebook(tmp_path/'a.ipynb', ('6*7', 'old\n'), 'import os, sys',
                   "print('hm', file=sys.stderr); os.environ.get('IN_TEST', 'not testing')",
                   ('#| slow\n1/0', 'kept\n'), ('#| eval: false\n1/0', 'kept too\n'),
                   'import matplotlib.pyplot as plt',
                   'plt.figure(figsize=(2, 1)).gca().plot([1, 2])', ('#| realdata\n1/0', 'real\n'))
    run = _save(nb, GENEFORMER_NB_DATA=None, IN_TEST='1')
    assert run.returncode == 0, run.stderr
    out = _outputs(nb)
    assert out[0][0]['data']['text/plain'] == ['42'] and len(out[0]) == 1
    assert [o['output_type'] for o in out[2]] == ['execute_result']
    assert 'not testing' in out[2][0]['data']['text/plain'][0]
    assert [out[i][0]['text'] for i in (3, 4, 7)] == [['kept\n'], ['kept too\n'], ['real\n']]
    assert [list(o['data']) for o in out[6]][0][0] == 'image/png' and len(out[6]) == 1
    assert 'slow' in run.stdout and 'realdata' in run.stdout
    again = nb.read_bytes()
    assert _save(nb, GENEFORMER_NB_DATA=None).returncode == 0 and nb.read_bytes() == again

@pytest.mark.parametrize('code,why', [
    ("print('/' + 'root/data/x')", 'paths of this machine'), ('1/0', 'ZeroDivisionError'),
    ("print('x' * 2_000_000)", 'kB')], ids=['path', 'error', 'size'])
def test_save_refuses(tmp_path, code, why):
    nb = _notebook(tmp_path/'a.ipynb', code)
    before = nb.read_bytes()
    run = _save(nb)
    assert run.returncode and why in run.stderr and nb.read_bytes() == before

def test_local_paths():
    slash = '/'
    assert saving.local_paths(f'saved {slash}home/ann/x.csv') and saving.local_paths(f"'{slash}tmp/x'")
    assert not saving.local_paths('a/home/b https://x.org/home/b and geneformer_nb/root/x')

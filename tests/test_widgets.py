"The explorer: its answers without a browser, and once in a real one"
import importlib.util, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from geneformer_nb.core import GeneformerError
from geneformer_nb.perturb.actions import Dose, KO, perturb
from geneformer_nb.explorer import _num, explore
from sentences import says

ROOT = Path(__file__).resolve().parent.parent
MAKE = """import torch
from geneformer_nb.data import toy
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.explorer import explore
torch.set_num_threads(1)
adata = toy.simulate(n_cells=120, n_donors=6, n_genes=80, seed=0)
vocabulary = Vocabulary.from_counts(adata, symbols='symbol', name='toy', max_len=90)
cells = tokenize(adata, vocabulary)
model = Geneformer.new('nano', vocabulary, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, initializer_range=.2)
hearts = explore(model, cells, 'disease', donor='donor', max_cells=24, nulls=4, gene='HK01')"""

@pytest.fixture(scope='module')
def made():
    "The toy explorer; threads are put back"
    threads, room = torch.get_num_threads(), {}
    exec(MAKE, room)
    torch.set_num_threads(threads)
    return room

@pytest.fixture(scope='module')
def hearts(made): return made['hearts']

def test_look_is_perturb_and_mean_over_donors(hearts, made):
    got = hearts.look('TF01', 'inhibit', state='dilated')
    raw = perturb(made['model'], hearts.cells, KO('TF01'), states=hearts.states, show=False)
    donor = hearts.cells.obs['donor'].astype(str).to_numpy()[raw.cell]
    by = raw['shift_dilated'].groupby(donor).mean()
    assert np.isclose(got.shift, by.mean(), atol=1e-6) and got.have == len(raw) and got.of == 24
    np.testing.assert_allclose(got.donors.set_index('donor')['shift'], by, atol=1e-6)
    np.testing.assert_allclose(got.cells['shift'], raw['shift_dilated'], atol=1e-6)
    assert _num(got.shift) in repr(got) and 'TF01' in repr(got)
    null = hearts.look(got.nulls.gene[0], 'inhibit', state='dilated') # a matched gene asked for by name
    assert np.isclose(null.shift, got.nulls['shift'][0], atol=1e-6) and 'TF01' not in list(got.nulls.gene)

def test_combinations_and_doses(hearts, made):
    two, again = hearts.look('TF01 + HK01', 'down', share=.5), hearts.look(['TF01', 'HK01'], 'down', share=.5)
    raw = perturb(made['model'], hearts.cells, Dose('TF01', 'HK01', down=.5), states=hearts.states, show=False)
    donor = hearts.cells.obs['donor'].astype(str).to_numpy()[raw.cell]
    assert two.shift == again.shift and np.isclose(two.shift, raw[f'shift_{two.towards}'].groupby(donor).mean().mean(), atol=1e-6)
    assert two.nulls.gene.str.contains(r' \+ ').all() and len(two.nulls)
    assert hearts.look('TF01', 'down', share=.25).shift != hearts.look('TF01', 'down', share=.75).shift

def test_cells_are_even_over_donors_and_the_cache_answers(hearts, made):
    assert set(hearts.cells.obs['donor'].value_counts()) == {4}
    told = []
    one = hearts.look('TF02', 'activate', tell=lambda *a: told.append(a))
    assert told and told[-1][0] == told[-1][1] and len(one.cells) == 24
    n = len(hearts.cache)
    assert hearts.look('TF02', 'activate').shift == one.shift and len(hearts.cache) == n
    a, b = (explore(made['model'], made['cells'], 'disease', max_cells=10, seed=s).cells.obs.index.tolist() for s in (0, 0))
    assert a == b

def test_neighbors(hearts):
    near = hearts.look('HK01').neighbors
    assert set(near.gene) == {'HK01'} and 'HK01' not in list(near.neighbor) and near.cosine.is_monotonic_decreasing and near.cosine.between(-1, 1).all()

def test_sentences(hearts, made):
    with says(GeneformerError, 'TF011', 'Did you mean', 'TF01'): hearts.look('TF011')
    with says(GeneformerError, 'Name a gene'): hearts.look('  ')
    with says(GeneformerError, 'twice'): hearts.look('TF01+tf01')
    with says(GeneformerError, 'inhibit, activate'): hearts.look('TF01', 'delete')
    with says(GeneformerError, 'dilated'): hearts.look('TF01', state='well')
    with says(GeneformerError, 'share'): hearts.look('TF01', 'up', share=2)
    with says(GeneformerError, 'nothing to move towards'): explore(made['model'], made['cells'])
    with says(GeneformerError, 'patient'): explore(made['model'], made['cells'], 'disease', donor='patient')
    with says(GeneformerError, 'no finite vector'): explore(made['model'], made['cells'], dict(a=np.zeros(3)))
    with says(GeneformerError, 'tokenize'): explore(made['model'], [1, 2], 'disease')
    few = explore(made['model'], made['cells'][:1], 'disease', nulls=2)
    lost = next(s for s, n in zip(made['vocabulary'].symbols.values(), few.seen[2:]) if not n)
    with says(GeneformerError, 'activate can put it there'): few.look(lost)
    assert np.isfinite(few.look(lost, 'activate').shift) and not len(few.look(lost, 'activate').neighbors)

def test_static_and_widgets_without_a_browser(hearts):
    page = hearts._repr_html_()
    assert page.count('<img alt="Inhibiting HK01') == 1 and _num(hearts.look('HK01').shift) in page
    assert not any('widget' in k for k in hearts._repr_mimebundle_())
    parts = hearts.ui().parts
    parts['gene'].value = 'NOSUCHGENE'; parts['go'].click()
    assert 'not in the vocabulary' in parts['out'].value and 'Traceback' not in parts['out'].value and not parts['go'].disabled
    parts['gene'].value, parts['action'].value, parts['state'].value = 'TF01 + TF02', 'activate', 'dilated'; parts['go'].click()
    assert _num(hearts.look('TF01 + TF02', 'activate', state='dilated').shift) in parts['out'].value
    parts['action'].value = 'up'; assert parts['share'].layout.display is None
    parts['gene'].value, parts['action'].value = 'HK01', 'inhibit'

def served(folder, name):
    "A Voilà server of a notebook, and its address"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {k: str(folder/k.lower()) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    env |= dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', GENEFORMER_NB_QUIET='1')
    log = open(folder/'voila.log', 'w')
    run = subprocess.Popen([sys.executable, '-m', 'voila', str(folder/name), f'--port={port}', '--no-browser', '--Voila.ip=127.0.0.1'], cwd=folder, env=env, stdout=log,
                           stderr=log, stdin=subprocess.DEVNULL)
    return run, f'http://127.0.0.1:{port}/'

@pytest.fixture
def browser(tmp_path):
    "Headless Chromium; skipped, with a reason, where something is missing"
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if not chromium or not shutil.which('chromedriver'): pytest.skip('no Chromium with its chromedriver on PATH: the explorer was tested without a browser only')
    for package in ('selenium', 'voila', 'ipykernel', 'nbformat'):
        if not importlib.util.find_spec(package): pytest.skip(f'{package} is not installed: the explorer was tested without a browser only')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for f in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
              '--disable-sync', '--disable-dev-shm-usage', '--window-size=1100,1000', f'--user-data-dir={tmp_path/"profile"}'): options.add_argument(f)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()

@pytest.mark.browser
def test_in_a_browser(hearts, browser, tmp_path):
    "Pick a gene, press the button, read the number; an unknown gene gives its sentence"
    import nbformat
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(MAKE), nbformat.v4.new_code_cell('hearts')],
                   metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))), tmp_path/'explorer.ipynb')
    run, address = served(tmp_path, 'explorer.ipynb')
    try:
        for _ in range(240):
            if run.poll() is not None: pytest.fail(f"Voilà did not start: {(tmp_path/'voila.log').read_text()[-800:]}")
            with socket.socket() as s:
                if not s.connect_ex(('127.0.0.1', int(address.split(':')[-1].strip('/')))): break
            time.sleep(.25)
        browser.set_page_load_timeout(120)
        browser.get(address)
        wait, page = WebDriverWait(browser, 90), lambda: browser.find_element(By.TAG_NAME, 'body').text
        def shown(text): wait.until(lambda _: text in page(), f'{text!r} did not appear')
        def press(word): browser.find_element(By.XPATH, f"//button[normalize-space()='{word}']").click()
        def type_gene(text):
            field = browser.find_element(By.CSS_SELECTOR, 'input[list]')
            field.send_keys(Keys.CONTROL, 'a'); field.send_keys(text, Keys.TAB)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, 'input[list]'), 'the widgets did not appear')
        shown(_num(hearts.look('HK01').shift)) # the first answer, as it comes
        press('activate'); type_gene('TF01 + TF02'); press('Look')
        want = hearts.look('TF01 + TF02', 'activate')
        shown(repr(want)[:repr(want).index(', mean')])
        picture = browser.find_element(By.CSS_SELECTOR, 'figure img')
        assert browser.execute_script('return arguments[0].naturalWidth', picture) > 300 and picture.get_attribute('alt') == repr(want)
        type_gene('TF011'); press('Look'); shown('Did you mean TF')
        assert 'Traceback' not in page() and not browser.find_elements(By.CSS_SELECTOR, 'figure img')
        if where := os.environ.get('GENEFORMER_NB_SHOTS'):
            browser.save_screenshot(f'{where}/error.png')
            type_gene('TF01'); press('down'); press('Look'); shown('Moving TF01 down by 25%'); browser.save_screenshot(f'{where}/dose.png')
    finally:
        run.send_signal(signal.SIGINT)
        try: run.wait(15)
        except subprocess.TimeoutExpired: run.kill(); run.wait()

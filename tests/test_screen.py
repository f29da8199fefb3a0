"The screen: a killed run that goes on gives the same table; its table, folder and report are checked; the report opens in a browser"
import html, json, re, shutil, signal, subprocess, sys, time
import numpy as np, pandas as pd, pytest
import geneformer_nb as gf
from geneformer_nb.data import toy

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    path = tmp_path_factory.mktemp('cohort')/'cohort.h5ad'
    toy.simulate(n_cells=270, n_donors=9, n_genes=80, seed=0).write_h5ad(path)
    return path

def command(cohort, out):
    return [sys.executable, '-c', 'from geneformer_nb.cli import main; raise SystemExit(main())', 'screen', str(cohort), '--label', 'disease',
            '--donor', 'donor', '--start', 'hypertrophic', '--goal', 'non-failing', '--where', 'cell_type=cardiomyocyte', '--max-cells', '12',
            '--folds', '2', '--steps', '20', '--epochs', '1', '--directions', 'KO,up', '--controls', 'first_order', '--pairs', '2', '--out', str(out)]

def run(cohort, out): return subprocess.run(command(cohort, out), capture_output=True, text=True, timeout=300)

def test_killed_screen_goes_on(cohort, tmp_path):
    whole = run(cohort, tmp_path/'whole')
    assert whole.returncode == 0, whole.stderr
    assert 'Expected: pretraining' in whole.stdout
    p = subprocess.Popen(command(cohort, tmp_path/'killed'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not list((tmp_path/'killed').glob('fold-*/perturb/shard-*')) and p.poll() is None and time.time() < deadline: time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (tmp_path/'killed'/'targets.csv').exists(), 'the run ended before it could be killed'
    again = run(cohort, tmp_path/'killed')
    assert again.returncode == 0, again.stderr
    a, b = (pd.read_csv(tmp_path/d/'targets.csv') for d in ('whole', 'killed'))
    pd.testing.assert_frame_equal(a, b)
    report = (tmp_path/'killed'/'report.html').read_text()
    assert 'Read this first' in report and 'http' not in report.replace('doi', '')
    cmd = command(cohort, tmp_path/'whole'); cmd[cmd.index('non-failing')] = 'dilated'
    other = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
    assert other.returncode == 2 and 'another run' in other.stderr and 'Traceback' not in other.stderr
    assert json.loads((tmp_path/'killed'/'summary.json').read_text())['plan']['n_donors'] == 3

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished screen of a simulated cohort, through the front door"
    cohort = toy.simulate(n_cells=360, n_donors=12, n_genes=60, seed=0)
    gf.pp.tokenize(cohort)
    return gf.tl.screen(cohort, label='disease', donor='donor', start='hypertrophic', goal='non-failing', out=tmp_path_factory.mktemp('screen')/'s',
                        max_cells=4, folds=2, pairs=2, seeds=2, say=None, known=['TF01'], directions='KO', pretraining=dict(steps=10),
                        finetuning=dict(epochs=1), flags=dict(mine=['TF01']))

def test_table_folder_and_report(finished):
    s = finished
    assert {'score', 'untrained', 'p_permuted', 'expression', 'first_order', 'rank_best', 'flag'} <= set(s.table) and len(s.stability) == 2 and len(s.map)
    assert (s.table.flag[s.table.symbol == 'TF01'] == 'mine').all()
    scored = s.table.score.notna()
    assert scored.any() and scored.is_monotonic_decreasing and (scored | s.table.p.isna()).all() and s.table.p_permuted.dropna().between(0, 1).all()
    pd.testing.assert_frame_equal(pd.read_parquet(s.folder/'targets.parquet')[['perturbation', 'score']].astype({'perturbation': str}),
                                  s.table[['perturbation', 'score']].astype({'perturbation': str}))
    assert {'targets.csv', 'targets_by_donor.csv', 'pairs.csv', 'summary.json', 'targets.png'} <= {f.name for f in s.folder.iterdir()}
    page = (s.folder/'report.html').read_text()
    headings = re.findall('<h2>(.*?)</h2>', page)
    assert headings.index('Read this first') < headings.index('Targets') < headings.index('Known genes') and headings[-1] == 'How to cite'
    assert all(x in page for x in s.limits) or all(html.escape(x) in page for x in s.limits)
    assert page.count('<figure>') >= 5
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)

@pytest.mark.browser
def test_report_opens_in_a_browser(finished, tmp_path):
    "every picture is drawn, nothing is fetched, no table runs off a narrow screen"
    browser = next((b for b in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if shutil.which(b)), None)
    if browser is None: pytest.skip('no Chromium on PATH to open the report in')
    page = (finished.folder/'report.html').read_text()
    look = """<script>addEventListener('load', () => {const i = [...document.images];
        document.title = [i.length, i.filter(x => x.naturalWidth > 50).length, document.documentElement.scrollWidth <= innerWidth + 1].join(' ')})</script>"""
    (tmp_path/'look.html').write_text(page.replace('</body>', look + '</body>'))
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --window-size=600,800'
    dom = subprocess.run([browser, *flags.split(), f'--user-data-dir={tmp_path/"profile"}', '--virtual-time-budget=4000', '--dump-dom', (tmp_path/'look.html').as_uri()],
                         capture_output=True, text=True, timeout=120).stdout
    n, drawn, fits = re.search(r'<title>(\d+) (\d+) (\w+)</title>', dom).groups()
    assert n == drawn and int(n) >= 5 and fits == 'true'

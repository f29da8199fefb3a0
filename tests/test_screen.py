"The main job from the command line: killed and called again it gives the table of a run left alone; its report opens in a browser"
import json, re, shutil, signal, subprocess, sys, time
import numpy as np, pandas as pd, pytest
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

def test_report_opens_in_a_browser(tmp_path):
    "every picture is drawn, nothing is fetched, no table runs off a narrow screen"
    browser = next((b for b in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if shutil.which(b)), None)
    if browser is None: pytest.skip('no Chromium on PATH to open the report in')
    from geneformer_nb.screen.run import screen
    cohort = toy.simulate(n_cells=360, n_donors=12, n_genes=60, seed=0)
    s = screen(cohort, disease='disease', donor='donor', start='hypertrophic', goal='non-failing', out=tmp_path/'s', max_cells=4, folds=2, pairs=2, seeds=2, say=None,
               known=['TF01'], directions='KO', pretraining=dict(steps=10), finetuning=dict(epochs=1), flags=dict(mine=['TF01']))
    assert {'score', 'untrained', 'p_permuted', 'expression', 'first_order', 'rank_best', 'flag'} <= set(s.table) and len(s.stability) == 2 and len(s.map)
    assert (s.table.flag[s.table.symbol == 'TF01'] == 'mine').all()
    assert np.isfinite(s.table.score).all() and s.table.p_permuted.dropna().between(0, 1).all()
    pd.testing.assert_frame_equal(pd.read_parquet(s.folder/'targets.parquet')[['perturbation', 'score']].astype({'perturbation': str}),
                                  s.table[['perturbation', 'score']].astype({'perturbation': str}))
    page = (s.folder/'report.html').read_text()
    look = """<script>addEventListener('load', () => {const i = [...document.images];
        document.title = [i.length, i.filter(x => x.naturalWidth > 50).length, document.documentElement.scrollWidth <= innerWidth + 1].join(' ')})</script>"""
    (tmp_path/'look.html').write_text(page.replace('</body>', look + '</body>'))
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --window-size=600,800'
    dom = subprocess.run([browser, *flags.split(), f'--user-data-dir={tmp_path/"profile"}', '--virtual-time-budget=4000', '--dump-dom', (tmp_path/'look.html').as_uri()],
                         capture_output=True, text=True, timeout=120).stdout
    n, drawn, fits = re.search(r'<title>(\d+) (\d+) (\w+)</title>', dom).groups()
    assert n == drawn and int(n) >= 5 and fits == 'true'
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)

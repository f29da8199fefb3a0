"The main job from the command line: killed and called again it gives the table of a run left alone"
import json, signal, subprocess, sys, time
import pandas as pd, pytest
from geneformer_nb import toy

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    path = tmp_path_factory.mktemp('cohort')/'cohort.h5ad'
    toy.simulate(n_cells=270, n_donors=9, n_genes=80, seed=0).write_h5ad(path)
    return path

def command(cohort, out):
    return [sys.executable, '-c', 'from geneformer_nb.cli import main; raise SystemExit(main())', 'screen', str(cohort), '--disease', 'disease',
            '--donor', 'donor', '--start', 'hypertrophic', '--goal', 'non-failing', '--where', 'cell_type=cardiomyocyte', '--max-cells', '12',
            '--folds', '3', '--steps', '20', '--epochs', '1', '--out', str(out)]

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
    assert json.loads((tmp_path/'killed'/'summary.json').read_text())['asked']['n_units'] == 3

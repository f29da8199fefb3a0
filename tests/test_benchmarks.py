"The benchmarks run at tiny sizes, and ours and the reference give the same answers; times are not tested"

import os, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

def test_answers_agree(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(OMP_NUM_THREADS='1')
    run = [sys.executable, 'benchmarks/run.py', '--quick', '--scratch', str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    agree = re.findall(r'^(\w+): answers agree', done.stdout, re.M)
    assert {'tokenize_5k', 'tokenize_retired', 'rank', 'embed_256', 'delete_256', 'shift'} <= set(agree), done.stdout

def test_table_has_its_columns():
    lines = [l for l in (ROOT/'benchmarks/RESULTS.md').read_text().splitlines() if l.startswith('|')]
    assert lines[0] == '| benchmark | size | ours | reference | ratio | peak memory | limit | command |'
    for l in lines[2:]:
        cells = [c.strip() for c in l.strip('|').split('|')]
        assert len(cells) == 8, l
        assert cells[4] == 'not measured' or re.fullmatch(r'\d+\.\d x \(\d+\.\d-\d+\.\d\)', cells[4]), l

def test_a_wrong_answer_is_refused():
    sys.path.insert(0, str(ROOT/'benchmarks'))
    try: import cases
    finally: sys.path.remove(str(ROOT/'benchmarks'))
    import numpy as np
    from scipy import sparse
    with pytest.raises(AssertionError): cases.matched(np.ones(3), np.ones(3) + 1e-3, 1e-4)
    X, gene, medians = sparse.csr_matrix([[2., 1., 4.]]), np.arange(3), np.array([1., 1., 2.])
    assert 'ties' in cases.same_tokens(X, gene, medians, [np.array([0, 2, 1])], [np.array([2, 0, 1])])
    for wrong in ([1, 0, 2], [0, 2]):
        with pytest.raises(AssertionError):
            cases.same_tokens(X, gene, medians, [np.array([0, 2, 1])], [np.array(wrong)])

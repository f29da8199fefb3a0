"What the closing lines of a run must say: whether parity with the official answers was checked"

import pytest

def pytest_configure(config):
    config.addinivalue_line('markers', 'browser: opens a page in Chromium; skipped where there is none')

@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    "Golden tests that were skipped are not green, and the run says so, last of all"
    yield
    golden = lambda kind: [r for r in terminalreporter.stats.get(kind, []) if 'golden' in getattr(r, 'nodeid', '')]
    passed, skipped, failed = (len(golden(k)) for k in ('passed', 'skipped', 'failed'))
    say = terminalreporter.write_line
    if not passed + skipped + failed: say('Golden parity was NOT checked: no golden test was among these.', bold=True)
    elif skipped:
        say(f'Golden parity was NOT checked ({skipped} tests skipped, {passed} ran): put the data folder beside the '
            'checkout as "shared", or name it in GENEFORMER_NB_DATA.', yellow=True, bold=True)
    else:
        say(f'Golden parity: {passed} tests passed, {failed} failed.')

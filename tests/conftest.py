"What all tests share: markers, a browser, and closing lines that say whether parity with the official answers was checked"
import shutil
import pytest

MARKERS = dict(slow='takes minutes', gpu='needs a CUDA device', browser='opens pages in Chromium')

def pytest_configure(config):
    for name, text in MARKERS.items(): config.addinivalue_line('markers', f'{name}: {text}')

def pytest_collection_modifyitems(items):
    "Tests that this machine cannot run are skipped, with the reason"
    marked = lambda name: [i for i in items if i.get_closest_marker(name)]
    if marked('browser') and find_browser() is None:
        for i in marked('browser'): i.add_marker(pytest.mark.skip(reason='no Chromium on PATH'))
    if marked('gpu'):
        import torch
        if not torch.cuda.is_available():
            for i in marked('gpu'): i.add_marker(pytest.mark.skip(reason='no CUDA device'))

def find_browser():
    "Path of a Chromium, or None"
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)

@pytest.fixture(scope='session')
def browser():
    "Path of a Chromium; tests that use it are marked `browser`"
    return find_browser()

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

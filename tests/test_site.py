"The site preview: builds, lists every page, every link and anchor leads somewhere, and it opens in a browser"
import re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'.ci'))
import checking, sidebar, site_preview

class Page(HTMLParser):
    "Links, anchors, pictures and loaded files of a page"
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.images, self.loads, self.here = [], set(), [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'a' and 'aria-current' in a: self.here.append(a['href'])
        if tag == 'img': self.images.append(a)
        if tag in ('script', 'link', 'img', 'iframe'): self.loads += [a[k] for k in ('src', 'href') if a.get(k)]

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site')/'docs'
    run = subprocess.run([sys.executable, ROOT/'.ci/nb.py', 'preview', '--out', out], capture_output=True, text=True,
                         stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr[-2000:]
    return out

@pytest.fixture(scope='session')
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}

NAMES = [n for _, ns in sidebar.listed() for n in ns]

def test_every_entry_has_a_page_and_every_page_the_sidebar(site, pages):
    for n in NAMES:
        addr = checking.page(n)
        assert addr in pages, f'{n} has no page'
        assert {checking.page(o) for o in NAMES} <= set(pages[addr].links), f'{addr} lacks part of the sidebar'
        assert pages[addr].here == [addr]

def test_titles_and_descriptions(site):
    for p in map(checking.page, NAMES):
        text = (site/p).read_text(encoding='utf-8')
        assert re.search(r'<h1 class="title">\S', text) and re.search(r'<p class="description">\S', text), p
        assert '.ipynb)' not in text and '#|' not in re.sub(r'<code.*?</code>', '', text, flags=re.S), p

def test_every_link_leads_somewhere(site, pages):
    lost = []
    for name, page in pages.items():
        for href in page.links + page.loads:
            if re.match(r'https?:|mailto:|data:', href): continue
            path, anchor = urldefrag(href)
            to = (site/name).parent/unquote(path) if path else site/name
            if not to.exists(): lost.append(f'{name}: {href} does not exist')
            elif anchor and to.suffix == '.html':
                other = pages[to.resolve().relative_to(site.resolve()).as_posix()]
                if unquote(anchor) not in other.ids: lost.append(f'{name}: {href} has no such anchor')
    assert lost == []

def test_pages_need_no_network_to_be_read(pages):
    assert [(n, l) for n, p in pages.items() for l in p.loads if re.match(r'https?:|//', l)] == []

def test_no_link_to_the_place_holder_address(pages):
    base, git = site_preview.site_settings()
    assert [(n, l) for n, p in pages.items() for l in p.links if l.startswith((base, git))] == []

def test_images_have_alternative_text(pages):
    assert [(n, str(i)[:80]) for n, p in pages.items() for i in p.images if not i.get('alt')] == []

def test_anchors_as_pandoc_makes_them():
    assert site_preview.slug('What we left out') == 'what-we-left-out'
    assert site_preview.slug('<code>Manifest.open</code>') == 'manifest.open'
    assert site_preview.slug('By hand, then: fast') == 'by-hand-then-fast'

def _browser():
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)

@pytest.fixture
def open_page(tmp_path):
    "Open a file in headless Chromium and give back the page as it stands there"
    browser = _browser()
    if not browser: pytest.skip('no Chromium on PATH: pages were checked without a browser only')
    flags = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
             '--disable-component-update --disable-sync --virtual-time-budget=2000').split()
    def go(path, width):
        more = [f'--user-data-dir={tmp_path/"profile"}', f'--window-size={width},900', '--dump-dom']
        run = subprocess.run([browser, *flags, *more, path.resolve().as_uri()], capture_output=True, text=True,
                             timeout=120, stdin=subprocess.DEVNULL)
        assert run.returncode == 0, run.stderr[-500:]
        return run.stdout
    return go

PROBE = """<script>document.title = JSON.stringify([document.documentElement.scrollWidth - innerWidth,
getComputedStyle(document.querySelector('nav.side')).display,
[...document.images].filter(i => !i.naturalWidth).length])</script></body>"""

@pytest.mark.parametrize('width,shown', [(1400, True), (600, False)], ids=['desk', 'phone'])
def test_opens_in_a_browser(site, open_page, width, shown):
    "Fits its window, shows its pictures, and folds the sidebar away on a narrow screen"
    for name in map(checking.page, NAMES):
        probe = site/f'_probe_{name}'
        probe.write_text((site/name).read_text(encoding='utf-8').replace('</body>', PROBE), encoding='utf-8')
        try: dom = open_page(probe, width)
        finally: probe.unlink()
        got = re.search(r'<title>\[(-?\d+),"(\w+)",(\d+)\]</title>', dom)
        assert got, f'{name} did not run'
        assert int(got[1]) <= 0, f'{name} is {got[1]} pixels wider than a window of {width}'
        assert (got[2] != 'none') == shown, name
        assert got[3] == '0', f'{name} has {got[3]} broken pictures'

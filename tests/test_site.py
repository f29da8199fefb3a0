"The site preview: builds, lists every page, every link and anchor leads somewhere, and it opens in a browser"
import json, re, shutil, subprocess, sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
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

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

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

FRAMES = """<!doctype html><title>?</title><body><script>
const names = NAMES, width = WIDTH, found = {};
const look = (name, frame) => { const d = frame.contentDocument; found[name] = {
  over: d.documentElement.scrollWidth - frame.contentWindow.innerWidth,
  side: frame.contentWindow.getComputedStyle(d.querySelector('nav.side')).display,
  broken: [...d.images].filter(i => !i.naturalWidth).length };
  if (Object.keys(found).length == names.length) document.title = JSON.stringify(found); };
for (const name of names) { const f = document.createElement('iframe');
  Object.assign(f, {src: name, width, height: 800, onload: () => look(name, f)}); document.body.append(f); }
</script>"""

@pytest.fixture
def look(site, tmp_path, browser):
    "Open every page in frames of one width in headless Chromium; {page: what was measured there}"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    flags = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
             '--disable-component-update --disable-sync --virtual-time-budget=60000 --dump-dom').split()
    frames = site/'_frames.html'
    def go(width):
        names = json.dumps([checking.page(n) for n in NAMES])
        frames.write_text(FRAMES.replace('NAMES', names).replace('WIDTH', str(width)), encoding='utf-8')
        where = f'http://127.0.0.1:{server.server_port}/{frames.name}'
        run = subprocess.run([browser, *flags, f'--user-data-dir={tmp_path/"profile"}', where], capture_output=True,
                             text=True, timeout=180, stdin=subprocess.DEVNULL)
        title = re.search(r'<title>(\{.*?\})</title>', run.stdout)
        assert title, f'the pages did not open: {run.stderr[-500:]}'
        return json.loads(title[1])
    yield go
    server.shutdown()
    frames.unlink(missing_ok=True)

@pytest.mark.browser
@pytest.mark.parametrize('width,shown', [(1400, True), (400, False)], ids=['desk', 'phone'])
def test_opens_in_a_browser(look, width, shown):
    "Fits its window, shows its pictures, and folds the sidebar away on a narrow screen"
    found = look(width)
    assert len(found) == len(NAMES)
    assert {n: f['over'] for n, f in found.items() if f['over'] > 0} == {}, 'wider than the window, in pixels'
    assert {n: f['broken'] for n, f in found.items() if f['broken']} == {}, 'pictures that do not load'
    assert [n for n, f in found.items() if (f['side'] != 'none') != shown] == []

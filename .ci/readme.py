"README.md from nbs/index.ipynb, without Quarto"
import json, re, sys
from pathlib import Path
from saving import directives

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {'hide', 'default_exp', 'export'}
NOTE = '<!-- made from nbs/index.ipynb by `make readme`; edit there -->\n'

def _links(text):
    "Links and images of the notebook, as seen from the root"
    return re.sub(r'(\]\()(?!https?:|#|mailto:|/)([^)\s]+)', r'\1nbs/\2', text)

def _output(o, alt=''):
    "One stored output as Markdown; a figure is told by its alternative text"
    data = o.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    if any(k.startswith('image/') for k in data): return f'*Figure on the front page of the site: {alt.strip(chr(34))}*'
    text = ''.join(o.get('text', data.get('text/plain', '')))
    return '\n'.join('    ' + l for l in text.rstrip().splitlines())

def render(nb):
    "The Markdown of a notebook: hidden cells left out, code fenced, text outputs indented"
    parts = []
    for c in nb['cells']:
        d, code = directives(''.join(c['source']))
        if c['cell_type'] == 'markdown': parts.append(_links(''.join(c['source'])))
        elif c['cell_type'] == 'code' and not d.keys() & HIDDEN and 'nbdev_export(' not in code:
            if d.get('echo', '').lower() != 'false': parts.append(f'```python\n{code}\n```')
            parts += [t for o in c['outputs'] if (t := _output(o, d.get('fig-alt', '')))]
    return NOTE + '\n' + '\n\n'.join(p.strip('\n') for p in parts) + '\n'

def current(): return render(json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8')))

def faults():
    f = ROOT/'README.md'
    if f.exists() and f.read_text(encoding='utf-8') == current(): return []
    return ['README.md is not what nbs/index.ipynb gives: run `make readme`']

def write(only_check=False):
    "Write README.md, or only compare; the exit status"
    if only_check:
        for f in faults(): print(f, file=sys.stderr)
        return int(bool(faults()))
    (ROOT/'README.md').write_text(current(), encoding='utf-8')
    print('README.md written')
    return 0

"The sidebar of the site: read from _quarto.yml, and written there from the numbers of the notebooks"
import re, sys
from pathlib import Path
from checking import notebooks

ROOT = Path(__file__).resolve().parent.parent
QUARTO = ROOT/'_quarto.yml'
BLOCK = re.compile(r'(?<=    contents:\n)(?:      .*\n)+')
# a notebook goes to the first section whose pattern its name begins with
SECTIONS = {
    'Machinery': r'00_|00a_|03\w?_|06\w?_',  # shown last
    'Start': r'index',
    'Counts and tokens': r'0[124]\w?_',
    'The model': r'0[789]\w?_',
    'Data': r'05\w?_',
    'Evaluate and fine-tune': r'1\d\w?_',
    'Tasks of the paper': r'2\d\w?_',
    'Perturb': r'3\d\w?_',
    'Look inside': r'4\d\w?_',
    'AnnData front door': r'5\d\w?_',
}

def section_of(name): return next((s for s, p in SECTIONS.items() if re.match(p, name)), 'Machinery')

def planned():
    "[(section, [notebook, ...])] of the notebooks that exist, in the order of the book"
    order = [s for s in SECTIONS if s != 'Machinery'] + ['Machinery']
    names = [p.name for p in notebooks()]
    return [(s, got) for s in order if (got := [n for n in names if section_of(n) == s])]

def listed():
    "[(section, [notebook, ...])] as _quarto.yml has them; a notebook outside a section stands under ''"
    import yaml
    items = yaml.safe_load(QUARTO.read_text(encoding='utf-8'))['website']['sidebar']['contents']
    name = lambda o: o if isinstance(o, str) else o['href']
    is_section = lambda o: isinstance(o, dict) and 'section' in o
    return [(o['section'], [name(x) for x in o['contents']]) if is_section(o) else ('', [name(o)]) for o in items]

def faults():
    "Notebooks that the sidebar lacks, and entries that do not exist"
    there, shown = {p.name for p in notebooks()}, [n for _, ns in listed() for n in ns]
    how = 'run `python .ci/nb.py sidebar`'
    return ([f'_quarto.yml does not list {n}: {how}' for n in sorted(there - set(shown))]
            + [f'_quarto.yml lists {n}, which does not exist: {how}' for n in sorted(set(shown) - there)]
            + [f'_quarto.yml lists {n} twice' for n in sorted({n for n in shown if shown.count(n) > 1})])

def write():
    "Write the sidebar anew into _quarto.yml"
    lines = []
    for s, names in planned():
        if s == 'Start': lines += [f'      - {{text: Start here, href: {n}}}' for n in names]
        else: lines += [f'      - section: {s}', '        contents:'] + [f'          - {n}' for n in names]
    old = QUARTO.read_text(encoding='utf-8')
    if not BLOCK.search(old): sys.exit('_quarto.yml has no sidebar contents to replace.')
    new = BLOCK.sub('\n'.join(lines) + '\n', old, count=1)
    if new != old: QUARTO.write_text(new, encoding='utf-8')
    print(f'sidebar: {sum(len(n) for _, n in planned())} notebooks')
    return 0

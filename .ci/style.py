"The style that `make test` holds everybody to: who may import whom, and how long a line or a cell may be"
import ast, json, re
from pathlib import Path
from saving import directives

ROOT = Path(__file__).resolve().parent.parent
LIB = 'geneformer_nb'
# a part imports only from the parts before it; parts of one floor do not import each other
FLOORS = [['core'], ['jobs'], ['data'], ['evaluate'], ['plots'], ['model'], ['train', 'perturb'],
          ['tasks', 'attention'], ['screen'], ['pp', 'tl', 'pl', 'get'], ['explorer', 'cli']]
LEVEL = {part: i for i, floor in enumerate(FLOORS) for part in floor}
MODULE_WIDTH, CELL_WIDTH, CELL_LINES = 100, 88, 30
EXPORTS = {'export', 'exports', 'exporti'}

def modules(lib=ROOT/LIB):
    "Every module but nbdev's index"
    return [p for p in sorted(Path(lib).rglob('*.py')) if p.name != '_modidx.py']

def part_of(name):
    "The part of a dotted module name inside the package: 'geneformer_nb.data.cells' is in 'data'"
    words = name.split('.')
    return words[1] if len(words) > 1 and words[0] == LIB else None

def imported(path, lib=ROOT/LIB):
    "(dotted module, names) of every import of our own in a module, inside functions too"
    here = [LIB, *Path(path).relative_to(lib).with_suffix('').parts]
    for node in ast.walk(ast.parse(Path(path).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names if part_of(a.name))
        if not isinstance(node, ast.ImportFrom): continue
        base = here[:len(here) - node.level] if node.level else []
        module = '.'.join(base + ([node.module] if node.module else []))
        if module.split('.')[0] != LIB: continue
        names = [a.name for a in node.names]
        if module == LIB: yield from ((f'{LIB}.{n}', []) for n in names)
        else: yield module, names

def import_faults(lib=ROOT/LIB):
    "Imports upwards or sideways between parts, and private names imported from another part"
    for path in modules(lib):
        if path == Path(lib)/'__init__.py': continue  # the roof: it stands above every part
        own = Path(path).relative_to(lib).parts[0].removesuffix('.py')
        for module, names in imported(path, lib):
            other, where = part_of(module), path.relative_to(lib)
            if other == own or other is None: continue
            if other not in LEVEL or own not in LEVEL: yield f'{where}: {other} or {own} has no floor in .ci/style.py'
            elif LEVEL[other] > LEVEL[own]: yield f'{where} imports {module}, which stands above it'
            elif LEVEL[other] == LEVEL[own] and own not in ('pp', 'tl', 'pl', 'get', 'explorer', 'cli'):
                yield f'{where} imports {module}, which stands beside it'
            for n in names:
                if n.startswith('_'): yield f'{where} imports the private name {n} of {module}'

def nested_conditional(tree):
    "Lines with a conditional expression inside another one"
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in ast.walk(node) if n is not node):
            yield node.lineno

def joined_statements(tree):
    "Lines where `;` joins statements"
    for node in ast.walk(tree):
        for field in ('body', 'orelse', 'finalbody'):
            block = getattr(node, field, None)
            if not isinstance(block, list): continue
            for a, b in zip(block, block[1:]):
                if a.end_lineno == b.lineno: yield b.lineno

def module_faults(lib=ROOT/LIB):
    "Long lines, joined statements, nested conditional expressions"
    for path in modules(lib):
        text, where = path.read_text(encoding='utf-8'), path.relative_to(lib)
        tree = ast.parse(text)
        for i, line in enumerate(text.splitlines(), 1):
            if len(line) > MODULE_WIDTH and not line.startswith(('# %%', '"""', '# AUTO', '__all__', '           \'')):
                yield f'{where}:{i} has {len(line)} columns'
        for i in sorted(set(joined_statements(tree))): yield f'{where}:{i} joins statements by ;'
        for i in sorted(set(nested_conditional(tree))): yield f'{where}:{i} nests conditional expressions'

def code_lines(source):
    "Lines of a cell that count: not the directives, blank lines, signatures with their docments, fields or docstrings"
    tree, skip = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = node.body[0]
            skip |= set(range(node.lineno, first.lineno))
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                skip |= set(range(first.lineno, first.end_lineno + 1))
        if isinstance(node, ast.ClassDef):
            for b in node.body:
                if isinstance(b, ast.AnnAssign): skip |= set(range(b.lineno, b.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for i, l in lines if l.strip() and not l.lstrip().startswith('#') and i not in skip)

def notebook_faults(path):
    "Exported cells that are too long, and visible code that is too wide"
    for i, c in enumerate(json.loads(Path(path).read_text(encoding='utf-8'))['cells']):
        if c['cell_type'] != 'code': continue
        d, code = directives(''.join(c['source']))
        plain = re.sub(r'^\s*[%!].*', 'pass', code, flags=re.M)
        if d.keys() & EXPORTS and (n := code_lines(plain)) > CELL_LINES:
            yield f'{path.name}: exported cell {i} has {n} lines'
        if 'hide' in d or 'export' in d or 'exporti' in d: continue
        for l in code.splitlines():
            if len(l) > CELL_WIDTH: yield f'{path.name}: cell {i} shows a line of {len(l)} columns: {l.strip()[:40]}'

def faults(nbs):
    "Every fault, one sentence each"
    return [*import_faults(), *module_faults(), *(f for p in nbs for f in notebook_faults(p))]

if __name__ == '__main__':
    import sys
    from checking import notebooks
    found = [f for f in faults(notebooks()) if not sys.argv[1:] or sys.argv[1] in f]
    print(*found, sep='\n')
    print(f'{len(found)} faults of style')

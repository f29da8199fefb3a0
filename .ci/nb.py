#!/usr/bin/env python
"""Notebook chores: save their outputs, check them, write the README, build the site preview.

  python .ci/nb.py save nbs/07_bert.ipynb [...] [--flags "slow gpu"]   run and store true outputs
  python .ci/nb.py check                     clean, in sync with the modules, in style, outputs small and free of local paths
  python .ci/nb.py skips                     which cells do not run here, and why
  python .ci/nb.py readme [--check]          README.md from nbs/index.ipynb
  python .ci/nb.py sidebar                   list every notebook in the sidebar of _quarto.yml
  python .ci/nb.py preview [--out _docs]     the site without Quarto
"""
import argparse, os, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
ROOT = Path(__file__).resolve().parent.parent

def main(argv=None):
    p = argparse.ArgumentParser(prog='nb.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='cmd', required=True)
    s = sub.add_parser('save', help='run notebooks and store their outputs')
    s.add_argument('nbs', nargs='*', type=Path, help='notebooks; none means every one of the book')
    s.add_argument('--flags', default='', help='run cells of these flags too, e.g. "slow gpu"')
    sub.add_parser('check', help='are the notebooks clean and the modules in sync?')
    sub.add_parser('skips', help='which cells do not run here, and why')
    r = sub.add_parser('readme', help='write README.md from nbs/index.ipynb')
    r.add_argument('--check', action='store_true', help='only compare')
    sub.add_parser('sidebar', help='write the sidebar into _quarto.yml')
    v = sub.add_parser('preview', help='build the site without Quarto')
    v.add_argument('--out', type=Path, default=ROOT/'_docs', help='folder of the site')
    v.add_argument('--force', action='store_true', help='process every notebook again')
    a = p.parse_args(argv)
    os.environ.pop('IN_TEST', None)  # nbdev sets it while testing; stored outputs are made without it
    if a.cmd == 'save':
        from saving import save_all
        return save_all([n.resolve() for n in a.nbs], a.flags.split())
    os.chdir(ROOT)  # nbdev finds its settings from the working folder
    if a.cmd == 'check':
        from checking import check
        return check()
    if a.cmd == 'skips':
        from checking import skips
        return skips()
    if a.cmd == 'readme':
        from readme import write
        return write(only_check=a.check)
    if a.cmd == 'sidebar':
        from sidebar import write
        return write()
    from site_preview import build
    print(f'{build(a.out, force=a.force)} pages in {a.out}')
    return 0

if __name__ == '__main__': sys.exit(main())

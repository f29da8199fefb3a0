__version__ = "0.0.1"

# below nbdev's line, by hand: submodules load on first use, so that `import geneformer_nb` is light
def _submodules():
    from pkgutil import iter_modules
    return [m.name for m in iter_modules(__path__) if not m.name.startswith('_')]

def __getattr__(name):
    from importlib import import_module
    if name in _submodules(): return import_module(f'{__name__}.{name}')
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

def __dir__(): return sorted([*globals(), *_submodules()])

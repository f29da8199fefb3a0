__version__ = "0.0.1"

# below nbdev's line, by hand: names load on first use, so that `import geneformer_nb` is light
from .core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    # tl loads every part, so that a model has all its methods: encode, perturb, finetune
    'tl': 'Geneformer',
    'data.vocabulary': 'Vocabulary',
    'data.cells': 'Cells',
    'perturb.actions': 'KO OE Dose drug each pairs',
    'train.pretraining': 'pretrain',
}, {'toy': 'data.toy', 'datasets': 'data.datasets'} | {part: part for part in (
    'data', 'evaluate', 'plots', 'model', 'train', 'perturb', 'tasks', 'attention', 'screen',
    'pp', 'tl', 'pl', 'get')})

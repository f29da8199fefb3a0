from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    pretraining='pretrain recipes by_rank',
    batching='joined extend',
    small_model='load_small_model'))

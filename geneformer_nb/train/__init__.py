from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    pretraining='pretrain Recipe recipes evaluate_masked',
    loop='train_loop',
    batching='joined extend',
    small_model='load_small_model'))

from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    received='received watch',
    heads='head_tests ablation',
    network='gene_network edge_auroc'))

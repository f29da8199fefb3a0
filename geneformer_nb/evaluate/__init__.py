from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    splits='split_donors fold_donors split_balanced audit_split scores calibration baselines de_ranking',
    baselines='gene_baselines gene_auc'))

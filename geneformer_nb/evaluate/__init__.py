from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    splits='has_value split_donors fold_donors split_balanced audit_split',
    metrics='scores calibration gene_auc auc_draws batch_check scib',
    baselines='cell_baselines gene_baselines de_ranking log_cp10k'))

from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    style='palette figure_style styled axes_of gray need_columns loss_curve rank_curve volcano top_targets shift_plot recall_curve confusion embedding',
    scores='roc calibration_plot prediction_map score_plot'))

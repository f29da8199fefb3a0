from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    style='palette figure_style embedding',
    training='loss_curve rank_curve confusion',
    screen='volcano top_targets shift_plot recall_curve',
    scores='roc calibration_plot prediction_map score_plot'))

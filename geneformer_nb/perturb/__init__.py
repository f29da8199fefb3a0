from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    actions='KO OE Dose drug each pairs perturb',
    shifts='Shifts',
    gradients='first_order shortlist',
    shards='perturb_to estimate gene_effects',
    stats='summarize wide',
    official='official_form'))

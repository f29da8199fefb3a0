from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    run='Result screen',
    question='Question Settings Plan',
    diseases='DiseaseScreen disease_screen',
    score='score_targets recovery',
    report='write_report',
    pathways='enrich gene_sets',
    drugs='drug_scores read_drugs'))

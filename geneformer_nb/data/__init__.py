from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    counts='counts_of check_counts gene_names',
    sources='read_any blocks',
    quality='check_quality',
    medians='Medians corpus_medians',
    vocabulary='Vocabulary match_genes',
    cells='Cells',
    tokenizer='tokenize',
    corpus='Corpus tokenize_to'))

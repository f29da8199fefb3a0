from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    bert='Geneformer presets',
    checkpoints='verify read_checkpoint',
    embed='cell_embeddings gene_embeddings gene_occurrences state_embeddings encode_layers '
          'pick_cells',
    atlas='embed_to',
    gene_context='context umap heat_map'))

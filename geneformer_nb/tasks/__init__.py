from ..core import lazy

__getattr__, __dir__, __all__ = lazy(__name__, dict(
    finetuning='CellClassifier FineTuned CellModel finetune',
    genes='gene_labels GeneClassifier finetune_genes',
    multitask='MultiTask finetune_tasks load_model',
    adapters='add_lora merge_lora quantize',
    search='search_settings',
    compare='cross_validate_cells cross_validate_genes'))

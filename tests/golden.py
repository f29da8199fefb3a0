"Where the official answers lie, and the pieces every golden test needs; tests are skipped where they are not"
import json, os
from functools import lru_cache
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd, pytest
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.data.tokenizer import tokenize

root = Path(os.environ.get('GENEFORMER_NB_DATA') or '/nowhere')
golden = root/'golden'
needed = pytest.mark.skipif(not golden.is_dir(), reason='GENEFORMER_NB_DATA names no folder with golden/: answers of the '
                            'official Geneformer code (huggingface.co/ctheodoris/Geneformer, commit 05fcbeb) are needed')
files = dict(kang_ifnb='kang_ifnb/kang_ifnb', heart_embryo='heart_embryo/heart_asp2019_st', pbmc3k='pbmc3k/pbmc3k_raw')
versions, sets = pytest.mark.parametrize('version', ['V1', 'V2']), pytest.mark.parametrize('name', list(files))

def table(name):
    "A golden table, by file name without the ending where that is csv"
    f = golden/name
    return pd.read_parquet(f) if f.suffix == '.parquet' else pd.read_csv(f'{f}.csv')

def of_json(name): return json.loads((golden/name).read_text())

@lru_cache
def vocabulary(version): return Vocabulary.official(version, root/'data/official')

@lru_cache
def model(version): return Geneformer.from_pretrained(golden/f'tiny-{version}', vocabulary=vocabulary(version))

@lru_cache
def adata(name): return ad.read_h5ad(root/f'data/{files[name]}.h5ad')[of_json('meta.json')[name]['cells']].copy()

@lru_cache
def cells(name, version): return tokenize(adata(name), vocabulary(version))

def perturbed(name, version):
    "The golden cells that were perturbed, as they were cropped"
    t, v = table(f'{name}_{version}_isp_cells.parquet'), vocabulary(version)
    return Cells(*ragged(t.input_ids), t.drop(columns='input_ids').set_index('barcode'), vocabulary=v, special=v.cls)

def official_order(cells):
    "{number of a cell here: its number in the official table}, longest first"
    return {int(i): k for k, i in enumerate(np.argsort(-cells.lengths, kind='stable'))}

def close(ours, theirs, rtol=1e-4, atol=1e-5): np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)

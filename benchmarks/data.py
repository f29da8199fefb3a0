"""Synthetic inputs of the benchmarks: counts that look like cells of 2,470 detected genes, and random weights"""
from pathlib import Path
import json
import numpy as np


def make_vocabulary(n_genes, seed=0):
    "Gene ids and non-zero medians, a few of them shared, as in the official files"
    rng = np.random.default_rng(seed)
    genes = [f'ENSG{10_000_000 + 7 * i:011d}' for i in range(n_genes)]
    medians = rng.lognormal(.3, .8, n_genes)
    medians[rng.choice(n_genes, n_genes // 250, replace=False)] = 1.105969024047805
    return genes, np.maximum(medians, 1e-6)


def make_counts(n_cells, n_genes, detected=2470, seed=0):
    "Counts as CSR (float32, 32-bit indices): as many molecules of skewed gene rates as show about `detected` genes"
    from scipy import sparse
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(0, 2., n_genes)
    rate /= rate.sum()
    lo, hi = 1., 1e8  # depth at which the expected number of seen genes is `detected`
    for _ in range(60):
        depth = (lo * hi) ** .5
        lo, hi = (depth, hi) if (1 - np.exp(-depth * rate)).sum() < detected else (lo, depth)
    cdf = np.cumsum(rate)
    data, indices, indptr = [], [], [0]
    for _ in range(n_cells):
        own = int(depth * rng.lognormal(-.02, .2))
        c = np.bincount(np.minimum(np.searchsorted(cdf, rng.random(own)), n_genes - 1), minlength=n_genes)
        at = np.flatnonzero(c)
        indices.append(at.astype(np.int32)); data.append(c[at].astype(np.float32))
        indptr.append(indptr[-1] + len(at))
    parts = np.concatenate(data), np.concatenate(indices), np.array(indptr)
    return sparse.csr_matrix(parts, shape=(n_cells, n_genes))


def write_h5ad(path, X, names):
    "An .h5ad as the official examples expect it: raw counts in X, `ensembl_id` in var, `n_counts` in obs"
    import anndata as ad, pandas as pd
    n = X.shape[0]
    obs = pd.DataFrame(dict(n_counts=np.asarray(X.sum(1)).ravel(),
                            cell_type=pd.Categorical([f'type{i % 5}' for i in range(n)])),
                       index=[f'cell{i}' for i in range(n)])
    var = pd.DataFrame(dict(ensembl_id=names), index=[f'gene{i}' for i in range(X.shape[1])])
    ad.AnnData(X, obs, var).write_h5ad(path)


def prepare(folder, n_cells, n_genes=20_000, retired=0, detected=2470):
    "Counts and vocabulary in `folder` (made once): counts.h5ad, vocabulary.json; returns the folder"
    folder = Path(folder) / f'counts_{n_cells}_{n_genes}_{retired}'
    if (folder/'vocabulary.json').exists(): return folder
    folder.mkdir(parents=True, exist_ok=True)
    genes, medians = make_vocabulary(n_genes)
    names, aliases = list(genes), {}
    for k in range(retired):  # a row named by a retired id of the gene of another row: to be summed
        names[n_genes - 1 - k] = f'ENSG{90_000_000 + k:011d}'
        aliases[names[n_genes - 1 - k]] = genes[k * 37]
    write_h5ad(folder/'counts.h5ad', make_counts(n_cells, n_genes, detected), names)
    from geneformer_nb.data.vocabulary import Vocabulary
    Vocabulary(genes, medians, cls=True, max_len=4096, aliases=aliases, name='bench').save(folder)
    return folder


def prepare_many(folder, n_cells, n_genes=20_000, block=20_000):
    "As many cells as wanted: the first 20,000 again and again, written block by block; returns the folder"
    import anndata as ad, h5py, pandas as pd, shutil
    one = prepare(folder, block, n_genes)
    folder = Path(folder) / f'many_{n_cells}_{n_genes}'
    if (folder/'vocabulary.json').exists(): return folder
    folder.mkdir(parents=True, exist_ok=True)
    X = ad.read_h5ad(one/'counts.h5ad').X
    times, n = n_cells // block, X.nnz
    with h5py.File(folder/'counts.h5ad', 'w') as f:
        g = f.create_group('X')
        g.attrs.update({'encoding-type': 'csr_matrix', 'encoding-version': '0.1.0', 'shape': [times * block, n_genes]})
        for name, x in dict(data=X.data, indices=X.indices).items():
            d = g.create_dataset(name, (times * n,), x.dtype, chunks=(1 << 16,))
            for i in range(times): d[i * n:(i + 1) * n] = x
        g['indptr'] = np.concatenate([[0], *(X.indptr[1:].astype(np.int64) + i * n for i in range(times))])
        ad.io.write_elem(f, 'obs', pd.DataFrame(dict(cell_type=pd.Categorical([f'type{i % 5}' for i in range(times * block)])),
                                                index=[f'cell{i}' for i in range(times * block)]))
        ad.io.write_elem(f, 'var', ad.read_h5ad(one/'counts.h5ad', backed='r').var)
    shutil.copy(one/'vocabulary.json', folder)
    return folder


def prepare_model(folder, n_cells, n_tokens, preset, n_genes, batch, variants=0, seed=0):
    "A checkpoint with random weights, and cells of random genes, up to 4 % longer or shorter where there are several"
    folder = Path(folder) / f'model_{preset}_{n_cells}_{n_tokens}_{n_genes}_{variants}'
    if (folder/'cells.json').exists(): return folder
    from geneformer_nb.data.cells import Cells, ragged
    from geneformer_nb.data.vocabulary import Vocabulary
    from geneformer_nb.model.bert import Geneformer
    genes, medians = make_vocabulary(n_genes)
    model = Geneformer.new(preset, Vocabulary(genes, medians, name='bench'), seed=seed)
    model.save_pretrained(folder)
    rng = np.random.default_rng(seed)
    lengths = np.linspace(.96, 1.04, n_cells) * n_tokens if n_cells > 1 else [n_tokens]
    tokens = [(rng.permutation(n_genes)[:int(n)] + 2).tolist() for n in lengths]
    Cells(*ragged(tokens), vocabulary=model.vocabulary).save(folder/'cells')
    (folder/'cells.json').write_text(json.dumps(dict(tokens=tokens, batch=batch, variants=variants)))
    return folder


def write_shifts(folder, n_cells, n_genes, seed=0):
    "A raw table as `perturb` writes it: every gene deleted in every cell; a tenth of the genes move"
    import pandas as pd
    rng = np.random.default_rng(seed)
    genes = np.array([f'ENSG{i:011d}' for i in range(n_genes)])
    effect = np.where(np.arange(n_genes) % 10 == 0, .3, 0.)
    x = rng.normal(effect, 1, (n_cells, n_genes)) * .01
    code = np.tile(np.arange(n_genes), n_cells)
    raw = pd.DataFrame(dict(cell=np.repeat(np.arange(n_cells), n_genes), kind='KO', gene_id=genes[code],
                            cosine=1 - np.abs(x.ravel()), shift_healthy=x.ravel()))
    raw.assign(perturbation='KO(' + raw['gene_id'] + ')').to_parquet(Path(folder)/'raw.parquet')

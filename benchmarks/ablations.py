"""What pretraining buys: many small models on real cells, each differing in one thing, judged on the same held-out cells.

  python benchmarks/ablations.py --scratch FOLDER                                    run what is not in FOLDER/runs.csv yet
  python benchmarks/ablations.py --scratch FOLDER --write benchmarks/ablations.csv   and write the table of results
  python benchmarks/ablations.py --scratch FOLDER --list                             what there is to run

Needs the real data (GENEFORMER_NB_DATA). A finished run is a line of FOLDER/runs.csv; the same command goes on where it
was stopped. The page nbs/41_ablations.ipynb reads the table. All runs: house shape (2 layers, 64 wide), 4,000 genes and the
labeled transcription factors, cells cut to 256 ranks. The house model is taken from the cache, or trained first.
"""
import argparse, os, sys, time, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, torch
from geneformer_nb.data import datasets
from geneformer_nb import __version__
from geneformer_nb.data.cells import Cells
from geneformer_nb.core import GeneformerError, MissingDataError, versions
from geneformer_nb.model.embed import gene_embeddings
from geneformer_nb.evaluate.splits import fold_donors
from geneformer_nb.evaluate.baselines import log_cp10k
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.train.small_model import RankFrequency, init_small_model, truncate, gene_vectors, hold_out, small_model_cells, load_small_model, SmallRecipe, evaluate_masked
from geneformer_nb.train.pretraining import pretrain
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.toy import simulate

GENES, RANKS, STEPS, BATCH, LR, SEEDS, PAIRS, HELD = 4000, 256, 400, 4, 3e-3, 3, 8, 150
TASK = 'dosage_sensitivity_TFs'
base = dict(world='real', cells=0, mask=.15, attention_dropout=0., ranks='in order', start='counted', steps=STEPS)


def plan():
    "Every run: what is varied, and the settings; seed by seed, so that a part of it is a whole grid with fewer seeds"
    out = []
    for seed in range(SEEDS):
        real = [('cells', dict(cells=n)) for n in (0, 250, 1000, 4000)] + [('mask', dict(mask=m)) for m in (.05, .3)]
        real += [('attention dropout', dict(attention_dropout=.02)), ('control', dict(ranks='shuffled')), ('control', dict(steps=0)),
                 ('control', dict(steps=0, start='random')), ('control', dict(start='random'))]
        toy = [('cells', dict(world='toy', cells=n)) for n in (100, 400, 1600)]
        out += [dict(varied=v, **base | d, seed=seed) for v, d in real + toy]
    more = [dict(attention_dropout=p) for p in (0., .02)]  # more pairs where the difference is small
    return out + [dict(varied='attention dropout', **base | d, seed=seed) for seed in range(SEEDS, PAIRS) for d in more]


def restrict(cells, v):
    "V1 cells in the words of a smaller vocabulary, in the same order, cut to its length"
    old, k = cells.vocabulary, len(v.specials)
    to = np.zeros(old.n_tokens, np.int32)
    at = {g: i + k for i, g in enumerate(v.genes)}
    to[len(old.specials):] = [at.get(g, 0) for g in old.genes]
    new = to[cells.tokens]
    lengths = np.add.reduceat(new > 0, cells.offsets[:-1])
    c = Cells(new[new > 0], np.r_[0, np.cumsum(lengths)], cells.obs, vocabulary=v)
    return truncate(c[c.lengths >= 7], v.max_len)


def shuffled(cells, seed=0):
    "Each cell's genes in an order of chance"
    rng = np.random.default_rng(seed)
    return replace(cells, tokens=np.concatenate([rng.permutation(cells[i].tokens) for i in range(len(cells))]))


class Real:
    "Cells in training, cells to evaluate_masked on, and the two tasks"
    def __init__(self):
        cells = small_model_cells()
        train = cells[(cells.obs.split == 'train').to_numpy()]
        seen = np.bincount(train.tokens, minlength=train.vocabulary.n_tokens)
        v1, self.labels = cells.vocabulary, datasets.gene_class(TASK)
        keep = set(np.argsort(-seen, kind='stable')[:GENES])
        keep |= {v1.token(g) for gs in self.labels.values() for g in gs if g in v1.genes and seen[v1.token(g)] >= 10}
        at = np.array(sorted(t - len(v1.specials) for t in keep))
        self.vocabulary = Vocabulary([v1.genes[i] for i in at], v1.medians[at], max_len=RANKS, name=f'V1, {len(at):,} genes')
        rng = np.random.default_rng(0)
        small = restrict(cells, self.vocabulary)
        small = small[rng.permutation(len(small))]
        self.train, self.held = (small[(small.obs.split == s).to_numpy()] for s in ('train', 'held out'))
        self.held = self.held[:HELD]
        kang = datasets.load('kang_ifnb')
        o = kang.obs.assign(donor=kang.obs.donor.astype(str), cell_type=kang.obs.cell_type.astype(str))
        big = o.cell_type.map(o[o.condition == 'ctrl'].cell_type.value_counts()).fillna(0) >= 20
        self.kang = kang[(o.condition == 'ctrl') & (o.donor.str.len() > 2) & (o.cell_type.str.len() > 2) & big].copy()
        self.kang.obs['donor'] = self.kang.obs.donor.astype(str)
        self.kang.obs['cell_type'] = self.kang.obs.cell_type.astype(str)
        self.folds = fold_donors(self.kang.obs, 'donor', 'cell_type', 4)
        self.kang_cells = restrict(tokenize(self.kang, v1, keep_empty=True), self.vocabulary)
        assert len(self.kang_cells) == self.kang.n_obs


class Toy:
    "The simulated cohort; donors held out"
    def __init__(self):
        adata = simulate(n_cells=2400, n_donors=12, seed=0)
        v = Vocabulary.from_counts(adata, symbols='symbol', name='toy', max_len=256)
        cells = tokenize(adata, v)
        cells.obs['source'], cells.obs['group'] = 'toy', cells.obs['donor'].astype(str)
        cells.obs['split'] = hold_out(cells.obs, .15)
        cells = cells[np.random.default_rng(0).permutation(len(cells))]
        self.train, self.held = (cells[(cells.obs.split == s).to_numpy()] for s in ('train', 'held out'))
        self.held = self.held[:HELD]


def probe(X, y, folds, C=1.):
    "Accuracy and macro F1 of logistic regression on frozen vectors, every cell predicted when its donors are held out"
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    out = np.empty(len(y), dtype=object)
    for f in np.unique(folds):
        tr, te = folds != f, folds == f
        A, B = X(tr, te) if callable(X) else (X[tr], X[te])
        out[te] = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)).fit(A, y[tr]).predict(B)
    return dict(cell_accuracy=accuracy_score(y, out), cell_f1=f1_score(y, out, average='macro'), cell_n=len(y))


def gene_probe(E, labels, seed=0):
    "AUC of logistic regression on vectors of genes, one prediction a gene, folds over genes"
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    yes, no = labels.values()
    genes = [g for g in [*yes, *no] if g in E.index]
    y = np.isin(genes, yes)
    fit = make_pipeline(StandardScaler(), LogisticRegression(C=.01, max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    p = cross_val_predict(fit, E.loc[genes].to_numpy(), y, cv=folds, method='predict_proba')[:, 1]
    return dict(gene_auc=roc_auc_score(y, p), gene_n=len(y), gene_positive=int(y.sum()))


def gene_cells(w): return w.train[:600]


def baselines(w, seed=0):
    "What costs no model: rows for the two tasks"
    from sklearn.decomposition import TruncatedSVD
    from sklearn.dummy import DummyClassifier
    X, y = log_cp10k(w.kang), w.kang.obs.cell_type.to_numpy()
    def pca(tr, te):
        svd = TruncatedSVD(64, random_state=seed).fit(X[tr])
        return svd.transform(X[tr]), svd.transform(X[te])
    from scipy.sparse import csr_matrix
    c, v = w.train, w.vocabulary
    rank = np.arange(len(c.tokens)) - np.repeat(c.offsets[:-1], c.lengths)
    n = np.bincount(c.tokens, minlength=v.n_tokens)
    S = csr_matrix((1 - rank / RANKS, (c.tokens, np.repeat(np.arange(len(c)), c.lengths))), shape=(v.n_tokens, len(c)))
    two = np.c_[np.log1p(n), S.sum(1) / np.maximum(n, 1)]
    there = np.unique(gene_cells(w).tokens)  # the genes that the models are asked about
    table = lambda A: pd.DataFrame(np.asarray(A)[there], index=v.gene(there))
    start = np.zeros((v.n_tokens, 64))
    rows, U = gene_vectors(w.train, 64)
    start[rows] = U
    most = pd.Series(y).value_counts(normalize=True)
    same = np.array(y == most.index[0])
    from sklearn.metrics import f1_score
    return [dict(varied='baseline', ranks='largest class', seed=seed, cell_accuracy=same.mean(), cell_n=len(y),
                 cell_f1=f1_score(y, np.full(len(y), most.index[0]), average='macro'), gene_auc=.5),
            dict(varied='baseline', ranks='PCA of log counts; PCA of cells a gene is in', seed=seed, **probe(pca, y, w.folds),
                 **gene_probe(table(TruncatedSVD(64, random_state=seed).fit_transform(S)), w.labels, seed)),
            dict(varied='baseline', ranks='gene vectors of the start', seed=seed, **gene_probe(table(start), w.labels, seed)),
            dict(varied='baseline', ranks='detection and mean rank', seed=seed, **gene_probe(table(two), w.labels, seed))]


def house(w):
    "The house model, trained longer and on all genes, and its start, on the two tasks: the same cells, folds and genes"
    cells = small_model_cells()
    train = cells[(cells.obs.split == 'train').to_numpy()]
    part = gene_cells(w)
    same, seen = cells[cells.obs.index.get_indexer(part.obs.index)], w.vocabulary.gene(np.unique(part.tokens))
    kang, y, out = tokenize(w.kang, cells.vocabulary), w.kang.obs.cell_type.to_numpy(), []
    for name, model in {'house model': load_small_model(), 'start of the house model': init_small_model(train, SmallRecipe().shape)}.items():
        E, cell = gene_embeddings(same, model, show=False), probe(model.encode(kang, show=False), y, w.folds)
        E = E.loc[E.index.intersection(seen)]
        out += [dict(varied='house', ranks=name, seed=k, **cell, **gene_probe(E, w.labels, k)) for k in range(SEEDS)]
    return out


def one(r, w):
    "One run: train, evaluate_masked, try the tasks"
    seed, n = r['seed'], r['cells'] or len(w.train)
    train = w.train[np.sort(np.random.default_rng(seed).permutation(len(w.train))[:n])]
    given = shuffled(train, seed) if r['ranks'] == 'shuffled' else train
    t, shape = time.process_time(), SmallRecipe().shape
    model = init_small_model(given, shape, seed, r['start'] == 'counted')
    if r['steps']:
        pretrain(given, model, steps=r['steps'], batch=BATCH, lr=LR, warmup=50, weight_decay=0., mask=r['mask'], seed=seed,
                 holdout=0., attention_dropout=r['attention_dropout'], device='cpu', args=dict(optim='adamw_torch_fused'))
    t = time.process_time() - t
    j = evaluate_masked(model, w.held, RankFrequency(train, strength=3000))
    k = evaluate_masked(model, shuffled(w.held))
    out = dict(r, cells=len(train), epochs=round(r['steps'] * BATCH / len(train), 2), loss=j.loss.mean(), accuracy=j.right.mean(),
               frequency=j.frequency.mean(), in_view=j.in_view.mean(), loss_shuffled=k.loss.mean(), held_cells=len(w.held), hidden=len(j),
               genes=len(w.train.vocabulary), seconds=round(t, 1))
    if r['world'] == 'real':
        out |= probe(model.encode(w.kang_cells, show=False), w.kang.obs.cell_type.to_numpy(), w.folds)
        out |= gene_probe(gene_embeddings(gene_cells(w), model, show=False), w.labels, seed)
    return out


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--scratch', required=True, help='folder that keeps the finished runs')
    p.add_argument('--write', help='table of results to write, for the page')
    p.add_argument('--list', action='store_true', help='only say what there is to run')
    a = p.parse_args(argv)
    warnings.simplefilter('ignore')
    os.environ.setdefault('GENEFORMER_NB_QUIET', '1')
    f, key = Path(a.scratch)/'runs.csv', ['varied', *base, 'seed']
    name = lambda r: ', '.join(f'{k} {r[k]}' for k in key)
    done = pd.read_csv(f, dtype=dict(name=str)) if f.exists() else pd.DataFrame(dict(name=[]))
    todo = [r for r in plan() if name(r) not in set(done['name'])]
    print(f'{len(plan()) - len(todo)} of {len(plan())} runs are done')
    if a.list: return print(*map(name, todo), sep='\n')
    f.parent.mkdir(parents=True, exist_ok=True)
    worlds = {}
    about = {f'version_{k}': v for k, v in versions('torch', 'transformers', 'numpy').items()} | dict(version=__version__)
    shape = SmallRecipe().shape
    sizes = dict(batch=BATCH, lr=LR, max_ranks=RANKS, layers=shape['num_hidden_layers'], width=shape['hidden_size'])
    def add(rows):
        pd.concat([*([pd.read_csv(f)] if f.exists() else []), pd.DataFrame(rows)]).to_csv(f, index=False)
    try:
        for i, r in enumerate(todo):
            if r['world'] not in worlds: worlds[r['world']] = dict(real=Real, toy=Toy)[r['world']]()
            got = one(r, worlds[r['world']])
            add([dict(name=name(r), **got, **sizes, **about)])
            print(f"{i + 1} of {len(todo)}: {name(r)}: loss {got['loss']:.3f}, {got['seconds']:.0f} s", flush=True)
        for kind, rows in dict(baseline=lambda w: [b for s in range(SEEDS) for b in baselines(w, s)], house=house).items():
            if f.exists() and (pd.read_csv(f)['varied'] == kind).any(): continue
            if 'real' not in worlds: worlds['real'] = Real()
            add([dict(name=kind, **b, **about) for b in rows(worlds['real'])])
    except MissingDataError as e: sys.exit(f'ablations: {e}')
    if a.write: pd.read_csv(f).drop(columns='name').round(5).to_csv(a.write, index=False)


if __name__ == '__main__': main()

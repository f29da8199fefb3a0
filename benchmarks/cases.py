"""The benchmarks: for each one how inputs are made, what we do, what the reference does, and what bounds it.

A case has `prepare(folder, **size)`, run once, and three functions that are each run in a fresh process:
`ours` and `reference` return (seconds of the work, answer), `bound` returns (seconds the same work cannot do without,
in words). `equal` compares the answers, or the files that were written, and says how equal they are.
"""
import json, time
from pathlib import Path
import numpy as np
import data, naive


def timed(f):
    "Seconds of a call, and what it returned"
    t = time.perf_counter()
    out = f()
    return time.perf_counter() - t, out


def matched(a, b, tolerance):
    "Largest difference of two answers; a complaint when it is too large"
    assert a.shape == b.shape and len(a), f'answers of shape {a.shape} and {b.shape}'
    d = float(np.abs(a - b).max())
    assert d <= tolerance, f'answers differ by {d:.2g}, more than {tolerance:g}'
    return f'largest difference {d:.1g}'


def same_tokens(X, gene, medians, ours, theirs):
    "Every cell the same genes, and the same order but for ties; genes are numbers in the vocabulary"
    wide, ties = np.zeros(len(medians)), 0
    assert len(ours) == len(theirs), f'{len(ours)} cells and {len(theirs)}'
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if np.array_equal(a, b): continue
        row = slice(X.indptr[i], X.indptr[i + 1])
        np.add.at(wide, gene[X.indices[row]], X.data[row])
        x, y = wide[a] / medians[a], wide[b] / medians[b]
        wide[gene[X.indices[row]]] = 0
        assert np.array_equal(np.sort(a), np.sort(b)), f'cell {i} has other genes'
        assert np.allclose(x, y, rtol=1e-12, atol=0), f'cell {i} is in another order'
        ties += int((a != b).sum())
    return f'tokens equal, {ties} of {sum(map(len, ours))} in ties' if ties else 'tokens equal'


# ---- tokens

class Tokenize:
    "From file to folder: an .h5ad with a CSR matrix in, an Arrow `.dataset` folder out"
    alone = False  # True where the reference is not run
    whole, lists, workers = True, True, None  # the time of the whole process counts, from its start to its end

    def prepare(self, folder, cells, genes=20_000, retired=0, detected=2470):
        return data.prepare(folder, cells, genes, retired, detected)

    def ours(self, folder, out):
        from geneformer_nb.data.vocabulary import Vocabulary
        from geneformer_nb.data.corpus import tokenize_to
        return timed(lambda: str(tokenize_to(folder/'counts.h5ad', Vocabulary.load(folder), out/'ours', workers=self.workers)))

    def reference(self, folder, out):
        import anndata, datasets  # noqa: F401 (not part of the work)
        datasets.disable_progress_bars()
        files = folder/'counts.h5ad', folder/'vocabulary.json', out/'reference'
        return timed(lambda: naive.tokenize(*files, self.lists))

    def bound(self, folder, out):
        "Import what any reader needs, read the bytes, sort one integer a count, write four bytes a token"
        t = time.perf_counter()
        import anndata, h5py, pyarrow  # noqa: F401
        t1 = time.perf_counter()
        with h5py.File(folder/'counts.h5ad') as f: parts = [f['X'][k][()] for k in ('data', 'indices', 'indptr')]
        t2 = time.perf_counter()
        seconds = sort_seconds(parts[2])
        t3 = time.perf_counter()
        (out/'raw').write_bytes(parts[1].data)
        t4 = time.perf_counter()
        words = (f'imports {t1 - t:.2f} s, reading {t2 - t1:.2f} s, sorting one integer a count {seconds:.2f} s, '
                 f'writing {t4 - t3:.2f} s')
        return (t2 - t) + seconds + (t4 - t3), words

    def equal(self, folder, out, *_):
        import anndata as ad
        from datasets import load_from_disk
        from geneformer_nb.data.cells import Cells
        from geneformer_nb.data.vocabulary import Vocabulary
        v, a = Vocabulary.load(folder), ad.read_h5ad(folder/'counts.h5ad')
        number = {g: i for i, g in enumerate(v.genes)}
        gene = np.array([number[v.aliases.get(g, g)] for g in a.var['ensembl_id']])
        ours, theirs = Cells.load(out/'ours'), load_from_disk(out/'reference')
        assert load_from_disk(out/'ours')[0]['length'] == theirs[0]['length']  # `datasets` reads ours too
        flat = theirs.data['input_ids'].combine_chunks()
        flat, off = flat.values.to_numpy(), flat.offsets.to_numpy()
        return same_tokens(a.X, gene, v.medians, [ours[i].tokens[1:-1] - 4 for i in range(len(ours))],
                           [flat[i + 1:j - 1] - 4 for i, j in zip(off, off[1:])])


class TokenizeArrays(Tokenize):
    "The same, where the reference hands numpy arrays to `datasets` instead of lists"
    lists = False


class TokenizeOne(TokenizeArrays):
    "The same, ours with one thread as well"
    workers = 1


class TokenizeLoop(Tokenize):
    "Ours goes from file to folder; the reference reads and ranks, and writes nothing"
    def reference(self, folder, out):
        import anndata  # noqa: F401 (not part of the work)
        return timed(lambda: f"{len(naive.read_and_rank(folder/'counts.h5ad', folder/'vocabulary.json')[0])} cells")

    def equal(self, folder, out, *_):
        import anndata as ad
        from geneformer_nb.data.cells import Cells
        ranked, v = naive.read_and_rank(folder/'counts.h5ad', folder/'vocabulary.json')
        a, ours, gene = ad.read_h5ad(folder/'counts.h5ad'), Cells.load(out/'ours'), np.arange(len(v['genes']))
        return same_tokens(a.X, gene, np.array(v['medians']), [ours[i].tokens[1:-1] - 4 for i in range(len(ours))],
                           [r[:v['max_len'] - 2] for r in ranked])


class TokenizeMany(Tokenize):
    "Ours alone, on more cells than fit in memory: does memory grow?"
    alone = True

    def prepare(self, folder, cells): return data.prepare_many(folder, cells)
    def equal(self, folder, out, *_):
        from geneformer_nb.data.corpus import Corpus
        c = Corpus(out/'ours')
        assert c.shards['cells'].sum() == len(c), 'cells were lost'
        return f'{len(c):,} cells, {c.n_tokens:,} tokens'

    def bound(self, folder, out):
        "Read the file and write as many bytes as there are tokens, in pieces of 16 MB, doing nothing with them"
        size, piece = (folder/'counts.h5ad').stat().st_size, 1 << 24
        def read():
            with open(folder/'counts.h5ad', 'rb', buffering=0) as f:
                while f.read(piece): pass
        def write():
            with open(out/'raw', 'wb', buffering=0) as f:
                for _ in range(size // 2 // piece): f.write(bytes(piece))
        a, b = timed(read)[0], timed(write)[0]
        return a + b, f'reading {size / 1e9:.1f} GB {a:.1f} s, writing half of it {b:.1f} s'


def sort_seconds(indptr):
    "Seconds to sort as many random 64-bit integers, cell by cell, on one thread"
    keys = np.random.default_rng(0).integers(0, 2**62, indptr[-1])
    t = time.perf_counter()
    for a, b in zip(indptr.tolist(), indptr[1:].tolist()): keys[a:b].sort()
    return time.perf_counter() - t


class Rank:
    "Ranking alone: counts in memory, gene numbers in memory"
    whole = alone = False

    def prepare(self, folder, cells, genes=20_000, detected=2470):
        return data.prepare(folder, cells, genes, 0, detected)

    def load(self, folder):
        import anndata as ad
        from geneformer_nb.data.vocabulary import Vocabulary
        X, v = ad.read_h5ad(folder/'counts.h5ad').X, Vocabulary.load(folder)
        return X, np.arange(len(v)), v.medians

    def ours(self, folder, out):
        from geneformer_nb.data.tokenizer import rank_genes
        X, gene, medians = self.load(folder)
        seconds, ranked = timed(lambda: rank_genes(X, gene, medians))
        return seconds, np.concatenate(ranked)

    def reference(self, folder, out):
        X, gene, medians = self.load(folder)
        seconds, ranked = timed(lambda: naive.rank_cells(X, gene, medians))
        return seconds, np.concatenate(ranked)

    def bound(self, folder, out):
        X, _, _ = self.load(folder)
        s = sort_seconds(X.indptr)
        return s, f'sorting {X.nnz / 1e6:.1f} M 64-bit integers, cell by cell'

    def equal(self, folder, out, a, b):
        X, gene, medians = self.load(folder)
        cut = lambda x: np.split(x, X.indptr[1:-1])
        return same_tokens(X, gene, medians, cut(a), cut(b))


# ---- the model: V1-10M shape, random weights, float32

class Embed:
    "Cell embeddings: mean over tokens, second to last layer"
    whole = alone = False

    def prepare(self, folder, cells, tokens, preset='V1-10M', genes=25_424, batch=8):
        return data.prepare_model(folder, cells, tokens, preset, genes, batch)

    dtype = None  # of ours; the reference is in float32

    def ours(self, folder, out):
        from geneformer_nb.data.cells import Cells
        from geneformer_nb.model.bert import Geneformer
        model, cells = Geneformer.from_pretrained(folder, device='cpu'), Cells.load(folder/'cells')
        model.encode(cells[:1], dtype=self.dtype, show=False)  # the first call sets things up
        return timed(lambda: model.encode(cells, dtype=self.dtype, show=False))

    def stock(self, folder):
        from transformers import BertForMaskedLM
        from transformers.utils import logging
        logging.disable_progress_bar()
        hf = BertForMaskedLM.from_pretrained(folder).eval()
        cells = json.load(open(folder/'cells.json'))
        naive.forward(hf, [cells['tokens'][0][:64]])
        return hf, cells['tokens'], cells['batch']

    def reference(self, folder, out):
        hf, cells, batch = self.stock(folder)
        return timed(lambda: naive.embed(hf, cells, batch))

    def flops(self, folder): return sum(encoder_flops(folder, len(c)) for c in cells_of(folder))
    def bound(self, folder, out):
        total, rate = self.flops(folder), matmul_rate(self.dtype)
        import torch
        return total / rate, (f'{total / 1e9:,.0f} GFLOP to the second to last layer, without head or padding, at '
                              f'{rate / 1e9:.0f} GFLOP/s (matrix product in {self.dtype or "float32"} on {torch.get_num_threads()} thread)')

    def equal(self, folder, out, a, b): return matched(a, b, 1e-4)


def cells_of(folder):
    return json.load(open(folder/'cells.json'))['tokens']


def encoder_flops(folder, n, back=1):
    "Multiplications and additions of the encoder on n tokens, all layers but the last `back`"
    c = json.load(open(folder/'config.json'))
    d, f, layers = c['hidden_size'], c['intermediate_size'], c['num_hidden_layers'] - back
    return layers * (2 * n * (4 * d * d + 2 * d * f) + 4 * n * n * d)


def matmul_rate(dtype=None):
    "FLOP/s of a large matrix product here and now, best of ten by each library that torch has for it"
    import torch
    from geneformer_nb.model.cpu_kernels import _linear, onednn
    a, b = torch.rand(2, 1536, 1536).to(getattr(torch, dtype or 'float32'))
    ways = [lambda: a @ b] + [lambda: _linear(a, b)] * onednn(a.dtype)
    return max(2 * 1536**3 / timed(way)[0] for way in ways for _ in range(10))


class Perturb(Embed):
    "Delete the first genes of one cell, one at a time: mean cosine of the remaining genes' vectors"
    def prepare(self, folder, tokens, variants, preset='V1-10M', genes=25_424, batch=8):
        return data.prepare_model(folder, 1, tokens, preset, genes, batch, variants)

    def ours(self, folder, out):
        from geneformer_nb.data.cells import Cells
        from geneformer_nb.model.bert import Geneformer
        from geneformer_nb.perturb.actions import KO, each, perturb
        model, cells = Geneformer.from_pretrained(folder, device='cpu'), Cells.load(folder/'cells')
        first = cells[0].tokens[:self.variants(folder)]
        what = each(model.vocabulary.gene(first), KO)
        model.hidden(np.arange(2, 66), [0, 64])
        if self.dtype: perturb(model, cells, KO(model.vocabulary.gene(first[:1])[0]), dtype=self.dtype, show=False)
        seconds, table = timed(lambda: perturb(model, cells, what, dtype=self.dtype, show=False))
        order = table.set_index('gene_id').cosine.loc[model.vocabulary.gene(first)]
        return seconds, order.to_numpy(float)

    def variants(self, folder):
        return json.load(open(folder/'cells.json'))['variants']

    def reference(self, folder, out):
        hf, cells, batch = self.stock(folder)
        return timed(lambda: naive.delete_each(hf, cells[0], self.variants(folder), batch))

    def flops(self, folder):
        n, k = len(cells_of(folder)[0]), self.variants(folder)
        return encoder_flops(folder, n) + k * encoder_flops(folder, n - 1)

    def equal(self, folder, out, a, b): return matched(a, b, 1e-4)


class PerturbByMap(Perturb):
    "The same, where the reference makes the perturbed cells of every cell in processes of its own"
    def reference(self, folder, out):
        hf, cells, batch = self.stock(folder)
        return timed(lambda: naive.delete_each_by_map(hf, cells[0], self.variants(folder), batch))


class EmbedHalf(Embed):
    "The same in bfloat16; the reference stays in float32"
    dtype = 'bfloat16'
    def equal(self, folder, out, a, b):
        cos = (a*b).sum(1)/np.linalg.norm(a, axis=1)/np.linalg.norm(b, axis=1)
        assert cos.min() > .999, f'cosine {cos.min():.4f}'
        return f'smallest cosine of the two {cos.min():.5f}'


class PerturbHalf(Perturb):
    "The same in bfloat16; the reference stays in float32"
    dtype = 'bfloat16'
    def equal(self, folder, out, a, b):
        from scipy.stats import spearmanr
        return matched(a, b, 1e-2) + f', rank correlation {spearmanr(a, b)[0]:.2f}'


class FirstOrder(Perturb):
    "All deletions of a cell by slopes, against the exact engine, whose time is that of the first genes times all of them"
    def encoder(self, folder):
        from geneformer_nb.data.cells import Cells
        from geneformer_nb.model.bert import Geneformer
        model, cells = Geneformer.from_pretrained(folder, device='cpu'), Cells.load(folder/'cells')
        goal = np.random.default_rng(0).normal(size=model.config.hidden_size)
        model.hidden(np.arange(2, 66), [0, 64])
        return model, cells, dict(goal=goal)

    def ours(self, folder, out):
        from geneformer_nb.perturb.gradients import first_order
        model, cells, states = self.encoder(folder)
        seconds, table = timed(lambda: first_order(model, cells, states=states, show=False))
        return seconds, table['shift_goal'].to_numpy()[:self.variants(folder)]

    def reference(self, folder, out):
        from geneformer_nb.perturb.actions import KO, each, perturb
        model, cells, states = self.encoder(folder)
        k, n = self.variants(folder), len(cells.tokens)
        what = each(model.vocabulary.gene(cells[0].tokens[:k]), KO)
        seconds, table = timed(lambda: perturb(model, cells, what, states=states, show=False))
        return seconds * n / k, table['shift_goal'].to_numpy()

    def flops(self, folder): return 9 * encoder_flops(folder, len(cells_of(folder)[0]))  # three passes, a backward pass is two
    def equal(self, folder, out, a, b):
        from scipy.stats import spearmanr
        r = spearmanr(a, b)[0]
        assert r > .5, f'rank correlation {r:.2f} of first order and exact'
        return f'rank correlation with the exact shifts {r:.2f}'


class Attention(Embed):
    "Attention that each gene receives in every head, mean over cells: streamed, against stock matrices that are all kept"
    def ours(self, folder, out):
        from geneformer_nb.attention.received import received
        from geneformer_nb.data.cells import Cells
        from geneformer_nb.model.bert import Geneformer
        model, cells = Geneformer.from_pretrained(folder, device='cpu'), Cells.load(folder/'cells')
        model.hidden(np.arange(2, 66), [0, 64])
        seconds, (table, _) = timed(lambda: received(model, cells, show=False))
        return seconds, table.sort_values(['gene_id', 'layer', 'head']).attention.to_numpy(float)

    def reference(self, folder, out):
        from geneformer_nb.data.vocabulary import Vocabulary
        hf, cells, _ = self.stock(folder)
        v = Vocabulary.load(folder/'vocabulary.json')
        seconds, table = timed(lambda: naive.attention_received(hf, cells))
        return seconds, np.concatenate([table[t].ravel() for t in sorted(table, key=v.gene)])

    def flops(self, folder): return sum(encoder_flops(folder, len(c), back=0) for c in cells_of(folder))

    def bound(self, folder, out):
        total, rate = self.flops(folder), matmul_rate()
        return total / rate, f'{total / 1e9:,.0f} GFLOP of all layers, at {rate / 1e9:.0f} GFLOP/s (matrix product on 1 thread)'

    def equal(self, folder, out, a, b): return matched(a, b, 1e-4)


# ---- pretraining: V1-10M shape, random weights, a step on a few cells

class Clock:
    "Seconds between the ends of a Trainer's steps, of every Trainer made while it is there"
    def __enter__(self):
        from transformers import TrainerCallback, trainer
        ends = self.ends = []
        class Tick(TrainerCallback):
            def on_step_end(self, *_, **__): ends.append(time.perf_counter())
        self.tick, self.all = Tick, trainer.DEFAULT_CALLBACKS
        self.all.append(Tick)
        return self
    def __exit__(self, *_): self.all.remove(self.tick)
    @property
    def step(self): return self.ends[-1] - self.ends[-2]  # the first one sets things up


class Pretrain(Embed):
    "Seconds of a training step; the loss of both on the same masked cells, without dropout, is compared"
    threads, what = 2, 'head on hidden genes only'

    def prepare(self, folder, cells, tokens, preset='V1-10M', genes=25_424):
        return data.prepare_model(folder, cells, tokens, preset, genes, cells)

    def ours(self, folder, out, prepared=lambda model: model, steps=2, **options):
        from geneformer_nb.data.cells import Cells
        from geneformer_nb.model.bert import Geneformer
        from geneformer_nb.train.pretraining import masked_loss, pretrain
        import torch
        model, cells = Geneformer.from_pretrained(folder, device='cpu'), Cells.load(folder/'cells')
        rows = naive.masked(cells_of(folder), model.vocabulary.n_tokens)
        shown, labels = (np.concatenate([r[i] for r in rows]) for i in (0, 1))
        with torch.inference_mode(): loss = masked_loss(model, shown, cells.offsets, labels)[0].item()
        with Clock() as clock: pretrain(cells, prepared(model), steps=steps, batch=len(cells), holdout=0., device='cpu', **options)
        return clock.step, np.array([loss])

    def reference(self, folder, out, change=lambda hf: None, steps=2):
        from transformers import BertForMaskedLM
        import torch
        hf, cells = BertForMaskedLM.from_pretrained(folder).eval(), cells_of(folder)
        with torch.inference_mode(): loss = hf(**naive.padded(naive.masked(cells, hf.config.vocab_size))).loss.item()
        change(hf)
        with Clock() as clock: naive.pretrain(hf, cells, len(cells), steps, out)
        return clock.step, np.array([loss])

    def flops(self, folder):
        c = json.load(open(folder/'config.json'))
        head = sum(.15 * len(x) * 2 * c['hidden_size'] * (c['hidden_size'] + c['vocab_size']) for x in cells_of(folder))
        return 3 * (head + sum(encoder_flops(folder, len(x), back=0) for x in cells_of(folder)))

    def bound(self, folder, out):
        import torch
        total, rate = self.flops(folder), matmul_rate()
        return total / rate, (f'{total / 1e9:,.0f} GFLOP forward and backward, {self.what}, at {rate / 1e9:.0f} GFLOP/s '
                              f'(matrix product on {torch.get_num_threads()} thread(s))')

    def equal(self, folder, out, a, b): return 'loss before training: ' + matched(a, b, 1e-3)


class FinetuneGenes(Pretrain):
    "Seconds of a step of the classifier of genes, 4 of 6 layers frozen; the loss of both before training is compared"
    threads, frozen, what, extra = 1, 4, 'backward through the layers that learn', {}

    def ours(self, folder, out, steps=3):
        from geneformer_nb.data.cells import Cells
        from geneformer_nb.tasks.genes import GeneClassifier, finetune_genes
        from geneformer_nb.model.bert import Geneformer
        import torch
        model, cells = Geneformer.from_pretrained(folder, device='cpu'), Cells.load(folder/'cells')
        v, word = model.vocabulary, naive.token_labels([range(model.vocabulary.n_tokens)], model.vocabulary.n_tokens)[0]
        classes = {c: v.gene(np.flatnonzero(word == i)) for i, c in enumerate('ab')}
        with torch.inference_mode():
            loss = GeneClassifier(model, classes).loss(torch.from_numpy(cells.tokens), cells.offsets, torch.from_numpy(word[cells.tokens])).item()
        side = {g: 'test' if i % 50 == 0 else 'train' for c in classes.values() for i, g in enumerate(c)}
        with Clock() as clock: finetune_genes(model, cells, classes, split=side, freeze_layers=min(self.frozen, model.config.num_hidden_layers - 1),
                                              steps=steps, batch=len(cells), balance=False, **self.extra)
        return clock.step, np.array([loss])

    def reference(self, folder, out, steps=3):
        import torch
        hf, cells = naive.token_classifier(folder), cells_of(folder)
        rows = list(zip(map(np.array, cells), naive.token_labels(cells, hf.config.vocab_size)))
        with torch.inference_mode(): loss = hf.eval()(**naive.padded(rows)).loss.item()
        with Clock() as clock: naive.train_tokens(hf, rows, len(cells), steps, min(self.frozen, hf.config.num_hidden_layers - 1), out)
        return clock.step, np.array([loss])

    def flops(self, folder):
        layers = json.load(open(folder/'config.json'))['num_hidden_layers']
        top = layers - min(self.frozen, layers - 1)  # learned: there and back; the others only there
        return sum(encoder_flops(folder, len(x), back=0) + 2 * encoder_flops(folder, len(x), back=layers - top) for x in cells_of(folder))


class FinetuneGenesHalf(FinetuneGenes):
    "The same in bfloat16 (autocast); the reference stays in float32"
    extra = dict(bf16=True)


# ---- statistics

class Shift:
    "Rank-sum test of every gene's shifts against the pool of all, with false discovery rates"
    whole = alone = False

    def prepare(self, folder, cells, genes):
        folder = Path(folder) / f'shifts_{cells}_{genes}'
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder/'raw.parquet').exists(): data.write_shifts(folder, cells, genes)
        return folder

    def load(self, folder):
        import pandas as pd
        raw = pd.read_parquet(folder/'raw.parquet')
        return raw.astype({k: 'category' for k in ('kind', 'perturbation', 'gene_id')})

    def ours(self, folder, out):
        from geneformer_nb.perturb.stats import goal_state_shift
        import scipy.stats  # noqa: F401 (not part of the work)
        raw = self.load(folder)
        seconds, t = timed(lambda: goal_state_shift(raw, 'healthy', official=True))
        return seconds, t.sort_values('gene_id')[['shift', 'p', 'fdr']].to_numpy(float)

    def reference(self, folder, out):
        import scipy.stats  # noqa: F401
        raw = self.load(folder)
        seconds, t = timed(lambda: naive.goal_state_shift(raw, 'shift_healthy'))
        return seconds, t.sort_values('gene_id')[['shift', 'p', 'fdr']].to_numpy(float)

    def bound(self, folder, out):
        x = self.load(folder)['shift_healthy'].to_numpy()
        s, _ = timed(lambda: np.argsort(x))
        return s, f'sorting {len(x):,} shifts once'

    def equal(self, folder, out, a, b): return matched(a, b, 1e-9)

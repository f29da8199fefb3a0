"""What a careful user would write without this library: the method of Geneformer in its plainest form.

Stock parts only (numpy, anndata, datasets, transformers, scipy), one cell after the other, one gene after the other
where the method says so. Every benchmark compares the library with one of these, after checking that both give the
same answer.
"""
import json, random
import numpy as np


# ---- tokens: counts per 10,000 over the gene's median, highest first

def rank_cells(X, gene, medians):
    "Gene numbers of every cell of a CSR matrix, highest first; a loop over cells"
    hits = np.bincount(gene[gene >= 0], minlength=len(medians))
    several, out = (hits > 1).any(), []
    for i in range(X.shape[0]):
        row = slice(X.indptr[i], X.indptr[i + 1])
        counts, g = X.data[row].astype(np.float64), gene[X.indices[row]]
        total = counts.sum()
        if (g < 0).any(): counts, g = counts[g >= 0], g[g >= 0]
        if several:  # more than one row of the data may stand for a gene
            g, at = np.unique(g, return_inverse=True)
            counts = np.bincount(at, weights=counts)
        out.append(g[np.argsort(-(counts / total * 10_000 / medians[g]))])
    return out


def read_and_rank(h5ad, vocabulary):
    "Ranked genes of all cells of an .h5ad, in memory, and the vocabulary"
    import anndata as ad
    v = json.load(open(vocabulary))
    number = {g: i for i, g in enumerate(v['genes'])}
    a = ad.read_h5ad(h5ad)
    gene = np.array([number.get(v['aliases'].get(g, g), -1) for g in a.var['ensembl_id']])
    return rank_cells(a.X, gene, np.array(v['medians'])), v


def tokenize(h5ad, vocabulary, folder, lists=True):
    "From an .h5ad file to an Arrow folder of the `datasets` library: <cls>, the genes, <eos>"
    import anndata as ad
    from datasets import Dataset
    ranked, v = read_and_rank(h5ad, vocabulary)
    a = ad.read_h5ad(h5ad, backed='r')
    ids = [np.concatenate([[2], g[:v['max_len'] - 2] + 4, [3]]).astype(np.int32) for g in ranked]
    if lists: ids = [i.tolist() for i in ids]
    columns = dict(input_ids=ids, length=[len(i) for i in ids], cell_type=a.obs['cell_type'].astype(str).tolist())
    Dataset.from_dict(columns).save_to_disk(folder)


# ---- embeddings: padded batches through the stock model

def forward(hf, cells, layer=-2):
    "Hidden states of a padded batch and its mask; the masked-LM head runs, as it is part of the model"
    import torch
    longest = max(map(len, cells))
    ids = torch.tensor([c + [0] * (longest - len(c)) for c in cells])
    mask = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in cells])
    return hf(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer], mask


def embed(hf, cells, batch):
    "Mean over the tokens of each cell, second to last layer, float32"
    import torch
    out = []
    with torch.no_grad():
        for i in range(0, len(cells), batch):
            hidden, mask = forward(hf, cells[i:i + batch])
            mask = mask[..., None]
            out.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(out).numpy()


# ---- pretraining: the stock Trainer on padded batches

def padded(rows):
    "(tokens as shown, what was hidden or -100) of some cells, as a padded batch"
    import torch
    longest = max(len(s) for s, _ in rows)
    def pad(part, fill): return torch.tensor(np.array([np.r_[r[part], np.full(longest - len(r[part]), fill)] for r in rows]))
    return dict(input_ids=pad(0, 0), labels=pad(1, -100),
                attention_mask=torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s, _ in rows]))


def masked(cells, n_tokens, seed=0, share=.15):
    "Hide some genes of each cell: 80 % behind <mask>, 10 % behind another gene, 10 % as they were"
    rng, out = np.random.default_rng(seed), []
    for c in cells:
        shown, labels, fate = np.array(c), np.full(len(c), -100), rng.random(len(c))
        at = rng.random(len(c)) < share
        labels[at] = shown[at]
        shown[at & (fate < .8)] = 1
        wild = at & (fate >= .9)
        shown[wild] = rng.integers(2, n_tokens, wild.sum())
        out.append((shown, labels))
    return out


def hidden_only(hf):
    "Let a model score the hidden places only; the first thing to mend in the plain loop"
    import types, torch
    def forward(self, input_ids, attention_mask, labels, num_items_in_batch=None):
        at = labels >= 0
        h = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[at]
        return dict(loss=torch.nn.functional.cross_entropy(self.cls(h), labels[at]))
    hf.forward = types.MethodType(forward, hf)


def train(hf, rows, batch, steps, folder, **args):
    "Train with the stock Trainer on padded batches of (tokens, labels); library defaults for what is not said"
    from transformers import Trainer, TrainingArguments
    data = [dict(input_ids=s, labels=l) for s, l in rows]
    args = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=batch, max_steps=steps, seed=0, report_to='none',
                             save_strategy='no', disable_tqdm=True, use_cpu=True, **args)
    def collate(items): return padded([(i['input_ids'], i['labels']) for i in items])
    Trainer(model=hf, args=args, train_dataset=data, data_collator=collate).train()


def pretrain(hf, cells, batch, steps, folder):
    "Masked genes, cells of similar length together"
    train(hf, masked(cells, hf.config.vocab_size), batch, steps, folder, learning_rate=1e-3, train_sampling_strategy='group_by_length')


# ---- classes of genes: the stock token classifier, lowest layers frozen

def token_labels(cells, n_words):
    "One of two classes for every tenth word, by its number; -100 elsewhere"
    word = np.full(n_words, -100)
    word[10::20], word[20::20] = 0, 1
    return [word[np.array(c)] for c in cells]


def token_classifier(folder, classes=2, seed=0):
    "The stock model with a linear head on every token"
    import torch
    from transformers import BertForTokenClassification
    hf = BertForTokenClassification.from_pretrained(folder, num_labels=classes)
    torch.manual_seed(seed)
    hf.classifier = torch.nn.Linear(hf.config.hidden_size, classes)
    torch.nn.init.zeros_(hf.classifier.bias)
    return hf


def train_tokens(hf, rows, batch, steps, frozen, folder):
    "Train with the stock Trainer, the parameters of the lowest layers frozen, the rest as it comes"
    for layer in hf.bert.encoder.layer[:frozen]:
        for p in layer.parameters(): p.requires_grad = False
    train(hf, rows, batch, steps, folder, learning_rate=5e-5, weight_decay=.001)


# ---- deletion: a cell without each of its genes in turn

def delete_each(hf, cell, variants, batch):
    "For each of the first genes of a cell: mean over the other genes of the cosine of their vectors before and after"
    import torch
    out = []
    with torch.no_grad():
        before = forward(hf, [cell])[0][0]
        for start in range(0, variants, batch):
            gone = range(start, min(start + batch, variants))
            after, _ = forward(hf, [cell[:i] + cell[i + 1:] for i in gone])
            for i, x in zip(gone, after):
                rest = torch.cat([before[:i], before[i + 1:]])
                out.append(torch.cosine_similarity(rest, x, dim=-1).mean().item())
    return np.array(out)


def attention_received(hf, cells):
    "{gene: (layers, heads)} sum over the genes that look at it, mean over its cells; every matrix of the batch is kept"
    import torch
    hf.set_attn_implementation('eager')
    total, n = {}, {}
    with torch.no_grad():
        got = hf.bert(**{k: x for k, x in padded([(c, c) for c in map(np.array, cells)]).items() if k != 'labels'}, output_attentions=True).attentions
        for i, cell in enumerate(cells):
            seen = np.stack([layer[i, :, :len(cell)].sum(1).double().numpy() for layer in got])
            for j, gene in enumerate(cell):
                total[gene] = total.get(gene, 0) + seen[:, :, j]
                n[gene] = n.get(gene, 0) + 1
    return {g: total[g] / n[g] for g in total}


def delete_each_by_map(hf, cell, variants, batch, processes=4):
    "The same, perturbed cells made by a `datasets` map in several processes, started anew for every cell"
    import torch
    from datasets import Dataset, disable_progress_bars
    disable_progress_bars()
    def delete(row):
        at = row['at'][0]
        return dict(input_ids=row['input_ids'][:at] + row['input_ids'][at + 1:])
    made = Dataset.from_dict(dict(input_ids=[cell] * variants, at=[[i] for i in range(variants)])).map(delete, num_proc=processes)
    out = []
    with torch.no_grad():
        before = forward(hf, [cell])[0][0]
        for start in range(0, variants, batch):
            part = made.select(range(start, min(start + batch, variants)))
            after, _ = forward(hf, [list(x) for x in part['input_ids']])
            for (i,), x in zip(part['at'], after):
                out.append(torch.cosine_similarity(torch.cat([before[:i], before[i + 1:]]), x, dim=-1).mean().item())
    return np.array(out)


# ---- statistics: the shifts of one gene against those of all genes

def goal_state_shift(raw, column):
    "Rank-sum test of each gene against a pool of all shifts, Benjamini-Hochberg over genes: shift, p, fdr by gene"
    import pandas as pd
    from scipy.stats import false_discovery_control, ranksums
    pool, rows = [], []
    for _, part in raw.groupby('gene_id', observed=True): pool += part[column].tolist()
    if len(pool) > 100_000: pool = random.Random(42).sample(pool, 100_000)
    pool = np.array(pool)
    for gene in sorted(raw['gene_id'].unique()):
        own = raw.loc[raw['gene_id'] == gene, column]
        rows.append((gene, own.mean(), ranksums(pool, own).pvalue))
    out = pd.DataFrame(rows, columns=['gene_id', 'shift', 'p'])
    return out.assign(fdr=false_discovery_control(out['p']))

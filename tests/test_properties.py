"Properties that hold for any counts: of ranks, of cells on disk, of what a perturbation leaves"
import tempfile, warnings
import anndata as ad, numpy as np, pandas as pd
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.perturb.engine import arrange, first_layer, singles
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.data.tokenizer import tokenize

few = settings(max_examples=30, deadline=None, derandomize=True)
n_genes = 12
genes = [f'TOYG{i:011d}' for i in range(n_genes)]
medians = st.lists(st.integers(1, 12), min_size=n_genes, max_size=n_genes).map(lambda m: np.array(m)/4) # few, so that ties are many

@st.composite
def vocabularies(draw): return Vocabulary(genes, draw(medians), draw(st.booleans()), max_len=draw(st.integers(4, 16)))

counts = st.integers(1, 6).flatmap(lambda n: arrays(np.int64, (n, n_genes), elements=st.integers(0, 8)))

def tokens_of(X, vocabulary, names=genes, **kw):
    "Tokens of each cell, empty ones kept; None where nothing was counted at all"
    if not X.sum(): return None
    a = ad.AnnData(sparse.csr_matrix(X.astype(np.float64)), var=pd.DataFrame(index=list(names)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        c = tokenize(a, vocabulary, keep_empty=True, **kw)
    return [c[i].tokens.tolist() for i in range(len(c))]

def by_hand(row, v):
    "The definition: known, non-zero genes by falling value, ties by token"
    order = sorted((g for g in range(n_genes) if row[g]), key=lambda g: (-row[g]/v.medians[g], g))
    if not order: return []
    k = len(v.specials)
    inside = [g + k for g in order[:v.max_len - 2*v.cls]]
    return [2, *inside, 3] if v.cls else inside

@few
@given(counts, vocabularies())
def test_equal_to_the_definition(X, v):
    if X.sum(): assert tokens_of(X, v) == [by_hand(r, v) for r in X]

@few
@given(counts, vocabularies(), st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_scaling_a_cell_changes_nothing(X, v, by):
    assert tokens_of(X*np.array(by[:len(X)])[:, None], v) == tokens_of(X, v)

@few
@given(counts, vocabularies(), st.permutations(range(n_genes)))
def test_order_of_genes_changes_nothing(X, v, order):
    order = list(order)
    assert tokens_of(X[:, order], v, [genes[i] for i in order]) == tokens_of(X, v)

@few
@given(counts, vocabularies(), st.integers(1, 3))
def test_blocks_change_nothing(X, v, block): assert tokens_of(X, v, block=block) == tokens_of(X, v)

@few
@given(counts, vocabularies())
def test_cells_do_not_know_each_other(X, v):
    both = tokens_of(X, v)
    for i in range(len(X)):
        if X[i].sum(): assert tokens_of(X[[i]], v)[0] == both[i]

@few
@given(counts, vocabularies())
def test_zeros_never_and_genes_once(X, v):
    for row, t in zip(X, tokens_of(X, v) or []):
        own = [x - len(v.specials) for x in t if x >= len(v.specials)]
        assert all(row[g] > 0 for g in own) and len(set(t)) == len(t) <= v.max_len
        assert len(own) == min((row > 0).sum(), v.max_len - 2*v.cls)

@few
@given(counts, vocabularies(), arrays(np.int64, n_genes, elements=st.integers(0, 8)))
def test_rows_of_a_gene_are_summed(X, v, part):
    part = np.minimum(X, part)
    two = np.hstack([X - part, part])
    assert tokens_of(two, v, genes + [g.lower() + '.2' if i % 2 else g.lower() for i, g in enumerate(genes)]) in (
        tokens_of(X, v), None)

lists = st.lists(st.lists(st.integers(4, 300), max_size=9), max_size=6)
texts = st.text(st.characters(codec='utf-8', exclude_characters='\x00'), max_size=5)

@few
@given(lists, st.booleans(), st.data())
def test_cells_come_back_from_disk(toks, special, data):
    n = len(toks)
    several = lambda s: data.draw(st.lists(s, min_size=n, max_size=n))
    obs = pd.DataFrame(dict(word=several(texts), number=several(st.integers(-9, 9)), share=several(st.floats(allow_nan=False)),
                            yes=several(st.booleans())), index=several(texts)).astype(dict(number=int, share=float, yes=bool, word=object))
    c = Cells(*ragged(toks), obs, vocabulary_hash='0'*16, special=special)
    with tempfile.TemporaryDirectory() as d:
        back = Cells.load(c.save(f'{d}/cells'))
        assert np.array_equal(back.tokens, c.tokens) and np.array_equal(back.offsets, c.offsets)
        assert (back.vocabulary_hash, back.special) == (c.vocabulary_hash, c.special)
        assert back.obs.equals(obs) and list(back.obs.index) == list(obs.index)

@few
@given(lists, st.integers(1, 40))
def test_batches_hold_every_cell_once(toks, budget):
    c = Cells(*ragged(toks))
    got = c.batches(budget)
    assert sorted(i for b in got for i in b) == list(range(len(c)))
    assert all(len(b) == 1 or c.lengths[b].sum() <= budget for b in got if c.lengths[b].any())

own_genes = st.lists(st.integers(4, 30), min_size=2, max_size=10, unique=True)
hows = st.one_of(st.sampled_from(['up', 'down']).flatmap(lambda w: st.integers(1, 10).map(lambda x: f'{w}={x/10}')),
                 st.sampled_from([-3, -2, -1, 1, 2, 3]).map(lambda q: f'quartiles={q}'))

@few
@given(own_genes, st.booleans(), st.data())
def test_what_a_deletion_and_a_move_leave(own, cls, data):
    x, front = np.array([2, *own, 3] if cls else own, dtype=np.int32), int(cls)
    gone = data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=len(own) - 1, unique=True))
    a = arrange(x, [('KO', t, '') for t in gone], cls)
    assert a.tokens.tolist() == [t for t in x if t not in gone] == x[a.src].tolist() and a.cut == 0
    assert a.positions.tolist() == list(range(len(x) - len(gone))) and not a.moved.any()
    held = arrange(x, [('KO', t, 'hold') for t in gone], cls)
    assert held.tokens.tolist() == a.tokens.tolist() and held.positions.tolist() == held.src.tolist() == a.src.tolist()
    a = arrange(x, [('OE', t, '') for t in gone], cls)
    assert sorted(a.tokens) == sorted(x) and a.tokens[front:front + len(gone)].tolist() == gone and a.cut == 0
    assert [t for t in a.tokens if t not in gone] == [t for t in x if t not in gone]
    assert set(a.tokens[a.moved]) == set(gone)

@few
@given(own_genes, st.booleans(), hows, st.data())
def test_a_dose_moves_one_gene_the_right_way(own, cls, how, data):
    x, t = np.array([2, *own, 3] if cls else own, dtype=np.int32), data.draw(st.sampled_from(own))
    got = arrange(x, [('Dose', t, how)], cls).tokens.tolist()
    was, now, n = own.index(t), got.index(t) - cls, len(own)
    assert [g for g in got if g != t] == [g for g in x if g != t]
    word, amount = how.split('='); up = word == 'up' or word == 'quartiles' and int(amount) > 0
    assert now <= was if up else now >= was
    if word in ('up', 'down'): assert abs(now - was) == min(round(float(amount)*n), was if up else n - 1 - was)
    elif up and 4*was//n < int(amount): assert now == 0
    elif not up and 4*was//n - int(amount) > 3: assert now == n - 1
    elif n >= 8: assert 4*now//n == 4*was//n - int(amount)

@few
@given(own_genes, st.booleans(), st.data())
def test_what_is_done_at_once_has_no_order(own, cls, data):
    x = np.array([2, *own, 3] if cls else own, dtype=np.int32)
    named = data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=len(own) - 1, unique=True))
    ops = [(a, t, how if a == 'Dose' else '') for t in named for a, how in [data.draw(st.tuples(st.sampled_from(['KO', 'Dose']), hows))]]
    one, other = (arrange(x, o, cls).tokens.tolist() for o in (ops, ops[::-1]))
    assert one == other and set(one) == set(x) - {t for a, t, _ in ops if a == 'KO'}

@few
@given(st.integers(2, 9), st.sampled_from(['KO', 'KO hold', 'OE']), st.booleans(), st.data())
def test_one_gene_at_a_time_is_the_same_all_at_once(n, act, cls, data):
    x = np.array([2, *range(10, 10 + n), 3] if cls else range(10, 10 + n), dtype=np.int32)
    at = sorted(data.draw(st.sets(st.integers(cls, n - 1 + cls), min_size=1)))
    many = singles(x, act, at, x[at], special=cls)
    for i, p in enumerate(at):
        one = arrange(x, [(act[:2], int(x[p]), act[3:])], cls)
        for k in ('tokens', 'positions', 'moved', 'rank', 'lengths', 'cut'): assert getattr(many[i:i+1], k).tolist() == getattr(one, k).tolist(), k

@few
@given(st.lists(st.integers(2, 40), min_size=2, max_size=14, unique=True), st.booleans(), st.data())
def test_the_shared_first_layer_is_the_first_layer(own, hold, data):
    m, x, act = nano(), np.array(own), 'KO hold' if hold else 'KO'
    at = sorted(data.draw(st.sets(st.integers(0, len(own) - 1), min_size=1)))
    got = first_layer(m, x, act, at)
    if at[-1] + 1 - at[0] > 2*len(at): assert got is None; return
    v = singles(x, act, at, at)
    want = m.hidden(v.tokens, np.concatenate([[0], np.cumsum(v.lengths)]), positions=v.positions, layer='last')
    np.testing.assert_allclose(got.detach(), want.detach(), atol=1e-5)

@few
@given(st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 60))
def test_neighbors_and_budget_do_not_matter(toks, budget):
    m, c = nano(), Cells(*ragged(toks))
    alone = np.concatenate([m.encode(c[[i]]) for i in range(len(c))])
    np.testing.assert_allclose(m.encode(c, budget=budget), alone, atol=1e-5)

def nano(made=[]):
    if not made:
        v = Vocabulary([f'G{i}' for i in range(40)], np.ones(40), max_len=16)
        made.append(Geneformer.new('nano', v, num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2))
    return made[0]

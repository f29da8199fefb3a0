"Attention: the sums by hand, what may not matter, tests that rank alone must not pass, heads taken out, sentences"
import copy
import numpy as np, pandas as pd, pytest, torch
from transformers import BertForMaskedLM
from geneformer_nb.attention.received import attention_by_rank, head_map, plant_head, rank_habits, received, watch
from geneformer_nb.attention.network import (beyond_degrees, best_head, edge_auroc, edge_baselines, gene_network, known_edges,
                                             mean_network, others_targets)
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.core import GeneformerError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.attention.heads import ablate, ablation, head_tests, layer_test
from geneformer_nb.model.bert import Geneformer
from sentences import says

names = [f'G{i:02d}' for i in range(30)]
shape = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, initializer_range=.3)

@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'cls'])
def system(request):
    v = Vocabulary(names, np.ones(30), cls=request.param, max_len=40)
    rng, k = np.random.default_rng(0), len(v.specials)
    rows = [rng.permutation(30)[:n] + k for n in (12, 9, 1, 12, 30, 8, 9, 0)]
    if request.param: rows = [np.r_[v.specials['<cls>'], r, v.specials['<eos>']] for r in rows]
    cells = Cells(*ragged(rows), obs=pd.DataFrame(dict(kind=list('aabbabab')), index=[f'c{i}' for i in range(8)]), vocabulary=v, special=request.param)
    return Geneformer.new('nano', v, 0, **shape), cells

def stock_attention(model, cells):
    "All matrices, kept, of the stock eager model: {cell: layers of (heads, n, n)}"
    hf = BertForMaskedLM(copy.deepcopy(model.config)).eval()
    hf.set_attn_implementation('eager')
    hf.load_state_dict(model.hf.state_dict())
    with torch.no_grad():
        return {i: [w[0].double().numpy() for w in hf.bert(torch.tensor(np.array(c.tokens, np.int64))[None], output_attentions=True).attentions]
                for i, c in ((i, cells[i]) for i in range(len(cells))) if len(c)}

def test_received_is_the_sum_of_columns(system):
    model, cells = system
    kept, v, s = stock_attention(model, cells), model.vocabulary, int(model.vocabulary.cls)
    rows = []
    for i, layers in kept.items():
        t, n = cells[i].tokens, len(cells[i])
        for l, w in enumerate(layers):
            for h in range(2):
                for j in range(s, n - s): rows.append((l, h, v.gene(t[j]), w[h, s:n - s, j].sum() * n / (n - 2 * s), j - s))
    want = pd.DataFrame(rows, columns=['layer', 'head', 'gene_id', 'attention', 'rank']).groupby(['layer', 'head', 'gene_id']).agg(
        attention=('attention', 'mean'), rank=('rank', 'mean'), n_cells=('rank', 'size'))
    got = received(model, cells)[0].set_index(['layer', 'head', 'gene_id'])
    pd.testing.assert_frame_equal(got.loc[want.index, ['attention', 'rank', 'n_cells']], want, rtol=1e-5, check_dtype=False)
    assert len(got) == len(want)

def test_what_may_not_matter(system):
    model, cells = system
    order = np.random.default_rng(1).permutation(len(cells))
    for got in (received(model, cells, pairs=1), received(model, cells, budget=7), received(model, cells[order])):
        for a, b in zip(got, received(model, cells)):
            pd.testing.assert_frame_equal(a, b, rtol=1e-5)

def test_groups_are_the_groups_alone(system):
    model, cells = system
    by = received(model, cells, by='kind', bins=5)
    for k in 'ab':
        for a, b in zip(by, received(model, cells[(cells.obs.kind == k).to_numpy()], bins=5)):
            pd.testing.assert_frame_equal(a[a.kind == k].drop(columns='kind').reset_index(drop=True), b, rtol=1e-5)

def test_expected_has_the_mean_of_the_attention(system):
    model, cells = system
    t = received(model, cells, bins=4)[0]
    both = t.groupby(['layer', 'head']).apply(lambda x: pd.Series({c: np.average(x[c], weights=x.n_cells) for c in ('attention', 'expected')}), include_groups=False)
    np.testing.assert_allclose(both.attention, both.expected, rtol=1e-6)

def test_no_more_weights_at_a_time_than_said(system):
    model, cells = system
    sizes, rows = [], []
    watch(model, cells, lambda l, r, t, w: (sizes.append(w.shape[0] * w.shape[-1]**2), rows.extend(r if l == 0 else [])), pairs=200)
    longest = int(cells.lengths.max())**2
    assert max(sizes) <= max(200, longest) and sorted(rows) == list(np.flatnonzero(cells.lengths > 0))

# sets: rank alone must not pass

@pytest.fixture(scope='module')
def world():
    rng, v = np.random.default_rng(0), Vocabulary([f'T{i:03d}' for i in range(300)], np.ones(300), max_len=300)
    level = rng.normal(size=300)
    cells = Cells(*ragged([np.argsort(-(level + rng.normal(0, .7, 300)))[:rng.integers(120, 260)] + 2 for _ in range(80)]), vocabulary=v)
    return v, level, cells

def test_rank_alone_gives_no_matched_finding(world):
    v, level, cells = world
    t = received(plant_head(Geneformer.new('nano', v, num_hidden_layers=1), 1), cells)[0]
    t = t[t['head'] == 1]
    rng, plain, p = np.random.default_rng(0), [], []
    for _ in range(40):
        high = [v.genes[i] for i in np.argsort(-(level + rng.normal(0, .8, 300)))[:60]]
        r = head_tests(t, high).iloc[0]
        plain.append(r.auc); p.append(r.p_matched)
    assert min(plain) > .7
    assert np.mean(np.array(p) < .05) <= .15, np.sort(p)[:9]

def test_planted_head_is_found_both_ways(world):
    v, level, cells = world
    mine = [v.genes[i] for i in np.random.default_rng(3).permutation(300)[:40]]
    r = head_tests(received(plant_head(Geneformer.new('nano', v), 2, mine, .5), cells)[0], mine)
    first = r[r.layer == 0].set_index('head')
    assert first.favors[2] and first.favors_matched[2] and first.auc_matched[2] > .95
    assert first.ratio_matched.idxmax() == 2 and first.ratio_matched.drop(2).max() < 1.1
    small = pd.Series(mine).str.lower()
    pd.testing.assert_frame_equal(head_tests(received(plant_head(Geneformer.new('nano', v), 2, mine, .5), cells)[0], small), r)

def test_p_is_uniform_for_sets_without_meaning(world):
    v, level, cells = world
    t = received(Geneformer.new('nano', v, num_hidden_layers=1, num_attention_heads=2, initializer_range=.3), cells)[0]
    rng = np.random.default_rng(0)
    r = pd.concat([head_tests(t, [v.genes[i] for i in rng.permutation(300)[:40]]) for _ in range(100)])
    for c in ('p', 'p_matched'):
        assert .01 < (r[c] < .05).mean() < .10 and .38 < r[c].mean() < .62
    assert abs(r.auc_matched.mean() - .5) < .02

def test_layers_counted_out():
    from itertools import combinations
    layer = np.repeat([0, 1, 2], 3)
    yes = np.array([1, 0, 0, 1, 0, 0, 0, 1, 0], bool)
    want = np.mean([layer[list(c)].sum() <= layer[yes].sum() for c in combinations(range(9), 3)])
    assert layer_test(pd.DataFrame(dict(layer=layer, favors=yes))).p == pytest.approx(want)
    rng, late = np.random.default_rng(0), pd.DataFrame(dict(layer=np.repeat(range(18), 18), favors=False))
    p = [layer_test(late.assign(favors=np.isin(np.arange(324), rng.permutation(324)[:20]))).p for _ in range(40)]
    assert .3 < np.mean(p) < .7

# heads taken out

def test_ablated_is_zeroed_weights(system):
    model, cells = system
    other, off = copy.deepcopy(model), [(0, 1), (1, 0)]
    with torch.no_grad():
        for l, h in off: other.hf.bert.encoder.layer[l].attention.output.dense.weight[:, h * 16:(h + 1) * 16] = 0
    before = model.encode(cells, layer='last')
    with ablate(model, off): gone = model.encode(cells, layer='last')
    np.testing.assert_allclose(gone, other.encode(cells, layer='last'), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.encode(cells, layer='last'), before)
    assert np.nanmax(np.abs(gone - before)) > 1e-3

def test_ablate_restores_after_an_error(system):
    model, cells = system
    before = model.encode(cells)
    with pytest.raises(KeyError):
        with ablate(model, [(0, 0)]): raise KeyError
    np.testing.assert_array_equal(model.encode(cells), before)
    assert not any(m._forward_pre_hooks for m in model.hf.modules())

def test_ablation_has_none_these_and_others(system):
    model, cells = system
    t = ablation(model, [(0, 0)], dict(first=lambda m: np.nanmean(m.encode(cells)), one=lambda m: 1), draws=9)
    assert list(t.index) == ['none', 'these heads', 'other heads 1', 'other heads 2', 'other heads 3']
    assert list(t.heads) == ['', '0.0', '0.1', '1.0', '1.1'] and (t.one == 1).all()

# pairs

def test_pairs_by_hand(system):
    model, cells = system
    kept, v = stock_attention(model, cells), model.vocabulary
    sources, targets = names[:7], names[3:20]
    for looks in ('target', 'source', 'both'):
        nets, n = gene_network(model, cells, sources, targets, least=2, looks=looks)
        want, many = np.zeros((2, 2, 7, 17)), np.zeros((7, 17))
        for i, layers in kept.items():
            at = {g: j for j, g in enumerate(v.gene(cells[i].tokens))}
            for a, s in enumerate(sources):
                for b, t in enumerate(targets):
                    if s not in at or t not in at: continue
                    many[a, b] += 1
                    for l, w in enumerate(layers):
                        x = dict(target=w[:, at[t], at[s]], source=w[:, at[s], at[t]])
                        want[l, :, a, b] += (x[looks] if looks != 'both' else (x['target'] + x['source']) / 2) * len(cells[i])
        np.testing.assert_array_equal(n, many)
        same = np.equal.outer(sources, targets)
        for (l, h), x in nets.items():
            mean = np.where((many >= 2) & ~same, want[l, h] / np.maximum(many, 1), np.nan)
            np.testing.assert_allclose(x, mean, rtol=1e-4)
    only = gene_network(model, cells, sources, targets, heads=[(1, 1)], least=2, looks='both')[0]
    pd.testing.assert_frame_equal(only[1, 1], nets[1, 1])
    pd.testing.assert_frame_equal(mean_network(nets), sum(nets.values()) / 4)

def test_edges_scored_as_sklearn_does():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    rows, cols = [f's{i}' for i in range(9)], [f't{i}' for i in range(30)]
    truth = pd.DataFrame((rng.random((9, 30)) < .2).astype(float), rows, cols)
    x = pd.DataFrame(rng.integers(0, 6, (9, 30)) + truth.to_numpy(), rows, cols)
    holes = x.mask(pd.DataFrame(rng.random((9, 30)) < .1, rows, cols))
    t = edge_auroc(dict(x=x, holes=holes), truth)
    ok = holes.notna().to_numpy()
    assert t.auroc['x'] == pytest.approx(roc_auc_score(truth.to_numpy()[ok], x.to_numpy()[ok])) == pytest.approx(t.auroc['holes'])
    own = [roc_auc_score(truth.to_numpy()[i][ok[i]], x.to_numpy()[i][ok[i]]) for i in range(9) if 0 < truth.to_numpy()[i][ok[i]].sum()]
    assert t.within['x'] == pytest.approx(np.mean(own)) and t.sources['x'] == len(own)
    assert t.ci_low['x'] < t.within['x'] < t.ci_high['x']

def test_a_head_chosen_among_coins_is_a_coin():
    rng = np.random.default_rng(0)
    rows, cols = [f's{i}' for i in range(10)], [f't{i}' for i in range(30)]
    frame = lambda: pd.DataFrame(rng.random((10, 30)), rows, cols)
    out = pd.concat([best_head({(0, h): frame() for h in range(24)}, (frame() < .2).astype(float), seed=s) for s in range(10)])
    assert out.chosen.mean() > .58 and abs(out.area.mean() - .5) < .03

def test_degrees_explain_what_only_degrees_made():
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2, 1, 12), rng.gamma(2, 1, 40)
    x = pd.DataFrame(np.outer(a, b)).mask(pd.DataFrame(rng.random((12, 40)) < .2))
    assert np.nanmax(np.abs(beyond_degrees(x, 200))) < 1e-6 and beyond_degrees(x).isna().equals(x.isna())

# sentences

def test_errors_are_sentences(system, world):
    model, cells = system
    v, level, many = world
    t, ranks = received(model, cells)
    edges = pd.DataFrame([[1., 0.], [0., 1.]], ['a', 'b'], ['c', 'd'])
    assert list(edge_auroc({(0, 1): edges}, edges).index) == ['head 0.1']  # as `gene_network` names them
    bad = Cells(*ragged([[], []]), vocabulary=model.vocabulary, special=model.vocabulary.cls)
    for f, text in [
        (lambda: received(model, many), 'vocabulary'),
        (lambda: received(model, bad), 'There is no attention to read'),
        (lambda: received(model, cells[:0]), 'There is no attention to read'),
        (lambda: received(model, 'cells'), 'tokenize'),
        (lambda: received(model, cells, by='donor'), "no column 'donor'"),
        (lambda: received(model, cells, bins=0), 'bins=0'),
        (lambda: head_tests(t, ['FOO'], least=1), 'No gene of the set'),
        (lambda: head_tests(t, ['FOO'], vocabulary=model.vocabulary), 'not in the vocabulary'),
        (lambda: head_tests(t, names, least=1), 'the set holds all genes'),
        (lambda: head_tests(t, []), 'holds no gene'),
        (lambda: head_tests(received(model, cells, by='kind')[0], names[:3]), 'several groups'),
        (lambda: rank_habits(received(model, cells, by='kind')[1]), 'several groups'),
        (lambda: attention_by_rank(received(model, cells, by='kind')[1]), 'several groups'),
        (lambda: head_map(t), 'auc'),
        (lambda: ablation(model, [(0, 0)] * 2 + [(1, 0), (0, 1)], {}), 'too few others'),
        (lambda: ablate(model, [(2, 0)]).__enter__(), 'no head 0 in layer 2'),
        (lambda: ablate(model, 'all').__enter__(), 'pairs (layer, head)'),
        (lambda: gene_network(model, cells, ['FOO'], names), 'not in the vocabulary'),
        (lambda: edge_auroc(dict(x=pd.DataFrame([[1.]], ['a'], ['b'])), pd.DataFrame([[1.]], ['a'], ['b'])), 'an area needs some of both'),
        (lambda: known_edges(pd.DataFrame(dict(source=['a'], target=['b'])), cells), 'No regulator'),
        (lambda: plant_head(model, 9), 'no head 9'),
        (lambda: head_tests((t, ranks), names[:3]), 'pass the first'),
        (lambda: rank_habits((t, ranks)), 'pass the second'), (lambda: rank_habits(t), 'pass the second'),
        (lambda: layer_test(head_tests(t, names[:9], least=1), 'fdr'), 'true or false'),
        (lambda: ablate(model, [(.7, 1.9)]).__enter__(), 'pairs (layer, head)'), (lambda: ablate(model, ['00']).__enter__(), 'pairs (layer, head)'),
        (lambda: ablate(model, pd.DataFrame(dict(layer=[0]))).__enter__(), 'head is not there'),
        (lambda: edge_auroc(edges, edges), 'give it a name'), (lambda: edge_auroc(dict(x=edges), -edges), 'holds -1'),
        (lambda: others_targets(2*edges), 'holds 2'), (lambda: edge_auroc(dict(x=edges), edges, draws=0), 'draws=0'),
        (lambda: edge_auroc(dict(x=edges), edges.rename(index=str.upper)), 'both by symbol'), (lambda: best_head({(0, 0): edges}, edges, measure='auc'), "'within'"),
        (lambda: edge_baselines(cells, names[0], names, Geneformer.new('nano', v, 0, **shape)), 'another vocabulary')]:
        with says(GeneformerError, text): f()

def test_a_model_that_does_not_show_its_attention(system):
    model, cells = system
    other = copy.deepcopy(model)
    other.hf.set_attn_implementation('sdpa')
    with pytest.raises(GeneformerError, match="runs as 'sdpa'"): received(other, cells)
    with pytest.raises(GeneformerError, match='not BertForMaskedLM'): received(model.hf, cells)
    with pytest.raises(GeneformerError, match='not BertForMaskedLM'): gene_network(model.hf, cells, names, names)

"Predicted against true knock-outs: scores by hand, what may not matter, sentences"
import numpy as np, pandas as pd, pytest, torch
from geneformer_nb.data.cells import Cells
from geneformer_nb.core import GeneformerError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.perturb.readouts import (guess_scores, knockout_baselines, knockout_scores, like_genes, other_knockouts, score_knockouts,
                                 score_table, specific)
from geneformer_nb.model.bert import Geneformer
from geneformer_nb.perturb.actions import KO, each, perturb
from sentences import says

names = [f'G{i:02d}' for i in range(12)]

@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'cls'])
def system(request):
    v = Vocabulary(names, np.ones(12), cls=request.param, max_len=16)
    rng, k = np.random.default_rng(0), len(v.specials)
    rows = [rng.permutation(12)[:n] + k for n in (12, 9, 7, 12, 10, 8)]
    if request.param: rows = [np.r_[v.specials['<cls>'], r, v.specials['<eos>']] for r in rows]
    cells = Cells(np.concatenate(rows).astype(np.int32), np.cumsum([0] + [len(r) for r in rows]), vocabulary=v, special=request.param)
    return Geneformer.new('nano', v, 0, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, initializer_range=.2), cells

@pytest.mark.parametrize('ranks', ['shift', 'hold'])
def test_scores_are_those_of_perturb(system, ranks):
    model, cells = system
    s = knockout_scores(model, cells, ranks=ranks, least=1)
    raw, per = perturb(model, cells, each('detected', KO, ranks=ranks), affected=True, show=False)
    k = len(model.vocabulary.specials)
    per = per.assign(moved=1 - per.cosine.astype(float), gene=[model.vocabulary.genes[t - k] for t in per.affected],
                     knocked=raw.gene_id.astype(str).to_numpy()[per.row])
    per['moved'] /= per.groupby('row').moved.transform('mean')
    by_hand = per.groupby(['knocked', 'gene']).moved.mean().unstack().reindex(index=s.index, columns=s.columns)
    np.testing.assert_allclose(s, by_hand, rtol=1e-5)
    assert np.isnan(np.diag(s.loc[names, names])).all()
    pd.testing.assert_frame_equal(knockout_scores(model, cells, ['G03'], ranks=ranks, least=1), s.loc[['G03']], rtol=1e-4)

def test_many_genes_do_not_overflow():
    v = Vocabulary([f'G{i:03d}' for i in range(100)], np.ones(100), max_len=100)
    k = len(v.specials)
    cells = Cells(np.tile(np.arange(100) + k, 2).astype(np.int32), [0, 100, 200], vocabulary=v)
    s = knockout_scores(Geneformer.new('nano', v, 0, num_hidden_layers=1, hidden_size=16, num_attention_heads=1), cells, layer='last', least=1)
    assert s.shape == (100, 100) and s.notna().sum().sum() == 9900

@pytest.mark.parametrize('ranks', ['shift', 'hold'])
def test_guesses_by_hand(system, ranks):
    model, cells = system
    v, x = model.vocabulary, cells[0].tokens.astype(np.int64)
    k, front = len(v.specials), int(v.cls)
    one = cells[:1]
    s = guess_scores(model, one, ranks=ranks, share=1e-9 + 1 / 12, least=1)  # one gene hidden at a time
    hid, gone = front + 4, front + 2
    shown = x.copy()
    shown[hid] = v.specials['<mask>']
    rest = np.delete(np.arange(len(x)), gone)
    with torch.inference_mode():
        def p(t, pos, at):
            h = model.hidden(t, [0, len(t)], positions=pos, layer='last')
            return model.hf.cls(h[[at]]).float()[0, k:].log_softmax(-1)[x[hid] - k].item()
        want = p(shown, None, hid) - p(shown[rest], rest if ranks == 'hold' else None, hid - 1)
    got = s.loc[v.genes[x[gone] - k], v.genes[x[hid] - k]]
    assert abs(got - want) < 1e-5 and s.notna().sum().sum() == 12 * 11

def test_a_model_that_sees_no_neighbors_answers_nothing(system):
    model, cells = system
    import copy
    blind = copy.deepcopy(model)
    blind.hidden = lambda t, o, positions=None, layer=None: model.hf.bert.embeddings.word_embeddings(torch.as_tensor(t).long())
    assert np.nanmax(np.abs(guess_scores(blind, cells, least=1))) < 1e-5

def frame(x, rows='abc', columns=None): return pd.DataFrame(np.asarray(x, float), list(rows), list(rows if columns is None else columns))

def test_specific_leaves_nothing_of_a_gene_that_always_moves():
    s = frame(np.outer([1, 1, 1], [1, 5, 9]))
    np.fill_diagonal(s.values[:], np.nan)
    assert np.allclose(specific(s).to_numpy()[~np.isnan(s.to_numpy())], 0)

def test_scores_and_their_table():
    truth = frame([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], 'abc', 'abcd')
    t = score_knockouts({'right': truth, 'wrong': -truth, 'flat': truth * 0}, truth)
    assert t.groupby('method').score.mean().to_dict() == {'right': 1, 'wrong': 0, 'flat': .5}
    assert set(t.knocked) == {'a', 'b'}, 'c has no target'
    table = score_table(pd.concat([t, t]))
    assert table.n.eq(2).all() and table.loc['right', ['ci_low', 'ci_high']].tolist() == [1, 1]
    with says(GeneformerError, "'auc' or 'rho'"): score_knockouts({}, truth, 'mse')

def test_baselines():
    rng = np.random.default_rng(0)
    a = rng.poisson(20, 400)
    x = np.c_[a, a * 2, rng.poisson(20, 400), np.full(400, 60)]
    b = knockout_baselines(x, 'abcd', axes=2)
    assert set(b) == {'no change', 'mean expression', 'correlation', 'linear on PCA'}
    assert b['correlation'].loc['a', 'b'] > .9 and b['correlation'].loc['a', 'b'] > b['correlation'].loc['a', 'c']
    assert b['linear on PCA'].loc['a', 'b'] < 0 and np.isfinite(b['linear on PCA']).all().all()
    with says(GeneformerError, '3 ids', '4 columns'): knockout_baselines(x, 'abc')

def test_neighbors_and_others():
    s = frame(np.arange(16).reshape(4, 4), 'abcd')
    level = pd.Series([1., 2, 10, 11], list('abcd'))
    assert like_genes(s, level, near=1).iloc[:, 0].tolist() == [4, 0, 4, 8]
    o = other_knockouts(s)
    assert o.loc['a', 'b'] == np.mean([9, 13]) and o.loc['d', 'a'] == np.mean([4, 8])

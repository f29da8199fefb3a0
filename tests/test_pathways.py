"Enrichment and drugs: against hand computations, bad input, and what must not change the answer"
import importlib.util, sys
import numpy as np, pandas as pd, pytest
from scipy.stats import fisher_exact
from geneformer_nb.data import toy
from geneformer_nb.core import GeneformerError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.screen.drugs import actions, drug_plan, drug_scores, read_drugs
from geneformer_nb.screen.pathways import enrich, enrichment_plot, gene_sets, read_gmt, running_sum
from geneformer_nb.perturb.actions import ActionPlan
from sentences import says

needs_decoupler = pytest.mark.skipif(not importlib.util.find_spec('decoupler'), reason="decoupler is not installed: pip install 'geneformer_nb[bio]'")

@pytest.fixture
def screen():
    "A result table of 300 genes in two directions, and 25 random sets"
    rng = np.random.default_rng(0)
    names = [f'G{i}' for i in range(300)]
    t = pd.concat([pd.DataFrame(dict(symbol=names, gene_id=[f'ENS{n}' for n in names], kind=k, donor='all', state='goal', cell_type='all',
                                     shift=rng.normal(size=300), null_shift=rng.normal(0, .1, 300))) for k in ('KO', 'OE')], ignore_index=True)
    return t, {f'S{i}': list(rng.choice(names + ['OUT1', 'OUT2'], 20 + i, replace=False)) for i in range(25)}

@needs_decoupler
def test_ora_is_fishers_test_on_the_screened_genes(screen):
    t, sets = screen
    got = enrich(t, sets, top=40).set_index(['direction', 'set'])
    for kind in ('KO', 'OE'):
        own = t[t.kind == kind]
        score = (own['shift'] - own.null_shift).set_axis(own.symbol)
        best = set(score.nlargest(40).index)
        for name, genes in sets.items():
            here = set(genes) & set(score.index)
            a = len(here & best)
            p = fisher_exact([[a, len(here) - a], [40 - a, 300 - len(here) - 40 + a]], alternative='greater')[1]
            r = got.loc[kind, name]
            assert np.isclose(r.p, p) and r.n_top == a and r.n_screened == len(here) and r.n_set == len(genes) and r.n_background == 300
            assert set(filter(None, r.genes.split(', '))) == here & best
            assert np.isclose(r.odds_ratio, (a + .5)*(300 - len(here) - 40 + a + .5)/((len(here) - a + .5)*(40 - a + .5)))

def walked(score, genes):
    "Enrichment score and leading edge with a plain loop"
    order, at, best, edge = score.sort_values(ascending=False), 0., 0., 0
    total = score[score.index.isin(genes)].abs().sum()
    for i, (g, x) in enumerate(order.items()):
        at += abs(x)/total if g in genes else -1/(len(score) - len(genes))
        if abs(at) > abs(best): best, edge = at, i
    side = order.index[:edge + 1] if best > 0 else order.index[edge + 1:]
    return best, set(side) & set(genes)

@needs_decoupler
def test_gsea_is_the_running_sum(screen):
    t, sets = screen
    got = enrich(t, sets, how='gsea', times=200).set_index(['direction', 'set'])
    own = t[t.kind == 'OE']
    score = (own['shift'] - own.null_shift).set_axis(own.symbol)
    for name, genes in sets.items():
        here = [g for g in genes if g in score.index]
        es, edge = walked(score, here)
        r = got.loc['OE', name]
        assert np.isclose(r.es, es) and set(r.genes.split(', ')) == edge and r.n_top == len(edge)
        assert np.sign(r.nes) == np.sign(r.es)
    assert got.p.between(1/201, 1).all()
    x = np.sort(score)[::-1]
    assert np.isclose(np.abs(running_sum(x, np.arange(300) < 10)).max(), 1)

@needs_decoupler
def test_p_is_even_where_there_is_nothing(screen):
    "False alarms of both ways over random sets and random scores"
    rng = np.random.default_rng(1)
    _, sets = screen
    for how, wide in (('ora', .12), ('gsea', .12)):
        p = np.concatenate([enrich(pd.Series(rng.normal(size=300), [f'G{i}' for i in range(300)]), sets, how=how, top=40, times=100).p for _ in range(8)])
        assert (p < .05).mean() < wide, how

@needs_decoupler
@pytest.mark.parametrize('how', ['ora', 'gsea'])
def test_order_names_and_seed(screen, how):
    t, sets = screen
    kw = dict(how=how, top=40, times=100)
    one = enrich(t, sets, **kw)
    pd.testing.assert_frame_equal(one, enrich(t.sample(frac=1, random_state=3), sets, **kw))
    pd.testing.assert_frame_equal(one, enrich(t, gene_sets(sets).sample(frac=1, random_state=3), **kw))
    pd.testing.assert_frame_equal(one, enrich(t, {k: [g.lower() for g in v] for k, v in sets.items()}, **kw))
    more = pd.concat([t, t.assign(donor='D1', shift=9.), t.assign(gene_id='A+B', shift=9.), t.assign(kind='drug', shift=9.)])
    pd.testing.assert_frame_equal(one, enrich(more, sets, **kw))
    np.testing.assert_allclose(enrich(t.assign(score=(t['shift'] - t.null_shift)*7), sets, **kw).p, one.p)
    if how == 'gsea': assert not np.allclose(enrich(t, sets, seed=1, **kw).p.sort_index(), one.p)

@needs_decoupler
def test_planted_drivers_come_first():
    truth = toy.toy_network(600)
    regulons = truth.edges.assign(source=truth.edges.source.map(truth.genes.symbol), target=truth.edges.target.map(truth.genes.symbol))
    got = enrich(toy.true_effects(truth, start='dilated'), regulons, top=8)
    first = got.groupby('direction')['set'].first()
    want = truth.drivers[truth.drivers.disease == 'dilated'].set_index('direction').symbol
    assert first['OE'] == want['lost'] and first['KO'] == want['activated']

@needs_decoupler
def test_nothing_goes_the_right_way(screen):
    t, sets = screen
    got = enrich(t.assign(shift=-1. - t['shift'].abs(), null_shift=0.), sets, top=40)
    assert (got.p == 1).all() and (got.n_top == 0).all()

def test_without_decoupler(screen, monkeypatch):
    t, sets = screen
    monkeypatch.setitem(sys.modules, 'decoupler', None)
    for how in ('ora', 'gsea'):
        with says(GeneformerError, "pip install 'geneformer_nb[bio]'"): enrich(t, sets, how=how, top=40)
    assert len(gene_sets(sets)) and len(drug_scores(t, pd.DataFrame(dict(drug='x', target=['G1'], action=['inhibit'])), times=10))

@pytest.mark.parametrize('text,word', [(b'', 'empty'), (b'\n\n', 'empty'), (b'gene,set\nA,B\n', 'Line 1'), (b'A\tx\tG\nB\tx\n', 'Line 2'), (b'A\tx\tG\nA\tx\tH\n', 'second time'),
                                       (b'\x89PNG\r\n\x1a\n\xff', 'no text')])
def test_no_gmt(tmp_path, text, word):
    (tmp_path/'a.gmt').write_bytes(text)
    with says(GeneformerError, word, 'a.gmt'): read_gmt(tmp_path/'a.gmt')

def test_gmt_with_blanks_and_weights(tmp_path):
    (tmp_path/'a.gmt').write_text('Folate biosynthesis\tHomo sapiens (human)\tG1,1.0\tG2\t\t\nB\t\tG1\r\n')
    assert read_gmt(tmp_path/'a.gmt').values.tolist() == [['Folate biosynthesis', 'G1', 1.], ['Folate biosynthesis', 'G2', 1.], ['B', 'G1', 1.]]

def test_bad_questions(screen):
    t, sets = screen
    with says(GeneformerError, 'collectri'): enrich(t, 'reactome')
    with says(GeneformerError, 'state='): enrich(pd.concat([t, t.assign(state='other')]), sets)
    with says(GeneformerError, 'cell_type='): enrich(t, sets, cell_type='fibroblast')
    with says(GeneformerError, 'symbol'): enrich(t.drop(columns='symbol'), sets)
    with says(GeneformerError, 'smaller top'): enrich(t, sets, top=300)
    with says(GeneformerError, 'min_size'): enrich(t, sets, min_size=0)
    with says(GeneformerError, 'nobody'): enrich(t, sets, by='nobody')
    with says(GeneformerError, 'matched by symbol'): enrich(t, {'A': ['ENSG01', 'ENSG02']})
    with says(GeneformerError, 'without rows'): enrich(t.iloc[:0], sets)
    with says(GeneformerError, 'set'): enrichment_plot(t)

def drugs(*rows): return pd.DataFrame(rows, columns=['Drug', 'Target', 'Action'])

@pytest.mark.parametrize('rows,words', [([('a', 'G1', 'agonist'), ('a', 'G2', 'modulator')], ('Row 2', 'modulator')), ([('a', None, 'agonist')], ('Row 1', 'target')),
                                        ([('a', 'G1', 'agonist'), ('a', 'g1', 'blocker')], ('both',)), ([], ('no rows',))])
def test_bad_drugs(rows, words):
    with says(GeneformerError, *words): read_drugs(drugs(*rows))

def test_drug_scores_by_hand(screen, tmp_path):
    t, _ = screen
    table = drugs(('a', 'G1', 'Inhibitor'), ('a', 'g2', 'positive allosteric modulator'), ('b', 'ENSG3', 'BLOCKER'), ('b', 'NOPE', 'agonist'), ('c', 'NOPE', 'agonist'))
    got = drug_scores(t, table, times=500).set_index('drug')
    x = (t['shift'] - t.null_shift).set_axis(pd.MultiIndex.from_arrays([t.kind, t.symbol]))
    assert np.isclose(got.score['a'], (x['KO', 'G1'] + x['OE', 'G2'])/2) and np.isclose(got.score['b'], x['KO', 'G3'])
    assert got.n_screened.to_dict() == dict(a=2, b=1, c=0) and got.n_targets.to_dict() == dict(a=2, b=2, c=1)
    assert np.isnan(got.p['c']) and np.isnan(got.score['c']) and 'NOPE not screened' in got.targets['b']
    assert abs(got.p['b'] - (x['KO'] >= x['KO', 'G3']).mean()) < .08
    table.to_csv(tmp_path/'d.csv', index=False)
    again = drug_scores(t.sample(frac=1, random_state=0), tmp_path/'d.csv', times=500).set_index('drug')
    pd.testing.assert_frame_equal(got, again)
    pd.testing.assert_frame_equal(got.drop(columns='fdr'), drug_scores(t, table.sample(frac=1, random_state=0), times=500).set_index('drug').drop(columns='fdr'))
    alone = drug_scores(t, table[table.Drug == 'a'], times=500)
    assert alone.p[0] == got.p['a'] # a drug's p does not depend on the others
    with says(GeneformerError, 'no rows of kind'): drug_scores(t, table, inhibit='Dose down=0.5', activate='Dose up=0.5')

def test_best_drug_is_rare_and_worst_is_not(screen):
    t, _ = screen
    x = (t['shift'] - t.null_shift).set_axis(t.symbol)[(t.kind == 'KO').to_numpy()]
    got = drug_scores(t, drugs(('good', x.idxmax(), 'inhibitor'), ('bad', x.idxmin(), 'inhibitor')), times=300)
    assert got.drug.tolist() == ['good', 'bad'] and got.p[0] < .02 and got.p[1] == 1

def test_plan(capsys):
    v = Vocabulary(['ENSG1', 'ENSG2', 'ENSG3'], [1., 1, 1], symbols=dict(ENSG1='A', ENSG2='B'), aliases=dict(A='ENSG1', B='ENSG2', OLDA='ENSG1'))
    plan = drug_plan(drugs(('x', 'A', 'inhibitor'), ('x', 'OLDA', 'blocker'), ('x', 'B', 'agonist'), ('x', 'Z', 'agonist'), ('y', 'Z', 'agonist')), v)
    assert [repr(p) for p in plan] == ['x'] and [(o.act, o.gene) for o in plan[0].ops] == [('KO', 'A'), ('OE', 'B')]
    said = capsys.readouterr().out
    assert 'Z of x' in said and 'Left without a target: y' in said
    ActionPlan(plan, v)
    with says(GeneformerError, 'two names'): drug_plan(drugs(('x', 'A', 'inhibitor'), ('x', 'OLDA', 'agonist')), v)
    with says(GeneformerError, 'None of'): drug_plan(drugs(('x', 'Z', 'inhibitor')), v, say=None)

def test_words_of_actions_are_distinct():
    assert not set(actions['inhibit']) & set(actions['activate'])

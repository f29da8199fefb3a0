"Statistics: type-I error, planted genes, equality with plain loops, on made-up raw tables"
import numpy as np, pandas as pd, pytest
from scipy.stats import ranksums, ttest_1samp
from geneformer_nb.core import GeneformerError
from geneformer_nb.perturb.stats import columns, goal_state_shift, mixture_model, rank_sums, summarize, vs_null

def made_up(genes=80, donors=6, cells=15, planted=(), seed=0, drift=.0):
    rng = np.random.default_rng(seed)
    c, g = np.divmod(np.arange(donors*cells*genes), genes)
    x = rng.normal(0, .01, (donors, genes))[c//cells, g] + rng.normal(0, .02, len(c)) + drift*np.linspace(-1, 1, genes)[g]
    x += .05*np.isin(g, planted)
    raw = pd.DataFrame(dict(cell=c, kind='KO', perturbation=[f'KO(G{i})' for i in g], gene_id=[f'G{i}' for i in g],
                            cosine=1 - np.abs(x), shift_goal=x))
    obs = pd.DataFrame(dict(donor=[f'D{i//cells}' for i in range(donors*cells)]))
    return raw[rng.random(len(raw)) < .7].reset_index(drop=True), obs

def test_equal_to_scipy_on_ties_and_rare_groups():
    rng = np.random.default_rng(0)
    x, g = rng.integers(0, 9, 500).astype(float), rng.integers(0, 40, 500)
    t = rank_sums(x, g)
    for k in t.index: assert np.isclose(t.p[k], ranksums(x[g == k], x[g != k]).pvalue, rtol=1e-12)
    t = rank_sums(x, g, pool=x[:300])
    for k in t.index: assert np.isclose(t.p[k], ranksums(x[:300], x[g == k]).pvalue, rtol=1e-12)

def test_official_sampling_is_pythons():
    import random
    rng = np.random.default_rng(1)
    n = 120_000
    raw = pd.DataFrame(dict(cell=0, kind='KO', perturbation=np.repeat(['a', 'b', 'c'], n//3), gene_id='x', shift_goal=rng.normal(size=n)))
    random.seed(42)
    pool = random.sample(raw.shift_goal.tolist(), 100_000)
    got = goal_state_shift(raw, 'goal', official=True).set_index('perturbation')
    for k in 'abc': assert np.isclose(got.p[k], ranksums(pool, raw.shift_goal[raw.perturbation == k]).pvalue, rtol=1e-9)

def test_donor_level_keeps_alpha_and_cell_level_does_not():
    runs = [made_up(seed=s) for s in range(30)]
    by_donor = np.concatenate([summarize(r, o, donor='donor').p for r, o in runs])
    by_cell = np.concatenate([goal_state_shift(r, 'goal').p for r, _ in runs])
    assert .035 < (by_donor < .05).mean() < .065
    assert (by_cell < .05).mean() > .15

@pytest.mark.parametrize('moderated', [False, True])
def test_planted_genes_are_found(moderated):
    raw, obs = made_up(planted=(3, 40), donors=8)
    t = summarize(raw, obs, donor='donor', moderated=moderated)
    assert list(t) == columns and set(t.gene_id[t.fdr < .05]) == {'G3', 'G40'}
    assert ((t.ci_low < t['shift']) & (t['shift'] < t.ci_high)).all()

def test_summarize_by_hand():
    raw, obs = made_up(genes=10, drift=.02)
    raw['rank'] = raw.gene_id.str[1:].astype(int)
    t = summarize(raw, obs, donor='donor').set_index('gene_id')
    m = raw.assign(d=obs.donor.to_numpy()[raw.cell]).pivot_table(index='gene_id', columns='d', values='shift_goal')
    for g in m.index: # ten genes are all near: the null of a gene is the middle three of the nine others
        rest = m.drop(g)
        null = rest.loc[rest.mean(axis=1).sort_values().index[3:6]].mean()
        assert np.isclose(t.null_shift[g], null.mean()) and np.isclose(t['shift'][g], m.loc[g].mean())
        assert np.isclose(t.p[g], ttest_1samp(m.loc[g] - null, 0).pvalue)
        assert np.isclose(t.ci_high[g], ttest_1samp(m.loc[g], 0).confidence_interval().high)

def test_matching_removes_a_drift_with_rank():
    raw, obs = made_up(genes=200, drift=.05)
    rank = {f'G{i}': i for i in range(200)}
    t = summarize(raw, obs, donor='donor', rank=rank)
    blind = summarize(raw, obs, donor='donor', rank={g: (i*7919) % 200 for g, i in rank.items()})
    assert (t.p < .05).mean() < .35 < (blind.p < .05).mean()
    assert np.corrcoef(t['shift'], t.null_shift)[0, 1] > .8

def test_order_of_rows_does_not_matter():
    raw, obs = made_up(planted=(5,))
    a, b = (summarize(r, obs, donor='donor').sort_values('gene_id', ignore_index=True)
            for r in (raw, raw.sample(frac=1, random_state=0).reset_index(drop=True)))
    pd.testing.assert_frame_equal(a, b)
    raw.index = np.arange(len(raw))[::-1] # nor does its index
    pd.testing.assert_frame_equal(a, summarize(raw, obs, donor='donor').sort_values('gene_id', ignore_index=True))

def test_categories_are_as_good_as_strings():
    raw, obs = made_up(planted=(5,))
    cat = raw.astype(dict(kind=pd.CategoricalDtype(['KO', 'OE']), perturbation='category', gene_id='category'))
    for f in (lambda r: summarize(r, obs, donor='donor'), lambda r: goal_state_shift(r, 'goal'), mixture_model,
              lambda r: vs_null(r[r.cell < 40], r[r.cell >= 40])):
        pd.testing.assert_frame_equal(f(raw), f(cat))

def test_mixture_does_not_depend_on_the_seed():
    raw, _ = made_up(planted=range(15))
    got = {tuple(mixture_model(raw, seed=s).sort_values('gene_id').impact) for s in range(6)}
    assert len(got) == 1 and mixture_model(raw).query('impact == 1')['shift'].max() < mixture_model(raw).query('impact == 0')['shift'].min()

def test_one_group_is_told():
    with pytest.warns(UserWarning, match='One group'): mixture_model(made_up()[0], 'goal')

def test_sentences():
    raw, obs = made_up(genes=5, donors=2)
    for call in (lambda: goal_state_shift(raw, 'sick'), lambda: goal_state_shift(raw[:0], 'goal'),
                 lambda: goal_state_shift(raw.drop_duplicates('gene_id'), 'goal'),
                 lambda: goal_state_shift(raw.assign(shift_goal=np.nan), 'goal'), lambda: vs_null(raw, raw[:0]),
                 lambda: summarize(raw, obs, donor='who'), lambda: summarize(raw, obs[:2], donor='donor'),
                 lambda: summarize(raw.drop(columns='kind'), obs)):
        with pytest.raises(GeneformerError) as e: call()
        assert str(e.value).endswith('.') and '\n' not in str(e.value)

def test_dictionary_of_the_page_is_that_of_the_code():
    "names, order, meanings and units of the markdown table in the notebook, and the sentence on the sign"
    import json
    from pathlib import Path
    from geneformer_nb.perturb.stats import meanings, sign
    nb = json.loads((Path(__file__).resolve().parent.parent/'nbs/31_stats.ipynb').read_text(encoding='utf-8'))
    page = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown' and '| name | meaning | unit |' in ''.join(c['source'])]
    assert len(page) == 1 and sign in page[0]
    rows = [[x.strip() for x in l.strip('| ').split(' | ')] for l in page[0].splitlines() if l.startswith('| `')]
    assert [(n.strip('`'), m, u) for n, m, u in rows] == [(n, *mu) for n, mu in meanings.items()]
    assert columns == list(meanings) == list(summarize(*made_up(genes=12), donor='donor'))

def test_the_sign():
    "Delete the gene that a state is made by deleting: the shift towards that state is positive, and away from the cell as it was"
    from geneformer_nb.data.cells import Cells, ragged
    from geneformer_nb.data.vocabulary import Vocabulary
    from geneformer_nb.model.bert import Geneformer
    from geneformer_nb.perturb.actions import KO, perturb
    from geneformer_nb.data.tokenizer import tokenize
    from geneformer_nb.data.toy import simulate
    from geneformer_nb.perturb.stats import sign
    assert sign == 'A positive shift is a move towards the state, and a negative one is a move away from it.'
    adata = simulate(n_cells=12, n_genes=60, seed=0)
    v = Vocabulary.from_counts(adata, symbols='symbol', name='toy', max_len=64)
    cells, model = tokenize(adata, v), Geneformer.new('nano', v, initializer_range=.25)
    gene = int(cells[0].tokens[0])
    without = Cells(*ragged([np.setdiff1d(cells[0].tokens, [gene], assume_unique=True)]), cells.obs[:1], vocabulary=v)
    states = dict(without=model.encode(without, show=False)[0], before=model.encode(cells[:1], show=False)[0])
    t = summarize(perturb(model, cells[:1], KO(v.gene(gene)), states=states)).set_index('state')
    assert t['shift']['without'] > 0 > t['shift']['before']

def test_pairs_are_matched_with_pairs():
    "A partner with an effect of its own must not become the null of genes that do nothing"
    raw, obs = made_up(genes=40, donors=8)
    pair = raw.assign(shift_goal=raw.shift_goal + .2, perturbation=raw.perturbation + ' + KO(P)', gene_id=raw.gene_id + '+P')
    both = pd.concat([raw, pair], ignore_index=True)
    alone, joint = summarize(raw, obs, donor='donor'), summarize(both, obs, donor='donor')
    one = joint[~joint.gene_id.str.contains('+', regex=False)].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, alone)
    assert (joint.p < .05).mean() < .12 and np.allclose(joint['shift'].max(), .2, atol=.05)

def test_matched_on_rank_and_detection():
    "A shift that hangs on detection alone, where rank says nothing of it"
    rng = np.random.default_rng(0)
    genes, donors, cells = 240, 8, 24
    c, g = np.divmod(np.arange(donors*cells*genes), genes)
    seen, rank = np.linspace(.2, 1, genes), rng.permutation(genes)
    keep = rng.random(len(c)) < seen[g]
    c, g = c[keep], g[keep]
    x = .1*seen[g] + rng.normal(0, .01, (donors, genes))[c//cells, g] + rng.normal(0, .02, len(c))
    raw = pd.DataFrame(dict(cell=c, kind='KO', perturbation='x', gene_id=[f'G{i:03d}' for i in g], rank=rank[g], cosine=.9, shift_goal=x))
    raw['perturbation'] = 'KO(' + raw.gene_id + ')'
    obs = pd.DataFrame(dict(donor=[f'D{i//cells}' for i in range(donors*cells)]))
    t = summarize(raw, obs, donor='donor').set_index('gene_id')
    assert (t.p < .05).mean() < .12 and np.corrcoef(t.null_shift, t['shift'])[0, 1] > .9
    full = raw[['gene_id', 'rank']].drop_duplicates('gene_id') # as activations: every cell, and rank -1 where the gene is not
    grid = pd.MultiIndex.from_product([range(donors*cells), full.gene_id], names=['cell', 'gene_id'])
    oe = raw.set_index(['cell', 'gene_id']).reindex(grid).reset_index()
    oe = oe.assign(rank=oe['rank'].fillna(-1), kind='OE', perturbation='OE(' + oe.gene_id + ')', cosine=.9,
                   shift_goal=.1*seen[oe.gene_id.str[1:].astype(int)] + rng.normal(0, .02, len(oe)))
    u = summarize(oe, obs, donor='donor').set_index('gene_id')
    assert np.corrcoef(u.null_shift, u['shift'])[0, 1] > .9

def test_hits_do_not_make_losers_of_their_neighbors():
    raw, obs = made_up(genes=100, donors=12, planted=range(0, 100, 10))
    raw['rank'] = raw.gene_id.str[1:].astype(int)
    t = summarize(raw, obs, donor='donor')
    hit = t.gene_id.str[1:].astype(int) % 10 == 0
    assert (t.fdr[hit] < .05).all() and (t.fdr[~hit] < .05).sum() <= 2 and (t.p[~hit] < .05).mean() < .1

def test_mixed_is_the_model_of_statsmodels():
    import warnings
    import statsmodels.api as sm
    raw, obs = made_up(genes=3, donors=6, cells=12)
    raw = raw[(raw.cell % 12 < 3 + 2*(raw.cell//12)) & (raw.gene_id == 'G1')].reset_index(drop=True) # uneven
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t = summarize(raw, obs, donor='donor', how='mixed').iloc[0]
        m = sm.MixedLM(raw.shift_goal, np.ones((len(raw), 1)), groups=obs.donor.to_numpy()[raw.cell]).fit(reml=True)
    n = raw.groupby(raw.cell//12).size()
    se = np.sqrt(m.scale/(n/(1 + n*float(np.asarray(m.cov_re).ravel()[0]/m.scale))).sum())
    from scipy.stats import t as student
    assert np.isclose(t['shift'], m.params.iloc[0], atol=2e-5) and t.n_donors == (n > 0).sum()
    df = len(n) - 1
    assert np.isclose((t.ci_high - t['shift'])/student.ppf(.975, df), se, rtol=.02)
    from geneformer_nb.perturb.stats import _means, _mixed
    parts = _means(np.zeros(len(raw), int), pd.factorize(obs.donor.to_numpy()[raw.cell])[0], raw.shift_goal.to_numpy(), 1, len(n))
    assert np.isclose(_mixed(*parts)[2][0], 2*student.sf(abs(m.params.iloc[0]/se), df), rtol=.1) and np.isnan(t.p)

def test_mixed_and_means_agree_where_donors_are_even():
    raw, obs = made_up(genes=60, donors=6, planted=(3,))
    even = raw[raw.groupby(['gene_id', raw.cell//15]).cumcount() < 6]
    a, b = (summarize(even, obs, donor='donor', how=h).set_index('gene_id').sort_index() for h in ('aggregate', 'mixed'))
    a, b = a[full := a.n_cells == 36], b[full] # six cells in each of six donors
    assert full.sum() > 50
    np.testing.assert_allclose(a['shift'], b['shift'], atol=1e-12)
    assert (b.p > a.p*.97).all() and np.isclose(a.p, b.p, rtol=.05).mean() > .5 # the same, or wider where donors do not differ

def test_states_side_by_side():
    from geneformer_nb.perturb.stats import wide
    raw, obs = made_up(planted=(3,), donors=8)
    raw = raw.rename(columns={'shift_goal': 'shift_p(goal)'}).assign(shift_alt=-raw.shift_goal)
    t = summarize(raw, obs, donor='donor')
    assert set(t.state) == {'p(goal)', 'alt'}
    w = wide(t, states=['p(goal)', 'alt'])
    assert len(w) == 80 and w.gene_id[0] == 'G3' and list(w)[-6:] == [f'{v}_{s}' for v in ('shift', 'p', 'fdr') for s in ('p(goal)', 'alt')]
    np.testing.assert_allclose(w['shift_p(goal)'], -w.shift_alt)
    with pytest.raises(GeneformerError, match='lacks'): wide(raw)

def test_bh_is_over_what_was_tested():
    "Genes of too few donors have no p and do not make the others pay"
    raw, obs = made_up(genes=40, donors=6, planted=(3,))
    rare = raw[raw.gene_id.str[1:].astype(int) < 20]
    some = raw[(raw.gene_id.str[1:].astype(int) >= 20) & (raw.cell < 15)] # one donor
    t = summarize(pd.concat([rare, some], ignore_index=True), obs, donor='donor')
    from scipy.stats import false_discovery_control
    ok = t.p.notna()
    assert ok.sum() == 20 and t.fdr[~ok].isna().all()
    np.testing.assert_allclose(t.fdr[ok], false_discovery_control(t.p[ok]))

def test_old_names_are_where_they_were():
    import geneformer_nb.perturb.official as o, geneformer_nb.perturb.stats as s
    for n in 'vs_null mixture_model goal_state_shift aggregate_gene_shifts excess bh rank_sums official_form'.split(): assert getattr(s, n) is getattr(o, n)
    assert callable(s.matched_null) and callable(s.summarize)

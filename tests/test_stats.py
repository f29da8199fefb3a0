"Statistics: type-I error, planted genes, equality with plain loops, on made-up raw tables"
import numpy as np, pandas as pd, pytest
from scipy.stats import ranksums, ttest_1samp
from geneformer_nb.core import GeneformerError
from geneformer_nb.stats import columns, goal_state_shift, mixture_model, rank_sums, summarise, vs_null

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
    by_donor = np.concatenate([summarise(r, o, donor='donor').p for r, o in runs])
    by_cell = np.concatenate([goal_state_shift(r, 'goal').p for r, _ in runs])
    assert .035 < (by_donor < .05).mean() < .065
    assert (by_cell < .05).mean() > .15

@pytest.mark.parametrize('moderated', [False, True])
def test_planted_genes_are_found(moderated):
    raw, obs = made_up(planted=(3, 40), donors=8)
    t = summarise(raw, obs, donor='donor', moderated=moderated)
    assert list(t) == columns and set(t.gene_id[t.fdr < .05]) == {'G3', 'G40'}
    assert ((t.ci_low < t['shift']) & (t['shift'] < t.ci_high)).all()

def test_summarise_by_hand():
    raw, obs = made_up(genes=10, drift=.02)
    raw['rank'] = raw.gene_id.str[1:].astype(int)
    t = summarise(raw, obs, donor='donor').set_index('gene_id')
    m = raw.assign(d=obs.donor.to_numpy()[raw.cell]).pivot_table(index='gene_id', columns='d', values='shift_goal')
    for g in m.index: # ten genes are one bin: the null of a gene is the mean of the nine others
        null = m.drop(g).mean()
        assert np.isclose(t.null_shift[g], null.mean()) and np.isclose(t['shift'][g], m.loc[g].mean())
        assert np.isclose(t.p[g], ttest_1samp(m.loc[g] - null, 0).pvalue)
        assert np.isclose(t.ci_high[g], ttest_1samp(m.loc[g], 0).confidence_interval().high)

def test_matching_removes_a_drift_with_rank():
    raw, obs = made_up(genes=200, drift=.05)
    rank = {f'G{i}': i for i in range(200)}
    t = summarise(raw, obs, donor='donor', rank=rank)
    blind = summarise(raw, obs, donor='donor', rank={g: (i*7919) % 200 for g, i in rank.items()})
    assert (t.p < .05).mean() < .35 < (blind.p < .05).mean()
    assert np.corrcoef(t['shift'], t.null_shift)[0, 1] > .8

def test_order_of_rows_does_not_matter():
    raw, obs = made_up(planted=(5,))
    a, b = (summarise(r, obs, donor='donor').sort_values('gene_id', ignore_index=True)
            for r in (raw, raw.sample(frac=1, random_state=0).reset_index(drop=True)))
    pd.testing.assert_frame_equal(a, b)
    raw.index = np.arange(len(raw))[::-1] # nor does its index
    pd.testing.assert_frame_equal(a, summarise(raw, obs, donor='donor').sort_values('gene_id', ignore_index=True))

def test_categories_are_as_good_as_strings():
    raw, obs = made_up(planted=(5,))
    cat = raw.astype(dict(kind=pd.CategoricalDtype(['KO', 'OE']), perturbation='category', gene_id='category'))
    for f in (lambda r: summarise(r, obs, donor='donor'), lambda r: goal_state_shift(r, 'goal'), mixture_model,
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
                 lambda: summarise(raw, obs, donor='who'), lambda: summarise(raw, obs[:2], donor='donor'),
                 lambda: summarise(raw.drop(columns='kind'), obs)):
        with pytest.raises(GeneformerError) as e: call()
        assert str(e.value).endswith('.') and '\n' not in str(e.value)

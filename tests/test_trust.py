"What the p of a screen is worth: levels, power, stability, permuted labels; simulated, and on a small model"
import numpy as np, pandas as pd, pytest
from geneformer_nb.core import GeneformerError
from geneformer_nb.perturb.official import goal_state_shift
from geneformer_nb.perturb.stats import summarize
from geneformer_nb.perturb.trust import (_labelings, donors_needed, permuted_states, permuted_test, power, simulated_run, spread, stability, tests as methods,
                                 type_one)

def test_type_one_under_a_permuted_label_in_tables():
    "No effect at all: donor tests near .05 in a world of whims, tests over cells far above"
    t, p = type_one(16, full=True, by_rank=0.)
    assert t.loc[['donors', 'donors, moderated', 'donors, mixed']].false_alarms.between(.03, .07).all()
    assert (t.loc[['cells, official', 'cells, other genes']].false_alarms > .12).all()
    assert (t.ci_low < t.false_alarms).all() and (t.n == 1600).all() and len(p['donors']) == 1600
    assert t.loc['donors', 'runs_with_discovery'] < .25 and t.loc['cells, official', 'runs_with_discovery'] > .7

def test_batches_are_the_witnesses():
    "two batches are two witnesses: told in the page, so it had better be true"
    one = dict(donors=methods['donors'])
    assert type_one(6, methods=one, batch=.02).false_alarms['donors'] > .2
    assert type_one(6, methods=one, batch=.02, batches=8, by_rank=0.).false_alarms['donors'] < .08 # a batch for each donor is a whim

def test_cells_are_right_when_donors_are_alike():
    flat = dict(gene_donor=0., donor_sd=0., by_rank=0.)
    t = type_one(10, methods={k: methods[k] for k in ('cells, official', 'cells, other genes')}, **flat)
    assert t.false_alarms.between(.03, .07).all()

def test_power_rises_with_donors_and_effect():
    t = power((4, 8, 14), (.01, .03), runs=4)
    w = t.pivot(index='donors', columns='effect', values='power')
    assert w.loc[14, .03] > .95 and w.loc[4, .03] < .6 and w.loc[14, .03] > w.loc[14, .01]
    need = donors_needed(t)
    assert need[.03] in (8, 14) and donors_needed(t[t.effect == .01], 1.01).isna().all()
    assert ((t.ci_low <= t.power) & (t.power <= t.ci_high)).all() and t.false.mean() < .1

@pytest.mark.parametrize('whim,noise', [(0., .02), (.01, .02), (.02, .04)])
def test_spread_recovers_the_settings(whim, noise):
    got = spread(*simulated_run(genes=300, donors=10, gene_donor=whim, noise=noise, uneven=0, seed=3), 'goal', 'donor')
    assert abs(got['noise'] - noise) < .1*noise and abs(got['gene_donor'] - whim) < (.004 if whim == 0 else .15*whim)
    type_one(2, methods=dict(donors=methods['donors']), **got) # its answer is what the simulation takes

def test_stability_by_hand():
    def made(scores): return pd.DataFrame(dict(perturbation=[f'g{i}' for i in range(len(scores))], donor='all', shift=scores, null_shift=0.))
    x = np.arange(50.)
    same, opposite = stability([made(x), made(x)], k=5), stability([made(x), made(-x)], k=5)
    assert np.allclose(same.value, 1) and np.isclose(opposite.value['spearman'], -1) and opposite.value['overlap'] == 0
    assert np.isclose(same.chance['overlap'], .1)
    half = stability([made(x), made(np.where(x >= 48, -x, x))], k=4) # two of the top four fall to the bottom
    assert half.value['overlap'] == .5 and half.ci_low['overlap'] < .5 < half.ci_high['overlap']
    for bad in ([made(x)], [made(x[:4]), made(x[:4])], [pd.concat([made(x), made(x)]), made(x)]):
        with pytest.raises(GeneformerError): stability(bad, k=5)

def test_stability_tells_noise_from_effects():
    truth = np.random.default_rng(1).normal(0, .02, 120)
    runs = lambda e: [summarize(*simulated_run(genes=120, effect=e, by_rank=0., seed=i), donor='donor') for i in range(2)]
    assert stability(runs(truth)).ci_low['spearman'] > .6 > .25 > abs(stability(runs(np.zeros(120))).value['spearman'])

def test_labelings_keep_donors_whole():
    obs = pd.DataFrame(dict(donor=np.repeat(list('abcdefgh'), 3), state=np.repeat(['x']*4 + ['y']*4, 3)))
    l = _labelings(obs, 'state', 'donor', 'x', 'y', 1000, 0)
    assert len(l) == 70 and len(np.unique(l, axis=0)) == 70 # 8 over 4
    assert (l[0] == (obs.state == 'x')).all() and (l.sum(1) == 12).all()
    assert all((l[:, 3*i] == l[:, 3*i + k]).all() for i in range(8) for k in range(3))
    both = pd.DataFrame(dict(donor=np.repeat(list('abcde'), 2), state=['x', 'y']*5)) # cells of both states in each donor
    l = _labelings(both, 'state', 'donor', 'x', 'y', 1000, 0)
    assert len(l) == 32 and (l[:, ::2] ^ l[:, 1::2]).all()

@pytest.fixture(scope='module')
def dealt():
    "A table of a run with state vectors of 61 labelings; genes move along directions of their own, one hangs on the label"
    rng, genes, donors, cells, n = np.random.default_rng(0), 60, 12, 12, 120
    obs = pd.DataFrame(dict(donor=np.repeat([f'D{i:02d}' for i in range(donors)], cells), state=np.repeat(['x']*6 + ['y']*6, cells)))
    labels = _labelings(obs, 'state', 'donor', 'x', 'y', n, 0)
    at = rng.normal(size=(donors, 8)); at[:6, 0] += 6 # donors differ in eight directions, the states in the first
    cell = at.repeat(cells, 0)
    moves = rng.normal(size=(genes, 8)); moves[:, 0] *= .2; moves[0, 0] = 5
    c, g = np.divmod(np.arange(len(obs)*genes), genes)
    own = moves[g] + rng.normal(0, .3, (len(c), 8))
    raw = pd.DataFrame(dict(cell=c, kind='KO', perturbation=[f'KO(G{i:02d})' for i in g], gene_id=[f'G{i:02d}' for i in g], rank=g, cosine=.9))
    cols = {}
    for i, l in enumerate(labels):
        for w, k in (('start', l), ('goal', ~l)): cols[f'shift_{w} {i}'] = own @ cell[k].mean(0)
    return pd.concat([raw, pd.DataFrame(cols)], axis=1), obs, labels

def test_permuted_labels_keep_their_level_where_other_tests_do_not(dealt):
    raw, obs, labels = dealt
    t, s, p = permuted_test(raw, obs, labels, 'donor', full=True)
    a = np.abs(s)
    own = np.mean([((a[:, 1:] >= a[:, i:i + 1]).mean(1) <= .05).mean() for i in range(1, len(labels))])
    assert .03 < own <= .055 and (p[:, 1:] < .05).mean() > .4
    one = raw[labels[3][raw.cell]]
    one = one[['cell', 'kind', 'perturbation', 'gene_id']].assign(shift_goal=one['shift_goal 3'] - one['shift_start 3'])
    assert (goal_state_shift(one, 'goal', official=True).p < .05).mean() > .4
    assert t.gene_id[0] == 'G00' and np.isclose(t.p[0], 1/len(labels)) and (t.p_donors < .05).mean() > .4

def test_permuted_test_by_hand(dealt):
    raw, obs, labels = dealt
    t, s, _ = permuted_test(raw, obs, labels, 'donor', full=True)
    i = t.index[t.gene_id == 'G20'][0]
    assert np.isclose(t.p[i], (np.abs(s[i]) >= abs(s[i, 0])).mean()) and np.isclose(s[i, 0], t.score[i])
    part = raw[labels[0][raw.cell]] # the true start cells; the score is the mean over donors of what summarize calls shift - null_shift
    part = part[['cell', 'kind', 'perturbation', 'gene_id', 'rank', 'cosine']].assign(shift_x=part['shift_goal 0'] - part['shift_start 0'])
    u = summarize(part, obs, donor='donor').set_index('gene_id').loc[t.gene_id]
    np.testing.assert_allclose(t.score, u['shift'] - u.null_shift); np.testing.assert_allclose(t.p_donors, u.p)
    assert (t.n_donors == 6).all() and (t.n_cells == 72).all()
    with pytest.raises(GeneformerError, match='one kind'): permuted_test(raw.assign(kind=np.where(raw.cell < 9, 'KO', 'OE')), obs, labels, 'donor')

def test_states_of_a_model():
    from geneformer_nb.model.embed import state_embeddings
    from geneformer_nb.data.vocabulary import Vocabulary
    from geneformer_nb.model.bert import Geneformer
    from geneformer_nb.data.tokenizer import tokenize
    from geneformer_nb.data.toy import simulate, toy_network
    adata = simulate(n_cells=72, n_donors=18, n_genes=60, truth=toy_network(60))
    vocab = Vocabulary.from_counts(adata, symbols='symbol', name='toy', max_len=64)
    cells = tokenize(adata, vocab, obs=['disease', 'donor'])
    model = Geneformer.new('nano', vocab, initializer_range=.25)
    ask = dict(label='disease', donor='donor', start='dilated', goal='non-failing')
    two, states, labels = permuted_states(model, cells, n=30, **ask)
    true = state_embeddings(two, model, 'disease', show=False)
    np.testing.assert_allclose(states['start 0'], true['dilated'], atol=1e-5); np.testing.assert_allclose(states['goal 0'], true['non-failing'], atol=1e-5)
    assert len(states) == 62 and labels.shape == (31, 48)
    two.obs = two.obs.assign(dealt=np.where(labels[7], 'dilated', 'non-failing'))
    np.testing.assert_allclose(states['goal 7'], state_embeddings(two, model, 'dealt', show=False)['non-failing'], atol=1e-5)
    few = np.flatnonzero(two.obs.donor.isin(two.obs.donor.unique()[:4]))
    with pytest.raises(GeneformerError, match='labelings'): permuted_states(model, two[few], **ask)
    with pytest.raises(GeneformerError, match="no column 'who'"): permuted_states(model, two, **{**ask, 'donor': 'who'})
    with pytest.raises(GeneformerError, match='has seen the labels'): permuted_states(type('Tuned', (), dict(encoder=model))(), two, **ask)

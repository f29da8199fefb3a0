"The shortlist of a screen: everything on small cohorts, the same list again, controls outside of it, and a rate that counts all genes"
import json
import numpy as np, pandas as pd, pytest
import geneformer_nb as gf
from geneformer_nb.cli import call, parser
from geneformer_nb.core import GeneformerError
from geneformer_nb.data import toy
from geneformer_nb.perturb.official import bh
from geneformer_nb.screen import question
from geneformer_nb.screen.score import score_targets
from geneformer_nb.perturb.trust import simulated_run

tiny = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=1, intermediate_size=64)
ask = dict(label='disease', donor='donor', start='hypertrophic', goal='non-failing', folds=2, finetuning=dict(steps=20), max_cells=4, report=False)

@pytest.fixture(scope='module')
def cohort():
    adata = toy.simulate(n_cells=420, n_donors=12, n_genes=200, seed=0)
    gf.pp.tokenize(adata)
    return adata, gf.Geneformer.new('nano', question.vocabulary_for(adata, None), **tiny)

@pytest.fixture(scope='module')
def short(cohort, tmp_path_factory):
    "A screen with a shortlist, and what it said"
    said, out = [], tmp_path_factory.mktemp('short')
    kw = ask | dict(controls='untrained', seeds=2, directions=('KO', 'OE'), known=['TF01'], exact=30, out=out)
    return gf.tl.screen(*cohort, say=said.append, **kw), said, kw

def test_small_cohort_is_screened_whole(cohort, tmp_path):
    "with fewer genes than a shortlist and its controls, the default is exact='all'"
    kw = ask | dict(controls=(), directions='KO', say=None)
    a, b = (gf.tl.screen(*cohort, exact=e, out=tmp_path/str(e), **kw) for e in ('shortlist', 'all'))
    pd.testing.assert_frame_equal(a.table, b.table)
    assert not len(a.matched) and not a.table.control.any() and len(a.table) > 150

def test_controls_lie_outside(short):
    s = short[0]
    listed, outside = set(s.table.gene_id), set(s.matched.gene_id)
    assert not listed & outside and len(outside) >= 50
    assert s.table.kind.value_counts().max() <= 31 and 'TF01' in set(s.table.symbol)
    assert s.matched.control.all() and s.matched.fdr.isna().all() and s.matched.score.isna().all()
    by = s.shifts.groupby('control').gene_id.agg(lambda g: set(map(str, g)))
    assert by[True] == outside and by[False] == listed
    assert (s.folder/'matched_genes.csv').exists() and s.table.untrained.notna().any() and 'rank_best' in s.table

def test_null_is_of_the_controls(short):
    "the null of a shortlisted gene is a mean over controls, so it lies within their range in each donor"
    s = short[0]
    ko, controls = (t[t.kind == 'KO'] for t in (s.table, s.matched))
    assert ko.null_shift.dropna().between(controls['shift'].min(), controls['shift'].max()).all() and ko.null_shift.notna().any()

def test_rate_counts_all_genes(short):
    s = short[0]
    ko = s.table[s.table.kind == 'KO']
    m = json.loads((s.folder/'summary.json').read_text())['plan']['considered']['KO']
    there = ko.p.notna()
    p = np.sort(ko.p[there])
    by_hand = np.minimum(np.minimum.accumulate((p*m/np.arange(1, len(p) + 1))[::-1])[::-1], 1)
    assert m > 150
    np.testing.assert_allclose(np.sort(ko.fdr[there]), by_hand)

def test_bh_by_hand():
    np.testing.assert_allclose(bh([.001, .02, np.nan, .01], considered=10), [.01, .02*10/3, np.nan, .01*10/2])
    np.testing.assert_allclose(bh([.001, .02]), [.002, .02])

def test_forecast_says_what_is_left_out(short, cohort):
    text = short[1][0]
    for part in ('Expected: pretraining none', 'gradients', '30 genes', '50 matched genes', 'Left out are', 'count in the FDR with p = 1',
                 "exact='all' would", 'max_cells (4)', 'exact=50'):
        assert part in text, part
    assert any(x.startswith('shortlist: 31 KO') or x.startswith('shortlist: 30 KO') for x in short[1])

def test_same_call_goes_on(cohort, tmp_path, monkeypatch):
    "the number that fitted into an hour is kept, also when the machine is slower the next time"
    kw = ask | dict(controls=(), directions='KO', say=None, out=tmp_path)
    monkeypatch.setattr(question, '_fitting', lambda plan, f: 25)
    a = gf.tl.screen(*cohort, **kw)
    monkeypatch.setattr(question, '_fitting', lambda plan, f: 21)
    b = gf.tl.screen(*cohort, **kw)
    assert len(a.table) == 25 and len(a.matched) == 50
    pd.testing.assert_frame_equal(a.table, b.table)
    with pytest.raises(GeneformerError, match='another run'): gf.tl.screen(*cohort, **(kw | dict(exact=22)))

def test_fitting_into_an_hour(cohort, tmp_path):
    plan = question.make_plan(*cohort, question.Question('disease', 'donor', 'hypertrophic', 'non-failing'),
                              question.Settings(folds=2, max_cells=4, controls=(), directions='KO'), tmp_path, say=lambda _: None)
    def costs(each, finetune=0.): return question.Forecast(0., finetune, 0., 0., 0, each)
    def fit(*c): return question._fitting(plan, costs(*c))
    assert fit(1e-9) == 500 and fit(1e9) == 100 and fit(.001, 5000.) == 100
    each = 3600/question._passes(plan, 300)
    assert fit(each) == 300 and 100 < fit(each, 1000.) < 300
    assert plan.exact == 'all' # 200 genes

def test_labels_without_meaning(cohort, tmp_path):
    "type-I error: with permuted labels p < .05 in at most a twentieth of the genes considered; a gene is named as seldom as the FDR says"
    adata, model = cohort
    two = adata[adata.obs.disease.isin(['hypertrophic', 'non-failing'])].copy()
    of = two.obs.drop_duplicates('donor').set_index('donor').disease.astype(str)
    small, chosen, named, runs = [], [], 0, 8
    for seed in range(runs):
        new = dict(zip(of.index, np.random.default_rng(seed).permutation(of)))
        one = two.copy()
        one.obs['disease'] = two.obs.donor.map(new).astype(str).to_numpy()
        s = gf.tl.screen(one, model, controls=(), directions='KO', say=None, exact=30, out=tmp_path/str(seed), **ask)
        low = (s.table.p < .05).sum()
        small, chosen, named = [*small, low/s.considered['KO']], [*chosen, low/len(s.table)], named + (s.table.fdr < .05).any()
    assert np.mean(small) <= .05 < np.mean(chosen) and named <= 2 # 3 of 8 or more: p = .006 where each has .05

def test_untested_actions_stand_apart():
    "without a p there is no score: such rows come last, are in no plot by score, and are not those with score 0"
    raw, obs = simulated_run(genes=40, donors=4, cells=12, effect=.04, hits=2, seed=0)
    rare = raw.gene_id.astype(str).isin(['G006', 'G010']) & (raw.cell >= 5)
    t, _ = score_targets(raw[~rare], obs, 'goal', 'donor')
    n = int(t.score.notna().sum())
    assert 20 < n < len(t) and (t.p.isna() == t.score.isna()).all() and t.score[:n].notna().all()
    assert {'G006', 'G010'} <= set(t.gene_id[n:]) and (t.score[:n] == 0).any()
    assert list(gf.get.targets(t, None).perturbation) == list(t.perturbation)
    names = [x.get_text() for x in gf.plots.top_targets(t, len(t), by='score').get_yticklabels()]
    assert names == list(t.perturbation[:n].astype(str))
    with pytest.raises(GeneformerError, match='No perturbation has a score'): gf.plots.top_targets(t.assign(score=np.nan), by='score')

def test_option_of_the_command(monkeypatch):
    seen = {}
    from geneformer_nb.screen import run
    monkeypatch.setattr(run, 'screen', lambda *a, **k: seen.update(k) or type('R', (), dict(table=pd.DataFrame(columns=['perturbation', 'score', 'shift', 'null_shift', 'p', 'fdr', 'consistency', 'flag'])))())
    from geneformer_nb import cli
    monkeypatch.setattr(cli, '_read_cells', lambda *a, **k: None)
    for word, value in ((['--exact', '80'], 80), (['--exact', 'all'], 'all'), ([], 'shortlist')):
        given = parser().parse_args(['screen', 'x.h5ad', '--label', 'l', '--donor', 'd', '--start', 'a', '--goal', 'b', '--out', 'o', *word])
        call(given._fn, given)
        assert seen['exact'] == value

@pytest.mark.parametrize('bad', [0, -1, True, 'some', 2.5])
def test_wrong_exact(bad):
    with pytest.raises(GeneformerError, match='exact'): question.Settings(exact=bad)

"Matched controls of named genes, the unit of replication, and what a table of one gene says"
import numpy as np, pandas as pd, pytest
import geneformer_nb as gf
from geneformer_nb.core import GeneformerError
from geneformer_nb.perturb.actions import ActionPlan, matched_controls
from sentences import quiet, says

small = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)
how = dict(label='disease', goal='non-failing', show=False)

@pytest.fixture(scope='module')
def made():
    adata = gf.toy.simulate(120, 12, 60)
    model = gf.Geneformer.new('nano', gf.Vocabulary.from_counts(adata, symbols='symbol', max_len=40), **small)
    gf.pp.tokenize(adata, model)
    return adata, model

def test_one_gene_has_no_p_and_the_way_to_get_one_is_said(made):
    shifts = gf.tl.perturb(*made, gf.KO('TF01'), **how)
    with pytest.warns(UserWarning, match=r'KO\(TF01\): too few other genes .* controls=12'):
        t = gf.tl.summarize(shifts, donor='donor')
    assert len(t) == 1 and t[['p', 'fdr', 'null_shift']].isna().all(axis=None) and np.isfinite(t['shift'][0])
    assert list(t.unit) == ['donors'] and not t.control[0]

@pytest.mark.parametrize('action,n', [(gf.KO('TF01'), 1), (gf.OE('TF01'), 1), (gf.Dose('TF01', down=.5), 1), (gf.each(['TF01', 'TF02']), 2)])
def test_controls_give_one_gene_its_p(made, action, n):
    shifts = gf.tl.perturb(*made, action, controls=12, **how)
    t = gf.tl.summarize(shifts, donor='donor')
    assert (~t.control).sum() == n and t.control.sum() == 12*n
    own = t[~t.control]
    assert own.p.notna().all() and own.fdr.notna().all() and own.null_shift.notna().all() and t[t.control].fdr.isna().all()
    with quiet(): alone = gf.tl.summarize(gf.tl.perturb(*made, action, **how), donor='donor')
    np.testing.assert_allclose(own.sort_values('gene_id')['shift'], alone.sort_values('gene_id')['shift'], atol=1e-6)

def test_the_null_is_that_of_the_controls(made):
    shifts = gf.tl.perturb(*made, gf.KO('TF01'), controls=12, **how)
    t = gf.tl.summarize(shifts, donor='donor')
    controls = t[t.control]['shift']
    assert controls.min() <= t[~t.control].null_shift.iloc[0] <= controls.max()

def test_controls_of_a_pair_are_pairs(made):
    with quiet(): shifts = gf.tl.perturb(*made, gf.KO('TF01') + gf.KO('TF02'), controls=5, **how)
    names = shifts.groupby('perturbation', observed=True).control.first()
    assert (names.index.str.count(r'\+') == 1).all() and names.sum() == 5

def test_controls_are_the_nearest_and_never_a_named_gene(made):
    adata, model = made
    cells = gf.get.cells(adata, model.vocabulary)
    plan = ActionPlan([gf.each(['TF01', 'TF02', 'TF03'])], model.vocabulary)
    drawn = matched_controls(plan, cells, np.arange(len(cells)), 4)
    names = [p.ops[0].gene for p in drawn]
    assert len(set(names)) == len(names) == 12 and not set(names) & {'TF01', 'TF02', 'TF03'}
    assert drawn == matched_controls(plan, cells, np.arange(len(cells)), 4) and all(p.control for p in drawn)
    seen = pd.Series(cells.tokens).value_counts()
    of = lambda g: seen.get(int(model.vocabulary.token(g)), 0)
    everyone = [abs(of(g) - of('TF01')) for g in model.vocabulary.symbols.values()]
    assert np.mean([abs(of(g) - of('TF01')) for g in names[:4]]) < np.mean(everyone)

def test_what_controls_cannot_be_for(made):
    with says(GeneformerError, 'detected'): gf.tl.perturb(*made, gf.each(), controls=12, **how)
    with says(GeneformerError, 'drug'): gf.tl.perturb(*made, gf.drug('x', inhibits=['TF01']), controls=12, **how)
    for bad in (-1, 1.5, True):
        with says(GeneformerError, 'whole number'): gf.tl.perturb(*made, gf.KO('TF01'), controls=bad, **how)

def test_controls_survive_a_folder(made, tmp_path):
    shifts = gf.tl.perturb(*made, gf.KO('TF01'), controls=6, out=tmp_path/'p', **{k: v for k, v in how.items() if k != 'show'})
    back = gf.get.shifts(tmp_path/'p')
    pd.testing.assert_frame_equal(pd.DataFrame(back), pd.DataFrame(shifts))
    assert gf.tl.summarize(back, donor='donor').control.sum() == 6

def test_the_unit_is_a_column(made):
    shifts = gf.tl.perturb(*made, gf.each(['TF01', 'TF02', 'TF03', 'TF04', 'TF05']), **how)
    assert set(gf.tl.summarize(shifts).unit) == {'cells'} and set(gf.tl.summarize(shifts, donor='donor').unit) == {'donors'}
    by = gf.tl.summarize(shifts, donor='donor', by_donor=True)
    assert set(by.unit[by.donor == 'all']) == {'donors'} and set(by.unit[by.donor != 'all']) == {'cells'}

"Our tables against those of the official code; needs the folder named by GENEFORMER_NB_DATA"
import os, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest
from geneformer_nb.perturb.stats import aggregate_gene_shifts, goal_state_shift, mixture_model, vs_null

golden = Path(os.environ.get('GENEFORMER_NB_DATA', '/nowhere'))/'golden'
pytestmark = pytest.mark.skipif(not golden.is_dir(), reason='GENEFORMER_NB_DATA names no folder with golden/: tables of the '
                                'official Geneformer code (huggingface.co/ctheodoris/Geneformer, commit 05fcbeb) are needed')
both, sets = pytest.mark.parametrize('v', ['V1', 'V2']), pytest.mark.parametrize('name', ['kang_ifnb', 'kang20'])

swapped = {'heart_embryo_V1', 'pbmc3k_V2', 'kang20_V1', 'kang20_V2'} # the official fit's first component was not the lower one

def read(name): return pd.read_parquet(golden/f'{name}.parquet').explode('values', ignore_index=True).astype({'values': float})

def as_raw(t):
    "The golden layout (batch, state, perturbed, affected, values) as a raw table, cell values only"
    t = t[t.affected == 'cell'].assign(perturbed=lambda d: d.perturbed.str.zfill(6)) # tokens in numeric order
    raw = t[t.state == t.state.iloc[0]].rename(columns=dict(batch='cell', perturbed='gene_id')).drop(columns=['affected', 'state'])
    raw = raw.assign(kind='KO', perturbation='KO(' + raw.gene_id + ')').rename(columns=dict(values='cosine'))
    for s in filter(None, t.state.unique()):
        one = t[t.state == s].set_index(['batch', 'perturbed'])['values']
        raw[f'shift_{s}'] = one.loc[list(zip(raw.cell, raw.gene_id))].to_numpy()
    return raw.reset_index(drop=True)

def close(ours, theirs, pairs):
    ours, theirs = ours.set_index('gene_id').sort_index(), theirs.assign(Gene=theirs.Gene.astype(str).str.zfill(6)).set_index('Gene').sort_index()
    assert list(ours.index) == list(theirs.index)
    for a, b in pairs.items():
        np.testing.assert_allclose(ours[a].astype(float), theirs[b].astype(float), atol=1e-6, rtol=1e-6, err_msg=b)

@both
@sets
def test_goal_state_shift(name, v):
    ours = goal_state_shift(as_raw(read(f'{name}_{v}_isp_delete_all_goal')), 'stim', official=True)
    close(ours, pd.read_csv(golden/f'{name}_{v}_stats_goal_state_shift.csv'), {'shift': 'Shift_to_goal_end',
          'p': 'Goal_end_vs_random_pval', 'fdr': 'Goal_end_FDR', 'n_cells': 'N_Detections', 'significant': 'Sig'})

@both
def test_group(v):
    raw = as_raw(read(f'kang20_{v}_isp_delete_all_goal'))
    theirs = pd.read_csv(golden/f'kang20_{v}_stats_goal_state_shift_group.csv').Shift_to_goal_end[0]
    means = raw.groupby('gene_id').shift_stim.mean() # the group is one gene, named in the golden notes by its Ensembl id
    named = pd.read_csv(golden/f'kang20_{v}_stats_goal_state_shift.csv').set_index('Ensembl_ID').Gene['ENSG00000161960']
    assert abs(means[str(named).zfill(6)] - theirs) < 1e-6

@both
def test_vs_null(v):
    ours = vs_null(as_raw(read(f'kang20_{v}_isp_delete_all_ctrl')), as_raw(read(f'kang20_{v}_isp_delete_all_stim')))
    close(ours, pd.read_csv(golden/f'kang20_{v}_stats_vs_null.csv'), {'shift': 'Test_avg_shift', 'null_shift': 'Null_avg_shift',
          'difference': 'Test_vs_null_avg_shift', 'p': 'Test_vs_null_pval', 'fdr': 'Test_vs_null_FDR',
          'n_cells': 'N_Detections_test', 'n_null': 'N_Detections_null', 'significant': 'Sig'})

@both
@pytest.mark.parametrize('name', ['kang_ifnb', 'heart_embryo', 'pbmc3k', 'kang20'])
def test_mixture_model(name, v):
    raw = as_raw(read(f'{name}_{v}_isp_delete_all{"_ctrl" if name == "kang20" else ""}'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        ours, sorted_ = mixture_model(raw, official=True), mixture_model(raw)
    theirs = pd.read_csv(golden/f'{name}_{v}_stats_mixture_model.csv')
    pairs = {'shift': 'Test_avg_shift', 'impact': 'Impact_component', 'impact_percent': 'Impact_component_percent', 'n_cells': 'N_Detections'}
    close(ours, theirs, pairs)
    if f'{name}_{v}' in swapped: assert sorted_.impact.sum() > 1.4*theirs.Impact_component.sum()
    else: close(sorted_, theirs, pairs)

@both
@pytest.mark.parametrize('name', ['kang_ifnb', 'heart_embryo', 'pbmc3k'])
def test_aggregate_gene_shifts(name, v):
    t = read(f'{name}_{v}_isp_delete_all').rename(columns=dict(perturbed='perturbation', values='cosine'))
    ours = aggregate_gene_shifts(t).set_index(['perturbation', 'affected'])
    theirs = pd.read_csv(golden/f'{name}_{v}_stats_aggregate_gene_shifts.csv', dtype={'Perturbed': str, 'Affected': str})
    theirs['Affected'] = theirs.Affected.replace('cell_emb', 'cell')
    ours = ours.loc[list(zip(theirs.Perturbed, theirs.Affected))]
    for a, b in {'cosine_mean': 'Cosine_sim_mean', 'cosine_sd': 'Cosine_sim_stdev', 'n_cells': 'N_Detections'}.items():
        np.testing.assert_allclose(ours[a], theirs[b], atol=1e-6)

# the official files, column by column

from golden import perturbed, vocabulary
from geneformer_nb.perturb.official import official_form

def with_ids(raw, v):
    "Golden tokens as the ids that `perturb` writes"
    ids = {t: vocabulary(v).gene(int(t)) for t in raw.gene_id.unique()}
    return raw.assign(gene_id=raw.gene_id.map(ids))

def same_file(ours, name, drop=()):
    "Names and order of the columns; the same rows; numbers to 1e-6; the order of rows where the sort keys differ"
    theirs = pd.read_csv(golden/f'{name}.csv')
    theirs = theirs[[c for c in theirs if not c.startswith('Unnamed')]]
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)
    key = 'Ensembl_ID'
    a, b = ours.set_index(key).sort_index(), theirs.set_index(key).sort_index()
    assert list(a.index) == list(b.index)
    for c in b:
        if b[c].dtype.kind in 'if' and c != 'Gene': np.testing.assert_allclose(a[c].astype(float), b[c], atol=1e-6, rtol=1e-6, err_msg=c)
        else: assert a[c].astype(str).tolist() == b[c].astype(str).tolist(), c
    return ours, theirs

@both
@sets
def test_form_goal_state_shift(name, v):
    raw = with_ids(as_raw(read(f'{name}_{v}_isp_delete_all_goal')), v)
    ours, theirs = same_file(official_form(raw, 'goal_state_shift', goal='stim', vocabulary=vocabulary(v)), f'{name}_{v}_stats_goal_state_shift')
    np.testing.assert_allclose(ours.Shift_to_goal_end, theirs.Shift_to_goal_end, atol=1e-6) # row by row: the same order
    alt = official_form(raw, 'goal_state_shift', goal='stim', alt=['ctrl'], vocabulary=vocabulary(v))
    assert list(alt)[3:] == ['Shift_to_goal_end', 'Shift_to_alt_end_ctrl', 'Goal_end_vs_random_pval', 'Alt_end_vs_random_pval_ctrl', 'Goal_end_FDR',
                             'Alt_end_FDR_ctrl', 'N_Detections', 'Sig']
    pd.testing.assert_frame_equal(alt[list(ours)], ours)
    own = goal_state_shift(raw, 'ctrl', official=True).set_index('gene_id').loc[alt.Ensembl_ID]
    np.testing.assert_allclose(alt['Alt_end_FDR_ctrl'], own.fdr); np.testing.assert_allclose(alt['Shift_to_alt_end_ctrl'], own['shift'])

@both
def test_form_group(v):
    raw = with_ids(as_raw(read(f'kang20_{v}_isp_delete_all_goal')), v)
    ours = official_form(raw, 'goal_state_shift', goal='stim', genes=['ENSG00000161960'], vocabulary=vocabulary(v))
    theirs = pd.read_csv(golden/f'kang20_{v}_stats_goal_state_shift_group.csv', index_col=0)
    assert list(ours) == list(theirs) and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    cells = official_form(raw, 'aggregate_data', goal='stim', genes=['ENSG00000161960'], vocabulary=vocabulary(v))
    assert list(cells) == ['Cosine_sim', 'Gene'] and set(cells.Gene) == {'EIF4A1'} and np.isclose(cells.Cosine_sim.mean(), theirs.iloc[0, 0], atol=1e-6)

@both
def test_form_vs_null(v):
    test, null = (with_ids(as_raw(read(f'kang20_{v}_isp_delete_all_{s}')), v) for s in ('ctrl', 'stim'))
    theirs = pd.read_csv(golden/f'kang20_{v}_stats_vs_null.csv')
    ours = official_form(test, 'vs_null', null=null, vocabulary=vocabulary(v))
    same_file(ours, f'kang20_{v}_stats_vs_null')
    np.testing.assert_allclose(ours.Test_vs_null_avg_shift, theirs.Test_vs_null_avg_shift, atol=1e-6, equal_nan=True)

@both
@pytest.mark.parametrize('name', ['kang_ifnb', 'heart_embryo', 'pbmc3k', 'kang20'])
def test_form_mixture_model(name, v):
    raw = with_ids(as_raw(read(f'{name}_{v}_isp_delete_all{"_ctrl" if name == "kang20" else ""}')), v)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        ours = official_form(raw, 'mixture_model', vocabulary=vocabulary(v))
    _, theirs = same_file(ours, f'{name}_{v}_stats_mixture_model')
    np.testing.assert_allclose(ours.Test_avg_shift, theirs.Test_avg_shift, atol=1e-6)

@both
@pytest.mark.parametrize('name', ['kang_ifnb', 'heart_embryo', 'pbmc3k'])
def test_form_aggregate_gene_shifts(name, v):
    t = read(f'{name}_{v}_isp_delete_all')
    raw, voc = with_ids(as_raw(t), v), vocabulary(v)
    g = t[t.affected != 'cell']
    special = {str(x) for x in voc.specials.values()}
    g = g[~g.affected.isin(special)]
    ids = {x: voc.gene(int(x)) for x in {*g.perturbed, *g.affected}}
    effects = pd.DataFrame(dict(gene_id=g.perturbed.map(ids), affected=g.affected.map(ids), cosine=g['values']))
    ours = official_form(raw, 'aggregate_gene_shifts', effects=effects, vocabulary=voc)
    theirs = pd.read_csv(golden/f'{name}_{v}_stats_aggregate_gene_shifts.csv')
    theirs = theirs[[c for c in theirs if not c.startswith('Unnamed')]]
    assert list(ours) == list(theirs) and (ours.Affected[:raw.gene_id.nunique()] == 'cell_emb').all()
    by = lambda d: d.assign(k=d.Perturbed.astype(str) + ' ' + d.Affected.astype(str)).set_index('k')
    a, b = by(ours), by(theirs)
    assert set(b.index) <= set(a.index)
    a = a.loc[b.index]
    for c in ('Cosine_sim_mean', 'Cosine_sim_stdev', 'N_Detections'): np.testing.assert_allclose(a[c], b[c], atol=1e-6)
    for c in ('Gene_name', 'Ensembl_ID', 'Affected_gene_name', 'Affected_Ensembl_ID'): assert a[c].fillna('').tolist() == b[c].fillna('').tolist(), c
    np.testing.assert_allclose(ours.Cosine_sim_mean[:len(theirs)], theirs.Cosine_sim_mean, atol=1e-6) # row by row: the same order

@both
def test_form_takes_what_perturb_gives(v):
    "The whole chain: pairs with an anchor, and effects on other genes as `perturb` returns them"
    from golden import model
    from geneformer_nb.perturb.actions import each, pairs, perturb
    voc, c = vocabulary(v), perturbed('kang20', v)
    names = [voc.gene(int(x)) for x in c[0].tokens[1:6]]
    raw = perturb(model(v), c[:3], [each(names), *pairs(names[1:], with_=names[0])[2:]], layer=-1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        t = official_form(raw, 'mixture_model', anchor=names[0], vocabulary=voc)
    assert list(t) == ('Gene Gene_name Ensembl_ID Anchor_shift Test_token_shift Sum_of_indiv_shifts Combo_shift Combo_minus_sum_shift Impact_component '
                       'Impact_component_percent N_Detections').split() and set(t.Ensembl_ID) == set(names[1:])
    wide = raw.pivot_table(index='cell', columns='gene_id', values='cosine', observed=True)
    for r in t.itertuples():
        d = wide[[names[0], r.Ensembl_ID, f'{r.Ensembl_ID}+{names[0]}']].dropna()
        a, b, both_ = d.mean()
        assert np.allclose([r.Anchor_shift, r.Test_token_shift, r.Combo_shift, r.Sum_of_indiv_shifts, r.Combo_minus_sum_shift], [a, b, both_, a + b - 1, both_ - a - b + 1])
        assert r.N_Detections == len(d)
    raw, effects = perturb(model(v), c[:2], each(names[:2]), layer=-1, affected=True)
    t = official_form(raw, 'aggregate_gene_shifts', effects=effects, vocabulary=voc)
    assert (t.Affected == 'cell_emb').sum() == raw.gene_id.nunique() and len(t) > 100
    one = t[(t.Ensembl_ID == names[0]) & (t.Affected != 'cell_emb')].iloc[0]
    at = effects[(raw.gene_id.to_numpy()[effects['row']] == names[0]) & (effects.affected == one.Affected)]
    assert np.isclose(at.cosine.mean(), one.Cosine_sim_mean) and len(at) == one.N_Detections

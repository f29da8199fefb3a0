"Our tables against those of the official code; needs the folder named by GENEFORMER_NB_DATA"
import os, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest
from geneformer_nb.stats import aggregate_gene_shifts, goal_state_shift, mixture_model, vs_null

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

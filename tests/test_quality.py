"Quality control: planted cells found, data sets kept apart, streams equal to memory, what was not tested said, refusals in sentences"
import anndata as ad, numpy as np, pandas as pd, pytest
from scipy import sparse
from geneformer_nb.core import CountsError, GeneformerError, GeneMatchError
from geneformer_nb.data.medians import corpus_medians
from geneformer_nb.data.quality import Quality, as_flags, check_quality, mito_genes, rules
from geneformer_nb.data.sources import sources

genes = [f'ENSG{i:011d}' for i in range(38)] + ['ENSG00000198888', 'ENSG00000198763']

def _cohort(n=60, level=20, seed=0, prefix='c', **obs):
    "Cells of even depth: 38 genes and two mitochondrial ones"
    X = np.random.default_rng(seed).poisson(level, (n, 40))
    X = np.clip(X, level - 5, level + 5).astype(np.float32)
    return ad.AnnData(sparse.csr_matrix(X), pd.DataFrame(obs, [f'{prefix}{i}' for i in range(n)]), pd.DataFrame(index=genes))

def _change(a, row, values, cols=slice(None)):
    X = a.X.toarray(); X[row, cols] = values; a.X = sparse.csr_matrix(X)
    return a

def _planted():
    a = _cohort(predicted_doublet=np.arange(60) == 7, malignant=['False']*59 + ['True'], is_cell_line=[0]*20 + [1] + [0]*39)
    _change(a, 3, 100, slice(0, 38)); _change(a, 11, 60, slice(38, 40)); _change(a, 15, 0, slice(0, 38)); _change(a, 15, 190, slice(0, 4))
    return a

planted = [[3], [11], [15], [7], [59], [20]]
def _failed(q): return [np.flatnonzero(q.cells[r]).tolist() for r in rules]

def test_planted_cells_are_found_and_no_others():
    a = _planted()
    before = a.copy()
    q = check_quality(a)
    assert _failed(q) == planted and np.flatnonzero(~q.cells['filter_pass']).tolist() == [3, 7, 11, 15, 20, 59]
    assert list(q.cells) == ['dataset', 'n_counts', 'n_mito', 'mito_share', 'n_genes', *rules, 'filter_pass']
    assert q.cells.index.equals(a.obs_names)
    assert (q.cells['n_counts'] == a.X.toarray().sum(1)).all() and (q.cells['n_genes'] == (a.X.toarray() > 0).sum(1)).all()
    assert np.allclose(q.cells['mito_share'], a.X.toarray()[:, 38:].sum(1)/a.X.toarray().sum(1))
    assert list(a.obs) == list(before.obs) and (a.X != before.X).nnz == 0 and 'obs' not in a.uns
    r = q.report().set_index('rule')
    assert r['cells'].to_dict() == {**dict.fromkeys(rules, 1), 'passed': 54} and (r['of'] == 60).all()
    assert r['how']['doublet'] == "obs['predicted_doublet']" and 'counts of 2 genes from 0' not in r['how']['mito']
    assert '54 pass (90.0%)' in repr(q) and 'not tested' not in repr(q)

def test_the_limits_are_those_of_the_definition():
    a = _planted()
    x = a.X.toarray().sum(1)
    for n_sd in (1, 3):
        q = check_quality(a, n_sd=n_sd)
        assert (q.cells['depth'].to_numpy() == (np.abs(x - x.mean()) > n_sd*x.std())).all()
    assert q.limits.loc[('AnnData', 'depth'), ['mean', 'sd']].tolist() == pytest.approx([x.mean(), x.std()], rel=1e-6)

@pytest.mark.parametrize('size', [1, 7, 64])
def test_in_blocks_as_in_memory(tmp_path, size, monkeypatch):
    import geneformer_nb.data.quality as module
    a = _planted()
    whole = check_quality(a)
    pieces = module.pieces
    monkeypatch.setattr(module, 'pieces', lambda data, _, *rest: pieces(data, size, *rest))
    a.write_h5ad(tmp_path/'AnnData.h5ad'); a.write_zarr(tmp_path/'AnnData.zarr')
    for data in (a, tmp_path/'AnnData.h5ad', tmp_path/'AnnData.zarr', iter([a])):
        q = check_quality(data)
        assert q.cells.equals(whole.cells) and q.report().equals(whole.report()) and q.limits.equals(whole.limits)

def test_each_file_is_a_data_set(tmp_path):
    low, high = _cohort(level=20), _change(_cohort(level=200, seed=1, prefix='d'), 5, 350)
    low.write_h5ad(tmp_path/'low.h5ad'); high.write_h5ad(tmp_path/'high.h5ad')
    q = check_quality([tmp_path/'low.h5ad', tmp_path/'high.h5ad'])
    assert q.cells['dataset'].unique().tolist() == ['low', 'high'] and q.cells.index.tolist() == [*low.obs_names, *high.obs_names]
    assert np.flatnonzero(q.cells['depth']).tolist() == [65]
    both = ad.concat([low, high])
    assert np.flatnonzero(check_quality(both).cells['depth']).tolist() != [65]        # pooled, the limits are others
    both.obs['study'] = ['low']*60 + ['high']*60
    split = check_quality(both, dataset='study')
    assert split.cells.equals(q.cells) and split.limits.equals(q.limits)
    assert split.report()[['dataset', 'rule', 'cells']].equals(q.report()[['dataset', 'rule', 'cells']])

def test_inputs_of_one_name_are_told_apart():
    for data in ([_cohort(), _cohort(seed=1)], iter([_cohort(), _cohort(seed=1)])):
        q = check_quality(data)
        assert q.cells['dataset'].value_counts(sort=False).to_dict() == q.sources and list(q.sources.values()) == [60, 60]

def test_cells_without_a_data_set_are_together():
    q = check_quality(_cohort(study=pd.Categorical(['a']*30 + [None]*30)), dataset='study')
    assert q.cells['dataset'].value_counts().to_dict() == {'a': 30, 'unknown': 30}

def test_what_cannot_be_tested_is_said():
    a = _cohort()
    q = check_quality(a[:, :38].copy())
    r = q.report().set_index('rule')
    assert r.loc['mito', 'how'] == 'no mitochondrial gene found' and r.loc['mito', 'of'] == 0 and np.isnan(r.loc['mito', 'share'])
    assert (r.loc[['doublet', 'malignant', 'cell_line'], 'how'] == 'no column found').all()
    assert q.cells['mito_share'].isna().all() and 'not tested: mito, doublet, malignant, cell_line' in repr(q)
    assert check_quality(_planted(), doublet=False).report().set_index('rule').loc['doublet', 'how'] == 'left out'
    mixed = check_quality([a, a[:, :38].copy()], dataset=None)
    assert mixed.report().query("rule == 'mito'")['of'].tolist() == [60, 0] and 'mito 0 (tested in 60)' in repr(mixed)

def test_the_same_in_every_cell_is_no_limit():
    "Values turned back from log1p have one total; rounding must not decide who passes"
    a = _cohort()
    X = a.X.toarray()
    a.X = sparse.csr_matrix(np.log1p(X/X.sum(1, keepdims=True)*1e4).astype(np.float32))
    q = check_quality(a, logged=True)
    r = q.report().set_index('rule')
    assert not q.cells['depth'].any() and r.loc['depth', 'how'] == 'total counts: the same in every cell' and r.loc['depth', 'of'] == 0
    assert r.loc['mito', 'of'] == 60

def test_ten_cells_cannot_fail():
    assert not check_quality(_change(_cohort(10), 0, 10_000)).cells['depth'].any()
    assert check_quality(_change(_cohort(11), 0, 10_000)).cells['depth'].sum() == 1

def test_coding_decides_which_genes_count():
    a = _change(_cohort(), 4, 0, slice(0, 34))
    assert check_quality(a).cells['few_genes'].sum() == 1                     # 4 genes and 2 mitochondrial ones
    q = check_quality(a, coding=[g.lower() + '.3' for g in genes[:3] + genes[34:38]], min_genes=5)
    assert np.flatnonzero(q.cells['few_genes']).tolist() == [4] and (q.cells['n_genes'].drop('c4') == 7).all()
    assert not check_quality(a, min_genes=0).cells['few_genes'].any()
    with pytest.raises(GeneMatchError, match="None of the 40 genes of 'AnnData' is in coding: it wants ids like ACTB"): check_quality(a, coding=['ACTB'])

def test_mitochondrial_genes():
    a = _cohort()
    a.var['mt'] = np.arange(40) < 2
    assert check_quality(a, mito='mt').cells['n_mito'].tolist() == a.X.toarray()[:, :2].sum(1).tolist()
    assert check_quality(a, mito=genes[5:6]).cells['n_mito'].tolist() == a.X.toarray()[:, 5].tolist()
    with pytest.raises(GeneMatchError, match="None of the 1 genes of mito"): check_quality(a, mito=['ND9'])
    with pytest.raises(GeneMatchError, match="no column 'mito'"): check_quality(a, mito='mito')
    v = pd.DataFrame({'name': pd.Categorical(['MT-ND1', 'ACTB'])}, index=['1', '2'])
    assert mito_genes(v).tolist() == [True, False]

@pytest.mark.parametrize('column,kw', [('doublet', {}), ('Predicted_Doublet', {}), ('scDblFinder.class', {}), ('mine', dict(doublet='mine'))])
def test_marks_by_their_usual_names(column, kw):
    a = _cohort(**{column: ['doublet']*2 + ['singlet']*58})
    q = check_quality(a, **kw)
    assert np.flatnonzero(q.cells['doublet']).tolist() == [0, 1] and column in q.report().set_index('rule').loc['doublet', 'how']

def test_marks_that_are_none():
    with pytest.raises(CountsError, match=r"obs\['cell_line'\] of 'AnnData' says 'K562' at 'c0', which is neither true nor false"):
        check_quality(_cohort(cell_line=['K562']*60))
    assert not check_quality(_cohort(cell_line=['K562']*60), cell_line=False).cells['cell_line'].any()
    with pytest.raises(CountsError, match="says 'nan' at 'c1'"): check_quality(_cohort(doublet=[True] + [np.nan]*59))
    with pytest.raises(CountsError, match=r"no column 'x' for doublet \(it has a\): name one of them, or pass False"):
        check_quality(_cohort(a=1), doublet='x')
    with pytest.raises(CountsError, match="no column 'study' for dataset"): check_quality(_cohort(), dataset='study')
    with pytest.raises(GeneformerError, match='n_sd=0'): check_quality(_cohort(), n_sd=0)
    with pytest.raises(CountsError, match='no input'): check_quality(iter([]))
    with pytest.raises(CountsError, match='neither'): as_flags(pd.Series([2]), 'x')

def test_shares_of_tissues():
    t = ['heart']*40 + ['lung']*15 + [None]*5
    q = check_quality(_cohort(tissue=t))
    assert q.tissues['cells'].to_dict() == dict(heart=40, lung=15, unknown=5) and q.tissues['over'].tolist() == [True, False, False]
    assert q.cells['filter_pass'].all() and 'heart 67%' in repr(q)
    assert check_quality(_cohort(tissue=t), max_share=.7).tissues['over'].sum() == 0
    assert check_quality(_cohort(tissue=t), tissue=False).tissues.empty and check_quality(_cohort()).tissues.empty
    assert check_quality(_cohort(organ=t)).tissues['cells'].sum() == 60
    failing = _change(_cohort(tissue=t), 0, 500)
    assert check_quality(failing).tissues.loc['heart', 'cells'] == 39

def test_the_verdict_in_obs():
    a = _planted()
    a.obs['n_genes'] = 5
    q = check_quality(a)
    q.apply(a)
    assert a.obs['filter_pass'].dtype == bool and a.obs['filter_pass'].tolist() == q.cells['filter_pass'].tolist()
    assert a.obs['filter_reason'].iloc[[0, 3, 7]].tolist() == ['', 'depth', 'doublet'] and (a.obs['n_genes'] == 5).all()
    assert a.obs['mito_share'].tolist() == q.cells['mito_share'].tolist()
    for other in (a[::-1], a[:5], _cohort(prefix='x')):
        with pytest.raises(GeneformerError, match='None of the 1 inputs has these'): q.apply(other)

def test_the_verdict_of_several_inputs():
    a, b, c = _cohort(), _cohort(seed=1), _change(_cohort(prefix='x'), 2, 500)
    q = check_quality([a, b, c])
    q.apply(c)
    assert np.flatnonzero(~c.obs['filter_pass']).tolist() == [2]
    with pytest.raises(GeneformerError, match='2 of the 3 inputs has these 60 cells.*source='): q.apply(a)
    q.apply(a, source=list(q.sources)[1])
    assert a.obs['n_counts'].tolist() == b.X.toarray().sum(1).tolist()

def test_what_passes_is_what_medians_count(tmp_path):
    a = _planted()
    q = check_quality(a)
    keep = corpus_medians(a, keep=q.cells['filter_pass'])
    q.apply(a)
    a.write_h5ad(tmp_path/'a.h5ad')
    assert (keep.cells, keep.left_out) == (54, 6) and corpus_medians(tmp_path/'a.h5ad').table().equals(keep.table())

def test_logged_and_normalized_counts_are_refused():
    a = _cohort()
    a.X = a.X/3
    with pytest.raises(CountsError, match='whole numbers'): check_quality(a)
    assert isinstance(check_quality(a, fractional=True), Quality)
    assert isinstance(check_quality(sources(a, fractional=True)), Quality)

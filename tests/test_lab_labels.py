"Labels and donors as labs write them: missing ones take no part, types survive, rare states stop nothing"
import warnings
import numpy as np, pandas as pd, pytest
import geneformer_nb as gf
from geneformer_nb.core import GeneformerError, LeakError
from geneformer_nb.evaluate.splits import audit_split, blank_words, fold_donors, has_value, split_balanced, split_donors
from geneformer_nb.model.embed import group_codes, pick_cells, state_embeddings
from sentences import quiet, says

small = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)
START, GOAL = 'hypertrophic', 'non-failing'

@pytest.fixture(scope='module')
def cohort(): return gf.toy.simulate(120, 12, 60)
@pytest.fixture(scope='module')
def model(cohort): return gf.Geneformer.new('nano', gf.Vocabulary.from_counts(cohort, symbols='symbol', max_len=40), **small)
@pytest.fixture
def adata(cohort, model):
    a = cohort.copy()
    gf.pp.tokenize(a, model)
    return a

def tune(adata, model, label, **how):
    with quiet(): return gf.tl.finetune(adata, model, label=label, donor='donor', steps=2, **how)

def screen(adata, vocabulary, out, start=START, goal=GOAL, label='disease', **settings):
    few = dict(pretraining=dict(steps=2), finetuning=dict(steps=2), controls=(), max_cells=2, directions=('KO',), folds=2, report=False)
    with quiet(): return gf.tl.screen(adata, vocabulary, label=label, donor='donor', start=start, goal=goal, out=out, **few | settings)

# --- what is missing

@pytest.mark.parametrize('make', [list, pd.Categorical, lambda x: pd.array(x, dtype='string')], ids=['object', 'category', 'string'])
def test_blank_words_are_missing_in_any_case_and_type(make):
    words = ['D1', '', 'NaN', None, 'none', ' NA ', 'n/a', 'Unknown', 'POOLED', 'D2']
    column = pd.Series(make(words))
    assert has_value(column).tolist() == [w in ('D1', 'D2') for w in words]
    assert has_value(column, ['none', 'Unknown']).tolist() == [w in ('D1', 'D2', 'none', 'Unknown') for w in words]

def test_numbers_are_missing_where_they_are_nan():
    assert has_value(pd.Series([1., np.nan, 0.])).tolist() == [True, False, True]
    assert has_value(pd.Series([0, 1])).all() and has_value(pd.Series([False, True])).all()

@pytest.mark.parametrize('word', [None, '', 'unknown', 'pooled'])
def test_cells_without_a_donor_are_in_no_split(cohort, word):
    obs = cohort.obs.copy()
    obs['donor'] = obs.donor.astype(object)
    lost = np.arange(len(obs)) % 3 == 0
    obs.loc[lost, 'donor'] = word
    with pytest.warns(UserWarning, match="40 of 120 cells have no 'donor'"): split = split_donors(obs, 'donor', 'disease')
    assert ((split == '') == lost).all() and set(split[~lost]) == {'train', 'test'}
    assert audit_split(obs, split, 'donor', 'disease').donors.sum() == obs.donor[~lost].nunique()
    with quiet(): assert ((fold_donors(obs, 'donor', 'disease', 2) == -1) == lost).all()
    with quiet(): assert ((split_balanced(obs, 'donor', 'n_counts', 'disease', trials=3)[0] == '') == lost).all()

def test_a_split_with_cells_of_unknown_donors_is_refused(cohort):
    obs = cohort.obs.copy()
    obs['donor'] = obs.donor.astype(object)
    split = split_donors(obs, 'donor', 'disease')
    obs.iloc[:5, obs.columns.get_loc('donor')] = ''
    with says(GeneformerError, "'donor'", 'missing for 5'): audit_split(obs, split, 'donor', 'disease')

def test_no_donor_at_all_is_an_error(cohort):
    obs = cohort.obs.assign(donor='unknown')
    with says(GeneformerError, 'missing for every cell'): split_donors(obs, 'donor', 'disease')

def test_finetune_leaves_cells_without_a_donor_out(adata, model):
    lost = np.arange(adata.n_obs) % 4 == 0
    adata.obs['donor'] = adata.obs.donor.astype(object).where(~lost, '')
    with pytest.warns(UserWarning, match="30 of 120 cells have no 'donor'"):
        clf = gf.tl.finetune(adata, model, label='disease', donor='donor', steps=2)
    assert (clf.split[lost] == '').all() and len(clf.scores) == 3

def test_unlabeled_cells_take_no_part_baselines_included(adata, model):
    d = adata.obs.disease.astype(str)
    adata.obs['y'] = pd.Categorical(np.where(d == START, 'ill', np.where(d == 'dilated', None, 'well')))
    with pytest.warns(UserWarning, match="have no 'y': they are neither learned from nor tested on"):
        clf = gf.tl.finetune(adata, model, label='y', donor='donor', steps=2)
    assert set(clf.classes) == {'ill', 'well'} and (clf.split[(d == 'dilated').to_numpy()] == '').all()
    assert clf.scores.n_cells.nunique() == 1 and len(clf.scores) == 3
    gf.tl.predict(adata, clf)
    assert adata.obs.geneformer_pred.notna().all()

def test_a_blank_word_that_is_named_is_a_class(adata, model):
    d = adata.obs.disease.astype(str)
    adata.obs['y'] = np.where(d == GOAL, 'none', np.where(d == START, 'ill', 'unknown'))
    with pytest.warns(UserWarning, match=r"'none'.*classes=\[…\]"):
        with says(GeneformerError, 'two classes'): gf.tl.finetune(adata, model, label='y', donor='donor', steps=2)
    clf = tune(adata, model, 'y', classes=['none', 'ill'])
    assert clf.classes == ['none', 'ill'] and (clf.split[(d == 'dilated').to_numpy()] == '').all()

def test_states_and_groups_leave_blank_words_out(adata, model):
    d = adata.obs.disease.astype(str)
    adata.obs['y'] = np.where(d == GOAL, 'none', np.where(d == START, 'ill', 'unknown'))
    cells = gf.get.cells(adata, model.vocabulary)
    assert set(state_embeddings(cells, model, 'y')) == {'ill'}
    assert set(state_embeddings(cells, model, 'y', ['none', 'ill'])) == {'none', 'ill'}
    assert group_codes(cells.obs, 'y')[0] == ['ill']

def test_summarize_leaves_out_cells_without_a_donor(adata, model):
    shifts = gf.tl.perturb(adata, model, gf.KO('TF01'), label='disease', goal=GOAL, show=False)
    before = gf.tl.summarize(shifts, donor='donor')
    shifts.obs['donor'] = shifts.obs.donor.astype(object).where(shifts.obs.donor != shifts.obs.donor.iloc[0], 'unknown')
    with pytest.warns(UserWarning, match="have no 'donor': they are left out of the table"):
        after = gf.tl.summarize(shifts, donor='donor')
    assert after.n_donors.iloc[0] == before.n_donors.iloc[0] - 1

def test_several_tasks_know_blank_words(adata, model):
    from geneformer_nb.tasks.multitask import finetune_tasks
    d = adata.obs.disease.astype(str)
    adata.obs['y'], adata.obs['age'] = np.where(d == 'dilated', '', d), 5.
    adata.obs['age'] += np.arange(adata.n_obs) % 7
    with quiet(): m = finetune_tasks(model, gf.get.cells(adata, model.vocabulary), dict(y='classes', age='regression'), 'donor', steps=2)
    assert m.tasks['y'].classes == sorted({START, GOAL})

def test_numbers_with_blank_words_are_learned(adata, model):
    adata.obs['ef'] = [str(20 + i % 30) if i % 5 else '' for i in range(adata.n_obs)]
    with quiet(): m = gf.tasks.finetune(model, gf.get.cells(adata, model.vocabulary), 'ef', 'donor', head='regression', steps=2)
    assert (m.split == '').sum() == adata.n_obs//5

# --- types

@pytest.mark.parametrize('kind', ['integers', 'booleans', 'numbers', 'categories of integers', 'nullable integers'])
def test_predictions_have_the_type_of_the_labels(adata, model, kind, tmp_path):
    ill = (adata.obs.disease == START).to_numpy()
    adata.obs['y'] = {'integers': ill.astype(int), 'booleans': ill, 'numbers': ill + .5, 'categories of integers': pd.Categorical(ill.astype(int)),
                      'nullable integers': pd.array(ill.astype(int), dtype='Int64')}[kind]
    clf = tune(adata, model, 'y', baselines=False)
    clf.save(tmp_path/'clf')
    for c in (clf, tmp_path/'clf'):
        gf.tl.predict(adata, c)
        y, got = adata.obs.y.to_numpy(), adata.obs.geneformer_pred.to_numpy()
        assert (y == got).mean() == (adata.obs.y.astype(str) == adata.obs.geneformer_pred.astype(str)).mean() > 0
    adata.obs['same'] = clf.predict(gf.get.cells(adata, model.vocabulary))['predicted']
    assert (adata.obs.same.to_numpy() == adata.obs.geneformer_pred.to_numpy()).all()
    gf.pl.confusion(adata, label='y', split=None)
    del adata.uns['toy']
    with quiet(): adata.write_h5ad(tmp_path/'a.h5ad')

def test_classes_named_as_numbers_or_as_words_are_the_same(adata, model):
    adata.obs['y'] = (adata.obs.disease == START).to_numpy().astype(int)
    for classes in ([1, 0], ['1', '0'], np.array([1, 0])):
        clf = tune(adata, model, 'y', classes=classes, baselines=False)
        assert clf.task.values == [1, 0] and clf.classes == ['1', '0']

@pytest.mark.parametrize('start,goal', [(True, False), (1, 0), ('1', '0')])
def test_screen_between_numbers_and_booleans(adata, model, start, goal, tmp_path):
    adata.obs['y'] = (adata.obs.disease == START).to_numpy()
    if not isinstance(start, bool): adata.obs['y'] = adata.obs.y.astype(int)
    assert len(screen(adata, model.vocabulary, tmp_path, start, goal, 'y').table)

@pytest.mark.parametrize('where', [dict(kind='x'), dict(kind=['x', 'y'])])
def test_where_takes_the_cells_that_have_a_value(adata, model, where):
    adata.obs['kind'] = pd.Categorical(['x', None, 'y', '']*30)
    shifts = gf.tl.perturb(adata, model, gf.KO('TF01'), where=where, show=False)
    assert set(adata.obs.kind.iloc[shifts.cell]) <= {'x', 'y'} and len(shifts)

def test_where_compares_numbers_and_words(adata, model):
    adata.obs['n'], adata.obs['flag'] = np.arange(120) % 3, np.arange(120) % 2 == 0
    obs = adata.obs
    assert len(pick_cells(obs, dict(n=1))) == len(pick_cells(obs, dict(n='1'))) == 40
    assert len(pick_cells(obs, dict(flag=True))) == len(pick_cells(obs, dict(flag='True'))) == 60

# --- rare states

def test_a_third_state_of_one_donor_does_not_stop_a_screen(adata, model, tmp_path):
    adata.obs['disease'] = adata.obs.disease.astype(str)
    adata.obs.loc[adata.obs.donor == adata.obs.donor.iloc[2], 'disease'] = 'rare one'
    said = []
    s = screen(adata, model.vocabulary, tmp_path, say=said.append)
    assert any("'rare one'" in x and 'left out' in x for x in said) and len(s.table)

def test_cells_without_label_or_donor_do_not_stop_a_screen(adata, model, tmp_path):
    adata.obs['disease'] = adata.obs.disease.astype(object)
    adata.obs['donor'] = adata.obs.donor.astype(object)
    adata.obs.iloc[:6, adata.obs.columns.get_loc('disease')] = ''
    adata.obs.iloc[6:10, adata.obs.columns.get_loc('donor')] = 'unknown'
    said = []
    s = screen(adata, model.vocabulary, tmp_path, say=said.append)
    assert any('10 cells are left out' in x for x in said) and len(s.table)

def test_a_screen_towards_none(adata, model, tmp_path):
    adata.obs['y'] = adata.obs.disease.astype(str).replace({GOAL: 'none', 'dilated': 'unknown'})
    assert len(screen(adata, model.vocabulary, tmp_path, START, 'none', 'y', controls=()).table)

def test_categories_without_cells_change_nothing(adata, model, tmp_path):
    adata.obs['disease'] = pd.Categorical(adata.obs.disease.astype(str), [GOAL, START, 'dilated', 'never seen'])
    adata.obs['donor'] = pd.Categorical(adata.obs.donor.astype(str), [*pd.unique(adata.obs.donor.astype(str)), 'ghost'])
    assert 'never seen' not in tune(adata, model, 'disease').classes
    assert len(screen(adata, model.vocabulary, tmp_path).table)

@pytest.mark.parametrize('seed', range(60))
def test_a_split_of_a_rare_type_passes_its_own_audit(seed):
    donors = np.repeat([f'D{i}' for i in range(6)], 10)
    kind = np.where(np.arange(60) % 10 < 5, 'a', 'b').astype(object)
    kind[[0, 10]] = 'rare'
    obs = pd.DataFrame(dict(donor=donors, kind=kind), index=[f'c{i}' for i in range(60)])
    split = split_donors(obs, 'donor', 'kind', seed=seed)
    audit_split(obs, split, 'donor', 'kind')
    assert {'train', 'test'} == set(split[kind == 'rare'])

# --- pairs

def test_pairs_count_the_cells_that_lack_a_gene(adata, model):
    with pytest.warns(UserWarning, match=r'leaves out \d+ of 120 cells, because they lack a gene \(TF01 in'):
        shifts = gf.tl.perturb(adata, model, gf.KO('TF01') + gf.KO('TF02'), show=False)
    assert 0 < len(shifts) < 120

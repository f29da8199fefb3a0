"Evaluation: folds without leaks, baselines that see what they say, scores from first principles"
import numpy as np, pandas as pd, pytest, torch
from geneformer_nb.core import GeneformerError, LeakError, MissingDataError
from geneformer_nb.tasks.compare import Comparison, cross_validate_cells, cross_validate_genes, fold_genes, untrained
from geneformer_nb.evaluate.splits import audit_split, fold_donors, split_balanced, split_donors
from geneformer_nb.evaluate.baselines import cell_baselines, predict_proba, learners, gene_baselines, gene_learners, gene_matrix
from geneformer_nb.evaluate.metrics import calibration, auc_draws, gene_auc
from geneformer_nb.tasks.genes import finetune_genes, gene_labels
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer, weights_digest
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.toy import simulate
from sentences import says

SHAPE = dict(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32)

@pytest.fixture(scope='module')
def cohort(): return simulate(n_cells=120, n_donors=12, n_genes=80, seed=0)
@pytest.fixture(scope='module')
def vocab(cohort): return Vocabulary.from_counts(cohort, symbols='symbol', name='toy', max_len=32)
@pytest.fixture(scope='module')
def cells(cohort, vocab): return tokenize(cohort, vocab, counts=True)
@pytest.fixture(scope='module')
def model(vocab): return Geneformer.new('nano', vocab, **SHAPE)
@pytest.fixture(scope='module')
def classes(vocab): return {'low': list(vocab.genes[:12]), 'high': list(vocab.genes[20:32])}
@pytest.fixture(scope='module')
def split(cohort): return split_donors(cohort.obs, 'donor', 'disease')

# --- cells: baselines and calibration

def test_baselines_see_training_cells_only(cohort, split):
    "Test cells changed beyond recognition: what is said of the others stays as it was"
    changed, te = cohort.copy(), np.flatnonzero(split == 'test')
    changed.X = changed.X.toarray(); changed.X[te[0]] = changed.X[te[0]][::-1] * 3
    for name in learners():
        a, b = (cell_baselines(x, 'disease', split, 'donor', which=[name])[1][name] for x in (cohort, changed))
        pd.testing.assert_frame_equal(a.iloc[1:], b.iloc[1:])

def test_baselines_are_what_they_are_called(cohort, split):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    table, pred = cell_baselines(cohort, 'disease', split, 'donor', which='all')
    assert list(table.index) == list(pred) == list(learners())
    y, tr = cohort.obs['disease'].astype(str).to_numpy(), split == 'train'
    most = pd.Series(y[tr]).value_counts().sort_index().idxmax()  # the first of equals
    assert (pred['majority class']['predicted'] == most).all()
    X = cohort.X.toarray().astype(np.float64)
    d = np.log1p(np.stack([X.sum(1), (X > 0).sum(1)], 1))
    s = StandardScaler().fit(d[tr])
    want = LogisticRegression().fit(s.transform(d[tr]), y[tr]).predict_proba(s.transform(d[~tr]))
    np.testing.assert_allclose(pred['counts and detected genes'].drop(columns='predicted'), want, atol=1e-3)

def test_chances_of_a_machine_rank_as_its_margins():
    from sklearn.svm import SVC
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    for labels in (y, y > 0):
        fit = SVC().fit(X, labels)
        p = predict_proba(fit, X)
        np.testing.assert_allclose(p.sum(1), 1)
        assert (fit.classes_[p.argmax(1)] == fit.predict(X)).mean() > .9  # its own votes break ties another way

def test_calibration_by_hand():
    t = calibration(['a', 'a', 'b', 'b'], ['a', 'a', 'a', 'b'], [.95, .85, .95, .3], bins=2)
    assert list(t['n']) == [1, 3] and t['accuracy'].tolist() == [1., 2 / 3]
    assert abs(t.attrs['error'] - (.7 + 3 * (2.75 / 3 - 2 / 3)) / 4) < 1e-12
    for bad in ([.5, np.nan, .2, .1], [-.1] * 4):
        with says(GeneformerError, 'between 0 and 1'): calibration(list('aaaa'), list('aaaa'), bad)

def test_the_best_split_is_kept(cohort):
    "The official code takes the last trial when none passes"
    obs = cohort.obs.assign(age=cohort.obs['donor'].cat.codes.astype(float) ** 3)
    best = [float(split_balanced(obs, 'donor', ['age', 'batch'], 'disease', trials=n, least=0.)[1]['p'].min()) for n in (1, 5, 40)]
    assert best == sorted(best) and best[0] < best[2]
    a, b = (split_balanced(obs, 'donor', 'age', 'disease')[0] for _ in range(2))
    assert (a == b).all() and audit_split(obs, a, 'donor', 'disease')['donors'].sum() == 12
    with pytest.warns(UserWarning, match='age'): split_balanced(obs, 'donor', 'age', trials=1, least=1.1)
    assert split_balanced(obs.assign(age=1.), 'donor', 'age')[1]['p'].iloc[0] == 1.

def test_a_third_of_the_donors_whatever_the_label():
    "Cell types vary inside a donor: rare ones must be met in the test, and not fill it with donors"
    rng = np.random.default_rng(0)
    types = np.where(rng.random(900) < .7, 'T', rng.choice([f'rare{i}' for i in range(8)], 900))
    obs = pd.DataFrame(dict(donor=np.arange(900) % 12, cell_type=types))
    for seed in range(5):
        split = split_donors(obs, 'donor', 'cell_type', seed=seed)
        assert obs['donor'][split == 'test'].nunique() in (4, 5)
        assert set(obs['cell_type'][split == 'test']) == set(types) == set(obs['cell_type'][split == 'train'])

# --- genes: features, baselines, areas

def test_gene_matrix_by_hand(cells, vocab):
    M, C = gene_matrix(cells).toarray(), gene_matrix(cells, 'counts').toarray()
    for i in (0, 7, 119):
        c = cells[i].tokens
        np.testing.assert_array_equal(M[c, i], vocab.max_len - np.arange(len(c)))
        assert (M[:, i] > 0).sum() == len(c)
        np.testing.assert_allclose(C[c, i], cells.lists['counts'][0][cells.offsets[i]:cells.offsets[i + 1]], rtol=1e-6)

def test_special_tokens_are_no_genes(cohort):
    v = Vocabulary.from_counts(cohort, symbols='symbol', name='framed', max_len=34, cls_token=True)
    M = gene_matrix(tokenize(cohort, v)).toarray()
    assert not M[:len(v.specials)].any() and M.max() == v.max_len

@pytest.mark.parametrize('name', list(gene_learners()))
def test_labels_of_test_genes_are_not_looked_at(cells, vocab, classes, name):
    labels = gene_labels(vocab, classes)
    side = pd.Series(np.where(np.arange(len(labels)) % 3, 'train', 'test'), labels.index)
    swapped = labels.copy()
    held = side == 'test'
    swapped[held] = labels[held].map(dict(low='high', high='low'))
    a, b = (gene_baselines(cells, l, side, [name])[name] for l in (labels, swapped))
    pd.testing.assert_frame_equal(a, b[a.columns])
    assert list(a.index) == list(labels.index[held])

def test_area_with_weights_is_sklearns():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(1)
    y, p, w = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 9, rng.integers(1, 50, 200)
    assert abs(gene_auc(y, np.stack([1 - p, p], 1), w) - roc_auc_score(y, p, sample_weight=w)) < 1e-12
    assert np.isnan(gene_auc([1, 1], np.array([[.2, .8], [.3, .7]])))

def test_drawn_areas_are_those_of_drawn_genes():
    "Against rows really repeated; the same draws for another model"
    rng = np.random.default_rng(0)
    t, f, p, q = rng.integers(0, 3, 60), rng.integers(0, 2, 60), *(rng.dirichlet(np.ones(3), 60) for _ in range(2))
    d = auc_draws(t, p, 400, 3, f)
    both = np.mean([gene_auc(t[f == k], p[f == k]) for k in (0, 1)])
    assert d.shape == (400,) and abs(np.median(d) - both) < .03
    np.testing.assert_array_equal(d, auc_draws(t, p, 400, 3, f))
    right = np.eye(3)[t]
    np.testing.assert_array_equal(auc_draws(t, right, 50, 3, f), 1.)
    assert abs(np.corrcoef(d, auc_draws(t, .9 * p + .1 * q, 400, 3, f))[0, 1]) > .9
    one = auc_draws(np.array([0, 0, 1]), np.array([[.9, .1], [.4, .6], [.5, .5]]), 4000)
    assert set(np.unique(one)) == {0., .5, 1.} and abs((one == .5).mean() - .5) < .05

# --- folds

def test_every_gene_is_held_out_once(vocab, classes):
    labels = gene_labels(vocab, classes)
    f = fold_genes(labels, 4)
    assert set(f) == {0, 1, 2, 3} and (pd.crosstab(labels, f) == 3).all(axis=None)
    assert (f == fold_genes(labels, 4)).all() and (f != fold_genes(labels, 4, seed=1)).any()
    with says(LeakError, 'fewer folds'): fold_genes(labels, 13)

def test_genes_and_donors_are_disjoint(model, cells, classes, monkeypatch):
    "In each fold no training gene is asked, and no training donor is read"
    import geneformer_nb.tasks.compare as module
    seen, plain = [], finetune_genes
    def watch(enc, cells, listed, **kw):
        clf = plain(enc, cells, listed, **kw)
        donors = {s: set(cells.obs['donor'][kw['cell_split'] == s]) for s in ('train', 'test')}
        assert not donors['train'] & donors['test'] and all(donors.values())
        assert set(clf.tested.index) <= set(kw['split'].index[kw['split'] == 'test'])
        seen.append(donors['test'])
        return clf
    monkeypatch.setattr(module, 'finetune_genes', watch)
    c = cross_validate_genes(model, cells, classes, folds=3, cells_by='donor', blank=False, steps=1)
    assert len(set.union(*seen)) == 12 and sum(map(len, seen)) == 12
    assert c.of('pretrained')['id'].is_unique
    with says(GeneformerError, 'choose from'): c.table({'oracle': .9})

def test_genes_are_compared_on_the_same_answers(model, cells, classes):
    c = cross_validate_genes(model, cells, classes, folds=3, steps=1)
    assert len(c.models) == 2 + len(gene_learners())
    want = c.of('pretrained')[['fold', 'id', 'truth', 'n']].reset_index(drop=True)
    for m in c.models: pd.testing.assert_frame_equal(c.of(m)[['fold', 'id', 'truth', 'n']].reset_index(drop=True), want)
    row = c.of('SVM, ranks')
    by_fold = [gene_auc(c.truth(t), c.class_probabilities(t)) for _, t in row.groupby('fold')]
    assert abs(c.scores.auc_genes['SVM, ranks'] - np.mean(by_fold)) < 1e-12
    per = c.folds[c.folds['model'] == 'SVM, ranks']
    assert abs(c.scores.auc_tokens['SVM, ranks'] - np.average(per['auc_tokens'], weights=per['n_tokens'])) < 1e-12
    a, b = c.difference('pretrained', 'SVM, ranks'), c.difference('SVM, ranks', 'pretrained')
    assert np.isclose(a['difference'], -b['difference']) and np.isclose(a['ci_low'], -b['ci_high']) and a['unit'] == 'gene'

def test_same_call_same_answer(model, cells, classes):
    a, b = (cross_validate_genes(model, cells, classes, folds=2, baselines=(), steps=2, cells_by='cells') for _ in range(2))
    pd.testing.assert_frame_equal(a.predictions, b.predictions, check_exact=True)

def test_untrained_has_the_shape_and_nothing_else(model):
    a, b = untrained(model), untrained(model, 1)
    assert a.config.to_dict() == model.config.to_dict() and weights_digest(a) != weights_digest(b) != weights_digest(model)
    assert weights_digest(untrained(model)) == weights_digest(a)
    torch.manual_seed(5); x = torch.rand(1)
    torch.manual_seed(5); untrained(model); assert torch.equal(torch.rand(1), x)

# --- cells

def test_every_cell_is_answered_once_by_donors_unseen(model, cells, cohort):
    c = cross_validate_cells(model, cells, 'disease', 'donor', folds=2, adata=cohort, baselines=['majority class'], steps=2)
    for m in c.models:
        rows = c.of(m)
        assert rows['id'].is_unique and len(rows) == 120
        assert (rows.groupby('donor')['fold'].nunique() == 1).all()
        assert (rows['truth'] == cohort.obs['disease'].astype(str).loc[rows['id']].to_numpy()).all()
    assert c.by_donor()['n_cells'].sum() == 120
    d = c.difference('pretrained', 'majority class')
    assert d['n'] == 12 and d['unit'] == 'donor'

def test_two_of_three_classes_and_one_donor_at_a_time(model, cells):
    c = cross_validate_cells(model, cells, 'disease', 'donor', folds='loo', classes=['dilated', 'non-failing'], blank=False, steps=1)
    assert c.predictions['fold'].nunique() == 8 and set(c.predictions['truth']) == {'dilated', 'non-failing'}

def test_cells_dealt_by_hand_have_no_interval_over_donors(model, cells):
    at = np.arange(len(cells)) % 2
    c = cross_validate_cells(model, cells, 'disease', folds=at, blank=False, steps=1)
    assert c.scores.n_donors.iloc[0] == 0 and np.isnan(c.scores.ci_low.iloc[0])
    assert c.difference('pretrained', 'pretrained')['unit'] == 'cell'
    with says(GeneformerError, 'no donors'): c.by_donor()
    with says(LeakError, 'donor'): cross_validate_cells(model, cells, 'disease', 'donor', folds=np.arange(len(cells)) % 7, steps=1)
    with says(GeneformerError, 'Name the obs column'): cross_validate_cells(model, cells, 'disease')
    with says(GeneformerError, "no column 'sick'"): cross_validate_cells(model, cells, 'sick', 'donor')

def test_saved_and_loaded(model, cells, tmp_path):
    c = cross_validate_cells(model, cells, 'disease', 'donor', folds=2, blank=False, steps=1)
    again = Comparison.load(c.save(tmp_path/'c'))
    pd.testing.assert_frame_equal(again.scores, c.scores)
    assert again.about == c.about and repr(again) == repr(c)
    with says(MissingDataError, 'comparison.json'): Comparison.load(tmp_path)

# --- sentences of scores

def test_answers_that_are_none():
    p = np.array([[.2, .8], [.7, .3], [.4, .6]])
    for f in (gene_auc, auc_draws):
        for truth, q, text in (['a', 'b', 'a'], p, 'number of each'), ([0, -1, 1], p, 'number of each'), ([0, 1, 2], p, 'number of each'), ([0, 1, 1], p[:, 1], 'two for a yes or no'), \
                ([0, 1, 1], np.where(p > .7, np.nan, p), 'missing'), ([0, 1], p, 'shape'):
            with says(GeneformerError, text): f(truth, q)

def test_plots_of_scores_say_what_is_wrong():
    from geneformer_nb.plots.scores import calibration_plot, roc, score_plot
    t = pd.DataFrame(dict(donor_accuracy=[.8, .6], accuracy=[.7, .9], ci_low=[.7, .5], ci_high=[.9, .7]), ['a', 'b'])
    with says(GeneformerError, "'donor_accuracy' and not of 'accuracy'"): score_plot(t, 'accuracy')
    ax = score_plot(t.assign(donor_accuracy=[np.nan, .6]), 'donor_accuracy', mark='b')
    assert [x.get_text() for x in ax.get_yticklabels()] == ['a', 'b']  # one without a score is not the best
    answers = pd.DataFrame({'model': 'a', 'truth': ['x', 'y'], 'predicted': ['x', 'y'], 'p(x)': [.9, .2], 'p(y)': [.1, .8]})
    for draw in (roc, calibration_plot):
        with says(GeneformerError, "No model is called 'b'"): draw(answers, models=['b'])
    with says(GeneformerError, 'n'): roc(answers, weights='n')

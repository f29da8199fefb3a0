"Fine-tuning: what the official classifiers got wrong, and what a page has no room for"
import copy, sys, warnings
import geneformer_nb as gf
import numpy as np, pandas as pd, pytest, torch
from geneformer_nb.tasks import finetuning as module
from geneformer_nb.tasks.adapters import add_lora, load_lora, merge_lora, quantize, save_lora, weight_bytes
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.core import CountsError, GeneformerError, LeakError, MissingDataError
from geneformer_nb.evaluate.baselines import log_cp10k
from geneformer_nb.evaluate.splits import split_donors
from geneformer_nb.tasks.finetuning import CellClassifier, CellModel, finetune, freeze
from geneformer_nb.tasks.genes import GeneClassifier, audit_genes, finetune_genes, gene_auc, gene_labels, split_by_gene
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.tasks.heads import AttentionPool, Classes, Ordinal, Regression
from geneformer_nb.model.bert import Geneformer, pool_cells, weights_digest
from geneformer_nb.tasks.multitask import MultiTask, finetune_tasks
from geneformer_nb.tasks.search import search_settings
from geneformer_nb.data.tokenizer import tokenize
from geneformer_nb.data.toy import simulate
from sentences import quiet, says

SHAPE = dict(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32)
peft = pytest.mark.skipif(__import__('importlib.util').util.find_spec('peft') is None,
    reason="peft is not installed: pip install 'geneformer_nb[tune]'")
optuna = pytest.mark.skipif(__import__('importlib.util').util.find_spec('optuna') is None,
    reason="optuna is not installed: pip install 'geneformer_nb[tune]'")
small = pytest.mark.skipif(__import__('importlib.util').util.find_spec('bitsandbytes') is None,
    reason="bitsandbytes is not installed: pip install 'geneformer_nb[quant]'")

@pytest.fixture(scope='module')
def cohort(): return simulate(n_cells=120, n_donors=12, n_genes=80, seed=0)
@pytest.fixture(scope='module')
def vocab(cohort): return Vocabulary.from_counts(cohort, symbols='symbol', name='toy', max_len=32)
@pytest.fixture
def cells(cohort, vocab):
    out = tokenize(cohort, vocab)
    out.obs = out.obs.copy()
    return out
@pytest.fixture(scope='module')
def model(vocab): return Geneformer.new('nano', vocab, **SHAPE)

def tune(model, cells, label='disease', donor='donor', steps=2, **kw):
    return finetune(model, cells, label, donor, steps=steps, **kw)
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.hf.state_dict().values(), b.hf.state_dict().values()))

# --- frozen layers

@pytest.mark.parametrize('pool', ['mean', 'attention'])
def test_nothing_is_recorded_below_frozen_layers(model, cells, pool):
    m = copy.deepcopy(model)
    freeze(m, 1)
    bert, seen = m.hf.base_model, {}
    for name, part in dict(embeddings=bert.embeddings, first=bert.encoder.layer[0],
            second=bert.encoder.layer[1]).items():
        part.register_forward_hook(lambda mod, i, o, name=name: seen.__setitem__(name, o[0] if isinstance(o, tuple)
            else o))
    out = CellClassifier(m, ['a', 'b'], pool).logits(cells[:6].tokens, cells[:6].offsets)
    assert [seen[k].grad_fn is None for k in ('embeddings', 'first', 'second')] == [True, True, False]
    out.sum().backward()
    assert all(p.grad is None for p in [*bert.embeddings.parameters(), *bert.encoder.layer[0].parameters()])

def test_training_leaves_frozen_layers_and_the_model_given_alone(model, cells):
    before = weights_digest(model)
    clf = tune(model, cells, freeze_layers=1, steps=3, lr=.01)
    assert weights_digest(model) == before
    for (k, a), b in zip(clf.encoder.hf.state_dict().items(), model.hf.state_dict().values()):
        if 'embeddings' in k or 'layer.0.' in k: assert torch.equal(a, b), k
    assert not torch.equal(clf.encoder.hf.base_model.encoder.layer[1].output.dense.weight,
        model.hf.base_model.encoder.layer[1].output.dense.weight)

def test_the_same_seed_gives_the_same_model(model, cells):
    a, b, c = (tune(model, cells, split=split_donors(cells.obs, 'donor', 'disease'), seed=s) for s in (0, 0, 1))
    assert same(a.encoder, b.encoder) and not same(a.encoder, c.encoder)

# --- pooling

def test_attention_is_over_the_cells_own_tokens():
    torch.manual_seed(0)
    pool, x = AttentionPool(8), torch.randn(20, 8)
    torch.nn.init.normal_(pool.score.weight)
    many = pool(x, [0, 3, 3, 15, 20])
    for i, (a, b) in enumerate([(0, 3), (3, 3), (3, 15), (15, 20)]):
        if a == b: assert many[i].isnan().all(); continue
        w = (x[a:b] @ pool.score.weight[0]).softmax(0)
        torch.testing.assert_close(many[i], w @ x[a:b])
    w, seg = pool.weights(x, [0, 3, 3, 15, 20])
    torch.testing.assert_close(torch.zeros(4).index_add(0, seg, w)[[0, 2, 3]], torch.ones(3))

def test_untrained_attention_is_the_mean():
    x = torch.randn(9, 4)
    torch.testing.assert_close(AttentionPool(4)(x, [0, 4, 9]), pool_cells(x, [0, 4, 9], 'mean'))

def test_position_0_is_refused_without_cls(model, cells):
    with says(GeneformerError, "'cls'", 'first token is a gene'): tune(model, cells, pool='cls')

def test_cls_pool_where_there_is_a_cls(cohort, vocab):
    two = Vocabulary(vocab.genes, vocab.medians, cls=True, max_len=32)
    c = tokenize(cohort, two)
    clf = tune(Geneformer.new('nano', two, **SHAPE), c)
    assert clf.pool == 'cls' and tune(Geneformer.new('nano', two, **SHAPE), c,
        pool='attention').predict(c).notna().all(axis=None)

# --- labels

def test_kinds_of_label_columns(model, cells):
    well = cells.obs['disease'].astype(str) == 'non-failing'
    for col, want in ((well, ['False', 'True']), (well.astype(int), ['0', '1']),
            (well.map({True: 'b', False: 'a'}).astype('category'), ['a', 'b'])):
        cells.obs['well'] = col
        assert tune(model, cells, 'well').classes == want

def test_classes_keep_the_order_given_and_others_are_left_out(model, cells):
    clf = tune(model, cells, classes=['non-failing', 'dilated'])
    assert clf.classes == ['non-failing', 'dilated']
    assert set(clf.split[(cells.obs['disease'] == 'hypertrophic').to_numpy()]) == {''}
    assert tune(model, cells).classes == sorted(set(cells.obs['disease']))
    with says(GeneformerError, "'healthy'", 'hypertrophic'): tune(model, cells, classes=['non-failing', 'healthy'])

def test_missing_labels_are_left_out_and_counted(model, cells):
    cells.obs['disease'] = cells.obs['disease'].astype(object).where(np.arange(len(cells)) % 4 > 0)
    with pytest.warns(UserWarning, match='30 of 120 cells have no'): clf = tune(model, cells)
    assert set(clf.split[::4]) == {''} and clf.audit.cells.sum() == 90 and 'nan' not in clf.classes
    cells.obs['disease'] = None
    with says(GeneformerError, 'missing for every cell'): tune(model, cells)

def test_a_class_called_predicted(model, cells, cohort, tmp_path):
    cells.obs['odd'] = np.where(cells.obs['disease'] == 'dilated', 'predicted', 'measured')
    clf = tune(model, cells, 'odd')
    p = clf.predict(cells)
    assert p.columns.is_unique and set(p['predicted']) <= {'predicted', 'measured'}
    np.testing.assert_allclose(p[clf.columns].sum(1), 1, rtol=1e-5)
    assert CellModel.load(clf.save(tmp_path/'c'), 'cpu').predict(cells).equals(p)

def test_a_class_of_the_test_cells_only(model, cells):
    split = np.where(cells.obs['disease'] == 'dilated', 'test',
        np.where(cells.obs['donor'] == cells.obs['donor'].iloc[0], 'test', 'train'))
    with says(LeakError, "'dilated'", 'never in train'): tune(model, cells, donor=None, split=split)
    with says(LeakError, "'dilated'"): finetune_tasks(model, cells, ['disease'], split=split, steps=1)

def test_rare_classes_and_caps(model, cells):
    names = cells.obs['disease'].astype(str).to_numpy().copy()
    cells.obs['some'] = np.where((np.arange(120) < 3), 'rare', names)
    clf = tune(model, cells, 'some', drop_rare=.05, max_per_class=10)
    assert clf.classes == sorted(set(names)) and set(clf.split[:3]) == {''}
    counts = pd.Series(names[clf.split == 'train']).value_counts()
    assert counts.max() == 10 and (clf.split == 'test').sum() > 20

@pytest.mark.parametrize('balance', [True, False, None, 'weights', 'sampling'])
def test_balance(model, cells, balance): assert tune(model, cells, balance=balance).scores.n_cells.iloc[0] > 0

def test_balance_words(model, cells):
    cells.obs['two'] = np.where(cells.obs['disease'] == 'dilated', 'd', 'other')
    split = split_donors(cells.obs, 'donor', 'disease')
    by = {b: tune(model, cells, 'two', split=split, balance=b, steps=3, lr=.01).encoder for b in (True, 'weights',
        False, None, 'sampling')}
    assert same(by[True], by['weights']) and same(by[False], by[None]) and not same(by[True],
        by[False]) and not same(by['sampling'], by[False])
    with says(GeneformerError, 'sampling', "'evenly'"): tune(model, cells, balance='evenly')

def test_drawn_cells_are_even():
    y = np.repeat([0., 1, 2], [90, 9, 1])
    n = np.bincount(y[module._drawn(np.arange(100), y, 3000, 0)].astype(int))
    assert n.min() > 850 and np.array_equal(module._drawn(np.arange(100), y, 50, 1), module._drawn(np.arange(100), y,
        50, 1))

def test_counts_that_are_none_fail_before_the_training(model, cells, cohort, monkeypatch):
    worn = cohort.copy(); worn.X = log_cp10k(cohort)
    def never(*a, **kw): raise AssertionError('it trained first')
    monkeypatch.setattr(module, 'train_loop', never)
    with says(CountsError, 'log'): tune(model, cells, adata=worn)

def test_a_misspelt_argument_is_named(model, cells, vocab):
    with says(GeneformerError, 'freeze_layer', "did you mean 'freeze_layers'"): tune(model, cells, freeze_layer=1)
    with says(GeneformerError, "did you mean 'weights'"): finetune_tasks(model, cells, ['disease'], 'donor', weight=1)
    with says(GeneformerError, "did you mean 'cell_split'"): finetune_genes(model, cells, gene_classes(vocab), cell_splits=1)

# --- heads

def test_regression_knows_only_training_labels(model, cells, cohort):
    y = np.log10(cells.obs['n_counts'].to_numpy(float))
    split = split_donors(cells.obs, 'donor', 'disease')
    cells.obs['depth'] = np.where(split == 'test', y + 1000, y)
    clf = tune(model, cells, 'depth', head='regression', split=split)
    assert type(clf) is CellModel and abs(clf.task.mean - y[split == 'train'].mean()) < 1e-6
    cohort = cohort.copy(); cohort.obs['depth'] = y; cells.obs['depth'] = y
    table = tune(model, cells, 'depth', head='regression', adata=cohort).scores
    assert list(table.index)[1:] == ['training mean', 'ridge regression, log CP10k'] and table.notna()['r2'].all()
    with says(GeneformerError, 'no numbers', 'classes'): tune(model, cells, 'disease', head='regression')

def test_ordinal_head(model, cells):
    steps = ['non-failing', 'hypertrophic', 'dilated']
    clf = tune(model, cells, head='ordinal', classes=steps, steps=4)
    p = clf.predict(cells)
    np.testing.assert_allclose(p[steps].sum(1), 1, rtol=1e-4)
    np.testing.assert_allclose(p['expected_step'], p[steps] @ [0, 1, 2], rtol=1e-4)
    assert (clf.head.cuts().diff() > 0).all()
    with says(GeneformerError, 'order', 'classes=['): tune(model, cells, head='ordinal')

def test_ordinal_likelihood_is_that_of_the_differences():
    h = Ordinal(list('abcd')); m = h.module(3); x = torch.randn(50, 3) * 3
    above = torch.cat([torch.ones(50, 1), m(x).sigmoid(), torch.zeros(50, 1)], 1).double()
    torch.testing.assert_close(h.link(m(x)).double(), above[:, :-1] - above[:, 1:], atol=2e-6, rtol=1e-3)

@pytest.mark.parametrize('head', ['classes', 'regression', 'ordinal'])
@pytest.mark.parametrize('pool', ['mean', 'attention'])
def test_saved_and_loaded_to_the_bit(model, cells, tmp_path, head, pool):
    label = 'n_counts' if head == 'regression' else 'disease'
    clf = tune(model, cells, label, head=head, pool=pool, classes=['non-failing', 'hypertrophic', 'dilated']
        if head == 'ordinal' else None)
    again = CellModel.load(clf.save(tmp_path/'c'), 'cpu')
    pd.testing.assert_frame_equal(again.predict(cells), clf.predict(cells), check_exact=True)
    assert (again.label, again.pool, type(again)) == (label, pool, type(clf))

def test_a_saved_classifier_of_before_still_loads(model, cells, tmp_path):
    from safetensors.torch import save_file
    from geneformer_nb.core import write_json
    clf = tune(model, cells)
    clf.save(tmp_path)
    save_file({k: v.contiguous() for k, v in clf.head.state_dict().items()}, tmp_path/'head.safetensors')
    write_json(tmp_path/'classes.json', dict(classes=clf.classes, pool=clf.pool))
    assert CellClassifier.load(tmp_path, 'cpu').predict(cells).equals(clf.predict(cells))

def test_a_head_that_does_not_fit_is_an_error(model, cells, tmp_path):
    from safetensors.torch import save_file
    clf = tune(model, cells, pool='attention')
    clf.save(tmp_path)
    save_file({f'cell_head.{k}': v for k, v in clf.head.state_dict().items()},
        tmp_path/'head.safetensors')  # the pool is lost, as in the official search
    with says(MissingDataError, 'head.safetensors', 'save'): CellModel.load(tmp_path, 'cpu')

# --- predictions

def test_one_prediction_a_cell_in_order(model, cells):
    clf = tune(model, cells)
    rows = np.random.default_rng(0).permutation(len(cells))[:101]  # no whole number of batches
    p = clf.predict(cells[rows], budget=64)
    assert len(p) == 101 and list(p.index) == list(cells.obs.index[rows])
    np.testing.assert_allclose(p[clf.classes], clf.predict(cells)[clf.classes].iloc[rows], atol=1e-5)

def test_an_empty_cell_gets_no_prediction(model, cells, vocab):
    some = Cells(*ragged([[5, 6], [], [7]]), vocabulary=vocab)
    p = tune(model, cells).predict(some)
    assert p.iloc[1].isna().all() and p.iloc[[0, 2]].notna().all(axis=None)

def test_predict_writes_classes_and_numbers(model, cells, cohort):
    clf, new = tune(model, cells), cohort[::-1].copy()
    new.obs['filter_pass'] = 0  # these cells shall not be dropped silently
    gf.pp.tokenize(new, clf)
    gf.tl.predict(new, clf)
    want = clf.predict(cells).loc[new.obs_names]
    assert (new.obs['geneformer_pred'].astype(str) == want['predicted']).all()
    np.testing.assert_allclose(new.obsm['geneformer_proba'], want[clf.classes], atol=1e-5)
    gf.tl.predict(new, tune(model, cells, 'n_counts', head='regression'), key_added='depth')
    assert new.obs['depth_pred'].dtype.kind == 'f' and 'depth_proba' not in new.obsm

# --- genes

def gene_classes(vocab, n=10): return {'low': list(vocab.genes[:n]), 'high': list(vocab.genes[n:2*n])}

def test_no_gene_on_both_sides(model, cells, vocab):
    labels = gene_labels(vocab, gene_classes(vocab))
    for seed in range(5):
        side = split_by_gene(labels, seed=seed)
        assert set(side) == {'train', 'test'} and len(side) == 20 and side.index.is_unique
    g = vocab.genes[0]
    with says(LeakError, g, 'one side'):
        finetune_genes(model, cells, gene_classes(vocab), split={g: 'train', vocab.symbol(g).lower(): 'test'}, steps=1)
    with says(GeneformerError, 'two classes'):
        finetune_genes(model, cells, {'a': [g, vocab.genes[1]], 'b': [g]}, steps=1)

def test_only_training_genes_are_asked(model, cells, vocab, monkeypatch):
    asked, plain = set(), GeneClassifier.loss
    def watch(self, tokens, offsets, labels, weight=None):
        asked.update(tokens[labels >= 0].tolist()); return plain(self, tokens, offsets, labels, weight)
    monkeypatch.setattr(GeneClassifier, 'loss', watch)
    clf = finetune_genes(model, cells, gene_classes(vocab), steps=4)
    train = set(vocab.token(list(clf.split.index[clf.split == 'train'])).tolist())
    assert asked and asked <= train

def test_cells_without_a_labeled_gene_are_dropped_and_counted(model, vocab):
    c = Cells(*ragged([[2, 30, 31], [40, 41], [], [3, 12], [4, 13, 14]] * 4), vocabulary=vocab)
    clf = finetune_genes(model, c, {'a': vocab.genes[:3], 'b': vocab.genes[10:13]}, split={g: s for i in (0, 10)
        for g, s in zip(vocab.genes[i:i+3], ('train', 'train', 'test'))} , steps=2)
    assert clf.dropped == 8
    with says(GeneformerError, 'holds a training gene'):
        finetune_genes(model, c[[1]], {'a': vocab.genes[:3], 'b': vocab.genes[10:13]}, steps=1)

def test_lost_genes_are_listed(model, cells, vocab):
    classes = gene_classes(vocab); classes['low'] = [*classes['low'], 'ENSG00000999999', classes['low'][0]]
    clf = finetune_genes(model, cells, classes, steps=1)
    assert clf.lost == ['ENSG00000999999'] and len(clf.labels) == 20

def test_held_out_donors_and_the_audit(model, cells, vocab):
    clf = finetune_genes(model, cells, gene_classes(vocab), donor='donor', steps=1)
    assert clf.audit.donors.sum() == 12
    assert set(finetune_genes(model, cells, gene_classes(vocab), steps=1).audit.donors) == {'shared'}

def test_gene_classifier_saved_and_loaded(model, cells, vocab, tmp_path):
    clf = finetune_genes(model, cells, gene_classes(vocab), steps=2)
    again = GeneClassifier.load(clf.save(tmp_path/'g'), 'cpu')
    pd.testing.assert_frame_equal(again.predict_genes(cells), clf.predict_genes(cells), check_exact=True)
    pd.testing.assert_frame_equal(again.predict_tokens(cells[:9]), clf.predict_tokens(cells[:9]), check_exact=True)

def test_gene_auc_is_sklearns():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 9
    assert abs(gene_auc(y, np.stack([1 - p, p], 1)) - roc_auc_score(y, p)) < 1e-12

# --- several tasks

def test_pretrained_weights_are_really_used(model, cells):
    "The official multi-task model was built from the configuration: random layers, then frozen"
    tasks = {'cell_type': Classes(['a', 'b']), 'disease': Classes(['c', 'd'])}
    builds = [MultiTask(copy.deepcopy(model), tasks, seed=s) for s in (0, 1)]
    assert all(weights_digest(b.encoder) == weights_digest(model) for b in builds)
    assert not torch.equal(builds[0].heads[0].weight, builds[1].heads[0].weight)
    m = finetune_tasks(model, cells, ['cell_type', 'disease'], 'donor', freeze_layers=2, steps=2)
    for (k, a), b in zip(m.encoder.hf.state_dict().items(), model.hf.state_dict().values()):
        if k.startswith('bert.'): assert torch.equal(a, b), k

def test_a_cell_counts_for_the_tasks_it_has(model, cells):
    b = MultiTask(copy.deepcopy(model), {'x': Classes(['a', 'b']), 'z': Regression(0., 1.)}, 'mean')
    c, nan = cells[:4], torch.nan
    def loss(y): return b.loss(torch.from_numpy(c.tokens), c.offsets, torch.tensor(y), [1., 2.], [None, None])
    y = [[0., nan], [1, 2.], [nan, nan], [nan, -1]]
    out = b.outputs(b.encoder.hidden(c.tokens, c.offsets, layer='last'), c.offsets)
    want = torch.nn.functional.cross_entropy(out[0][:2], torch.tensor([0, 1])) + 2 * ((out[1][[1, 3],
        0] - torch.tensor([2., -1]))**2).mean()
    torch.testing.assert_close(loss(y), want)
    loss([[nan, nan]] * 4).backward()
    assert all(p.grad.abs().sum() == 0 for p in b.heads.parameters())

def test_several_tasks_say_which_cells_get_no_answer(model, cells, cohort):
    m = finetune_tasks(model, cells, ['cell_type', 'disease'], 'donor', steps=1)
    new = cohort[:10].copy(); new.X = new.X.toarray(); new.X[3] = 0
    with pytest.warns(UserWarning, match='1 of 10 cells'): gf.pp.tokenize(new, m)
    gf.tl.predict(new, m)
    assert new.obs['geneformer_disease_pred'].isna().sum() == 1

def test_scores_of_tasks_count_known_cells(model, cells):
    cells.obs['disease'] = cells.obs['disease'].astype(object).where(np.arange(120) % 2 == 0)
    m = finetune_tasks(model, cells, {'cell_type': 'classes', 'disease': 'classes', 'n_counts': 'regression'},
        'donor', steps=2)
    te = m.split == 'test'
    assert m.scores.n_cells['cell_type'] == te.sum() and m.scores.n_cells['disease'] == cells.obs['disease'][te].notna().sum()

def test_tasks_saved_and_loaded(model, cells, cohort, tmp_path):
    m = finetune_tasks(model, cells, {'cell_type': 'classes', 'n_counts': 'regression'}, 'donor', steps=2)
    again = MultiTask.load(m.save(tmp_path/'m'), 'cpu')
    for k, t in m.predict(cells).items(): pd.testing.assert_frame_equal(again.predict(cells)[k], t, check_exact=True)
    new = cohort.copy(); gf.pp.tokenize(new, again); gf.tl.predict(new, tmp_path/'m')
    assert {'geneformer_cell_type_pred', 'geneformer_n_counts_pred'} <= set(new.obs) and 'geneformer_cell_type_proba' in new.obsm

def test_one_split_for_all_tasks(model, cells):
    split = np.where(np.arange(120) < 60, 'train', 'test')
    with says(LeakError, 'donors', "'D01'"):
        finetune_tasks(model, cells, ['cell_type', 'disease'], 'donor', split=split, steps=1)

# --- readers

def test_whatever_can_encode_cells_is_read_alike(model, cells, vocab):
    x = model.hidden(cells[:4].tokens, cells[:4].offsets, layer='last')
    v, none = model.read(x, cells[:4].offsets)
    assert model.encoder is model and model.parts == {} and model.answers == [] and none is None
    torch.testing.assert_close(v, pool_cells(x, cells[:4].offsets, 'mean'))
    clf, far, genes = tune(model, cells), tune(model, cells, 'n_counts', head='regression'), GeneClassifier(model, ['a', 'b'])
    assert clf.answers == [f'p({c})' for c in clf.classes] and far.answers == ['predicted'] and genes.read_pool is None
    x = clf.encoder.hidden(cells[:4].tokens, cells[:4].offsets, layer=clf.read_layer)
    np.testing.assert_allclose(clf.read(x, cells[:4].offsets)[1].detach(), clf.predict(cells[:4])[clf.classes], rtol=1e-5)
    both = MultiTask(model, {'x': Classes(['a', 'b']), 'z': Regression(0., 1.)}, 'mean')
    assert both.answers == ['p(x: a)', 'p(x: b)', 'z: predicted'] and both.read(x, cells[:4].offsets)[1].shape == (4, 3)

# --- adapters and small weights

@peft
def test_adapters(model, cells, tmp_path):
    clf = tune(model, cells, lora=dict(r=2, alpha=4), steps=3, lr=.01)
    for (k, a), b in zip(((k, v) for k, v in clf.encoder.hf.state_dict().items() if 'lora_' not in k),
            model.hf.state_dict().values()):
        assert torch.equal(a, b), k
    merged = clf.merge()
    np.testing.assert_allclose(merged.predict(cells)[clf.classes], clf.predict(cells)[clf.classes], atol=1e-6)
    assert list(merged.encoder.hf.state_dict()) == list(model.hf.state_dict()) and not same(merged.encoder, model)
    folder = clf.save(tmp_path/'a')
    assert not (folder/'model.safetensors').exists()
    assert CellModel.load(folder, encoder=model).predict(cells).equals(clf.predict(cells))
    with says(MissingDataError, 'adapters only', 'encoder='): CellModel.load(folder)
    with says(GeneformerError, 'another encoder'):
        CellModel.load(folder, encoder=Geneformer.new('nano', model.vocabulary, seed=3, **SHAPE))
    assert CellModel.load(merged.save(tmp_path/'b'), 'cpu').predict(cells).equals(merged.predict(cells))

@peft
def test_adapters_for_genes_and_tasks(model, cells, vocab, tmp_path):
    g = finetune_genes(model, cells, gene_classes(vocab), lora=True, steps=2)
    assert GeneClassifier.load(g.save(tmp_path/'g'), encoder=model).predict_genes(cells).equals(g.predict_genes(cells))
    m = finetune_tasks(model, cells, ['cell_type'], 'donor', lora=dict(r=2), steps=2)
    assert MultiTask.load(m.save(tmp_path/'m'),
        encoder=model).predict(cells)['cell_type'].equals(m.predict(cells)['cell_type'])

def test_packages_that_are_not_here(model, cells, monkeypatch):
    for name, extra, call in (('peft', 'tune', lambda: add_lora(model)), ('optuna', 'tune', lambda: search_settings(model,
            cells, 'disease', 'donor')), ('bitsandbytes', 'quant', lambda: quantize(model))):
        monkeypatch.setitem(sys.modules, name, None)
        with says(MissingDataError, name, f"geneformer_nb[{extra}]"): call()

@small
@pytest.mark.parametrize('bits', [8, 4])
def test_small_weights(model, cells, bits):
    q = quantize(model, bits)
    a, b = model.encode(cells, show=False), q.encode(cells, show=False)
    cos = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cos.min() > (.999 if bits == 8 else .9) and weight_bytes(q)['layers'] < .6 * weight_bytes(model)['layers']
    with says(GeneformerError, 'lora'): tune(q, cells)
    with says(GeneformerError, 'full-precision'): CellClassifier(q, ['a', 'b']).save('nowhere')

# --- search

@optuna
def test_search_never_shows_the_test_donors(model, cells, monkeypatch):
    seen, plain = [], finetune
    import geneformer_nb.tasks.search as s
    def watch(model, cells, label, donor, *, split, **kw):
        seen.append(np.asarray(split)); return plain(model, cells, label, donor, split=split, **kw)
    monkeypatch.setattr(s, 'finetune', watch)
    got = search_settings(model, cells, 'disease', 'donor', trials=2, folds=2, steps=1, space=dict(lr=(1e-4, 1e-2, 'log')),
        show=False)
    outer = got.split == 'test'
    assert len(seen) == 2 * 2 + 1 and all((x[outer] == '').all() for x in seen[:-1]) and np.array_equal(seen[-1],
        got.split)
    donors = cells.obs['donor'].to_numpy()
    for x in seen: assert not set(donors[x == 'train']) & set(donors[x == 'test'])

@optuna
def test_search_goes_on(model, cells, tmp_path):
    kw = dict(folds=2, steps=1, space=dict(lr=(1e-4, 1e-2, 'log'), balance=[True, False]), show=False)
    search_settings(model, cells, 'disease', 'donor', trials=1, out=tmp_path/'s', **kw)
    a, b = search_settings(model, cells, 'disease', 'donor', trials=3, out=tmp_path/'s', **kw), search_settings(model, cells,
        'disease', 'donor', trials=3, **kw)
    pd.testing.assert_frame_equal(a.trials, b.trials)
    assert a.best == b.best and same(a.model.encoder, b.model.encoder)
    with says(GeneformerError, 'another run', 'seed'):
        search_settings(model, cells, 'disease', 'donor', trials=3, out=tmp_path/'s', seed=1, **kw)

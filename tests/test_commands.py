"Commands from one end to the other, and official classifiers: what a person types, and what lies in the folder afterwards"
import json, pickle, subprocess, sys
import anndata as ad, numpy as np, pandas as pd, pytest, torch
from transformers import BertForSequenceClassification, BertForTokenClassification
import geneformer_nb as gf
from geneformer_nb.cli import main, names_list, parser
from geneformer_nb.core import GeneformerError
from geneformer_nb.data.arrow import load_cells
from geneformer_nb.model.bert import bert_config
from geneformer_nb.tasks.finetuning import CellClassifier, OfficialClassifier
from geneformer_nb.tasks.genes import GeneClassifier
from geneformer_nb.tasks.multitask import load_model
from sentences import quiet, says

small = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2)

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a cohort, a vocabulary, a model and tokenized cells"
    d = tmp_path_factory.mktemp('place')
    adata = gf.toy.simulate(120, 12, 60)
    adata.write_h5ad(d/'a.h5ad')
    words = gf.Vocabulary.from_counts(adata, symbols='symbol', max_len=40)
    words.save(d/'words')
    gf.Geneformer.new('nano', words, **small).save_pretrained(d/'model')
    assert run('tokenize', d/'a.h5ad', '--vocabulary', d/'words', '--out', d/'a.dataset') == 0
    return d

def run(*words):
    with quiet(): return main([str(w) for w in words])

# --- official classifiers

def official(folder, kind, words, n=3):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hf = kind(bert_config('nano', words, num_labels=n, initializer_range=.6, **small)).eval()
    torch.nn.init.normal_(hf.classifier.weight, std=3.)
    hf.save_pretrained(folder)
    words.save(folder)
    return hf

@pytest.mark.parametrize('cls', [True, False], ids=['V2', 'V1'])
def test_an_official_classifier_of_cells_predicts_as_the_stock_model(cls, place, tmp_path):
    adata = ad.read_h5ad(place/'a.h5ad')
    words = gf.Vocabulary.from_counts(adata, symbols='symbol', cls_token=cls, max_len=40)
    hf = official(tmp_path/'heart', BertForSequenceClassification, words)
    clf = CellClassifier.load(tmp_path/'heart', 'cpu')
    gf.pp.tokenize(adata, clf)
    gf.tl.predict(adata, clf)
    cells = gf.get.cells(adata, words)
    with torch.no_grad():
        want = torch.stack([hf(torch.from_numpy(cells[i].tokens.astype(np.int64))[None]).logits[0].softmax(-1) for i in range(len(cells))])
    np.testing.assert_allclose(adata.obsm['geneformer_proba'], want, atol=1e-5)
    assert list(adata.obs.geneformer_pred.cat.categories) == ['LABEL_0', 'LABEL_1', 'LABEL_2']
    assert len(np.unique(want.argmax(1))) > 1

def test_names_of_official_classes(place, tmp_path):
    words = gf.Vocabulary.load(place/'words')
    official(tmp_path/'run/heart', BertForSequenceClassification, words)
    assert CellClassifier.load(tmp_path/'run/heart', classes=['NF', 'HCM', 'DCM']).classes == ['NF', 'HCM', 'DCM']
    assert CellClassifier.load(tmp_path/'run/heart', classes={2: 'DCM', 'LABEL_0': 'NF'}).classes == ['NF', 'LABEL_1', 'DCM']
    (tmp_path/'run/cm_id_class_dict.pkl').write_bytes(pickle.dumps({0: 'nf', 1: 'hcm', 2: 'dcm'}))
    assert CellClassifier.load(tmp_path/'run/heart').classes == ['nf', 'hcm', 'dcm']
    with says(GeneformerError, '3 classes', '2 names'): CellClassifier.load(tmp_path/'run/heart', classes=['a', 'b'])

def test_an_official_classifier_is_saved_perturbed_and_read_again(place, tmp_path):
    words = gf.Vocabulary.load(place/'words')
    official(tmp_path/'heart', BertForSequenceClassification, words)
    clf = load_model(tmp_path/'heart', 'cpu')
    assert isinstance(clf, OfficialClassifier)
    adata = ad.read_h5ad(place/'a.h5ad')
    gf.pp.tokenize(adata, clf)
    again = CellClassifier.load(clf.save(tmp_path/'saved'), 'cpu')
    cells = gf.get.cells(adata, words)
    pd.testing.assert_frame_equal(again.predict(cells), clf.predict(cells), check_exact=True)
    shifts = gf.tl.perturb(adata, clf, gf.KO('TF01'), label='disease', goal='non-failing', show=False)
    rows = shifts.cell.to_numpy()
    assert {'shift_non-failing', 'shift_p(LABEL_0)'} <= set(shifts)
    token, before = int(words.token('TF01')), clf.predict(cells).to_numpy()[:, 0]
    def without(t): return np.r_[t[t != token]]
    from geneformer_nb.data.cells import Cells, ragged
    deleted = Cells(*ragged([without(cells[i].tokens) for i in rows]), cells.obs.iloc[rows], words.hash, words.cls, words)
    change = clf.predict(deleted).to_numpy()[:, 0].astype(float) - before[rows].astype(float)
    np.testing.assert_allclose(shifts['shift_p(LABEL_0)'], change, atol=1e-5)

def test_an_official_classifier_of_genes(place, tmp_path):
    words = gf.Vocabulary.load(place/'words')
    hf = official(tmp_path/'dosage', BertForTokenClassification, words, 2)
    clf = GeneClassifier.load(tmp_path/'dosage', 'cpu', classes=['insensitive', 'sensitive'])
    cells = load_cells(place/'a.dataset', words)[:5]
    got = clf.predict_tokens(cells)
    one = got[got.cell == cells.obs.index[2]]
    with torch.no_grad(): want = hf(torch.from_numpy(cells[2].tokens.astype(np.int64))[None]).logits[0].softmax(-1)
    edge = slice(1, -1) if words.cls else slice(None)
    np.testing.assert_allclose(one[['insensitive', 'sensitive']], want[edge], atol=1e-5)
    assert isinstance(load_model(tmp_path/'dosage'), GeneClassifier)

def test_a_checkpoint_is_no_classifier(place):
    with says(GeneformerError, 'no classifier', 'model'): CellClassifier.load(place/'model')
    adata = ad.read_h5ad(place/'a.h5ad')
    with says(GeneformerError, 'classifier'): gf.tl.predict(adata, place/'model')

# --- cells without counts

def test_cells_become_an_anndata(place):
    words = gf.Vocabulary.load(place/'words')
    model, cells = gf.Geneformer.from_pretrained(place/'model'), load_cells(place/'a.dataset', words)
    vectors = model.encode(cells, show=False)
    adata = cells.to_adata(vectors)
    assert np.array_equal(gf.get.cells(adata, words).tokens, cells.tokens) and np.array_equal(adata.obsm['X_geneformer'], vectors)
    gf.tl.embed(adata, model, key_added='again')
    np.testing.assert_allclose(adata.obsm['again'], vectors, atol=1e-6)
    with says(GeneformerError, 'baselines'): gf.tl.finetune(adata, model, label='disease', donor='donor', steps=1)
    assert len(gf.tl.finetune(adata, model, label='disease', donor='donor', steps=1, baselines=False).scores)

# --- commands

@pytest.mark.parametrize('data', ['a.h5ad', 'a.dataset'])
def test_finetune_predict_embed_perturb_stats(data, place, tmp_path, capsys):
    d = place
    assert run('finetune', d/data, '--model', d/'model', '--label', 'disease', '--donor', 'donor', '--steps', 2, '--out', tmp_path/'clf') == 0
    scores = pd.read_csv(tmp_path/'clf/scores.csv', index_col=0)
    assert len(scores) == (3 if data == 'a.h5ad' else 1) and set(pd.read_csv(tmp_path/'clf/split.csv').geneformer_split) == {'train', 'test'}
    kept = json.loads((tmp_path/'clf.command.json').read_text())
    assert kept['command'] == 'finetune' and kept['options']['steps'] == 2 and kept['versions']['torch']
    assert run('predict', d/data, '--model', tmp_path/'clf', '--out', tmp_path/'p.csv') == 0
    p = pd.read_csv(tmp_path/'p.csv', index_col='barcode')
    assert len(p) == 120 and np.allclose(p.filter(like='p(').sum(axis=1), 1, atol=1e-4) and p.geneformer_pred.notna().all()
    assert run('embed', d/data, '--model', d/'model', '--out', tmp_path/'e.h5ad', '--layer', '-1') == 0
    assert run('embed', d/data, '--model', d/'model', '--out', tmp_path/'e.zarr', '--layer', 'second_to_last') == 0
    a, b = ad.read_h5ad(tmp_path/'e.h5ad'), ad.read_zarr(tmp_path/'e.zarr')
    np.testing.assert_allclose(a.obsm['X_geneformer'], b.obsm['X_geneformer'], atol=1e-6)
    words = ['perturb', d/data, '--model', tmp_path/'clf', '--label', 'disease', '--goal', 'non-failing', '--out', tmp_path/'shifts']
    assert run(*words, '--genes', 'TF01', '--controls', 5) == 0
    assert run('stats', tmp_path/'shifts', '--donor', 'donor', '--out', tmp_path/'t.csv') == 0
    table = pd.read_csv(tmp_path/'t.csv')
    assert set(table.gene_id[~table.control]) and table.control.sum() == 5*table.state.nunique() and (tmp_path/'t.csv.command.json').exists()

def test_a_long_list_and_a_file_of_genes(place, tmp_path):
    words = gf.Vocabulary.load(place/'words')
    assert names_list(','.join(words.genes[:40])) == list(words.genes[:40])
    (tmp_path/'genes.txt').write_bytes('\ufeffTF01\r\nTF02\n'.encode())
    assert names_list(str(tmp_path/'genes.txt')) == ['TF01', 'TF02'] and names_list('TF01, TF02') == ['TF01', 'TF02']
    assert run('perturb', place/'a.h5ad', '--model', place/'model', '--out', tmp_path/'p', '--genes', ','.join(words.genes[:30])) == 0

@pytest.mark.parametrize('layer', ['-1', '0', 'last', 'second_to_last'])
def test_official_layer_numbers(layer, place, tmp_path):
    assert run('embed', place/'a.dataset', '--model', place/'model', '--out', tmp_path/'e.h5ad', f'--layer={layer}') == 0

def test_medians_and_attention(place, tmp_path):
    assert run('medians', place/'a.h5ad', '--out', tmp_path/'medians') == 0
    assert (tmp_path/'medians/medians.parquet').exists()
    assert run('attention', place/'a.dataset', '--model', place/'model', '--by', 'disease', '--out', tmp_path/'a.csv') == 0
    assert pd.read_csv(tmp_path/'a.csv').disease.nunique() == 3

@pytest.mark.parametrize('words', [('tokenize', 'a.h5ad', '--vocabulary', 'words'), ('embed', 'a.h5ad', '--model', 'model'),
                                   ('perturb', 'a.dataset', '--model', 'model'), ('perturb', 'a.h5ad', '--model', 'model', '--start', 'dilated', '--label', 'disease')])
def test_a_dry_run_writes_nothing(words, place, tmp_path, capsys):
    words = [place/w if (place/w).exists() else w for w in words]
    assert run(*words, '--out', tmp_path/'out', '--dry-run') == 0
    said = capsys.readouterr().out
    assert 'cells' in said and 'MB' in said and 'Nothing was written' in said and not list(tmp_path.iterdir())

def test_check_says_what_would_fail(place, capsys, tmp_path):
    d = place
    assert run('check') == 0
    assert run('check', d/'a.h5ad', '--model', d/'model', '--label', 'disease', '--donor', 'donor') == 0
    said = capsys.readouterr().out
    assert said.count('ok') >= 4 and 'WRONG' not in said and '120 cells' in said
    assert run('check', d/'a.h5ad', '--model', d/'model', '--label', 'disease', '--donor', 'nobody') == 2
    assert 'WRONG label and donor' in capsys.readouterr().out
    assert run('check', '--model', tmp_path) == 2 and run('check', tmp_path/'none.h5ad', '--model', d/'model') == 2

def test_the_shape_of_a_new_model(place, tmp_path):
    shape = ['--layers', 1, '--hidden', 24, '--heads', 3]
    assert run('pretrain', place/'a.dataset', '--out', tmp_path/'m', '--steps', 1, '--batch', 4, *shape) == 0
    c = gf.Geneformer.from_pretrained(tmp_path/'m').config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads) == (1, 24, 3)
    assert run('pretrain', place/'a.dataset', '--out', tmp_path/'n', '--model', place/'model', *shape) == 2

def test_every_command_teaches(capsys):
    sub = parser()._subparsers._group_actions[0].choices
    assert {'tokenize', 'medians', 'embed', 'pretrain', 'finetune', 'predict', 'perturb', 'stats', 'screen', 'attention', 'check'} <= set(sub)
    for name, p in sub.items():
        text = p.format_help()
        assert name == 'demo' or f'geneformer-nb {name} ' in text.split('usage')[1].split('\n\n', 1)[1], name
        for action in p._actions: assert action.help, (name, action.dest)

def test_exit_status_of_a_process(place, tmp_path):
    words = [sys.executable, '-m', 'geneformer_nb.cli', 'embed', tmp_path/'none.h5ad', '--model', place/'model', '--out', tmp_path/'e.h5ad']
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('geneformer-nb: ') and 'Traceback' not in done.stderr

# --- quiet, and one run at a time

def test_the_first_call_says_nothing_of_libraries(place, tmp_path):
    words = [sys.executable, '-m', 'geneformer_nb.cli', 'pretrain', place/'a.dataset', '--out', tmp_path/'m', '--steps', '2', '--batch', '4', '--save-every', '1']
    for _ in range(2):
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        lines = [l for l in done.stderr.replace('\r', '\n').split('\n') if l.strip() and not l.startswith('pretraining:')]
        assert done.returncode == 0 and not lines, lines
        assert 'NaN' not in done.stdout and 'loss' in done.stdout

def test_two_runs_in_one_folder_exclude_each_other(place, tmp_path):
    from geneformer_nb.core import only_run
    words = gf.Vocabulary.load(place/'words')
    for name in ('shards', 'tokens', 'm'): (tmp_path/name).mkdir()
    model = gf.Geneformer.from_pretrained(place/'model')
    cells = load_cells(place/'a.dataset', words)
    jobs = dict(shards=lambda f: gf.perturb.perturb_to(f, model, cells, gf.KO('TF01')),
                tokens=lambda f: gf.data.tokenize_to(place/'a.h5ad', words, f), m=lambda f: gf.pretrain(cells, 'nano', f, steps=1, batch=4))
    for name, job in jobs.items():
        with only_run(tmp_path/name):
            with says(GeneformerError, 'Another run', name): job(tmp_path/name)
        job(tmp_path/name)
        assert not list((tmp_path/name).glob('.lock*'))

def test_a_lock_of_a_dead_process_holds_nobody(tmp_path):
    code = f"import os, time; from geneformer_nb.core import only_run\nwith only_run({str(tmp_path)!r}):\n    print('in', flush=True)\n    time.sleep(60)"
    run = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == 'in\n'
    from geneformer_nb.core import only_run
    with says(GeneformerError, 'Another run'):
        with only_run(tmp_path): pass
    run.kill()
    run.wait()
    with only_run(tmp_path): pass

def test_gradients_of_an_official_classifier_follow_its_own_vector(place, tmp_path):
    words = gf.Vocabulary.load(place/'words')
    official(tmp_path/'heart', BertForSequenceClassification, words)
    clf = load_model(tmp_path/'heart', 'cpu')
    cells = load_cells(place/'a.dataset', words)[:6]
    from geneformer_nb.perturb.actions import make_engine
    from geneformer_nb.perturb.gradients import _gated, first_order
    engine = make_engine(clf, cells, None, None, None, False, None)
    for i in range(3):
        with torch.no_grad():
            h = engine.hidden(cells[i].tokens, [0, cells.lengths[i]])
            got, want = _gated(engine, h[None], torch.ones(1, len(h))), clf.cell_vectors(h, [0, len(h)])
        torch.testing.assert_close(got, want)
    assert 'shift_p(LABEL_0)' in first_order(clf, cells)

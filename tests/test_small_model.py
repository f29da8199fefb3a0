"The small model: no donor on both sides, trained once and the same ever after, and baselines that are distributions"
import os, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from sentences import says
from geneformer_nb.train import small_model
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.core import GeneformerError, MissingDataError, StorageError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.train.small_model import (RankFrequency, SmallRecipe, Stage, init_small_model, truncate, gene_vectors, hold_out, small_model_cells, small_model_folder, load_small_model,
                                 small_model_scores, evaluate_masked, summarize_masked)
from geneformer_nb.model.bert import weights_digest

real = pytest.mark.skipif(not (Path(os.environ.get('GENEFORMER_NB_DATA', '/nowhere'))/'data').is_dir(),
                          reason='GENEFORMER_NB_DATA names no folder with data/: see geneformer_nb.data.datasets.registry for the sources')
LITTLE = SmallRecipe(dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, dropout=.02),
                     (Stage(ranks=12, steps=9, batch=4, lr=3e-3, warmup=2), Stage(ranks=40, steps=4, batch=4, lr=1e-3, warmup=1)))

def cohort(n=80, genes=40, seed=0, cls=False):
    "Cells of 5 to 35 ranks, early genes first, of six donors and of none"
    rng = np.random.default_rng(seed)
    v = Vocabulary([f'G{i}' for i in range(genes)], np.ones(genes), max_len=genes + 2, name='forty', cls=cls)
    k = len(v.specials)
    def cell():
        got = k + np.argsort(np.arange(genes) + rng.normal(0, 8, genes))[:rng.integers(5, 36)]
        return np.r_[2, got, 3] if cls else got
    m = n // 2
    obs = pd.DataFrame(dict(source=['a'] * m + ['b'] * (n - m), group=[f'D{i % 6}' for i in range(m)] + [''] * (n - m)),
                       index=[f'c{i}' for i in range(n)])
    return Cells(*ragged([cell() for _ in range(n)]), obs.assign(split=hold_out(obs, .2, seed)), vocabulary=v, special=cls)

def sides(cells): return [cells[(cells.obs.split == s).to_numpy()] for s in ('train', 'held out')]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.hf.state_dict().values(), b.hf.state_dict().values()))

# ---- split

@pytest.mark.parametrize('seed', range(5))
def test_no_donor_on_both_sides(seed):
    obs = cohort(seed=seed).obs
    both = obs[obs.group != ''].groupby('group').split.nunique()
    assert (both == 1).all()
    assert set(obs.split[obs.source == 'a']) == {'train', 'held out'} == set(obs.split[obs.source == 'b'])
    assert (hold_out(obs, .2, seed) == obs.split).all()

def test_cells_of_unknown_donor_stay_in_training():
    obs = pd.DataFrame(dict(source='a', group=['D1', 'D2', 'D3', '', '']))
    assert set(hold_out(obs, .2)[3:]) == {'train'} and (hold_out(obs, .2) == 'held out').sum() == 1

def test_the_only_donor_of_a_source_is_learned_from():
    assert set(hold_out(pd.DataFrame(dict(source='a', group=['D1'] * 9)))) == {'train'}

@real
def test_real_cells():
    cells = small_model_cells()
    obs = cells.obs
    assert len(cells) > 6500 and cells.lengths.min() >= 7 and cells.vocabulary.name == 'V1' and obs.index.is_unique
    assert (obs[obs.group != ''].groupby(['source', 'group']).split.nunique() == 1).all()
    assert (obs.groupby('source').split.nunique() == 2).all() and obs.source.nunique() == 5
    assert (small_model_cells().obs.split == obs.split).all()

# ---- baseline

@pytest.mark.parametrize('cls', [False, True])
def test_guesses_sum_to_one_and_losses_are_theirs(cls):
    cells = cohort(cls=cls)
    f = RankFrequency(cells[:60], edges=(0, 4, 16), strength=20)
    np.testing.assert_allclose(f.p.sum(1), 1)
    rng = np.random.default_rng(0)
    for i in range(60, 80):
        shown, labels = cells[i].tokens.copy(), np.full(len(cells[i]), -100)
        at = rng.choice(np.arange(cls, len(shown) - cls), 3, replace=False)
        labels[at] = shown[at]
        shown[at[0]], shown[at[1]] = 1, rng.integers(f.k, f.p.shape[1])  # hidden; perhaps another; as it was
        p, q = f.guess(shown, np.sort(at))
        np.testing.assert_allclose(p.sum(1), 1); np.testing.assert_allclose(q.sum(1), 1)
        assert (p[:, :f.k] == 0).all() and (q[:, :f.k] == 0).all() and (q > 0)[:, f.k:].all()
        truth = labels[np.sort(at)]
        for got, want in zip(f.losses(shown, labels), (p, q)):
            np.testing.assert_allclose(got, -np.log(want[range(3), truth]), rtol=1e-6)

def test_counting_beats_blind_and_looking_beats_counting():
    train, held = sides(cohort(400))
    j = evaluate_masked(init_small_model(train, LITTLE.shape), held, RankFrequency(train, edges=(0, 4, 8, 16, 24), strength=20))
    blind = np.log(len(train.vocabulary))
    assert j.in_view.mean() < j.frequency.mean() - .1 < blind - .1

# ---- judging

def test_summary_counts_every_gene_once():
    train, held = sides(cohort())
    j = evaluate_masked(init_small_model(train, LITTLE.shape), held, RankFrequency(train))
    for by in ('source', 'masked', (0, 5, 20, 500)):
        s = summarize_masked(j, by)
        assert s.n[:-1].sum() == s.n['all'] == len(j) and s.cells['all'] == len(held)
        np.testing.assert_allclose((s.loss * s.n)[:-1].sum() / len(j), s.loss['all'], rtol=1e-5)
    assert list(summarize_masked(j, (0, 5, 20, 500)).index)[:2] == ['0–4', '5–19']

def test_judging_does_not_depend_on_the_batch():
    train, held = sides(cohort())
    model = init_small_model(train, LITTLE.shape)
    a, b = (evaluate_masked(model, held, budget=n).sort_values(['cell', 'rank'], ignore_index=True) for n in (60, 5000))
    assert (a.cell == b.cell).all() and (a['rank'] == b['rank']).all()
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4)

# ---- the start

def test_start_knows_the_frequencies():
    train, held = sides(cohort(400))
    model = init_small_model(train, LITTLE.shape)
    assert evaluate_masked(model, held).loss.mean() < np.log(len(train.vocabulary)) + .05
    assert same(model, init_small_model(train, LITTLE.shape))

def test_genes_of_the_same_cells_start_as_neighbors():
    rng = np.random.default_rng(0)
    v = Vocabulary([f'G{i}' for i in range(60)], np.ones(60), max_len=60)
    def cell(): return 2 + np.r_[40 + rng.permutation(20)[:15], 20 * rng.integers(2) + rng.permutation(20)[:12]]  # two kinds
    cells = Cells(*ragged([cell() for _ in range(300)]), vocabulary=v)
    rows, U = gene_vectors(cells, 2, least=10)
    like = U @ U.T
    assert len(rows) == 60 and like[:20, :20].mean() > .3 > -.3 > like[:20, 20:40].mean()
    assert len(gene_vectors(cells, 2, least=200)[0]) == 20

def test_cut():
    cells = cohort()
    c = truncate(cells, 10)
    assert (c.lengths == np.minimum(cells.lengths, 10)).all()
    assert all((c[i].tokens == cells[i].tokens[:10]).all() for i in range(len(cells)))

# ---- trained once

def test_cached_is_trained_and_interrupted_resumes(tmp_path, monkeypatch):
    from transformers import Trainer
    cells, kw = cohort(), dict(recipe=LITTLE, save_every=3, device='cpu')
    whole = load_small_model(tmp_path/'whole', cells=cells, **kw)
    step = Trainer.training_step
    for stage, at in ((1, 5), (2, 3)):  # once in each stage
        def dies(self, *a, **k):
            if self.state.global_step == at and f'stage{stage}' in self.args.output_dir: raise KeyboardInterrupt
            return step(self, *a, **k)
        monkeypatch.setattr(Trainer, 'training_step', dies)
        with pytest.raises(KeyboardInterrupt): load_small_model(tmp_path/'halves', cells=cells, **kw)
        assert not (tmp_path/'halves/history.json').exists()
    monkeypatch.setattr(Trainer, 'training_step', step)
    halves = load_small_model(tmp_path/'halves', cells=cells, **kw)
    assert same(whole, halves) and whole.history.equals(halves.history)
    monkeypatch.setattr(small_model, 'pretrain', lambda *a, **k: pytest.fail('trained again'))
    assert same(whole, load_small_model(tmp_path/'whole'))
    assert {p.name for p in (tmp_path/'halves').iterdir()} == {p.name for p in (tmp_path/'whole').iterdir()}
    assert not any(p.name.startswith(('stage', 'start')) for p in (tmp_path/'whole').iterdir())

def test_scores_are_kept(tmp_path, monkeypatch):
    cells = cohort()
    first = small_model_scores(tmp_path/'m', cells=cells, recipe=LITTLE, device='cpu')
    monkeypatch.setattr(small_model, 'evaluate_masked', lambda *a, **k: pytest.fail('judged again'))
    pd.testing.assert_frame_equal(small_model_scores(tmp_path/'m'), first)
    assert set(first.source) == {'a', 'b'} and {'loss', 'frequency', 'in_view', 'masked', 'right'} <= set(first)

def test_another_recipe_does_not_go_on_in_the_folder(tmp_path, monkeypatch):
    from transformers import Trainer
    cells, step = cohort(), Trainer.training_step
    def dies(self, *a, **k):
        if self.state.global_step == 5: raise KeyboardInterrupt
        return step(self, *a, **k)
    monkeypatch.setattr(Trainer, 'training_step', dies)
    with pytest.raises(KeyboardInterrupt): load_small_model(tmp_path, cells=cells, recipe=LITTLE, save_every=3, device='cpu')
    other = replace(LITTLE, stages=(replace(LITTLE.stages[0], lr=1e-2),))
    with says(StorageError, 'lr was 0.003'): load_small_model(tmp_path, cells=cells, recipe=other, save_every=3, device='cpu')

def test_place_follows_recipe_and_seed(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert small_model_folder() == small_model_folder() and small_model_folder().parent == tmp_path/'geneformer_nb/models'
    assert len({small_model_folder(), small_model_folder(seed=1), small_model_folder(LITTLE)}) == 3

# ---- sentences

def test_without_data_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); monkeypatch.delenv('GENEFORMER_NB_DATA', raising=False)
    for call in (load_small_model, small_model_scores):
        with says(MissingDataError, 'small model', 'not on this machine', 'ctheodoris/Geneformer'): call()
    with says(MissingDataError, 'ctheodoris/Geneformer'): small_model_cells()
    with pytest.raises(SystemExit) as e: small_model.main([])
    assert str(e.value).startswith('small model: ') and '\n' not in str(e.value)

def test_cells_of_ones_own(tmp_path):
    cells = cohort()
    with says(GeneformerError, 'name a folder'): load_small_model(cells=cells)
    with says(GeneformerError, 'split'): load_small_model(tmp_path, cells=replace(cells, obs=cells.obs.drop(columns='split')))

# ---- the table of ablations

def test_table_of_ablations_is_the_plan(monkeypatch):
    root = Path(__file__).resolve().parent.parent
    monkeypatch.syspath_prepend(str(root/'benchmarks'))
    import ablations
    table = pd.read_csv(root/'benchmarks/ablations.csv')
    runs, plan = table[~table.varied.isin(['baseline', 'house'])], pd.DataFrame(ablations.plan())
    assert len(runs) == len(plan) and (runs.groupby('varied').size() == plan.groupby('varied').size()).all()
    for c in ('seed', 'steps', 'mask', 'attention_dropout', 'ranks', 'start'): assert sorted(runs[c]) == sorted(plan[c]), c
    assert runs[['loss', 'in_view', 'held_cells', 'hidden', 'version_torch']].notna().all(axis=None)
    assert table[table.varied == 'baseline'].seed.nunique() == plan.seed[plan.varied == 'control'].nunique() == 3

def test_two_that_want_it_train_it_once(tmp_path, monkeypatch):
    "The second waits for the first, and takes what it made"
    made = []
    def train(cells, r, folder, *_):
        made.append(folder)
        time.sleep(.5)
        (folder/'history.json').write_text('[]')
    monkeypatch.setattr(small_model, '_train_small', train)
    monkeypatch.setattr(small_model, '_finished', lambda folder, device: folder)
    cells = cohort()
    with ThreadPoolExecutor(2) as pool: got = list(pool.map(lambda _: load_small_model(tmp_path/'h', cells=cells, recipe=LITTLE), range(2)))
    assert made == [tmp_path/'h'] and got == [tmp_path/'h']*2

"The example with official names, against a hub on loopback that holds small checkpoints in the official layout"
import json, os, pickle, shutil, subprocess, sys
import numpy as np, pytest
import geneformer_nb as gf
from geneformer_nb.core import MissingDataError
from geneformer_nb.data.hub import HubPlace, hub_place
from hub import COMMIT, Hub
from sentences import says

REPO = 'ctheodoris/Geneformer'
shape = dict(hidden_size=32, num_attention_heads=2, intermediate_size=32)

@pytest.fixture(scope='module')
def cohort(): return gf.toy.simulate(n_cells=120, n_donors=12, n_genes=60, seed=0)

@pytest.fixture(scope='module')
def repository(cohort, tmp_path_factory):
    "Three sizes in sub-folders, one at the top, and dictionaries in `geneformer/` as the official ones are laid out"
    root = tmp_path_factory.mktemp('repository')
    v = gf.Vocabulary.from_counts(cohort, symbols='symbol', max_len=64)
    layers = {'Geneformer-V1-10M': 1, 'Geneformer-V2-104M': 2, 'Geneformer-V2-316M': 3, '': 3}
    for folder, n in layers.items(): gf.Geneformer.new('nano', v, num_hidden_layers=n, **shape).save_pretrained(root/folder)
    (root/'geneformer').mkdir()
    tokens = {s: i for i, s in enumerate(('<pad>', '<mask>', '<cls>', '<eos>'))} | {g: i + 4 for i, g in enumerate(v.genes)}
    files = dict(token_dictionary=tokens, gene_median_dictionary=dict(zip(v.genes, v.medians.tolist())),
                 gene_name_id_dict={s: g for g, s in v.symbols.items()}, ensembl_mapping_dict={})
    for name, content in files.items(): (root/f'geneformer/{name}_gc104M.pkl').write_bytes(pickle.dumps(content))
    (root/'README.md').write_text('not needed')
    return root

@pytest.fixture(scope='module')
def hub(repository):
    with Hub(repository, REPO) as h: yield h

def run(code, hub_url, home, **env):
    "A fresh process that knows this hub only"
    env = {k: v for k, v in os.environ.items() if k != 'GENEFORMER_NB_DATA'} | dict(
        HF_ENDPOINT=hub_url, HF_HOME=str(home), HF_HUB_DISABLE_PROGRESS_BARS='1', GENEFORMER_NB_QUIET='1', OMP_NUM_THREADS='1') | env
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=env, timeout=300)

EXAMPLE = """
import sys, scanpy as sc
import geneformer_nb as gf

adata = sc.read_h5ad(sys.argv[1] if len(sys.argv) > 1 else 'hearts.h5ad')
model = gf.Geneformer.from_pretrained("V2-104M")
gf.pp.tokenize(adata, model)
gf.tl.embed(adata, model)
clf = gf.tl.finetune(adata, model, label="disease", donor="donor", steps=2)
gf.tl.predict(adata, clf)
shifts = gf.tl.perturb(adata, clf, gf.KO("TF01") + gf.OE("TF02"), label="disease", goal="NF")
gf.tl.summarize(shifts, donor="donor")
s = gf.tl.screen(adata, model, label="disease", donor="donor", start="DCM", goal="NF", out="dcm", max_cells=1, folds=2,
                 directions='KO', controls=(), finetuning=dict(steps=2), say=None)
gf.pl.targets(s)
print(len(gf.get.targets(s)), model.config.num_hidden_layers)
"""

def test_the_example_of_the_front_page_runs_with_official_names(cohort, hub, tmp_path):
    hearts = cohort.copy()
    hearts.obs['disease'] = hearts.obs['disease'].map({'non-failing': 'NF', 'dilated': 'DCM', 'hypertrophic': 'HCM'}).astype(str)
    del hearts.uns['toy']
    hearts.write_h5ad(tmp_path/'hearts.h5ad')
    code = f"import os; os.chdir({str(tmp_path)!r}); import matplotlib; matplotlib.use('Agg')\n" + EXAMPLE
    got = run(code, hub.url, tmp_path/'hf')
    assert got.returncode == 0, got.stderr[-1500:]
    assert got.stdout.split()[-2:] == ['20', '2'] and (tmp_path/'dcm/report.html').exists()

LOAD = """
import geneformer_nb as gf, json
out = {}
for n in NAMES:
    try: out[n] = gf.Geneformer.from_pretrained(n, device='cpu').config.num_hidden_layers
    except gf.core.GeneformerError as e: out[n] = str(e)
print(json.dumps(out))
"""

def load(names, hub_url, home, **env):
    got = run(LOAD.replace('NAMES', repr(names)), hub_url, home, **env)
    assert got.returncode == 0, got.stderr[-1500:]
    return json.loads(got.stdout.splitlines()[-1])

def test_one_string_names_a_checkpoint_and_what_was_fetched_is_kept(hub, tmp_path):
    names = ['V1-10M', f'{REPO}/Geneformer-V1-10M', 'V2-316M', REPO, f'{REPO}/V3']
    hub.asked.clear()
    first = load(names, hub.url, tmp_path/'hf')
    assert [first[n] for n in names[:4]] == [1, 1, 3, 3]
    assert "no config.json" in first[f'{REPO}/V3'] and f'{REPO}/Geneformer-V2-104M' in first[f'{REPO}/V3']
    fetched = {p for kind, p in hub.asked if kind == 'GET' and '/resolve/' in p}
    assert not any('README' in p or 'V2-104M' in p for p in fetched), 'one checkpoint and no more'
    offline = load(names, 'http://127.0.0.1:9', tmp_path/'hf', HF_HUB_OFFLINE='1')
    assert [offline[n] for n in names[:4]] == [1, 1, 3, 3] and f'{REPO}/Geneformer-V1-10M' in offline[f'{REPO}/V3']
    nothing = load(['V2-104M'], 'http://127.0.0.1:9', tmp_path/'empty', HF_HUB_OFFLINE='1')['V2-104M']
    assert 'nothing of that name came from the hub' in nothing

def test_the_bare_repository_says_which_model_it_is(hub, tmp_path):
    code = f"import geneformer_nb as gf, warnings; warnings.simplefilter('always'); gf.Geneformer.from_pretrained({REPO!r}, device='cpu')"
    env = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path/'hf'))
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | env, timeout=200)
    assert f'The top folder of {REPO} holds a model of 3 layers' in got.stderr, got.stderr[-800:]

def test_dictionaries_come_from_the_hub_or_from_a_folder(hub, repository, tmp_path):
    code = "import geneformer_nb as gf; print(gf.Vocabulary.official('V2'))"
    got = run(code, hub.url, tmp_path/'hf')
    assert got.returncode == 0, got.stderr[-800:]
    here = gf.Vocabulary.official('V2', repository)
    assert here.hash in got.stdout and here.cls and here.symbols

def test_a_folder_of_this_machine_goes_first(tmp_path, monkeypatch, repository):
    shutil.copytree(repository/'Geneformer-V1-10M', tmp_path/'V1-10M')
    monkeypatch.chdir(tmp_path)
    assert hub_place('V1-10M') is None and hub_place('V2-104M') == HubPlace(REPO, 'Geneformer-V2-104M')
    assert gf.Geneformer.from_pretrained('V1-10M', device='cpu').config.num_hidden_layers == 1
    with says(MissingDataError, 'no config.json', 'V2-104M'): gf.Geneformer.from_pretrained('V2_104M')
    shutil.copytree(repository/'Geneformer-V1-10M', tmp_path/'clone/Geneformer-V1-10M')
    with says(MissingDataError, "clone/Geneformer-V1-10M'"): gf.Geneformer.from_pretrained(tmp_path/'clone')

"The registry of real data: what is said when a set is missing or different, and the sets themselves where they are"
import os, re, warnings
from pathlib import Path
import numpy as np, pytest
from geneformer_nb.core import GeneformerError, MissingDataError
from geneformer_nb.data.datasets import available, check, data_folder, gene_class, load, path, registry

real = pytest.mark.skipif(not (Path(os.environ.get('GENEFORMER_NB_DATA', '/nowhere'))/'data').is_dir(),
                          reason='GENEFORMER_NB_DATA names no folder with data/: see geneformer_nb.data.datasets.registry for the sources')

@pytest.fixture
def nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); monkeypatch.delenv('GENEFORMER_NB_DATA', raising=False)
    return tmp_path

def test_registry_is_complete():
    for n, d in registry.items():
        assert d.what and d.source and d.license, n
        assert all(re.fullmatch('[0-9a-f]{64}', s) for s in d.files.values()), n

@pytest.mark.parametrize('name', [n for n, d in registry.items() if d.files])
def test_missing_data_is_one_sentence_that_names_the_source(name, nothing):
    with pytest.raises(MissingDataError) as e: load(name)
    assert registry[name].source in str(e.value) and '\n' not in str(e.value) and str(nothing) not in str(e.value)

def test_a_set_put_into_the_cache_is_found(nothing):
    f = data_folder()/'gene_lists_housekeeping'/'housekeeping_genes.txt'
    f.parent.mkdir(parents=True); f.write_text('ACTB\nB2M\n')
    with pytest.warns(UserWarning, match='sha256 differs'): assert load('gene_lists_housekeeping') == ['ACTB', 'B2M']
    assert available().here['gene_lists_housekeeping'] == 'cache' and path('gene_lists_housekeeping') == f

def test_sentences(nothing, monkeypatch):
    for call in (lambda: load('heart'), lambda: path('pbmc3k', 'x.txt'), lambda: path('pbmc68k_reduced')):
        with pytest.raises(GeneformerError): call()
    monkeypatch.setenv('GENEFORMER_NB_DATA', str(nothing/'gone'))
    with pytest.raises(MissingDataError): available()

def test_scanpys_own_set_needs_no_folder(nothing):
    a = load('pbmc68k_reduced')
    assert a.shape == (700, 765) and (a.raw.X.data % 1).any()

@real
@pytest.mark.parametrize('name', list(registry))
def test_every_set_loads_and_is_ours(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert all(check(name).values())
        got = load(name)
    if name in ('heart_embryo', 'heart_infarct', 'kang_ifnb', 'pbmc3k', 'perturbseq_papalexi299'):
        assert (got.X.data == np.rint(got.X.data)).all() and 'ensembl_id' in got.var
    else: assert got is not None

@real
def test_gene_classes_have_the_papers_sizes():
    assert {k: len(v) for k, v in gene_class('dosage_sensitivity_TFs').items()} == {
        'Dosage-sensitive TFs': 122, 'Dosage-insensitive TFs': 368}
    assert [len(v) for v in gene_class('bivalent_vs_lys4_only_genomewide').values()] == [2602, 7213]
    assert [len(v) for v in gene_class('bivalent_vs_lys4_only', distinct=False).values()] == [107, 80]

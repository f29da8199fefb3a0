"The simulated cohort: seeds, files, known answers over several networks"
import subprocess, sys
import anndata, numpy as np, pytest
from geneformer_nb.core import GeneformerError
from geneformer_nb.data.toy import simulate, states, toy_network, true_effect, true_effects, truth_of

def test_same_seed_same_bytes_in_another_process():
    code = ("import hashlib; from geneformer_nb.data.toy import simulate; a = simulate(400, seed=5); "
            "print(hashlib.sha256(a.X.data.tobytes() + a.X.indices.tobytes()).hexdigest())")
    one, two = (subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert one == two

def test_survives_a_file(tmp_path):
    a = simulate(200)
    a.write_h5ad(tmp_path/'toy.h5ad')
    b = anndata.read_h5ad(tmp_path/'toy.h5ad')
    assert np.array_equal(a.X.toarray(), b.X.toarray()) and list(b.obs.columns) == list(a.obs.columns)
    truth = truth_of(b)
    assert true_effects(truth).equals(true_effects(truth_of(a)))

def test_counts_are_counts():
    a = simulate(500, n_genes=100)
    assert a.shape == (500, 100) and a.X.dtype == np.float32 and a.X.has_canonical_format
    assert (a.X.data > 0).all() and (a.X.data == np.rint(a.X.data)).all()
    assert np.allclose(a.obs.n_counts, a.X.sum(1).A1 if hasattr(a.X.sum(1), 'A1') else a.X.sum(1))
    assert a.var_names.str.startswith('TOYG').all() and not a.var.symbol.duplicated().any()
    assert a.obs.groupby('donor', observed=True).disease.nunique().eq(1).all()

@pytest.mark.parametrize('seed', range(6))
def test_the_lost_driver_is_the_best_or_next_best_activation(seed):
    truth = toy_network(seed=seed)
    for s in states[1:]:
        table = true_effects(truth, s)
        for d in truth.drivers[truth.drivers.disease == s].itertuples():
            place = table.query('gene_id == @d.gene_id and kind == @k', local_dict=dict(
                d=d, k=dict(lost='OE', activated='KO')[d.direction])).index[0]
            assert place < 4 and table['shift'][place] > .3

def test_modeling_disease_is_the_mirror_of_treating_it():
    truth = toy_network()
    for d in truth.drivers.itertuples():
        kind = dict(lost='KO', activated='OE')[d.direction]
        assert true_effect(truth, d.symbol, kind, start='non-failing', goal=d.disease) > .1

def test_no_effect_no_truth():
    table = true_effects(toy_network(effect=0))
    assert table['shift'].eq(0).all()

def test_sentences():
    truth = toy_network()
    for call in (lambda: true_effect(truth, 'TF01', 'CRISPR'), lambda: true_effects(truth, start='sick'),
                 lambda: true_effects(truth, cell_type='neuron'), lambda: truth_of(anndata.AnnData(np.ones((2, 2))))):
        with pytest.raises(GeneformerError) as e: call()
        assert str(e.value).endswith('.')

"Tokens equal to those of the official tokenizer, cell by cell and in order"
import numpy as np
from golden import adata, cells, needed, sets, table, versions, vocabulary
from geneformer_nb.data.cells import Cells
from geneformer_nb.data.tokenizer import tokenize

pytestmark = needed

@versions
@sets
def test_tokens(name, version):
    gold, ours = table(f'{name}_{version}_tokens.parquet'), cells(name, version)
    assert list(ours.obs.index) == list(gold.barcode) and ours.lengths.tolist() == gold.length.tolist()
    for i, want in enumerate(gold.input_ids): np.testing.assert_array_equal(ours[i].tokens, want)

def test_the_sets_test_what_they_should():
    "The cut at 2,048 and the summing of rows of one gene are both in there"
    assert cells('heart_embryo', 'V1').lengths.max() == 2048 and cells('heart_embryo', 'V2').match.summed == 77

@versions
def test_from_a_file_in_blocks_and_back(version, tmp_path):
    a = adata('heart_embryo')
    a.write_h5ad(tmp_path/'a.h5ad')
    got = tokenize(tmp_path/'a.h5ad', vocabulary(version), block=7)
    want = cells('heart_embryo', version)
    assert np.array_equal(got.tokens, want.tokens) and np.array_equal(got.offsets, want.offsets)
    back = Cells.load(got.save(tmp_path/'cells.dataset'), vocabulary(version))
    assert np.array_equal(back.tokens, want.tokens) and list(back.obs.index) == list(want.obs.index)

"Embeddings of cells, genes and states equal to the official ones: 1e-4 relative, 1e-5 absolute near zero"
import geneformer_nb as gf, numpy as np, pytest
from golden import adata, cells, close, needed, of_json, sets, table, versions, model
from geneformer_nb.model.embed import gene_embeddings, state_embeddings

pytestmark = needed
states = dict(kang_ifnb='condition', heart_embryo='region')

@pytest.mark.parametrize('layer', [-1, 0])
@pytest.mark.parametrize('version,mode', [('V1', 'cell'), ('V2', 'cell'), ('V2', 'cls')])
@sets
def test_cells(name, version, mode, layer):
    gold, m = table(f'{name}_{version}_emb_{mode}_layer{layer}').set_index('barcode').filter(regex=r'^\d+$'), model(version)
    own = adata(name).obs_names[adata(name).obs_names.isin(gold.index)] # our order, not the official one by length
    a = adata(name)[own].copy()
    before = list(a.obs_names)
    gf.pp.tokenize(a, m)
    gf.tl.embed(a, m, layer=layer, pool=dict(cell='mean', cls='cls')[mode])
    assert list(a.obs_names) == before and a.obsm['X_geneformer'].shape == (len(gold), 32)
    close(a.obsm['X_geneformer'], gold.loc[before])

@versions
@sets
def test_genes(name, version):
    gold = table(f'{name}_{version}_gene_emb_layer-1').set_index('Unnamed: 0').drop(index=['<cls>', '<eos>'], errors='ignore')
    short = table(f'{name}_{version}_emb_cell_layer-1').barcode
    part = cells(name, version)
    ours = gene_embeddings(part[part.obs.index.get_indexer(short)], model(version), layer=-1)
    close(ours.loc[gold.index], gold)
    assert not ours.index.str.startswith('<').any() and ours.index.is_unique

@versions
@pytest.mark.parametrize('name', list(states))
def test_states(name, version):
    gold = of_json(f'{name}_{version}_state_embs.json')
    ours = state_embeddings(cells(name, version), model(version), states[name], list(gold), layer=-1)
    assert list(ours) == list(gold)
    for s in gold: close(ours[s], gold[s])

def test_budget_and_order_change_nothing():
    c, m = cells('kang_ifnb', 'V2'), model('V2')
    c = c[np.argsort(c.lengths)[:30]]
    mixed = np.random.default_rng(0).permutation(len(c))
    close(m.encode(c[mixed], budget=500), m.encode(c)[mixed], rtol=0)

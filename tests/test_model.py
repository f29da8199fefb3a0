"Packed attention equals padded stock BERT, and checkpoints of every official layout are read, or refused in a sentence"
import fnmatch, json, os, shutil, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification
from geneformer_nb.model import checkpoints
from geneformer_nb.model import bert as module
from geneformer_nb.data.cells import Cells, ragged
from geneformer_nb.data.datasets import official_files
from geneformer_nb.model.checkpoints import read_checkpoint, read_tensors, verify
from geneformer_nb.core import GeneformerError, MissingDataError
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer, bert_config, weights_digest
from golden import root
from sentences import says

WORDS = Vocabulary([f'G{i:03d}' for i in range(90)], np.ones(90), max_len=96, name='ninety')
LENGTHS = [60, 1, 17, 17, 33, 4, 90, 52, 17, 8, 8, 25]
single, half = torch.float32, torch.bfloat16

def same(a, b): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5)

def noisy(seed=0, **changes):
    "A model all of whose numbers are random, so that no part can be left out unseen"
    gf = Geneformer.new('nano', WORDS, seed, **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in gf.hf.parameters(): p.add_(torch.randn_like(p) * .1)
    return gf

def some(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.choice(np.arange(2, 92), n, replace=False) for n in lengths]

def stock(gf, attention):
    "A model that has never heard of this library, with the same weights"
    out = BertForMaskedLM(BertConfig.from_dict(gf.config.to_dict())).eval()
    out.load_state_dict(gf.hf.state_dict())
    out.set_attn_implementation(attention)
    return out

# --- packed attention

@pytest.fixture(scope='module')
def gf(): return noisy()

def states_and_gradients(hf, run, tokens, dtype):
    hf.zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype != single): states, scores = run()
    F.cross_entropy(scores.float(), torch.from_numpy(tokens).long()).backward()
    out = [x.detach().float() for x in states], {k: p.grad.clone() for k, p in hf.named_parameters()}
    hf.zero_grad(set_to_none=True)
    return out

def both_ways(gf, attention, dtype, cells):
    (tokens, offsets), depth = ragged(cells), gf.config.num_hidden_layers
    hf = stock(gf, attention)
    pad = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in cells], batch_first=True)
    def packed():
        states = [gf.hidden(tokens, offsets, layer=i) for i in range(-depth, 1)]
        return states, gf.hf.cls(states[-1])
    def padded():
        out = hf(pad, attention_mask=(pad > 0).long(), output_hidden_states=True)
        return [x[pad > 0] for x in out.hidden_states], out.logits[pad > 0]
    return states_and_gradients(gf.hf, packed, tokens, dtype), states_and_gradients(hf, padded, tokens, dtype)

def apart(a, b): return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))

@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('dtype,near,steep', [(single, 5e-6, 3e-5), (half, .02, .15)], ids=['float32', 'bfloat16'])
def test_packed_equals_padded_stock_bert(gf, attention, dtype, near, steep):
    "Vectors of every layer, gradients of every parameter; the bias of the keys has gradient 0 but for rounding"
    (ours, g), (theirs, stocks) = both_ways(gf, attention, dtype, some())
    assert len(ours) == len(theirs) == 4 and set(g) == set(stocks)
    assert max(apart(a, b) for a, b in zip(ours, theirs)) < near
    unit = max(x.abs().max() for x in stocks.values())
    for k in g:
        if 'key.bias' in k:
            assert max(g[k].abs().max(), stocks[k].abs().max()) < (1e-6 if dtype == single else 1e-2) * unit
        else: assert apart(g[k], stocks[k]) < steep, k

def test_packed_equals_padded_with_cls_in_v2_proportions():
    "Head width 64, ReLU network four times as wide, two specials more"
    v = Vocabulary([f'G{i}' for i in range(90)], np.ones(90), cls=True, max_len=96)
    gf = Geneformer.new('V2-104M', v, num_hidden_layers=2, hidden_size=128, num_attention_heads=2,
                        intermediate_size=512, initializer_range=.2)
    (ours, _), (theirs, _) = both_ways(gf, 'eager', single, [np.r_[2, c + 2, 3] for c in some([30, 7, 7, 60])])
    assert max(apart(a, b) for a, b in zip(ours, theirs)) < 5e-6

def test_a_cell_does_not_feel_its_company(gf):
    "Same stretches: the same bits. Other stretches, orders and budgets: rounding at most"
    cells = some()
    def alone(rows):
        with torch.no_grad(): return gf.hidden(*ragged(rows))[:17]
    base = alone([cells[2], cells[3], cells[4]])
    assert torch.equal(base, alone([cells[2], *some([17, 33], seed=5)]))
    for company in ([], cells, some([90] * 20)): same(alone([cells[2], *company]), base)
    packed = Cells(*ragged(cells), vocabulary=WORDS)
    e = gf.encode(packed)
    order = np.random.default_rng(3).permutation(len(packed))
    for budget in (1, 64, 200, 10**6): same(gf.encode(packed[order], budget=budget), e[order])

def test_empty_cells_are_stepped_over(gf):
    tokens, offsets = ragged([[], [5, 6, 7], [], [], [8, 9], []])
    with torch.no_grad(): same(gf.hidden(tokens, offsets), gf.hidden(*ragged([[5, 6, 7], [8, 9]])))
    assert gf.hidden([], [0]).shape == gf.hidden([], [0, 0, 0]).shape == (0, 128)
    got = gf.encode(Cells(tokens, offsets, vocabulary=WORDS))
    assert np.isnan(got[[0, 2, 3, 5]]).all() and np.isfinite(got[[1, 4]]).all()

def test_attention_dropout_keeps_mean_and_spread(gf):
    "Packed in training mode against padded eager attention in training mode, 400 draws of one layer"
    gf, cells = noisy(hidden_dropout_prob=0., attention_probs_dropout_prob=.3, num_hidden_layers=1), some([12, 5])
    hf, pad = stock(gf, 'eager'), torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in cells], batch_first=True)
    gf.hf.train(), hf.train()
    torch.manual_seed(0)
    with torch.no_grad():
        ours = torch.stack([gf.hidden(*ragged(cells), layer='last') for _ in range(400)])
        mask = (pad > 0).long()
        theirs = torch.stack([hf.bert(pad, attention_mask=mask).last_hidden_state[pad > 0] for _ in range(400)])
    error = (ours.var(0) / 400 + theirs.var(0) / 400).sqrt()
    assert ours.std(0).mean() > .01 and ((ours.mean(0) - theirs.mean(0)) / error).abs().max() < 6
    assert abs(float((ours.std(0) / theirs.std(0)).mean()) - 1) < .03

@pytest.mark.parametrize('call,words', [
    (dict(tokens=[5, 6], offsets=[0, 3]), ('offsets', '(2)')),
    (dict(tokens=[5, 6], offsets=[0, 2, 1, 2]), ('never fall',)),
    (dict(tokens=[5, 6], offsets=[]), ('begin with 0',)),
    (dict(tokens=[5] * 97, offsets=[0, 97]), ('97', '96', 'tokenize again')),
    (dict(tokens=[5, 6], offsets=[0, 2], gate=torch.ones(1)), ('gate has 1',)),
    (dict(tokens=[5, 6], offsets=[0, 2], positions=[1]), ('positions has 1',)),
    (dict(tokens=[], offsets=[0], layer=3), ('layer 3',))])
def test_cells_that_cannot_be_run(gf, call, words):
    with says(GeneformerError, *words): gf.hidden(**call)

def test_unknown_fields_of_a_size():
    with says(GeneformerError, 'num_layers', 'num_hidden_layers'): Geneformer.new('nano', WORDS, num_layers=2)
    assert Geneformer.new('nano', WORDS, num_labels=3, dropout=.5).config.attention_probs_dropout_prob == .5

# --- the road for CUDA, with a stand-in for its kernel

class Kernel:
    "What varlen_attn does, as a loop over cells; remembers its calls"
    def __init__(self): self.calls = []
    def __call__(self, q, k, v, cu_q, cu_k, max_q, max_k):
        self.calls.append((tuple(q.shape), cu_q.tolist(), cu_q.dtype, max_q))
        assert cu_q is cu_k and max_q == max_k
        return torch.cat([F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
                          for a, b in zip(cu_q, cu_q[1:])])

@pytest.fixture
def kernel(monkeypatch):
    out = Kernel()
    monkeypatch.setattr(module, '_varlen', lambda *_: out)
    return out

def test_one_call_a_layer_for_cells_of_all_lengths(gf, kernel, monkeypatch):
    cells = [[], *some()]
    with torch.no_grad(): fast = gf.hidden(*ragged(cells), layer='last')
    ends = np.cumsum([0, *LENGTHS]).tolist()
    assert kernel.calls == [((ends[-1], 4, 32), ends, torch.int32, 90)] * 3
    monkeypatch.setattr(module, '_varlen', lambda *_: None)
    with torch.no_grad(): torch.testing.assert_close(fast, gf.hidden(*ragged(cells), layer='last'), rtol=0, atol=1e-5)

def test_the_fast_road_is_differentiable(gf, kernel):
    (ours, g), (theirs, stocks) = both_ways(gf, 'eager', single, some())
    assert kernel.calls and all(apart(g[k], stocks[k]) < 3e-5 for k in g if 'key.bias' not in k)

def test_what_the_kernel_cannot_do_goes_by_length(kernel):
    gf, (tokens, offsets) = noisy(attention_probs_dropout_prob=.1), ragged(some())
    gf.hidden(tokens, offsets, gate=torch.ones(len(tokens)))
    gf.hidden(tokens, offsets, observe=lambda *_: None)
    gf.hf.train(); gf.hidden(tokens, offsets); gf.hf.eval()
    assert not kernel.calls
    gf.hf.bert(torch.tensor([[5, 6, 7]]))  # the stock forward, a rectangle
    assert not kernel.calls
    gf.hidden(tokens, offsets); assert len(kernel.calls) == 2

def test_when_the_kernel_is_chosen(monkeypatch):
    "CUDA and half precision only; absent, failing or wrong: never"
    import torch.nn.attention.varlen as varlen
    choose, cuda, asked = module._varlen.__wrapped__, torch.device('cuda'), []
    monkeypatch.setattr(module, '_kernel_works', lambda kernel, *what: asked.append(what) or True)
    assert [choose(torch.device(d), t, 64) for d in ('cpu', 'mps') for t in (single, half)] == [None] * 4
    assert choose(cuda, single, 64) is None and not asked
    assert choose(cuda, half, 64) is choose(cuda, torch.float16, 64) is varlen.varlen_attn
    assert asked == [(cuda, half, 64), (cuda, torch.float16, 64)]
    monkeypatch.setattr(module, '_kernel_works', lambda *_: False)
    assert choose(cuda, half, 64) is None
    monkeypatch.setitem(sys.modules, 'torch.nn.attention.varlen', None)  # torch before 2.10
    assert choose(cuda, half, 64) is None

def test_a_kernel_is_tried_before_it_is_trusted():
    from torch.nn.attention.varlen import varlen_attn
    def wrong(q, *rest): return q
    sound, cpu = module._kernel_works, torch.device('cpu')
    assert sound(Kernel(), cpu, half, 64) and not sound(wrong, cpu, half, 64)
    assert not sound(varlen_attn, cpu, half, 64)  # it has no CPU version: its own error is caught
    def old(q, k, v): return q
    assert not sound(old, cpu, half, 64)

def test_the_arguments_are_those_of_this_torch():
    "Seven by position, in this order, since torch 2.10; the rest have defaults"
    import inspect
    from torch.nn.attention.varlen import varlen_attn
    ps = list(inspect.signature(varlen_attn).parameters.values())
    assert [p.name for p in ps[:7]] == ['query', 'key', 'value', 'cu_seq_q', 'cu_seq_k', 'max_q', 'max_k']
    assert all(p.default is not p.empty for p in ps[7:])

# --- checkpoints

class Trap:
    "A pickle that leaves a mark when it is opened"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.system, (f'touch {self.mark}',)

def write(folder, hf, how='safetensors', conf=None, position_ids=True):
    "A checkpoint folder as the official ones are, with the files beside the weights that nobody should open"
    folder.mkdir(parents=True, exist_ok=True)
    conf = conf or dict(hf.config.to_dict(), architectures=[type(hf).__name__])
    (folder/'config.json').write_text(json.dumps(conf))
    d = {k: v.contiguous() for k, v in hf.state_dict().items()}
    if position_ids: d |= {'bert.embeddings.position_ids': torch.arange(hf.config.max_position_embeddings)[None]}
    if how == 'bin': torch.save(d, folder/'pytorch_model.bin')
    else: save_file({k: v for k, v in d.items() if '.decoder.' not in k}, folder/'model.safetensors', dict(format='pt'))
    (folder/'generation_config.json').write_text('{"no": "json')
    torch.save(Trap(folder/'sprung'), folder/'training_args.bin')
    return folder

def small(kind=BertForMaskedLM, **kw):
    torch.manual_seed(0)
    return kind(bert_config('nano', WORDS, **kw)).eval()

opened = []
def _watch(event, args):
    if event == 'open' and opened and isinstance(args[0], (str, bytes, os.PathLike)):
        opened.append(Path(os.fsdecode(args[0])).name)
sys.addaudithook(_watch)

@pytest.fixture
def watched():
    yield opened
    opened.clear()

@pytest.mark.parametrize('how', ['safetensors', 'bin'])
@pytest.mark.parametrize('kind,kw', [(BertForMaskedLM, {}), (BertForTokenClassification, dict(num_labels=2)),
    (BertForSequenceClassification, dict(num_labels=3, problem_type='single_label_classification'))],
    ids=['masked', 'token', 'sequence'])
def test_layouts_and_heads(tmp_path, kind, kw, how, watched):
    "The same numbers as the stock model, and nothing opened but configuration, vocabulary and weights"
    hf = small(kind, **kw)
    folder = write(tmp_path/'tuned', hf, how)
    WORDS.save(folder)
    watched[:] = ['from here on']
    got = Geneformer.from_pretrained(folder, device='cpu')
    assert type(got.hf) is kind and got.vocabulary.hash == WORDS.hash and not got.hf.training
    seen = {n for n in watched if (folder/n).exists()}
    assert seen <= {'config.json', 'vocabulary.json', 'model.safetensors', 'pytorch_model.bin'}, seen
    assert not (folder/'sprung').exists()
    x = torch.tensor([[5, 9, 13, 60, 7]])
    with torch.no_grad(): torch.testing.assert_close(got.hf(x).logits, hf(x).logits, rtol=0, atol=1e-6)
    if kind is BertForSequenceClassification: assert got.config.id2label == {i: f'LABEL_{i}' for i in range(3)}
    for k, v in hf.state_dict().items(): assert torch.equal(v, got.hf.state_dict()[k]), k
    again = Geneformer.from_pretrained(got.save_pretrained(tmp_path/'again'), device='cpu')
    assert weights_digest(again) == weights_digest(got) and type(again.hf) is kind

@pytest.mark.parametrize('how', ['safetensors', 'bin'])
def test_shards(tmp_path, how):
    hf, folder = small(), tmp_path/'large'
    if how == 'safetensors': hf.save_pretrained(folder, max_shard_size='300KB')
    else:
        write(folder, hf, 'bin'); (folder/'pytorch_model.bin').unlink()
        items, where = list(hf.state_dict().items()), {}
        for i in range(3):
            name = f'pytorch_model-{i+1:05d}-of-00003.bin'
            torch.save(dict(items[i::3]), folder/name)
            where |= {k: name for k, _ in items[i::3]}
        (folder/'pytorch_model.bin.index.json').write_text(json.dumps(dict(weight_map=where)))
    got, _ = read_checkpoint(folder, vocabulary=WORDS)
    for k, v in hf.state_dict().items(): assert torch.equal(v, got.state_dict()[k]), k
    part = sorted(folder.glob('*model-*'))[1]
    part.rename(folder/'away')
    with says(MissingDataError, 'large', part.name, 'fetch'): read_checkpoint(folder, vocabulary=WORDS)

def test_an_index_that_points_out_of_its_folder(tmp_path):
    write(tmp_path/'other', small())
    folder = write(tmp_path/'sly', small()); (folder/'model.safetensors').unlink()
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'a': '../other/model.safetensors'})))
    with says(GeneformerError, 'sly', '../other', 'source you trust'):
        Geneformer.from_pretrained(folder, vocabulary=WORDS)

def test_a_malicious_bin_is_refused(tmp_path):
    folder = write(tmp_path/'gift', small(), 'bin')
    torch.save({'bert.embeddings.word_embeddings.weight': Trap(folder/'sprung')}, folder/'pytorch_model.bin')
    with says(GeneformerError, 'pytorch_model.bin', 'gift', '.system', 'nothing of it was run', 'safetensors'):
        Geneformer.from_pretrained(folder, vocabulary=WORDS)
    import pickle
    (folder/'pytorch_model.bin').write_bytes(pickle.dumps(Trap(folder/"sprung"), 2))  # the layout before torch 1.6
    with says(GeneformerError, 'pytorch_model.bin', 'gift'): Geneformer.from_pretrained(folder, vocabulary=WORDS)
    assert not (folder/'sprung').exists()

def test_a_pointer_in_place_of_weights(tmp_path):
    folder = write(tmp_path/'clone', small())
    size, sha = official_files['Geneformer-V1-10M']['model.safetensors']
    text = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n'
    (folder/'model.safetensors').write_text(text)
    with says(MissingDataError, 'clone', 'git-lfs pointer', '41,183,536', 'git lfs pull'):
        Geneformer.from_pretrained(folder, vocabulary=WORDS)
    t = verify(folder, 'Geneformer-V1-10M')
    assert dict(zip(t.file, t.found))['model.safetensors'] == 'a git-lfs pointer to this file' and not t.ok.any()

@pytest.mark.parametrize('spoil,words', [
    (lambda f: os.truncate(f/'model.safetensors', 100_000), ('model.safetensors', 'incomplete')),
    (lambda f: (f/'model.safetensors').unlink(), ('no weights',)),
    (lambda f: (f/'config.json').write_text('{"vocab'), ('config.json', 'damaged')),
    (lambda f: (f/'config.json').unlink(), ('no config.json', 'V2-104M')),
    (lambda f: save_file({'bert.pooler.dense.bias': torch.ones(128)}, f/'model.safetensors'), ('lack', 'tensors'))])
def test_damaged_folders(tmp_path, spoil, words):
    folder = write(tmp_path/'worn', small())
    spoil(folder)
    with says(GeneformerError, 'worn', *words): Geneformer.from_pretrained(folder, vocabulary=WORDS)

def test_weights_of_another_shape(tmp_path):
    folder = write(tmp_path/'mixed', small())
    conf = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(conf | dict(intermediate_size=64)))
    with says(MissingDataError, 'mixed', 'do not fit'): Geneformer.from_pretrained(folder, vocabulary=WORDS)
    (folder/'config.json').write_text(json.dumps(conf | dict(vocab_size=92, architectures=['T5Model'])))
    with says(GeneformerError, 'T5Model', 'no BERT'): Geneformer.from_pretrained(folder, vocabulary=WORDS)

def test_a_file_of_an_official_name_and_another_size_is_remarked(tmp_path):
    folder = write(tmp_path/'Geneformer-V1-10M', small())
    with pytest.warns(UserWarning, match='41,183,536.*verify'): Geneformer.from_pretrained(folder, vocabulary=WORDS)
    other = write(tmp_path/'mine', small())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Geneformer.from_pretrained(other, vocabulary=WORDS)

# --- the hub

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "huggingface_hub that copies from a folder laid out as the official repository, and remembers what it was asked"
    import huggingface_hub
    repo, cache, asked = tmp_path/'repo', tmp_path/'cache', []
    write(repo, small(), position_ids=False)
    write(repo/'Geneformer-V1-10M', small())
    write(repo/'Geneformer-V1-10M', small(), 'bin')
    write(repo/'fine_tuned_models/heart', small(BertForSequenceClassification, num_labels=3), 'bin')
    small().save_pretrained(repo/'large', max_shard_size='300KB')
    (repo/'geneformer').mkdir()
    for name in ('token_dictionary_gc104M.pkl', 'code.py'): (repo/'geneformer'/name).write_text('x')
    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        for p in repo.rglob('*'):
            name = p.relative_to(repo).as_posix()
            if p.is_file() and any(fnmatch.fnmatch(name, a) for a in allow_patterns):
                (cache/name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(p, cache/name)
        cache.mkdir(exist_ok=True)
        return str(cache)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    def fetched(): return {p.relative_to(cache).as_posix() for p in cache.rglob('*') if p.is_file()}
    return asked, fetched

@pytest.mark.filterwarnings('ignore:.*official file')
@pytest.mark.parametrize('sub,revision,weights', [
    (None, None, {'model.safetensors'}), ('Geneformer-V1-10M', 'v0.1', {'Geneformer-V1-10M/model.safetensors'}),
    ('fine_tuned_models/heart', None, {'fine_tuned_models/heart/pytorch_model.bin'}), ('large', 'main', None)])
def test_a_hub_id_fetches_one_checkpoint_and_no_more(hub, sub, revision, weights):
    asked, fetched = hub
    what = dict(revision=revision, vocabulary=WORDS, device='cpu')
    got = Geneformer.from_pretrained(f"someone/Geneformer/{sub or ''}", **what)
    assert set(asked) == {('someone/Geneformer', revision)} and got.vocabulary is WORDS
    files = fetched() - {'geneformer/token_dictionary_gc104M.pkl'}
    conf = f'{sub}/config.json' if sub else 'config.json'
    if weights: assert files == weights | {conf}
    else: assert len([f for f in files if f.startswith('large/model-')]) > 2 and not any('training' in f for f in files)
    assert isinstance(got.hf, BertForSequenceClassification if sub and 'heart' in sub else BertForMaskedLM)

def test_a_hub_that_does_not_answer(hub, monkeypatch):
    import huggingface_hub
    def fails(*_, **__): raise huggingface_hub.errors.LocalEntryNotFoundError('offline')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fails)
    with says(MissingDataError, 'models/v1', 'LocalEntryNotFound', 'mend the name'): Geneformer.from_pretrained('models/v1')
    with says(MissingDataError, 'nowhere', 'config.json'): Geneformer.from_pretrained('/nowhere/at/all/nowhere')

def test_a_hub_id_with_a_wrong_subfolder_names_the_right_ones(hub):
    with says(MissingDataError, 'no config.json'): Geneformer.from_pretrained('someone/Geneformer/V3')

def test_the_names_that_snapshot_download_takes():
    import inspect
    from huggingface_hub import snapshot_download
    assert {'repo_id', 'revision', 'allow_patterns'} <= set(inspect.signature(snapshot_download).parameters)

# --- official layouts from the official configurations

CONFIGS = root/'data/official/configs'
needed = pytest.mark.skipif(not CONFIGS.is_dir(), reason='GENEFORMER_NB_DATA names no folder with data/official/configs: '
                            'the config.json files of huggingface.co/ctheodoris/Geneformer are needed')
HEART = 'fine_tuned_models/Geneformer-V1-10M_CellClassifier_cardiomyopathies_220224'

@needed
@pytest.mark.filterwarnings('ignore:.*official file')
@pytest.mark.parametrize('name,how,layers', [('Geneformer-V1-10M', 'safetensors', 6),
    ('Geneformer-V1-10M', 'bin', 1), (HEART, 'bin', 2), ('Geneformer-V2-104M', 'safetensors', 1),
    ('Geneformer-V2-104M_CLcancer', 'safetensors', 1), ('Geneformer-V2-316M', 'safetensors', 1)])
def test_official_folders(tmp_path, name, how, layers):
    "A copy of the repository with random weights: V1 in full, the others with fewer layers; dictionaries beside it"
    import transformers
    conf = json.loads((CONFIGS/f'{Path(name).name}_config.json').read_text()) | dict(num_hidden_layers=layers)
    torch.manual_seed(0)
    kind = getattr(transformers, conf['architectures'][0])
    hf = kind(BertConfig.from_dict(conf)).eval()
    v1 = conf['vocab_size'] == 25_426
    write(tmp_path/name, hf, how, conf, position_ids=v1)
    (tmp_path/'geneformer').symlink_to(root/'data/official/geneformer')
    got = Geneformer.from_pretrained(tmp_path/name, device='cpu')
    assert got.vocabulary.name == ('V1' if v1 else 'V2') and type(got.hf) is kind
    if layers == 6 and v1:
        assert (tmp_path/name/'model.safetensors').stat().st_size == official_files[name]['model.safetensors'][0]
    genes = got.vocabulary.token(['TTN', 'MYH7', 'NPPA', 'PLN'])
    cell = np.r_[2, genes, 3] if got.vocabulary.cls else genes
    x = torch.from_numpy(cell.astype(np.int64))[None]
    with torch.no_grad():
        theirs = hf(x, output_hidden_states=True)
        same(got.hf(x).logits, theirs.logits)
        for back in range(layers + 1):
            same(got.hidden(cell, [0, len(cell)], layer=-back), theirs.hidden_states[layers - back][0])
    if kind is BertForSequenceClassification:
        assert list(got.config.id2label.values()) == ['LABEL_0', 'LABEL_1', 'LABEL_2']

@needed
def test_checksums_are_those_of_the_repository(tmp_path):
    lines = [l.split() for l in (CONFIGS/'official_lfs_pointers.txt').read_text().splitlines()]
    stated = {l[0]: (int(l[4]), l[2].removeprefix('sha256:')) for l in lines}
    assert {f'{d}/{f}'.lstrip('/'): x for d, fs in official_files.items() for f, x in fs.items()} == stated
    t = verify(root/'data/official')
    assert len(t) == 8 and t.ok.all() and len(verify(root/'data/official', missing=True)) == len(stated)
    copy = tmp_path/'gene_dictionaries_30m'
    shutil.copytree(root/'data/official/geneformer/gene_dictionaries_30m', copy)
    f = copy/'token_dictionary_gc30M.pkl'
    f.chmod(0o644)
    raw = bytearray(f.read_bytes()); raw[5000] ^= 1; f.write_bytes(raw)  # one bit
    t = verify(copy).set_index('file')
    assert t.ok.sum() == 3 and not t.ok[f.name] and len(t.found[f.name]) == 64

"Products by oneDNN: a model says what it said, with its derivatives, and learns the same"
import numpy as np, pytest, torch
from geneformer_nb.model import cpu_kernels
from geneformer_nb.data.vocabulary import Vocabulary
from geneformer_nb.model.bert import Geneformer

sound = {t: cpu_kernels._kernel_works(cpu_kernels._linear, t) for t in (torch.float32, torch.bfloat16)}
names = [f'G{i}' for i in range(900)]
v = Vocabulary(names, np.ones(900), max_len=900)
off, tokens = np.array([0, 850, 1700, 1740]), np.random.default_rng(0).integers(2, 902, 1740)

@pytest.fixture
def switch(monkeypatch):
    "On or off, whatever the processor is"
    def to(on, dtype=torch.float32):
        if on and not sound[dtype]: pytest.skip('this build of torch has no oneDNN')
        monkeypatch.setattr(cpu_kernels, 'onednn', lambda dtype=torch.float32: on)
    return to

@pytest.fixture(scope='module')
def model(): return Geneformer.new('nano', v, 0, initializer_range=.1)

@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_vectors_are_those_of_torch(model, switch, dtype, threads):
    old = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = []
        for on in (False, True):
            switch(on, dtype)
            with torch.inference_mode(), torch.autocast('cpu', dtype, enabled=dtype != torch.float32): out.append(model.hidden(tokens, off).float())
    finally: torch.set_num_threads(old)
    assert (out[0] - out[1]).abs().max() < (1e-4 if dtype == torch.float32 else .1)
    assert torch.nn.functional.cosine_similarity(*out).min() > (1 - 1e-6 if dtype == torch.float32 else .999)

def test_derivatives_are_those_of_torch(model, switch):
    model.hf.zero_grad()
    own, grads = list(model.hf.bert.encoder.parameters()), []
    for on in (False, True):
        switch(on)
        grads.append(torch.autograd.grad(model.hidden(tokens, off, layer='last').square().sum(1).sqrt().sum(), own))
    most = max(a.abs().max() for a in grads[0])  # that of a key's bias is 0 but for rounding
    for a, b in zip(*grads): assert (a - b).abs().max() <= 1e-3*a.abs().max() + 1e-5*most

def test_the_same_bits_twice(model, switch):
    switch(True)
    with torch.inference_mode(): one, two = model.hidden(tokens, off), model.hidden(tokens, off)
    assert torch.equal(one, two)

def test_tensors_that_lie_apart_stay_with_torch():
    x, w = torch.randn(64, 8), torch.randn(5, 8)
    assert cpu_kernels._Products.ours(x, w) and not cpu_kernels._Products.ours(torch.randn(8, 64).T, w) and not cpu_kernels._Products.ours(x, torch.randn(8, 5).T)
    class Own(torch.Tensor): pass
    assert not cpu_kernels._Products.ours(x, w.as_subclass(Own)) and not cpu_kernels._Products.ours(x.to('meta'), w.to('meta'))

def test_the_environment_switches_it_off(model, monkeypatch):
    "whatever the processor is, GENEFORMER_NB_CPU_KERNELS=0 leaves every product to torch, and the vectors agree"
    monkeypatch.setattr(cpu_kernels, '_onednn_pays', lambda dtype: sound[dtype])
    out, modes = [], []
    for value in ('1', '0'):
        monkeypatch.setenv('GENEFORMER_NB_CPU_KERNELS', value)
        modes.append(isinstance(cpu_kernels.fast_matmul(torch.device('cpu')), cpu_kernels._Products))
        with torch.inference_mode(): out.append(model.hidden(tokens, off))
    assert modes == [sound[torch.float32], False]
    torch.testing.assert_close(*out, atol=1e-4, rtol=0)

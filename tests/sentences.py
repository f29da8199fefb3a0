"What several tests ask: was it one sentence, and which tokens are these?"
import warnings
from contextlib import contextmanager
import pytest

@contextmanager
def says(error, *words):
    "The block raises `error` with one sentence that holds all the words"
    with pytest.raises(error) as info: yield
    text = str(info.value)
    assert '\n' not in text and text[-1] in '.…)?', text
    for w in words: assert w in text, f'{w!r} is not in: {text}'

@contextmanager
def quiet():
    "The block without warnings"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        yield

def tokens(cells): return [cells[i].tokens.tolist() for i in range(len(cells))]

"""Greedy continuations are mlx_lm's, end where they should, and read the compressed cache."""

import mlx_lm.models.cache as host
import pytest
from models import greedy, llama, tokens

from vllm_metal_tq import TurboQuantConfig
from vllm_metal_tq.completion import complete
from vllm_metal_tq.evaluate import compressed


class Numbers:
    """A tokenizer that writes ids as words."""

    def __init__(self, *ends):
        self.eos_token_ids = set(ends)

    def decode(self, ids):
        return " ".join(f"<{token}>" for token in ids)


@pytest.fixture(scope="module")
def model():
    return llama()


PROMPT = tokens(300)[0].tolist()


def answer(model, tokenizer=None, caches=None, **options):
    caches = caches or host.make_prompt_cache(model)
    return complete(model, tokenizer or Numbers(), PROMPT, caches, 12, **options)


@pytest.fixture(scope="module")
def wanted(model):
    prompt = tokens(300)[0]
    return greedy(model, host.make_prompt_cache(model), prompt, 12, prefill_step_size=128)


def test_it_is_what_mlx_lm_generates(model, wanted):
    assert answer(model) == Numbers().decode(wanted)


def test_a_stop_text_and_an_end_token_end_it(model, wanted):
    first = wanted.index(wanted[5])
    assert answer(model, stop=f"<{wanted[5]}>").strip() == Numbers().decode(wanted[:first])
    assert answer(model, Numbers(wanted[5])) == Numbers().decode(wanted[:first])


def test_the_prompt_reads_the_compressed_cache_too(model):
    # Only the prompt's last position decides the first token: with 2 bits it reads other logits.
    method = compressed(model, TurboQuantConfig(2, 2), 300, tail=False)
    caches = method.caches(model)
    answer(model, caches=caches)
    assert all(cache.offset >= 300 and cache.sequences.raw_window == 1 for cache in caches)

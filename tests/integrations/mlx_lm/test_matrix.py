"""Every kind of attention, compressed at 8 bits, against mlx_lm's own cache.

A spread is the standard deviation of a step's logits over the vocabulary. Compression moved the
logits of these models by up to 0.07 of it, and more where attention is sharper. Without one block
of 16 tokens of 80 they would move by ``BOUND`` and more, as a test shows for each kind; so they
would without one in windows of 48 tokens, which the decoded tokens leave behind.
"""

from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host
import pytest
from kinds import KINDS, WINDOW, Kind
from models import tokens
from supported_models import PAGE, written
from trained import trained

from vllm_metal_tq import TurboQuantConfig, make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm.parts import all_compressed, compressed
from vllm_metal_tq.integrations.mlx_lm.probe import attention
from vllm_metal_tq.tail import FEW, TAIL

BOUND = 0.1  # spreads
CHUNKS = 48, 32  # of the prompt: more than a block and the tail
STEPS = 32
TQ8 = TurboQuantConfig.from_names("tq8")


@dataclass
class Case:
    """A model, and what it says with mlx_lm's own cache: ``(1 + STEPS, vocab)`` and its tokens."""

    kind: Kind
    model: nn.Module
    logits: mx.array
    chosen: list[int]

    @property
    def spread(self):
        return mx.std(self.logits, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def case(request):
    kind = request.param
    pytest.importorskip(f"mlx_lm.models.{kind.model_type}")  # of a later mlx_lm
    if not kind.is_here:
        pytest.skip(f"mlx_lm {version('mlx-lm')} has other caches for it, or breaks: {kind.since}")
    model = trained(kind)
    return Case(kind, model, *decode(model, host.make_prompt_cache(model)))


def prefill(model, cache):
    """The logits of the prompt's last token."""
    prompt = tokens(sum(CHUNKS))
    for chunk in mx.split(prompt, CHUNKS[:1], axis=1):
        logits = model(chunk, cache=cache)[0, -1]
    return logits


def steps(model, cache, logits, forced=None):
    """Logits of the prompt and of each step, and the tokens: its own choice, or ``forced``."""
    found, chosen = [logits], []
    for i in range(STEPS):
        chosen.append(forced[i] if forced else int(found[-1].argmax().item()))
        found.append(model(mx.array([[chosen[-1]]]), cache=cache)[0, -1])
    return mx.stack(found), chosen


def decode(model, cache, forced=None):
    return steps(model, cache, prefill(model, cache), forced)


def moved(case, logits):
    """How far each step's logits are from the uncompressed ones, in spreads."""
    return (mx.abs(logits - case.logits) / case.spread).max(axis=1)


every_kind = pytest.mark.parametrize("case", KINDS, ids=str, indirect=True)
compressed_kinds = pytest.mark.parametrize(
    "case", [kind for kind in KINDS if any(kind.compressed)], ids=str, indirect=True
)
kinds_with_windows = pytest.mark.parametrize(
    "case",
    [kind for kind in KINDS if kind.rings],
    ids=str,
    indirect=True,
)


@every_kind
def test_the_caches_that_are_compressed_and_why_others_are_not(case):
    cache = make_prompt_cache(case.model, TQ8)
    found = attention(case.model)
    assert [x if isinstance(x, str) else x.reader.value for x in found] == case.kind.caches
    ours = [compressed(c) is not None for c in cache]
    assert ours == case.kind.compressed


@every_kind
def test_logits_and_choices_are_those_of_the_uncompressed_cache(case):
    logits, _ = decode(case.model, make_prompt_cache(case.model, TQ8), case.chosen)
    bound = BOUND if any(case.kind.compressed) else 0.0
    assert moved(case, logits).max().item() <= bound
    best = mx.sort(case.logits, axis=1)[:, -2:]
    clear = (best[:, 1] - best[:, 0]) / case.spread[:, 0] > bound
    assert clear.sum().item() > STEPS / 4  # else choices would say nothing
    same = logits.argmax(axis=1) == case.logits.argmax(axis=1)
    assert (same | ~clear).all()


@compressed_kinds
def test_a_block_that_is_lost_would_show(case):
    cache = make_prompt_cache(case.model, TQ8)
    logits = prefill(case.model, cache)
    lose_a_block(all_compressed(cache))
    logits, _ = steps(case.model, cache, logits, case.chosen)
    assert moved(case, logits).max().item() > BOUND


def lose_a_block(caches):
    """One that the next token sees in a window, but not as it came."""
    lost = sum(CHUNKS) - TAIL - 16
    assert sum(CHUNKS) - WINDOW <= lost
    for cache in caches:
        cache.pool.pages[cache.sequences.tables[0].blocks[lost // 16]] = 0


def rings(cache):
    return [ours for ours in all_compressed(cache) if ours.sequences.window == WINDOW]


@kinds_with_windows
def test_a_block_that_is_lost_from_a_window_would_show(case):
    cache = make_prompt_cache(case.model, TQ8)
    logits = prefill(case.model, cache)
    lose_a_block(rings(cache))
    logits, _ = steps(case.model, cache, logits, case.chosen)
    assert moved(case, logits).max().item() > BOUND


@kinds_with_windows
def test_a_window_drops_what_is_behind_it(case):
    cache = make_prompt_cache(case.model, TQ8)
    decode(case.model, cache, case.chosen)
    assert rings(cache)
    for ring in rings(cache):
        assert ring.offset == sum(CHUNKS) + STEPS
        assert WINDOW <= ring.size() <= WINDOW + FEW + 16
        assert ring.nbytes < 8 * ring.pool.block_bytes + ring.sequences.tail.nbytes


def test_the_documentation_has_these_kinds():
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page
    assert f"{BOUND:.0%} of their spread" in page

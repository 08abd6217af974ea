"""Speculative decoding, by a draft model or by prompt lookup, is plain decoding."""

import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from models import VOCAB, build, greedy, llama, tokens

from vllm_metal_tq import TurboQuantConfig, make_prompt_cache
from vllm_metal_tq.integrations.mlx_lm import lookup
from vllm_metal_tq.integrations.mlx_lm.lookup import MAX_DRAFT, Seen, lookup_generate_step
from vllm_metal_tq.tail import TAIL

EIGHT = TurboQuantConfig(8, 8)
# A row of a chunk sees some tokens through pages that decoding sees as they came, those that the
# chunk's last rows push out of the tail: with eight bits the difference of logits is this at most.
BOUND = 0.01
ROUNDING = 2e-4  # of float32, where all tokens are seen as they came


@pytest.fixture(scope="module")
def model():
    return llama()


def plain_logprobs(model, prompt, answer, **options):
    """Log-probabilities before each token of ``answer``, decoding it token by token."""
    forced = iter(answer)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=len(answer),
        prompt_cache=make_prompt_cache(model, EIGHT),
        sampler=lambda _: mx.array([next(forced, 0)]),
        **options,
    )
    return mx.stack([logprobs for _, logprobs in steps])


class Drafts:
    """Drafts of which as many are right as ``accepted`` says for each, in turn."""

    def __init__(self, sequence, accepted, size=MAX_DRAFT):
        self.sequence, self.accepted, self.size, self.round = list(sequence), accepted, size, 0
        self.at = 0

    def add(self, token):
        assert token == self.sequence[self.at]
        self.at += 1

    def draft(self, count):
        count = min(count, self.size)
        right = min(self.accepted[self.round % len(self.accepted)], count)
        self.round += 1
        rest = self.sequence[self.at :]
        wrong = [(t + 1) % VOCAB for t in rest[right:count]]
        return rest[:right] + wrong


def speculated(model, monkeypatch, prompt, count, accepted, size=MAX_DRAFT):
    """Greedy tokens and log-probabilities under such drafts, and the plain run's own tokens."""
    plain = greedy(model, make_prompt_cache(model, EIGHT), mx.array(prompt), count)
    drafts = Drafts([*prompt, *plain], accepted, size)
    monkeypatch.setattr(lookup, "Seen", lambda: drafts)
    cache = make_prompt_cache(model, EIGHT)
    steps = list(lookup_generate_step(mx.array(prompt), model, cache, max_tokens=count))
    assert drafts.round < count or not any(accepted)
    assert cache[0].size() == cache[0].offset == len(prompt) + count - 1
    return [t for t, _, _ in steps], mx.stack([x for _, x, _ in steps]), plain


class TestDrafts:
    def seen(self, *text):
        seen = Seen()
        for token in text:
            seen.add(token)
        return seen

    def test_what_followed_is_drafted(self):
        assert self.seen(1, 2, 3, 4, 5, 1, 2, 3).draft(2) == [4, 5]
        assert self.seen(1, 2, 3, 4, 5, 1, 2, 3).draft(9) == [4, 5, 1, 2, 3]

    def test_the_last_time_counts(self):
        assert self.seen(1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3).draft(1) == [8]

    def test_more_tokens_that_repeat_come_first(self):
        assert self.seen(9, 1, 2, 7, 8, 1, 2, 5, 9, 1, 2).draft(1) == [7]

    def test_two_tokens_are_enough_and_one_is_not(self):
        assert self.seen(6, 1, 2, 7, 8, 1, 2).draft(1) == [7]
        assert self.seen(6, 1, 2, 7, 8, 9, 2).draft(1) == []

    def test_nothing_is_drafted_where_nothing_repeats_or_is_wanted(self):
        assert self.seen().draft(3) == self.seen(1).draft(3) == self.seen(1, 2, 3).draft(3) == []
        assert self.seen(1, 2, 1, 2).draft(0) == self.seen(1, 2, 1, 2).draft(-1) == []


@pytest.mark.parametrize("size", range(1, MAX_DRAFT + 1))
def test_within_the_tail_tokens_are_those_of_plain_decoding(model, monkeypatch, size):
    prompt = tokens(8)[0].tolist()
    for accepted in {0, size // 2, size}:
        found, logprobs, plain = speculated(
            model, monkeypatch, prompt, TAIL - len(prompt), [accepted], size
        )
        assert found == plain
        exact = plain_logprobs(model, prompt, plain)
        assert mx.abs(logprobs - exact).max().item() < ROUNDING


@pytest.mark.parametrize("start", [1, 16, 47])
def test_across_blocks_and_rings_what_is_seen_is_what_decoding_sees(model, monkeypatch, start):
    # Chunks and trims of all lengths, at all places in a block and in the ring of the tail.
    prompt = tokens(start)[0].tolist()
    rng = np.random.default_rng(start)
    accepted = rng.permutation(3 * list(range(MAX_DRAFT + 1))).tolist()
    plain = greedy(model, make_prompt_cache(model, EIGHT), mx.array(prompt), 100)
    drafts = Drafts([*prompt, *plain], accepted)
    cache = make_prompt_cache(model, EIGHT)
    if start > 1:
        model(mx.array([prompt[:-1]]), cache=cache)
    for token in prompt:
        drafts.add(token)
    out = []
    while len(out) < 90:
        draft = drafts.draft(int(rng.integers(0, MAX_DRAFT + 1)))
        right = next(
            (i for i, t in enumerate(draft) if t != drafts.sequence[drafts.at + i]), len(draft)
        )
        chunk = [drafts.sequence[drafts.at - 1], *draft]
        logits = model(mx.array([chunk]), cache=cache)[0, : right + 1]
        assert host.trim_prompt_cache(cache, len(draft) - right) == len(draft) - right
        out += list(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        drafts.at += right + 1
    exact = plain_logprobs(model, prompt, plain)
    assert mx.abs(mx.stack(out) - exact[: len(out)]).max().item() < BOUND
    assert cache[0].offset == start - 1 + len(out)


@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_lookup_on_a_text_that_repeats_itself(model, count):
    prompt = (tokens(11)[0].tolist() * 4)[:40]
    cache = make_prompt_cache(model, EIGHT)
    steps = list(lookup_generate_step(mx.array(prompt), model, cache, max_tokens=count))
    answer = [t for t, _, _ in steps]
    assert len(answer) == count
    exact = plain_logprobs(model, prompt, answer)
    assert mx.abs(mx.stack([x for _, x, _ in steps]) - exact).max().item() < BOUND
    assert cache[0].size() == len(prompt) + count - 1


def test_lookup_with_windows_that_wrap():
    pattern = ["sliding_attention", "full_attention"]
    model = llama(num_hidden_layers=2, layer_types=pattern, sliding_window=40)
    prompt = (tokens(11)[0].tolist() * 8)[:80]
    cache = make_prompt_cache(model, EIGHT)
    steps = list(lookup_generate_step(mx.array(prompt), model, cache, max_tokens=60))
    assert sum(drafted for _, _, drafted in steps) > 5
    exact = plain_logprobs(model, prompt, [t for t, _, _ in steps])
    assert mx.abs(mx.stack([x for _, x, _ in steps]) - exact).max().item() < BOUND
    assert cache[1].size() == cache[0].offset == 80 + 60 - 1
    assert cache[0].size() < 40 + 8 + 16 + MAX_DRAFT


def test_lookup_processes_the_prompt_in_the_chunks_of_mlx_lm(model):
    prompt, seen = tokens(50)[0].tolist(), []
    options = {"prefill_step_size": 16, "max_tokens": 5}
    cache = make_prompt_cache(model, EIGHT)
    steps = lookup_generate_step(
        mx.array(prompt),
        model,
        cache,
        prompt_progress_callback=lambda *x: seen.append(x),
        **options,
    )
    found = [(t, x) for t, x, _ in steps]
    exact = plain_logprobs(model, prompt, [t for t, _ in found], prefill_step_size=16)
    assert mx.abs(mx.stack([x for _, x in found]) - exact).max().item() < BOUND
    assert seen == [(16, 50), (32, 50), (48, 50), (49, 50)]


@pytest.mark.parametrize("stop", range(1, 12))
def test_who_stops_early_leaves_a_cache_without_drafts(model, monkeypatch, stop):
    prompt = tokens(8)[0].tolist()
    plain = greedy(model, make_prompt_cache(model, EIGHT), mx.array(prompt), 20)
    drafts = Drafts([*prompt, *plain], [MAX_DRAFT, 3])
    monkeypatch.setattr(lookup, "Seen", lambda: drafts)
    cache = make_prompt_cache(model, EIGHT)
    steps = lookup_generate_step(mx.array(prompt), model, cache, max_tokens=20)
    taken = [next(steps)[0] for _ in range(stop)]
    steps.close()
    assert cache[0].size() == cache[0].offset == len(prompt) + stop - 1
    assert taken == plain[:stop]
    assert greedy(model, cache, mx.array(taken[-1:]), 5) == plain[stop : stop + 5]


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 7])
def test_with_a_draft_model_of_mlx_lm(model, num_draft_tokens):
    # Near the model, so that some of its drafts are right.
    draft_model = llama()
    keys = iter(mx.random.split(mx.random.key(1), 100))
    draft_model.update(
        tree_map(
            lambda x: x + 0.2 * x.std() * mx.random.normal(x.shape, key=next(keys)),
            draft_model.parameters(),
        )
    )
    prompt = tokens(20)[0].tolist()
    cache = make_prompt_cache(model, EIGHT) + make_prompt_cache(draft_model, EIGHT)
    steps = list(
        speculative_generate_step(
            mx.array(prompt),
            model,
            draft_model,
            num_draft_tokens=num_draft_tokens,
            max_tokens=60,
            prompt_cache=cache,
        )
    )
    drafted = sum(drafted for _, _, drafted in steps)
    assert 5 < drafted < 55
    exact = plain_logprobs(model, prompt, [t for t, _, _ in steps])
    assert mx.abs(mx.stack([x for _, x, _ in steps]) - exact).max().item() < BOUND


class TestWhatIsRefused:
    @pytest.mark.parametrize("number", [0, -1, MAX_DRAFT + 1])
    def test_more_drafts_than_decoding_takes(self, model, number):
        with pytest.raises(ValueError, match=f"{number} draft tokens: 1 to 7"):
            next(lookup_generate_step(tokens(5)[0], model, [], num_draft_tokens=number))

    def test_a_cache_with_a_limit(self, model):
        cache = make_prompt_cache(model, max_kv_size=64)
        with pytest.raises(ValueError, match="which TurboQuantKVCache cannot do"):
            next(lookup_generate_step(tokens(5)[0], model, cache))

    def test_layers_with_a_sliding_window(self):
        pattern = ["sliding_attention", "full_attention"]
        model = llama(num_hidden_layers=2, layer_types=pattern, sliding_window=8)
        lookup.check_trimmable(make_prompt_cache(model), few=True)
        for cache, kind in (
            (make_prompt_cache(model), "TurboQuantKVCache"),
            (host.make_prompt_cache(model), "RotatingKVCache"),
        ):
            with pytest.raises(ValueError, match=f"which {kind} cannot do"):
                lookup.check_trimmable(cache)

    def test_but_not_dense_caches(self, model):
        lookup.check_trimmable(host.make_prompt_cache(build("llama", head_dim=64)))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "bound"), [("tq8", 0.05), ("tq4", 1.0)])
def test_the_demo_model_says_the_same_up_to_near_ties(demo, preset, bound):
    model, tokenizer = demo
    config = TurboQuantConfig.from_names(preset)
    line = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n"
    prompt = mx.array(tokenizer.encode(3 * line + "The quick brown"))
    plain = generate_step(
        prompt, model, max_tokens=48, prompt_cache=make_prompt_cache(model, config)
    )
    steps = list(
        lookup_generate_step(prompt, model, make_prompt_cache(model, config), max_tokens=48)
    )
    assert 10 < sum(drafted for _, _, drafted in steps) < 48
    for (token, logprobs), (its, its_logprobs, _) in zip(plain, steps, strict=True):
        assert mx.abs(logprobs - its_logprobs).max().item() < bound
        if token != its:
            assert (logprobs[token] - logprobs[its]).item() < bound / 10
            break

from importlib.resources import files

import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
import pytest
from models import llama, tokens

from vllm_metal_tq import TurboQuantConfig, make_prompt_cache
from vllm_metal_tq.evaluate import evaluate


def by_single_tokens(model, ids, config, scored):
    """The same figures from plain decoding, token by token, in numpy."""
    logits = []
    for cache in (host.make_prompt_cache(model), make_prompt_cache(model, config)):
        steps = [model(mx.array([[token]]), cache=cache)[0, 0] for token in ids[:-1]]
        logits.append(np.array(mx.stack(steps), np.float64))
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in logits)
    rows = np.arange(len(ids) - 1)[-scored:]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[rows]
    nll = -log_q[rows, np.array(ids)[1:][rows]]
    same = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1))[rows]
    return np.exp(nll.mean()), kl.mean(), np.quantile(kl, 0.99), same.mean()


def test_figures_are_those_of_decoding_token_by_token():
    model = llama()
    ids = tokens(301)[0].tolist()
    config = TurboQuantConfig(2, 2)
    quality = evaluate(model, ids, config, window=300, tokens=150)
    ppl, kl_mean, kl_p99, top1 = by_single_tokens(model, ids, config, 150)
    assert quality.tokens == 150
    assert quality.ppl == pytest.approx(ppl, rel=1e-4)
    assert quality.kl_mean == pytest.approx(kl_mean, rel=1e-2)
    assert quality.kl_p99 == pytest.approx(kl_p99, rel=1e-2)
    assert quality.top1 == pytest.approx(top1, abs=1 / 150)
    assert quality.kl_mean > 1e-6


def test_the_tail_improves_the_figures():
    model = llama()
    ids = tokens(301)[0].tolist()
    plain, with_tail = (
        evaluate(model, ids, TurboQuantConfig(2, 2), window=100, tokens=150, tail=tail)
        for tail in (False, True)
    )
    assert plain.tokens == with_tail.tokens == 150
    assert with_tail.kl_mean < plain.kl_mean / 2


@pytest.mark.parametrize(("asked", "scored"), [(10, 10), (50, 50), (60, 60), (1000, 100)])
def test_as_many_positions_are_scored_as_asked_for_if_the_text_has_them(asked, scored):
    ids = tokens(201)[0].tolist()
    assert evaluate(llama(), ids, TurboQuantConfig(4, 4), window=100, tokens=asked).tokens == scored


def test_progress_runs_to_the_end():
    seen = []
    evaluate(
        llama(),
        tokens(201)[0].tolist(),
        TurboQuantConfig(4, 4),
        window=100,
        tokens=100,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (400, 400)
    assert seen == sorted(seen)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "top1"), [("tq8", 0.975), ("tq6", 0.95), ("tq4", 0.86)])
def test_the_demo_model_agrees_with_its_uncompressed_self(demo, preset, top1):
    model, tokenizer = demo
    text = (files("vllm_metal_tq") / "data" / "alice.txt").read_text(encoding="utf-8")
    quality = evaluate(model, tokenizer.encode(text), TurboQuantConfig.from_names(preset))
    assert quality.tokens >= 1000
    assert quality.top1 >= top1

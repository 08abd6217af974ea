"""vllm-metal's own runtimes and forward contexts over our pages, with small models.

What an engine would schedule is written out here; the tokens' logits are those that mlx_lm's
model gives with our cache in one sequence, chunk by chunk.
"""

import mlx.core as mx
import models
import pytest

pytest.importorskip("vllm_metal_on_linux", reason="needs vLLM and vllm-metal: make e2e-vllm")

from vllm_metal.attention.context import (
    OffsetCache,
    clear_context,
    get_context,
    prepare_grouped,
)
from vllm_metal.attention.runtime.hybrid import HybridPagedAttentionRuntime
from vllm_metal.attention.runtime.mha import MHAPagedAttentionRuntime

from vllm_metal_tq import TurboQuantConfig
from vllm_metal_tq.integrations.mlx_lm import calibrate, make_prompt_cache
from vllm_metal_tq.integrations.vllm import backend, forward
from vllm_metal_tq.integrations.vllm.cache import Layers

BLOCKS, WIDTHS = 24, TurboQuantConfig(8, 6)


class Engine:
    """Runs a model through vllm-metal's runtime; blocks are given out from the last to the first.

    Args:
        model: of mlx_lm; it is patched.
        configs: widths of each layer, None for a dense one.
        centres: of each layer.
        block_size: tokens of the engine's blocks.
        windows: of each layer, -1 where there is none.
    """

    def __init__(self, model, configs, centres=None, block_size=16, windows=None):
        self.model, self.size, count = model, block_size, len(model.layers)
        attention = model.layers[0].self_attn
        dense = MHAPagedAttentionRuntime(
            num_layers=count,
            num_kv_heads=attention.n_kv_heads,
            head_dim=attention.k_proj.weight.shape[0] // attention.n_kv_heads,
            block_size=block_size,
            dtype=mx.float32,
            sliding_window_per_layer=windows,
        )
        layers = Layers(configs, centres or [None] * count, 16)
        self.runtime = backend._taking_over(dense, backend.CompressedRuntime, layers)
        self.runtime.initialize(BLOCKS)
        self.runtime.patch_model(model)
        forward.install()
        self.free, self.blocks, self.ends = list(range(BLOCKS)), {}, {}

    def _blocks(self, request, end):
        blocks = self.blocks.setdefault(request, [])
        while len(blocks) * self.size < end:
            blocks.append(self.free.pop())
        return [list(blocks)]

    def step(self, decode, prefill=None, together=False):
        """Logits of new tokens: lists of ids of requests that decode, then of others."""
        prefill, decoding, filling = prefill or {}, [], []
        for requests, listed in ((decode, decoding), (prefill, filling)):
            for request, ids in requests.items():
                start = self.ends.get(request, 0)
                self.ends[request] = start + len(ids)
                blocks = self._blocks(request, start + len(ids))
                new = (start, len(ids)) if listed is decoding else (len(ids), start)
                listed.append((blocks, *new))
        prepare_grouped(decoding, filling, (self.size,), merge_verify_windows=together)
        everything = decode | prefill
        self.runtime.populate_step_context(req_ids=list(everything), ctx=get_context())
        ids = mx.array([[token for ids in everything.values() for token in ids]])
        caches = [OffsetCache(0) for _ in self.model.layers]
        try:
            logits = self.model(ids, cache=caches)[0]
        finally:
            clear_context()
        ends = mx.cumsum(mx.array([len(ids) for ids in everything.values()])).tolist()
        return dict(zip(everything, mx.split(logits, ends[:-1]), strict=True))


def straight(model, chunks, calibration=None, config=WIDTHS):
    """Logits of the last of some chunks of one sequence, by mlx_lm with our cache."""
    cache = make_prompt_cache(model, config, calibration=calibration)
    for chunk in chunks:
        logits = model(mx.array([chunk]), cache=cache)[0]
    return logits


def ids(count, seed):
    return models.tokens(count, seed)[0].tolist()


def close(x, y, bound=1e-4):
    return mx.abs(x - y).max().item() < bound


def compressed(model):
    return [WIDTHS] * len(model.layers)


@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("calibrated", [False, True])
def test_decoding_and_prefill_in_one_batch_give_what_each_request_gets_alone(
    block_size, calibrated
):
    reference, a, b = models.llama(), ids(80, 0), ids(80, 1)
    calibration = calibrate(reference, ids(300, 5)) if calibrated else None
    model = models.llama()
    centres = calibration and list(calibration.centres)
    engine = Engine(model, compressed(model), centres, block_size)
    engine.step({}, {"a": a[:40]})
    mixed = engine.step({"a": a[40:41]}, {"b": b[:30]})
    assert close(mixed["a"], straight(reference, [a[:40], a[40:41]], calibration))
    assert close(mixed["b"], straight(reference, [b[:30]], calibration))
    chunked = engine.step({"a": a[41:42]}, {"b": b[30:60]})
    assert close(chunked["b"], straight(reference, [b[:30], b[30:60]], calibration))
    both = engine.step({"b": b[60:61], "a": a[42:43]})
    chunks = [a[:40], a[40:41], a[41:42], a[42:43]]
    assert close(both["a"], straight(reference, chunks, calibration))


@pytest.mark.parametrize("together", [False, True])
def test_drafts_are_verified_in_one_window_however_they_are_listed(together):
    model, a, b = models.llama(), ids(60, 0), ids(60, 1)
    reference = models.llama()
    engine = Engine(model, compressed(model))
    engine.step({}, {"a": a[:40], "b": b[:40]})
    got = engine.step({"a": a[40:43], "b": b[40:41]}, together=together)
    assert close(got["a"], straight(reference, [a[:40], a[40:43]]))
    assert close(got["b"], straight(reference, [b[:40], b[40:41]]))
    engine.ends["a"] = 41  # two of three drafts are refused
    after = engine.step({"a": a[41:42]})["a"]
    # The tail has lost what the refused drafts took the place of, no more.
    assert close(after, straight(reference, [a[:40], a[40:41], a[41:42]]), 5e-2)


def test_a_prefix_hit_reads_the_blocks_of_another_request():
    model, a = models.llama(), ids(60, 0)
    engine = Engine(model, compressed(model))
    cold = engine.step({}, {"a": a[:48]})["a"]
    engine.blocks["b"], engine.ends["b"] = engine.blocks["a"][:2], 32
    hit = engine.step({}, {"b": a[32:48]})["b"]
    assert close(hit, cold[32:], 5e-2)


def test_a_preempted_request_computes_its_tokens_again_in_other_blocks():
    model, a = models.llama(), ids(60, 0)
    reference = models.llama()
    engine = Engine(model, compressed(model))
    engine.step({}, {"a": a[:40]})
    engine.step({"a": a[40:41]})
    engine.runtime.release_requests({"a"})
    engine.free += engine.blocks.pop("a")
    engine.ends.pop("a")
    engine.step({}, {"a": a[:41]})
    again = engine.step({"a": a[41:42]})["a"]
    assert close(again, straight(reference, [a[:41], a[41:42]]))


def test_copied_blocks_serve_in_place_of_the_first():
    model, a = models.llama(), ids(60, 0)
    config = [WIDTHS, None, WIDTHS]
    engine = Engine(model, config)
    engine.step({}, {"a": a[:48]})
    old, new = engine.blocks["a"], [engine.free.pop() for _ in range(3)]
    engine.runtime.copy_blocks(list(zip(old, new, strict=True)))
    engine.blocks["b"], engine.ends["b"] = new, 48
    engine.runtime.release_requests({"a"})
    first = engine.step({"a": a[48:49]})["a"]
    second = engine.step({"b": a[48:49]})["b"]
    assert mx.array_equal(first, second)
    with pytest.raises(RuntimeError, match="no such blocks"):
        engine.runtime.copy_blocks([(0, BLOCKS)])


def test_uncompressed_layers_stay_exact():
    model, a = models.llama(), ids(60, 0)
    dense = models.llama()
    every = Engine(model, [None] * 3).step({}, {"a": a[:40]})["a"]
    assert close(every, dense(mx.array([a[:40]])), 1e-4)
    model = models.llama()
    engine = Engine(model, [None, WIDTHS, None])
    engine.step({}, {"a": a[:40]})
    cache = engine.runtime.kv_cache
    assert [layer is None for layer in cache.layers] == [True, False, True]
    assert [x.size > 0 for x in cache.key_caches] == [True, False, True]
    exact = dense(mx.array([a[:48]]))[0, 40:]
    mixed = engine.step({}, {"a": a[40:48]})["a"]
    assert 0 < mx.abs(mixed - exact).max().item() < 5e-2


def test_attention_sinks_and_windows_are_served():
    # gpt-oss: sinks everywhere, a window in every other layer.
    arguments = {
        "head_dim": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 20,
        "rope_scaling": {"rope_type": "default"},
    }
    model, reference = (models.build("gpt_oss", **arguments) for _ in range(2))
    for m in (model, reference):
        for layer in m.layers:
            layer.self_attn.sinks = mx.array([3.0, -1.0, 0.5, 2.0])
    for layer in model.layers:
        layer.self_attn.n_heads = layer.self_attn.num_attention_heads
        layer.self_attn.n_kv_heads = layer.self_attn.num_key_value_heads
    windows = [20 if kind == "sliding_attention" else -1 for kind in model.model.layer_types]
    assert sorted(windows) == [-1, 20]
    engine, a = Engine(model, compressed(model), windows=windows), ids(80, 0)
    got = [engine.step({}, {"a": a[:50]})["a"]]
    got += [engine.step({"a": a[i : i + 1]})["a"] for i in range(50, 60)]
    exact = reference(mx.array([a[:60]]))[0]
    assert close(mx.concatenate(got), exact, 5e-2)
    for layer in model.layers:  # the check would notice if sinks were left out
        layer.self_attn._inner.sinks = None
    assert not close(engine.step({}, {"b": a[:50]})["b"], exact[:50], 5e-2)


def gemma():
    """Windows in the first and third of four layers."""
    return models.build(
        "gemma3_text",
        **{"num_hidden_layers": 4, "head_dim": 64, "sliding_window": 24},
        **{"sliding_window_pattern": 2, "query_pre_attn_scalar": 64},
    )


def test_layers_with_and_without_a_window_share_one_list_of_blocks():
    model, dense, a = gemma(), gemma(), ids(90, 0)
    engine = Engine(model, compressed(model), windows=[24, -1, 24, -1])
    got = [engine.step({}, {"a": a[:60]})["a"]]
    got += [engine.step({"a": a[i : i + 1]})["a"] for i in range(60, 70)]
    assert close(mx.concatenate(got), dense(mx.array([a[:70]]))[0], 0.1)


def test_what_prefill_stores_does_not_pile_up_unevaluated():
    model = models.llama()
    engine, outputs = Engine(model, compressed(model)), []
    engine.step({}, {"a": ids(40, 0)})
    engine.runtime.extend_forward_eval_outputs(outputs)
    assert len(outputs) == 3 * 3  # of each layer its pages, and the keys and values of a tail
    assert all(any(x is y for y in outputs) for x in engine.runtime.kv_cache.pending)
    engine.runtime.release_requests({"a"})
    assert len(engine.runtime.kv_cache.pending) == 3


def test_a_hybrid_models_attention_layers_have_pages_in_large_blocks():
    dense = HybridPagedAttentionRuntime(
        num_layers=8,
        full_attention_interval=4,
        max_num_seqs=2,
        num_kv_heads=2,
        head_dim=64,
        linear_num_v_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        linear_conv_dim=96,
        block_size=544,
        dtype=mx.float32,
    )
    runtime = backend._taking_over(
        dense, backend.CompressedHybridRuntime, Layers([WIDTHS, WIDTHS], [None, None], 16)
    )
    runtime.initialize(3)
    cache = runtime.kv_cache
    layout = cache.layers[0].pool.layout
    assert len(cache.layers) == 2
    assert cache.layers[0].pool.pages.shape == (3 * 34, 2, layout.page_bytes)
    assert runtime.state_cache is not None
    cache.layers[1].pool.pages[34:68] = 7
    runtime.copy_blocks([(1, 2)])
    assert mx.array_equal(cache.layers[1].pool.pages[68:], cache.layers[1].pool.pages[34:68])
    runtime.release_requests({"nobody"})

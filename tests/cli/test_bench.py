import json

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from vllm_metal_tq.bench import clock, decode, encode, generate
from vllm_metal_tq.bench.decode import PagedCache, Shape
from vllm_metal_tq.cli import main
from vllm_metal_tq.config import TurboQuantConfig
from vllm_metal_tq.layout import PageLayout

MACHINE = {"device", "mlx", "runs", "preset", "k_quant", "v_quant"}
DECODE = {
    *("batch", "context", "heads", "kv_heads", "kernel_us", "sdpa_us", "speedup", "gbps"),
    *("mlx_8bit_us", "mlx_4bit_us"),
    *("copy_share", "rel_error", "call_us", "sdpa_call_us", "chain_us", "sdpa_chain_us"),
}
ENCODE = {
    *("tokens", "encode_us", "gbps", "copy_share"),
    *("encode_call_us", "bf16_append_call_us", "mlx_4bit_call_us"),
}
APPEND = {"cache_tokens", "cache_bytes", "append_us", "extra_bytes"}
CACHES = ["bf16", "mlx_lm 8-bit", "mlx_lm 4-bit", "tq4"]
GENERATE = {"cache", "batch", "context", "tokens_per_s", "peak_bytes", "kv_bytes", "skipped"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tiny = llama.ModelArgs(
        model_type="llama",
        rms_norm_eps=1e-5,
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    monkeypatch.setitem(generate.MODEL_SHAPES, "tiny", tiny)
    monkeypatch.setattr(clock, "REPEATS", 3)


def bench(capsys, *flags):
    status = main(["bench", *flags])
    return status, *capsys.readouterr()


def figures(capsys, *flags):
    status, out, _ = bench(capsys, *flags, "--json")
    assert status == 0
    return json.loads(out)


def test_encode_has_a_progress_bar_to_its_end(bars, capsys, monkeypatch):
    monkeypatch.setattr(encode, "CPU_CACHE_TOKENS", [64, 128])
    monkeypatch.setattr(encode, "GPU_CACHE_TOKENS", [64, 128])
    figures(capsys, "encode", "--tokens", "1,8")
    assert bars["bench encode"] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_decode_has_both_sides(capsys):
    answer = figures(capsys, "decode", "--shapes", "1,100,4,2;2,64,2,2", "--head-dim", "64")
    assert set(answer) == MACHINE | {"head_dim", "copy_gbps", "shapes"}
    assert answer["runs"] == ("kernels" if clock.gpu_backend() else "reference")
    assert [x["context"] for x in answer["shapes"]] == [100, 64]
    for x in answer["shapes"]:
        assert set(x) == DECODE
        assert x["speedup"] == pytest.approx(x["sdpa_us"] / x["kernel_us"])
        assert x["rel_error"] < 5e-4
        assert min(value for name, value in x.items() if name != "rel_error") > 0


def test_the_error_is_that_of_what_is_timed(monkeypatch):
    cache = PagedCache(Shape(2, 50, 4, 2), PageLayout(TurboQuantConfig(4, 4), 64))
    attend = cache.attend
    monkeypatch.setattr(cache, "attend", lambda queries: 1.01 * attend(queries))
    assert cache.rel_error() == pytest.approx(0.01, rel=0.1)


def test_encode_times_and_appends(capsys, monkeypatch):
    monkeypatch.setattr(encode, "CPU_CACHE_TOKENS", [1000, 20000])
    monkeypatch.setattr(encode, "GPU_CACHE_TOKENS", [1000, 20000])
    answer = figures(capsys, "encode", "--tokens", "1,32", "--k-quant", "q8_0")
    assert set(answer) == MACHINE | {"head_dim", "copy_gbps", "encode", "append"}
    assert answer["k_quant"] == "q8_0"
    assert [x["tokens"] for x in answer["encode"]] == [1, 32]
    assert all(set(x) == ENCODE and min(x.values()) > 0 for x in answer["encode"])
    assert all(set(x) == APPEND for x in answer["append"])
    small, large = answer["append"]
    assert large["cache_bytes"] > 10 * small["cache_bytes"]
    assert 100 * large["extra_bytes"] < large["cache_bytes"]  # nothing was copied


def test_a_copied_cache_would_show():
    cache = mx.zeros((1 << 20,), mx.uint8)
    mx.eval(cache)
    assert clock.extra_memory(lambda: cache + 1) >= cache.nbytes


def test_generate_compares_four_caches(capsys):
    flags = ("--model-shape", "tiny", "--batch", "1", "--context", "64,300")
    answer = figures(capsys, "generate", *flags)
    assert set(answer) == MACHINE | {"model_shape", "steps", "weight_bytes", "cases"}
    cases = [(x["context"], x["cache"]) for x in answer["cases"]]
    assert cases == [(n, c) for n in (64, 300) for c in CACHES]
    for x in answer["cases"]:
        assert set(x) == GENERATE
        if x["skipped"] is None:
            assert x["peak_bytes"] >= answer["weight_bytes"] + x["kv_bytes"]
            assert x["tokens_per_s"] > 0
    dense, *_, ours = answer["cases"][4:]
    assert (dense["skipped"], ours["skipped"]) == (None, None)
    assert dense["kv_bytes"] == 2 * 2 * 2 * 64 * 2 * 512  # room for 300 tokens and some steps
    assert 3 * ours["kv_bytes"] < dense["kv_bytes"]


def test_what_cannot_run_is_skipped_with_a_reason(capsys, monkeypatch):
    monkeypatch.setattr(clock, "device_bytes", lambda: 1 << 20)
    flags = ("generate", "--model-shape", "tiny", "--context", "4096")
    answer = figures(capsys, *flags)
    dense = answer["cases"][0]
    assert dense["tokens_per_s"] is None
    assert dense["skipped"].startswith("needs ")
    assert "skipped: needs" in bench(capsys, *flags)[1]


def test_a_cache_that_refuses_is_skipped_with_its_message():
    def refuse(model):
        raise ValueError("one sequence only\nand more")

    cases = generate.GenerateBench("tiny", TurboQuantConfig(4, 4))
    cases.makers["tq4"] = refuse
    assert cases.run("tq4", 8, 64)["skipped"] == "one sequence only"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["decode", "--shapes", "1,32,2,2", "--head-dim", "64"], ["speedup", "in a chain"]),
        (["encode", "--tokens", "1"], ["tokens in pages", "bf16 append"]),
    ],
)
def test_tables_name_the_machine(capsys, flags, words):
    status, out, _ = bench(capsys, *flags)
    assert status == 0
    for word in [*words, clock.machine()["device"], mx.__version__]:
        assert word in out
    assert ("no GPU" in out) == (clock.gpu_backend() is None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["decode", "--shapes", "1,2,3"], "shape '1,2,3' must be four whole numbers: B,ctx,H,HKV"),
        (["decode", "--shapes", "1,64,3,2"], "shape 1,64,3,2: HKV must divide H"),
        (["decode", "--shapes", "1,0,2,2"], "all four numbers must be at least 1"),
        (
            ["decode", "--shapes", "1,99999999999,4,2"],
            "shape 1,99999999999,4,2 takes 102399 GB, the",
        ),
        (["encode", "--tokens", "2147483647"], "--tokens 2147483647 takes 8796 GB, the device has"),
        (["generate", "--context", "9" * 30], "all must be at most 2147483647"),
        (["decode", "--head-dim", "512"], "--head-dim 512 is too large: the kernels take 256"),
        (["encode", "--tokens", "1;2"], "--tokens '1;2' must be numbers with commas between"),
        (["generate", "--batch", "0"], "--batch '0': all must be at least 1"),
        (["generate", "--model-shape", "x"], "--model-shape 'x' is unknown: allowed are llama-3.2"),
        (["encode", "--preset", "tq5"], "preset 'tq5' is unknown"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, flags, message):
    status, out, err = bench(capsys, *flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_mlx_cannot_quantise_has_no_time():
    able, unable = (decode._quantised_time(Shape(1, 32, 4, 2), dim, 4) for dim in (64, 80))
    assert unable is None
    assert clock.gpu_backend() == "cuda" or able > 0  # which cannot run some shapes

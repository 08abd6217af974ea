import csv
import gc
import json

import mlx.core as mx
import pytest
import serve_load

from vllm_metal_tq.bench import clock, process
from vllm_metal_tq.cli import common, main

HEAD = {"device", "system", "mlx", "mlx_lm", "vllm_metal_tq", "runs", "model"}
FACTS = {"weight_bytes", "limit", "kv_dtype", "limit_bytes", "rows", "stopped"}
ROW = ["cache", "context", "kv_bytes", "peak_bytes", "rss_bytes", "prefill_tps", "decode_tps"]
DENSE = "dense float32"  # the tiny model's keys and values
CACHES = [DENSE, "mlx_lm 8-bit", "mlx_lm 4-bit", "tq4", "tq8"]
FLAGS = ("--max-context", "150", "--step", "64", "--presets", "tq4,tq8", "--no-calibrate")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    serve_load.tiny_model(folder)
    return str(folder)


@pytest.fixture
def here(monkeypatch):
    """Work in this process what else has one of its own."""
    monkeypatch.setattr(process, "apart", lambda work, *args: work(*args))


def bench(capsys, *flags):
    status = main(["bench", "context", *flags])
    return status, *capsys.readouterr()


def test_json_has_every_step_of_every_cache(capsys, tiny, here, tmp_path):
    files = ("--csv", str(tmp_path / "x.csv"), "--plot", str(tmp_path / "x.png"))
    status, out, _ = bench(capsys, "--model", tiny, *FLAGS, *files, "--json")
    assert status == 0
    answer = json.loads(out)
    assert set(answer) == HEAD | FACTS
    assert (answer["kv_dtype"], answer["limit"]) == ("float32", 4096)
    cases = [(row["cache"], row["context"]) for row in answer["rows"]]
    assert cases == [(cache, n) for cache in CACHES for n in (64, 150)]
    assert answer["stopped"] == dict.fromkeys(CACHES, "--max-context 150")
    for row in answer["rows"]:
        assert list(row) == ROW
        assert row["peak_bytes"] > answer["weight_bytes"] + row["kv_bytes"]
    written = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [(row["cache"], int(row["context"])) for row in written] == cases
    assert (tmp_path / "x.png").stat().st_size > 0


def test_the_report_can_be_pasted(capsys, tiny, here):
    status, out, _ = bench(capsys, "--model", tiny, *FLAGS, "--memory", "8GB")
    assert status == 0
    assert f"- machine: {clock.machine()['device']}" in out
    assert "- memory that MLX may hold: 5.33 GiB (--memory 8GB)" in out
    rows = [line for line in out.splitlines() if line.startswith("| tq4 | 150 |")]
    assert [row.endswith("--max-context 150 |") for row in rows] == [True, False]


def test_without_max_context_the_model_says_where_to_end(capsys, tiny, here, monkeypatch):
    from vllm_metal_tq.bench import context

    monkeypatch.setattr(context, "model_limit", lambda model: 100)
    flags = ("--model", tiny, "--no-calibrate", "--json")
    answer = json.loads(bench(capsys, *flags)[1])
    assert set(answer["stopped"].values()) == {"the model's longest context, 100"}
    monkeypatch.setattr(context, "model_limit", lambda model: None)
    status, _, err = bench(capsys, *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert "give --max-context" in err


def test_a_cache_that_fails_leaves_the_others(capsys, tiny, here, monkeypatch):
    from vllm_metal_tq.cli import bench_context

    grow = bench_context._grow

    def fail(args, cache, *rest):
        work = grow(args, cache, *rest)
        if cache == "tq8":
            yield next(work)
            raise process.ProcessError("out of memory")
        return (yield from work)

    monkeypatch.setattr(bench_context, "_grow", fail)
    answer = json.loads(bench(capsys, "--model", tiny, *FLAGS, "--json")[1])
    assert answer["stopped"]["tq8"] == "failed: out of memory"
    assert [row["context"] for row in answer["rows"] if row["cache"] == "tq8"] == [64]
    assert answer["stopped"]["tq4"] == "--max-context 150"


@pytest.mark.slow
def test_each_cache_has_a_process_of_its_own(capsys, tiny):
    status, out, _ = bench(capsys, "--model", tiny, *FLAGS, "--json")
    assert status == 0
    answer = json.loads(out)
    assert set(answer["stopped"].values()) == {"--max-context 150"}
    # This process, which has loaded the demo model, takes more than any of them.
    assert max(row["rss_bytes"] for row in answer["rows"]) < process.rss_high_water()


def test_a_cache_ends_with_the_memory(capsys, tiny, here):
    gc.collect()
    limit = mx.get_active_memory() + 4 * 2**20  # the demo model is there too
    memory = f"{1.5 * limit / 2**20:.6f}MB"  # of which macOS recommends two thirds
    flags = ("--max-context", "600", "--step", "128", "--memory", memory, "--no-calibrate")
    answer = json.loads(bench(capsys, "--model", tiny, *flags, "--json")[1])
    assert abs(answer["limit_bytes"] - limit) < 9
    assert all(row["peak_bytes"] <= limit for row in answer["rows"])
    longest = max(row["context"] for row in answer["rows"] if row["cache"] == DENSE)
    assert 0 < longest < 600
    assert answer["stopped"][DENSE].startswith("budget: ")


@pytest.mark.slow
def test_the_demo_model_is_measured(capsys, here):
    flags = ("--model", "demo", "--max-context", "128", "--step", "128")
    status, out, _ = bench(capsys, *flags, "--json")
    assert status == 0
    dense, *_, ours = json.loads(out)["rows"]
    assert (dense["context"], ours["context"], ours["cache"]) == (128, 128, "tq4")
    assert 2 * ours["kv_bytes"] < dense["kv_bytes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--presets", "tq4,tq5"], "preset 'tq5' is unknown"),
        (["--memory", "much"], "--memory 'much' is no size"),
        (["--step", "37"], "--step 37 is too small: at least 38 tokens"),
        (["--max-context", "0"], "--max-context 0 is too small: at least 38 tokens"),
        (["--csv", "nowhere/x.csv"], "--csv 'nowhere/x.csv': there is no folder 'nowhere'"),
        (["--plot", "nowhere/x.png"], "--plot 'nowhere/x.png': there is no folder 'nowhere'"),
        (["--plot", "x.doc"], "--plot 'x.doc' must end in .png"),
    ],
)
def test_bad_input_is_one_clear_error_before_a_model_is_loaded(
    capsys, here, monkeypatch, flags, message
):
    monkeypatch.setattr(common, "load_model", lambda name: pytest.fail("was loaded"))
    status, out, err = bench(capsys, "--model", "demo", *flags)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_weights_that_leave_no_memory_are_an_error(capsys, tiny, here):
    status, _, err = bench(capsys, "--model", tiny, "--memory", "1MB", "--no-calibrate")
    assert status == 2
    assert err == (
        "error: the weights take 818.00 KiB, and a process may use 682.67 KiB: no memory is left "
        "for a context\n"
    )


def test_a_model_that_cannot_be_loaded_is_named(capsys, here):
    status, _, err = bench(capsys, "--model", "/nowhere")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: model '/nowhere' cannot be loaded")

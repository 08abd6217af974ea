import io
import json

import mlx_lm.models.cache as host
import pytest

from vllm_metal_tq import load_prompt_cache
from vllm_metal_tq.cli import main
from vllm_metal_tq.integrations.mlx_lm import report

FIELDS = {
    "model",
    "file",
    "bytes",
    "preset",
    "k_quant",
    "v_quant",
    "layers_compressed",
    "layers",
    "prompt_tokens",
    "kv_bytes",
    "kv_bytes_bf16",
    "ratio",
    "prefill_tps",
    "peak_bytes",
}
CAPITALS = "The capital of France is Paris. The capital of Italy is"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompt.safetensors"


def cache_prompt(capsys, file, *flags):
    status = main(["cache-prompt", "--model", "demo", "--prompt-cache-file", str(file), *flags])
    return status, *capsys.readouterr()


def generated(capsys, *flags):
    assert main(["generate", "--model", "demo", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_says_what_the_file_holds(capsys, demo, file):
    status, out, _ = cache_prompt(capsys, file, "-p", CAPITALS, "--preset", "tq6", "--json")
    said = json.loads(out)
    assert status == 0
    assert set(said) == FIELDS
    assert (said["model"], said["file"]) == ("demo", str(file))
    assert said["bytes"] == file.stat().st_size
    cache, metadata = load_prompt_cache(file, demo[0], return_metadata=True)
    assert metadata == {"model": "demo"}
    assert cache[0].offset == said["prompt_tokens"] > 10
    widths = {(c.layout.config.k_width, c.layout.config.v_width) for c in cache}
    assert widths == {(6, 5)}
    assert (said["preset"], said["k_quant"], said["v_quant"]) == ("tq6", "q6_0", "q5_0")
    held = report(cache)
    assert (said["layers_compressed"], said["layers"]) == (30, held.layers) == (30, 30)
    assert said["ratio"] == said["kv_bytes_bf16"] / said["kv_bytes"]
    assert said["prefill_tps"] > 0
    assert said["peak_bytes"] > said["kv_bytes"]


def test_a_table_and_the_files_name_are_printed(capsys, file):
    _, out, _ = cache_prompt(capsys, file, "-p", "Say hello.", "--v-quant", "q3_0")
    assert out.endswith(f"\n{file}\n")
    for words in ("q4_0/q3_0", "30 of 30", "prompt tokens", "size of the file"):
        assert words in out


def test_generate_continues_it_as_if_it_had_read_the_whole_prompt(capsys, file):
    # All of it fits into the tail: nothing that is read from pages could differ.
    plain = ("--ignore-chat-template", "-m", "6")
    whole = generated(capsys, "-p", CAPITALS + " Rome. The capital of Spain is", *plain)
    cache_prompt(capsys, file, "-p", CAPITALS, "--ignore-chat-template")
    rest = ("-p", " Rome. The capital of Spain is", *plain)
    continued = generated(capsys, *rest, "--prompt-cache-file", str(file))
    assert "Madrid" in continued["text"]
    assert continued["prompt_tokens"] < whole["prompt_tokens"]
    assert continued["text"] == whole["text"]
    assert continued["preset"] == "tq4"
    again = generated(capsys, *rest, "--prompt-cache-file", str(file))
    assert again["text"] == continued["text"]  # the file stays as it was


def test_a_message_is_begun_and_generate_ends_it(capsys, demo, file):
    model, tokenizer = demo
    begin = ("-p", "Here is a list:\\n- red \\n", "--system-prompt", "Be brief.")
    told = json.loads(cache_prompt(capsys, file, *begin, "--json")[1])
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHere is a list:\n- red \n"
    assert told["prompt_tokens"] == len(tokenizer.encode(start, add_special_tokens=False))
    cache = load_prompt_cache(file, model)
    assert cache[0].offset == told["prompt_tokens"]
    assert host.can_trim_prompt_cache(cache)
    end = "How many?<|im_end|>\n<|im_start|>assistant\n"
    answer = generated(capsys, "-p", "How many?", "-m", "2", "--prompt-cache-file", str(file))
    assert answer["prompt_tokens"] == len(tokenizer.encode(end, add_special_tokens=False))


def test_the_prompt_may_come_from_standard_input(capsys, file, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello."))
    here = json.loads(cache_prompt(capsys, file, "-p", "-", "--json")[1])
    given = json.loads(cache_prompt(capsys, file, "-p", "Say hello.", "--json")[1])
    assert here["prompt_tokens"] == given["prompt_tokens"]


def test_a_limit_is_kept(capsys, demo, file):
    flags = ("-p", "word " * 200, "--max-kv-size", "64", "--prefill-step-size", "32", "--json")
    said = json.loads(cache_prompt(capsys, file, *flags)[1])
    cache = load_prompt_cache(file, demo[0])
    assert cache[0].offset == said["prompt_tokens"] > 200
    assert cache[0].size() <= 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-p", " "], "the prompt is empty"),
        (["-p", "x", "--preset", "tq5"], "preset 'tq5' is unknown"),
        (["-p", "x", "--max-kv-size", "0"], "--max-kv-size 0 must be at least 1"),
        (["-p", "x", "--prefill-step-size", "0"], "--prefill-step-size 0 must be at least 1"),
        (["-p", "x", "--system-prompt", "y", "--ignore-chat-template"], "--system-prompt cannot"),
        (["-p", "x", "--no-calibrate", "--calibration", "y"], "--calibration cannot be given"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, file, flags, message):
    status, out, err = cache_prompt(capsys, file, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert not file.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompt.cache", "must end in .safetensors"),
        ("nowhere/prompt.safetensors", "there is no folder"),
        (".", "must end in .safetensors"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_any_work(
    capsys, tmp_path, monkeypatch, name, message
):
    monkeypatch.setattr("vllm_metal_tq.demo_model.load", lambda *_: pytest.fail("it was loaded"))
    status, out, err = cache_prompt(capsys, tmp_path / name, "-p", "x")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_prompt_and_file_must_be_given(capsys):
    for flags in (["-p", "x"], ["--prompt-cache-file", "x.safetensors"]):
        with pytest.raises(SystemExit):
            main(["cache-prompt", "--model", "demo", *flags])
        assert "required" in capsys.readouterr().err


def test_a_file_of_another_model_is_refused_by_generate(capsys, file, demo, monkeypatch):
    cache_prompt(capsys, file, "-p", "Say hello.")
    norm = demo[0].model.norm
    monkeypatch.setitem(norm, "weight", norm.weight * 2)  # a module of MLX is a dict
    status = main(["generate", "--model", "demo", "--prompt-cache-file", str(file)])
    assert status == 2
    assert "was made by another model" in capsys.readouterr().err

import argparse
import json

import pytest
from models import build

from vllm_metal_tq import make_prompt_cache, save_prompt_cache
from vllm_metal_tq.cli import common, main, prompts
from vllm_metal_tq.cli import generate as command

TAIL = 32 * 2 * 64 * 4  # bytes of a KV head's last tokens in float32

FIELDS = {
    "text",
    "model",
    "preset",
    "k_quant",
    "v_quant",
    "layers_compressed",
    "layers",
    "prompt_tokens",
    "tokens",
    "tokens_drafted",
    "kv_bytes",
    "kv_bytes_bf16",
    "ratio",
    "prefill_tps",
    "decode_tps",
    "peak_bytes",
}


def generate(capsys, *flags):
    status = main(["generate", "--model", "demo", *flags])
    return status, *capsys.readouterr()


def test_json_says_what_was_generated_and_what_the_cache_held(capsys):
    status, out, _ = generate(capsys, "--prompt", "Say hello.", "--max-tokens", "5", "--json")
    answer = json.loads(out)
    assert status == 0
    assert set(answer) == FIELDS
    assert answer["text"]
    assert answer["tokens"] == 5
    assert (answer["preset"], answer["k_quant"], answer["v_quant"]) == ("tq4", "q4_0", "q4_0")
    assert (answer["layers_compressed"], answer["layers"]) == (30, 30)
    assert answer["kv_bytes"] == 30 * 3 * (256 * 68 + TAIL)
    assert answer["kv_bytes_bf16"] == 30 * 3 * 256 * 256
    assert answer["ratio"] == answer["kv_bytes_bf16"] / answer["kv_bytes"]
    assert answer["peak_bytes"] > answer["kv_bytes"]
    assert min(answer["prefill_tps"], answer["decode_tps"]) > 0


def test_text_is_streamed_and_a_table_follows(capsys):
    _, out, _ = generate(
        capsys, "-p", "Say hello.", "-m", "5", "--k-quant", "q8_0", "--v-quant", "q3_0"
    )
    text, table = out.split("\n\n", 1)
    assert text
    for words in ("q8_0/q3_0", "30 of 30", "1.64x", "tok/s", "peak memory"):
        assert words in table


def test_the_table_says_why_layers_are_not_compressed(capsys, demo, monkeypatch):
    _, tokenizer = demo
    convolutions = {
        **{"layer_types": ["conv", "full_attention"], "norm_eps": 1e-5, "conv_bias": False},
        **{"conv_L_cache": 3, "block_dim": 64, "block_multiple_of": 32, "block_ff_dim": 96},
        **{"block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False},
    }
    model = build("lfm2", num_hidden_layers=2, vocab_size=tokenizer.vocab_size, **convolutions)
    monkeypatch.setattr(common, "load_model", lambda *_: (model, tokenizer))
    _, out, _ = generate(capsys, "-p", "Say hello.", "-m", "2", "--no-calibrate")
    assert "1 of 2" in out
    assert "1: a state, no keys" in out


def test_a_seed_makes_sampling_repeatable(capsys):
    flags = ("-p", "Tell me a story.", "-m", "8", "--temp", "1.0", "--top-p", "0.9", "--json")
    texts = [
        json.loads(generate(capsys, *flags, "--seed", seed)[1])["text"] for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_saved_prompt_is_continued(capsys, demo, tmp_path):
    import mlx.core as mx

    model, tokenizer = demo
    text = "The capital of France is Paris. The capital of Italy is"
    cache = make_prompt_cache(model)
    model(mx.array([tokenizer.encode(text)]), cache=cache)
    file = tmp_path / "prompt.safetensors"
    save_prompt_cache(file, cache, model)
    flags = ("-p", " Rome. The capital of Spain is", "--ignore-chat-template", "-m", "2", "--json")
    answer = json.loads(generate(capsys, *flags, "--prompt-cache-file", str(file))[1])
    assert "Madrid" in answer["text"]
    assert answer["preset"] == "tq4"


def test_a_continued_prompt_is_not_introduced_again(demo):
    _, tokenizer = demo
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def fed(*flags):
        args = parser.parse_args(["--model", "demo", "-p", "And\\tSpain?", *flags])
        begins = not args.prompt_cache_file
        return tokenizer.decode(prompts.tokens(args, tokenizer, begins=begins))

    end = "And\tSpain?<|im_end|>\n<|im_start|>assistant\n"
    assert fed("--prompt-cache-file", "x") == end
    assert fed("--system-prompt", "Be brief.").endswith("<|im_start|>user\n" + end)
    assert fed("--system-prompt", "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert fed("--ignore-chat-template") == "And\tSpain?"


def test_max_kv_size_bounds_the_cache(capsys):
    prompt = "word " * 300
    flags = ("-p", prompt, "-m", "3", "--prefill-step-size", "64", "--max-kv-size", "64", "--json")
    answer = json.loads(generate(capsys, *flags)[1])
    assert answer["prompt_tokens"] > 300
    assert answer["kv_bytes"] == 30 * 3 * (256 * 68 + TAIL)  # one growth step, not two


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--preset", "tq5"], "preset 'tq5' is unknown: allowed are tq8, tq6, tq4, tq3, tq2"),
        (["--k-quant", "fp8"], "k_quant 'fp8' is unknown: allowed are q2_0"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--max-kv-size", "-5"], "--max-kv-size -5 must be at least 1"),
        (["--max-tokens", "9" * 30], "9 must be at most 2147483647"),
        (["--seed", "-1"], "--seed -1 must be from 0 to 18446744073709551615"),
        (["--seed", "9" * 30], "9 must be from 0 to 18446744073709551615"),
        (["--temp", "nan"], "--temp nan must be a number of at least 0"),
        (["--top-p", "2"], "--top-p 2 must be from 0 to 1"),
        (["--min-p", "nan"], "--min-p nan must be from 0 to 1"),
        (["--top-k", "-1"], "--top-k -1 must be at least 0"),
        (["--max-kv-size", "8"], "max_kv_size 8 is too few: at least 32"),
        (["--prefill-step-size", "0"], "--prefill-step-size 0 must be at least 1"),
        (
            ["--system-prompt", "x", "--ignore-chat-template"],
            "--system-prompt cannot be given with",
        ),
        (["--prompt-cache-file", "nowhere"], "'nowhere': no such file"),
        (["--prompt-cache-file", "x", "--preset", "tq4"], "--preset cannot be given with"),
        (["--prompt-cache-file", "x", "--calibration", "y"], "--calibration cannot be given with"),
        (["--prompt-cache-file", "x", "--draft-model", "y"], "--draft-model cannot be given with"),
        (["--draft-model", "x", "--prompt-lookup", "3"], "--prompt-lookup cannot be given with"),
        (["--draft-model", "x", "--max-kv-size", "64"], "--max-kv-size cannot be given with"),
        (["--prompt-lookup", "3", "--max-kv-size", "64"], "--max-kv-size cannot be given with"),
        (["--prompt-lookup", "0"], "--prompt-lookup 0 must be at least 1"),
        (["--prompt-lookup", "8"], "--prompt-lookup 8 is too many: at most 7"),
        (["--num-draft-tokens", "0"], "--num-draft-tokens 0 must be at least 1"),
        (
            ["--draft-model", "demo", "--num-draft-tokens", "9"],
            "--num-draft-tokens 9 is too many: at most 7",
        ),
        (["--no-calibrate", "--calibration", "x"], "cannot be given with --no-calibrate"),
        (["--calibration", "nowhere"], "'nowhere': no such file"),
    ],
)
def test_bad_input_gets_one_clear_line(capsys, flags, message):
    status, out, err = generate(capsys, *flags)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_that_cannot_be_had_is_named(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["generate", "--model", "nobody/no-such-model"]) == 2
    err = capsys.readouterr().err
    assert "error: model 'nobody/no-such-model' cannot be loaded: " in err


def test_a_folder_that_is_no_model_is_named(capsys, tmp_path):
    assert main(["generate", "--model", str(tmp_path)]) == 2
    assert f"error: model '{tmp_path}' cannot be loaded: " in capsys.readouterr().err

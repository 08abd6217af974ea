"""What generate, cache-prompt and serve say of layers that are not compressed, or are restored."""

import argparse
import logging

import pytest
from models import build

from vllm_metal_tq.cli import common, main, serve
from vllm_metal_tq.integrations.mlx_lm import CachePools

LATENT = {
    **{"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32},
    **{"v_head_dim": 32, "num_key_value_heads": 4, "moe_intermediate_size": 32},
    **{"n_routed_experts": None, "n_shared_experts": None, "first_k_dense_replace": 3},
}
NOTES = {
    "deepseek_v3": (LATENT, ["layers compressed", "0 of 3"], "3: latent attention (MLA)"),
    "gemma2": (
        {"head_dim": 64},
        ["layers compressed", "3 of 3"],
        "3: the model's own code reads them",
    ),
}


@pytest.fixture(params=NOTES)
def noted(request, demo, monkeypatch):
    """A small model that answers to every name, and what is to be said of it."""
    fields, *notes = NOTES[request.param]
    tokenizer = demo[1]
    model = build(request.param, **fields | {"vocab_size": tokenizer.vocab_size})
    monkeypatch.setattr(common, "load_model", lambda *_: (model, tokenizer))
    return model, notes


def test_generate_says_it(noted, capsys):
    assert main(["generate", "--model", "m", "-p", "Hello", "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out
    (count, note) = noted[1]
    assert any(all(part in line for part in count) for line in out.splitlines())
    assert note in out


def test_cache_prompt_says_it(noted, capsys, tmp_path):
    file = str(tmp_path / "prompt.safetensors")
    words = ["cache-prompt", "--model", "m", "-p", "Hello", "--prompt-cache-file", file]
    assert main(words) == 0
    assert noted[1][1] in capsys.readouterr().out


def test_serve_logs_it_at_the_start(noted, caplog):
    model, (count, note) = noted
    pools = CachePools(model)
    batchable = all(hasattr(cache, "merge") for cache in pools.make_prompt_cache())
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--model", "m", "--no-calibrate"])
    with caplog.at_level(logging.INFO):  # what the thread that loads the model calls
        serve._pools(args, model, None)
    assert ": ".join(count) in caplog.messages
    assert any(note in message for message in caplog.messages)
    alone = any("one at a time" in message for message in caplog.messages)
    assert alone == (not batchable) == (model.model_type == "gemma2")

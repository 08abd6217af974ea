"""Stages of a pipeline, one process each, in the real ``vllm serve``."""

import re
from importlib.resources import files

import mlx.core as mx
import pytest
from vllm_process import free_port, serve

from vllm_metal_tq.config import CALIBRATION_TOKENS
from vllm_metal_tq.integrations.mlx_lm import calibrate, make_prompt_cache
from vllm_metal_tq.integrations.vllm.settings import Settings

TOKENS = 12
FLAGS = ("--max-model-len", "240", "--max-num-seqs", "2", "--no-async-scheduling")
# Widths of their own for layers of the first, the second and the third stage of 10 layers each.
SETTING = {"turboquant": True, "preset": "tq4", "layer_overrides": "0-1=tq8,12=q8_0/q3_0,29=tq6"}


@pytest.fixture(scope="module")
def calibration(demo, tmp_path_factory):
    """A calibration in a file, of the whole model."""
    model, tokenizer = demo
    text = (files("vllm_metal_tq") / "data" / "calibration.txt").read_text(encoding="utf-8")
    found = calibrate(model, tokenizer.encode(text)[:CALIBRATION_TOKENS])
    file = tmp_path_factory.mktemp("calibration") / "turboquant.safetensors"
    found.save(file)
    return found, file


def expected(model, calibration, prompt):
    """The greedy tokens of this library, in one process."""
    config = Settings.parse(SETTING).config
    cache = make_prompt_cache(model, config, calibration=calibration)
    step, tokens = mx.array([prompt]), []
    for _ in range(TOKENS):
        step = mx.argmax(model(step, cache=cache)[:, -1:], axis=-1)
        tokens.append(step.item())
    return tokens


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_give_the_tokens_of_one_process(demo, model_folder, calibration, tmp_path, stages):
    found, file = calibration
    flags = (*FLAGS, "--pipeline-parallel-size", str(stages))
    ring = {"VLLM_METAL_RING_BASE_PORT": str(free_port()), "VLLM_HOST_IP": "127.0.0.1"}
    prompts = [demo[1].encode(text * 9)[:90] for text in ("Green tea is a ", "Cold water and ")]
    setting = SETTING | {"calibration": str(file)}
    with serve(model_folder, tmp_path / "log", setting, flags, **ring) as server:
        got = [server.tokens(prompt, TOKENS) for prompt in prompts]
        log = server.log
    assert got == [expected(demo[0], found, prompt) for prompt in prompts]
    assert got[0] != got[1]
    pages = [int(count) for count in re.findall(r"MB of pages for (\d+) layers", log)]
    assert pages == [30 // stages] * stages

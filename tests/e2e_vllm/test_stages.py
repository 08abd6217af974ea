"""Stages of a pipeline: each compresses its own layers, as the whole model numbers them."""

from types import SimpleNamespace

import mlx.core as mx
import models
import pytest

pytest.importorskip("vllm_metal_on_linux", reason="needs vLLM and vllm-metal: make e2e-vllm")

from engine import configuration, make_room, worker
from vllm.config import set_current_vllm_config
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

from vllm_metal_tq.integrations.mlx_lm import calibrate
from vllm_metal_tq.integrations.vllm import plugin

LAYERS = 5
WIDTHS = [(8, 6), (4, 4), (4, 4), (6, 5), (4, 4)]
SETTING = {"turboquant": True, "preset": "tq4", "layer_overrides": "0=tq8,3=tq6"}


@pytest.fixture(autouse=True)
def registered():
    plugin.register()


def model():
    return models.llama(num_hidden_layers=LAYERS)


@pytest.fixture
def stages(tmp_path):
    """Workers of two stages, and the engine's configuration."""

    def build(calibration):
        found = []
        for rank in range(2):
            folder = tmp_path / str(rank)
            folder.mkdir()
            config = configuration(model(), folder, 48, SETTING | {"calibration": calibration})
            pp = SimpleNamespace(rank=rank, size=2, is_first=rank == 0, is_last=rank == 1)
            with set_current_vllm_config(config):
                found.append(worker(config, model(), pp))
        return found, config

    return build


def test_the_engine_hears_of_each_layer_of_the_model_once(stages):
    workers, config = stages(calibration=False)
    specs = [worker.get_kv_cache_spec() for worker in workers]
    every = specs[0] | specs[1]
    assert list(every) == [f"layers.{number}.self_attn" for number in range(LAYERS)]
    assert [(spec.k_width, spec.v_width) for spec in every.values()] == WIDTHS
    memory = []
    for stage in workers:
        make_room()
        memory.append(stage.determine_available_memory())
    plans = get_kv_cache_configs(config, specs, memory)
    assert plans[0].num_blocks == plans[1].num_blocks
    for stage, plan in zip(workers, plans, strict=True):
        stage.initialize_from_config(plan)


def test_each_stage_has_its_part_of_a_calibration(stages, tmp_path):
    whole = calibrate(model(), models.tokens(300)[0].tolist())
    whole.save(file := tmp_path / "whole.safetensors")
    assert all(whole.centres[1:])
    workers, _ = stages(str(file))
    parts = [
        worker.model_runner.build_paged_attention_runtime(block_size=16).compression
        for worker in workers
    ]
    configs = [config for part in parts for config in part.configs]
    assert [(config.k_width, config.v_width) for config in configs] == WIDTHS
    centres = [centre for part in parts for centre in part.centres]
    assert len(centres) == LAYERS
    for found, expected in zip(centres[1:], whole.centres[1:], strict=True):
        assert mx.array_equal(found.mu, expected.mu)


def test_where_there_is_no_calibration_a_stage_says_who_can_make_one(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    monkeypatch.setattr(
        "vllm_metal_tq.integrations.vllm.backend.logger.warning",
        lambda text, *arguments: said.append(text % arguments),
    )
    (first, _), _ = stages(calibration=True)
    runtime = first.model_runner.build_paged_attention_runtime(block_size=16)
    assert set(runtime.compression.centres) == {None}
    assert "`vllm-metal-tq calibrate --model" in said[0]

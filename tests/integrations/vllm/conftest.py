"""vLLM without a model: its configuration objects over a config.json of a few lines."""

import json
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with the configuration of a small model that vLLM believes it can run."""
    from planning import NoModel
    from vllm import ModelRegistry

    # vLLM inspects a class that it knows by name only in a process of its own: 20 seconds.
    ModelRegistry.register_model("NoModel", NoModel)
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["NoModel"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "max_position_embeddings": 131_072,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def vllm_config(model_folder):
    """Build a ``VllmConfig``; a ``max_model_len`` of -1 is fitted to the memory."""

    def build(block_size=16, max_model_len=4096, hybrid_manager=True):
        from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig

        config = VllmConfig(
            model_config=ModelConfig(
                model=str(model_folder),
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=max_model_len,
            ),
            cache_config=CacheConfig(block_size=block_size),
            scheduler_config=SchedulerConfig(
                max_model_len=4096,
                max_num_batched_tokens=4096,
                max_num_seqs=8,
                is_encoder_decoder=False,
                disable_hybrid_kv_cache_manager=not hybrid_manager,
            ),
        )
        if hasattr(config.cache_config, "get_resolved_kv_cache_layout"):
            # Newer versions plan an order of pages too; each layer's lie together in vllm-metal.
            config.cache_config.kv_cache_layout = "LBNHC"
        return config

    return build

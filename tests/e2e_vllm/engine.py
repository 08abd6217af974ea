"""vLLM's planner and scheduler and vllm-metal's worker in this process, over a model of mlx_lm.

All is theirs but what reads a model from a folder. What vLLM reads there is a few lines.
"""

import json
from pathlib import Path

import mlx.core as mx
import vllm_metal_on_linux
from planning import NoModel
from vllm import ModelRegistry
from vllm.config import (
    CacheConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm_metal.v1.model_runner import MetalModelRunner
from vllm_metal.v1.worker import MetalWorker

MEMORY = 64 << 20  # bytes, for pages
TOKENS = 512  # the most of a request
CONFIG = {"model_type": "llama", "vocab_size": 97, "max_position_embeddings": 4096}
STATES = (  # of linear attention
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_conv_kernel_dim"),
)
PASSED = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("num_hidden_layers", "head_dim", "kv_lora_rank", *STATES),
)


class NoHybrid(NoModel):
    """What vLLM takes for a model with linear attention in some layers."""

    is_hybrid = True

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config):
        config = vllm_config.model_config.hf_text_config
        sizes = [getattr(config, name) for name in STATES]
        return MambaStateShapeCalculator.gated_delta_net_state_shape(1, *sizes, 0)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config):
        dtype = vllm_config.model_config.dtype
        return MambaStateDtypeCalculator.gated_delta_net_state_dtype(dtype, "auto", "float32")


def write_config(model, folder: Path) -> None:
    """What vLLM and the plugin read of a model, from mlx_lm's arguments of it."""
    arguments = vars(model.args)
    text = arguments.get("text_config") or {}
    arguments = arguments | (text if isinstance(text, dict) else vars(text))
    known = {name: arguments[name] for name in PASSED if arguments.get(name) is not None}
    kind = NoHybrid if STATES[0] in known else NoModel
    ModelRegistry.register_model(kind.__name__, kind)
    (folder / "config.json").write_text(
        json.dumps(CONFIG | known | {"architectures": [kind.__name__]})
    )


def make_room() -> None:
    """Let there be memory for pages, beside all that is in use."""
    vllm_metal_on_linux._claim_memory(2 * (mx.get_active_memory() + MEMORY))


def configuration(model, folder: Path, chunk: int, additional: dict) -> VllmConfig:
    """vLLM's configuration for a model of mlx_lm: see ``Engine``."""
    write_config(model, folder)
    make_room()
    return VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=TOKENS
        ),
        cache_config=CacheConfig(
            block_size=16, gpu_memory_utilization=0.5, enable_prefix_caching=False
        ),
        scheduler_config=SchedulerConfig(
            max_model_len=TOKENS,
            max_num_batched_tokens=chunk,
            max_num_seqs=4,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        additional_config=additional,
    )


def worker(config: VllmConfig, model, pp=None) -> MetalWorker:
    """vllm-metal's worker with its model, or a stage of it."""
    made = MetalWorker(config, 0, 0, "")
    made.model_runner = MetalModelRunner(config)
    made.model_runner.pp = pp
    loading = made.model_runner._model_lifecycle
    loading._load_generation_model = lambda *_, **__: (model, None)
    made.load_model()
    current_platform.update_block_size_for_backend(config)
    return made


class Engine:
    """Serves one request after the other.

    Args:
        model: of mlx_lm; it is patched.
        folder: an empty one.
        chunk: the most tokens of a step.
        additional: what ``--additional-config`` says.
    """

    def __init__(self, model, folder: Path, chunk: int, additional: dict):
        self.config = configuration(model, folder, chunk, additional)
        with set_current_vllm_config(self.config):
            self.worker = worker(self.config, model)
            self.scheduler = self._scheduler()

    def _scheduler(self):
        specs = self.worker.get_kv_cache_spec()
        memory = self.worker.determine_available_memory()
        (plan,) = get_kv_cache_configs(self.config, [specs], [memory])
        self.worker.initialize_from_config(plan)
        self.worker.initialize_cache(plan.num_blocks, 0)
        plan = generate_scheduler_kv_cache_config([plan])
        block_size, hash_block_size = resolve_kv_cache_block_sizes(plan, self.config)
        return Scheduler(
            self.config,
            plan,
            StructuredOutputManager(self.config),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )

    def decode(self, prompt: list[int], count: int, forced: list[int] | None = None) -> mx.array:
        """Logits ``(count, vocab)`` of tokens after ``prompt``: its own choice, or ``forced``."""
        request = Request(
            request_id="a",
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=count, temperature=0, ignore_eos=True),
            pooling_params=None,
        )
        adapter, chosen, logits = self.worker.model_runner._model_adapter, iter(forced or ()), []
        extract = type(adapter).extract_logits

        def spied(output):
            found = extract(adapter, output)
            seen.append(found[0, -1])
            if forced is None:
                return found
            one = (mx.arange(found.shape[-1]) == ahead).astype(found.dtype)
            return mx.broadcast_to(one, found.shape)

        adapter.extract_logits = spied
        self.scheduler.add_request(request)
        ahead = next(chosen, 0)
        while self.scheduler.has_requests():
            seen = []
            step = self.scheduler.schedule()
            output = self.worker.execute_model(step) or self.worker.sample_tokens(None)
            if any(output.sampled_token_ids):
                logits.append(seen[-1])
                ahead = next(chosen, 0)
            self.scheduler.update_from_output(step, output)
        return mx.stack(logits)

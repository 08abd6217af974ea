"""The compressed cache in place of vllm-metal's.

vllm-metal goes on believing that its cache is dense. What it plans with, specs and bytes of a
block, is replaced by the compressed figures; where it allocates arrays, pages are made; and where
it would attend, our layers do. Three of its classes are subclassed, one function is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm_metal.attention.runtime import hybrid, mha
from vllm_metal.v1.cache_policy import ModelCachePolicy

from ... import calibration, dispatch
from ...centre import Centre
from ...tail import TAIL
from . import forward
from .cache import Layers, PagedCache
from .settings import (
    SHARING,
    Settings,
    assistant_complaint,
    mla_complaint,
    shared_complaint,
)
from .spec import compressed

logger = init_logger("vllm.vllm_metal_tq")

_LAYER = re.compile(r"^layers\.(\d+)\.")  # how vllm-metal names what it caches
_ATTENTION = re.compile(_LAYER.pattern + "self_attn")


if TYPE_CHECKING:  # what comes after _Compressed
    from vllm_metal.attention.runtime.mha import MHAPagedAttentionRuntime as _Runtime
else:
    _Runtime = object

_Kind = TypeVar("_Kind", bound="_Compressed")


class CachePolicy(ModelCachePolicy):
    """What vllm-metal allocates and plans for, of a model whose cache is compressed.

    Args:
        runner: vllm-metal's model runner.
        model_adapter: vllm-metal's knowledge of the model.
        settings: what the user asked for.
    """

    def __init__(self, runner: Any, model_adapter: Any, settings: Settings):
        super().__init__(runner, model_adapter)
        self._settings = settings
        self._first = 0  # of the model's layers, here: a pipeline's stage has some of them
        split = runner.apply_pipeline_split

        def apply_pipeline_split(pp: Any) -> None:
            self._first, _ = get_pp_indices(runner.num_layers, pp.rank, pp.size)
            self._centres  # noqa: B018 (found by the whole model, which is here for the last time)
            split(pp)

        runner.apply_pipeline_split = apply_pipeline_split
        forward.install()

    def validate_paged_attention_support(self) -> None:
        """Refuse what cannot be compressed."""
        super().validate_paged_attention_support()
        model = self._runner.model_config.model
        if self._runner.is_mla:
            raise NotImplementedError(mla_complaint(model, self._runner.num_layers))
        shared = self._runner._yoco_cache_mapping is not None
        if shared and self._runner.model_args["model_type"] not in SHARING:
            raise NotImplementedError(shared_complaint(model))
        if self._runner._gemma4_mtp_assistant:
            raise NotImplementedError(assistant_complaint(model))

    def _uses_deferred_mha_layout(self) -> bool:
        # With blocks of their own, layers with a window would share pages with others, which must
        # then be alike. They see their window only, and keep pages for everything.
        return False

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vllm-metal's specs, those of compressed layers with their compressed size."""
        specs = self._dense_specs().items()
        return {name: self._spec(name, spec) for name, spec in specs}

    def _dense_specs(self) -> dict[str, KVCacheSpec]:
        """vllm-metal's specs under the numbers that layers have in the whole model.

        Its own begin at 0 in each stage of a pipeline, and the engine takes layers of one name
        for one layer.
        """
        specs = super().get_kv_cache_spec()
        return {_LAYER.sub(self._in_model, name): spec for name, spec in specs.items()}

    def _in_model(self, found: re.Match[str]) -> str:
        return f"layers.{self._first + int(found[1])}."

    def _mha_model_layer_names(self) -> tuple[str, ...]:
        return tuple(_LAYER.sub(self._in_model, name) for name in super()._mha_model_layer_names())

    def _spec(self, name: str, spec: KVCacheSpec) -> KVCacheSpec:
        found = _ATTENTION.fullmatch(name)
        config = self._settings.for_layer(int(found[1])) if found else None
        return compressed(spec, config) if config else spec

    def _attention_bytes(self) -> int:
        """Bytes of a block of all layers whose cache grows with the sequence."""
        specs = self.get_kv_cache_spec().values()
        paged = (FullAttentionSpec, SlidingWindowSpec)
        return sum(spec.page_size_bytes for spec in specs if isinstance(spec, paged))

    def get_cache_block_size_bytes(self) -> int:
        """Bytes of a block, draft layers included."""
        return self._attention_bytes()

    def draft_scratch_reserve_bytes(self) -> int:
        """Bytes held out of the budget: vllm-metal's own, tails, and a layer's past."""
        return int(super().draft_scratch_reserve_bytes()) + self._reserve

    @cached_property
    def _reserve(self) -> int:
        """Bytes of the tails of as many requests as run, and of one layer read for a long chunk."""
        dtype = self._require_kv_cache_dtype()
        tokens = [
            2 * spec.num_kv_heads * spec.head_size * dtype.size
            for name, spec in self._dense_specs().items()
            if self._spec(name, spec) is not spec
        ]
        requests = self._runner.scheduler_config.max_num_seqs
        tails = requests * TAIL * sum(tokens)
        past = self._runner.model_config.max_model_len * max(tokens, default=0)
        logger.info(
            "turboquant: held out of the budget are %.2f GiB for the last tokens of %d requests "
            "(--max-num-seqs) as they came, and %.2f GiB to read a layer of one request of the "
            "greatest length (--max-model-len)",
            tails / 2**30,
            requests,
            past / 2**30,
        )
        return int(tails + past)

    def _build_mha_backend(self, block_size: int) -> mha.MHAPagedAttentionRuntime:
        dense = super()._build_mha_backend(block_size)
        count, _ = self._mha_cache_layout()
        layers = range(self._first, self._first + count)
        return _taking_over(dense, CompressedRuntime, self._layers(layers))

    def _build_hybrid_backend(self, block_size: int) -> hybrid.HybridPagedAttentionRuntime:
        dense = super()._build_hybrid_backend(block_size)
        layers = sorted(self._runner.sdpa_layer_indices)
        return _taking_over(dense, CompressedHybridRuntime, self._layers(layers))

    def _layers(self, layers: Iterable[int]) -> Layers:
        layers = list(layers)
        configs = [self._settings.for_layer(layer) for layer in layers]
        centres = [self._centres[layer] for layer in layers]
        return Layers(configs, centres, self._settings.config.block_size)

    @cached_property
    def _centres(self) -> list[Centre | None]:
        """The calibration of each layer of the model."""
        nothing: list[Centre | None] = [None] * self._runner.num_layers
        try:
            found = self._calibration()
        except Exception as error:  # whatever a model that nobody has tried may raise
            if isinstance(self._settings.calibration, str):
                raise
            logger.warning("turboquant: keys are stored without calibration: %r", error)
            return nothing
        return list(found.centres) if found else nothing

    def _calibration(self) -> calibration.Calibration | None:
        from ..mlx_lm.measure import find_or_calibrate

        runner, asked = self._runner, self._settings.calibration
        model, folder = runner._forward_model, runner.model_config.model
        if isinstance(asked, str):
            found = calibration.load(Path(asked), model)
        elif asked and runner.pp:  # no stage has room to run the whole model
            found = calibration.find(model, folder if Path(folder).is_dir() else None)
            if found is None:
                raise FileNotFoundError(
                    "there is no calibration, and no stage of a pipeline can make one; "
                    f"`vllm-metal-tq calibrate --model {folder}` does, on each Mac"
                )
        else:
            found = asked and find_or_calibrate(model, runner.tokenizer, folder)
        # Layers that read the cache of others have none of their own.
        caches, _ = runner._yoco_cache_mapping or (runner.num_layers, None)
        if found and len(found.centres) != caches:
            raise ValueError(f"it is of {len(found.centres)} layers, the model has {caches}")
        return found or None

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """Take up the engine's plan, and say what it comes to."""
        super().initialize_kv_cache(kv_cache_config)
        if kv_cache_config.kv_cache_groups:  # encoders have none
            logger.info("%s", self._summary(kv_cache_config))

    def _summary(self, kv_cache_config: KVCacheConfig) -> str:
        ours, dense = self._attention_bytes(), super().get_cache_block_size_bytes()
        bytes_in_all = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
        # Groups of layers, such as those with linear attention, take blocks of one pool in turn.
        turns = len(kv_cache_config.kv_cache_groups)
        blocks = kv_cache_config.num_blocks, int(kv_cache_config.num_blocks * ours / dense)
        size = self._runner.cache_config.block_size
        fit, would_fit = (count // turns * size for count in blocks)
        return (
            f"turboquant {self._settings.label}: {dense / ours:.2f}x smaller. {fit:,} tokens fit "
            f"into {bytes_in_all / 2**30:.2f} GiB; uncompressed, {would_fit:,} would"
        )


class _Compressed(_Runtime):
    """A runtime of vllm-metal whose cache is compressed."""

    compression: Layers
    module: Any  # of vllm-metal's runtime
    kv_cache: PagedCache

    def initialize(self, num_blocks: int) -> None:
        """Allocate the cache."""
        with self._own_cache():
            super().initialize(num_blocks)

    @contextmanager
    def _own_cache(self) -> Iterator[None]:
        """Let vllm-metal make our cache where it makes its own."""
        theirs = self.module.MetalPagedKVCache
        ours = type("PagedCache", (PagedCache,), {"compression": self.compression})
        self.module.MetalPagedKVCache = ours
        try:
            yield
        finally:
            self.module.MetalPagedKVCache = theirs

    def needs_step_context(self) -> bool:
        """Requests are told apart in every step."""
        return True

    def populate_step_context(self, *, req_ids: list[str], ctx: Any, **rest: Any) -> None:
        """Note whose tokens a forward pass has."""
        super().populate_step_context(req_ids=req_ids, ctx=ctx, **rest)
        self.kv_cache.begin(req_ids)

    def extend_forward_eval_outputs(self, outputs: list[mx.array]) -> None:
        """A first chunk's logits do not depend on what is stored: it would stay unevaluated."""
        super().extend_forward_eval_outputs(outputs)
        outputs += self.kv_cache.pending

    def release_requests(self, req_ids: set[str]) -> None:
        """These requests will not go on where they were."""
        super().release_requests(req_ids)
        self.kv_cache.forget(req_ids)

    def warm_up(self) -> None:
        """Compile and check the kernels, or find that plain MLX operations serve."""
        super().warm_up()
        for layout in {layer.pool.layout for layer in self.kv_cache.layers if layer}:
            dispatch.executor(layout)


class CompressedRuntime(_Compressed, mha.MHAPagedAttentionRuntime):
    """Models whose layers all attend."""

    module = mha


class CompressedHybridRuntime(_Compressed, hybrid.HybridPagedAttentionRuntime):
    """Models with linear attention in some layers."""

    module = hybrid


def _taking_over(dense: object, kind: type[_Kind], compression: Layers) -> _Kind:
    """A runtime of ``kind`` that is set up as ``dense`` is."""
    runtime = kind.__new__(kind)
    runtime.__dict__.update(vars(dense))
    runtime.compression = compression
    return runtime

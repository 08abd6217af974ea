"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes.

That does nothing but wait for modules to be imported. Once vLLM's configuration is made with
``"turboquant": true``, it is checked, and renamed: vllm-metal would turn on a cache of its own.
The renamed configuration travels to all processes, and where vllm-metal's runner and platform
find it, ours take over.
"""

from __future__ import annotations

import importlib.util
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .settings import (
    CACHE_DTYPES,
    FOREIGN,
    SHARING,
    UNCOMPRESSED,
    Settings,
    mla_complaint,
    shared_complaint,
)

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, VllmConfig

OWN_KEY = "vllm_metal_tq"
"""Where the checked configuration is in ``additional_config``."""

VLLM = "0.27.1"
"""The oldest version that is supported. 0.32.0 is the newest that was tested."""

_registered = False


def register() -> None:
    """Wait for the modules that ours hook into."""
    global _registered
    if _registered:
        return
    _registered = True
    from wrapt import register_post_import_hook

    register_post_import_hook(_watch_config, "vllm.config.vllm")
    register_post_import_hook(_watch_platform, "vllm_metal.platform")
    register_post_import_hook(_watch_runner, "vllm_metal.v1.model_runner")


def settings_of(vllm_config: VllmConfig) -> Settings | None:
    """What a configuration that was checked says, None where it says nothing."""
    given = getattr(vllm_config, "additional_config", None)  # stand-ins of tests have none
    return Settings.parse(given[OWN_KEY]) if isinstance(given, dict) and OWN_KEY in given else None


def _watch_config(module: Any) -> None:
    original = module.VllmConfig.__post_init__

    @wraps(original)
    def post_init(self: VllmConfig, *args: Any, **options: Any) -> None:
        prepare(self)
        original(self, *args, **options)

    module.VllmConfig.__post_init__ = post_init


def _watch_platform(module: Any) -> None:
    platform = module.MetalPlatform
    original = platform.update_block_size_for_backend.__func__

    @wraps(original)
    def update(cls: Any, vllm_config: VllmConfig) -> None:
        cache = vllm_config.cache_config
        given = cache.block_size if cache.user_specified_block_size else None
        original(cls, vllm_config)
        if settings := settings_of(vllm_config):
            from .hybrid import align

            align(cls, vllm_config, settings, given)

    platform.update_block_size_for_backend = classmethod(update)


def _watch_runner(module: Any) -> None:
    original = module.ModelCachePolicy

    def policy(runner: Any, model_adapter: Any) -> Any:
        if settings := settings_of(runner.vllm_config):
            from .backend import CachePolicy

            return CachePolicy(runner, model_adapter, settings)
        return original(runner, model_adapter)

    module.ModelCachePolicy = policy


def prepare(vllm_config: VllmConfig) -> None:
    """Check a new configuration, and rename what it says of the compressed cache.

    Raises:
        ValueError: it says what is not known, or paged attention is off.
        RuntimeError: vLLM or vllm-metal is missing or not supported.
        NotImplementedError: the model's cache cannot be compressed.
    """
    given = vllm_config.additional_config
    if not isinstance(given, dict):
        return
    given = _from_cache_dtype(vllm_config.cache_config, given)
    settings = Settings.parse(given)
    if not settings:
        return
    _check_versions()
    _check_model(vllm_config.model_config)
    _set_block_size(vllm_config.cache_config, settings, "block_size" in given)
    foreign = {key: given[key] for key in FOREIGN if key in given}
    own = {key: value for key, value in given.items() if key not in foreign}
    vllm_config.additional_config = foreign | {OWN_KEY: own}


def _from_cache_dtype(cache_config: CacheConfig, given: dict[str, Any]) -> dict[str, Any]:
    """``additional_config`` with what ``--kv-cache-dtype turboquant_*`` says, on a Mac."""
    dtype = cache_config.cache_dtype
    if dtype not in CACHE_DTYPES or given.get("turboquant") is False or not _on_metal():
        return given
    k_quant, v_quant = CACHE_DTYPES[dtype]
    skipped = list(cache_config.kv_cache_dtype_skip_layers or ())
    if unknown := [layer for layer in skipped if not str(layer).isdecimal()]:
        raise ValueError(
            f"turboquant: --kv-cache-dtype-skip-layers {unknown[0]!r}: layers are given by number"
        )
    cache_config.cache_dtype, cache_config.kv_cache_dtype_skip_layers = "auto", []
    named = {"turboquant": True, "layer_overrides": dict.fromkeys(skipped, UNCOMPRESSED)}
    if not {"preset", "k_quant", "v_quant"} & set(given):
        named |= {"k_quant": k_quant, "v_quant": v_quant}
    return named | given


def _on_metal() -> bool:
    from vllm.platforms import current_platform

    return type(current_platform).__module__.startswith("vllm_metal.")


def _check_versions() -> None:
    import vllm
    from packaging.version import Version
    from vllm.platforms import current_platform

    if Version(vllm.__version__).release < Version(VLLM).release:
        raise RuntimeError(
            f"turboquant needs vLLM {VLLM} or newer (tested: {VLLM} to 0.32.0); this is "
            f"{vllm.__version__}"
        )
    if not _installed("vllm_metal"):
        raise RuntimeError(
            "turboquant needs vllm-metal 0.3 or newer (tested: 0.3.0), which is not installed; "
            "https://github.com/vllm-project/vllm-metal says how"
        )
    if not _on_metal():
        raise RuntimeError(
            "turboquant of vllm-metal-tq serves the platform of vllm-metal; this is "
            f"{type(current_platform).__name__}"
        )
    from .spec import check_page_size

    check_page_size()
    try:
        from . import backend  # noqa: F401
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "turboquant needs vllm-metal 0.3 or newer (tested: 0.3.0); this is "
            f"{_version('vllm-metal')}, where it finds: {error}"
        ) from error


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "an unknown version"


def _check_model(model_config: ModelConfig | None) -> None:
    from vllm_metal.config import get_config

    if not get_config().use_paged_attention:
        raise ValueError(
            "turboquant needs paged attention, which VLLM_METAL_USE_PAGED_ATTENTION=0 turns off"
        )
    if model_config is None:
        return
    config = model_config.hf_text_config
    if getattr(config, "kv_lora_rank", None):
        raise NotImplementedError(mla_complaint(model_config.model, config.num_hidden_layers))
    if getattr(config, "num_kv_shared_layers", 0) and config.model_type not in SHARING:
        raise NotImplementedError(shared_complaint(model_config.model))


def _set_block_size(cache_config: CacheConfig, settings: Settings, asked: bool) -> None:
    """The engine's blocks are made of ours."""
    size = settings.config.block_size
    given = cache_config.block_size if cache_config.user_specified_block_size else None
    if given is not None and given % size:
        raise ValueError(
            f"turboquant: --block-size {given} is no multiple of the {size} tokens of a page "
            "(block_size in --additional-config)"
        )
    if given is None and asked:
        cache_config.block_size, cache_config.user_specified_block_size = size, True

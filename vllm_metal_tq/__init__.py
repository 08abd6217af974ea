"""TurboQuant KV-cache compression for MLX: 2-8 bits an element, in pages."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "T2": ".config",
    "T3": ".config",
    "TurboQuantConfig": ".config",
    "TurboQuantKVCache": ".integrations.mlx_lm",
    "load_prompt_cache": ".integrations.mlx_lm",
    "make_prompt_cache": ".integrations.mlx_lm",
    "save_prompt_cache": ".integrations.mlx_lm",
}

__all__ = [
    "T2",
    "T3",
    "TurboQuantConfig",
    "TurboQuantKVCache",
    "load_prompt_cache",
    "make_prompt_cache",
    "save_prompt_cache",
]

if TYPE_CHECKING:
    from .config import T2, T3, TurboQuantConfig
    from .integrations.mlx_lm import (
        TurboQuantKVCache,
        load_prompt_cache,
        make_prompt_cache,
        save_prompt_cache,
    )


def __getattr__(name: str) -> object:
    # Imported at first use: mlx_lm brings transformers, which takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)

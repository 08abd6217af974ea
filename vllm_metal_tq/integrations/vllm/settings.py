"""What ``--additional-config`` says of the compressed cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config import TurboQuantConfig

KEYS = {
    "turboquant": (bool,),
    "preset": (str,),
    "k_quant": (str,),
    "v_quant": (str,),
    "layer_overrides": (str, dict),
    "calibration": (str, bool),
    "block_size": (int,),
}
"""Known keys, and the types of what they may say."""

FOREIGN = ("gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend")
"""What vLLM itself puts beside them."""

CACHE_DTYPES = {
    "turboquant_k8v4": ("q8_0", "q4_0"),
    "turboquant_4bit_nc": ("q4_0", "q4_0"),
    "turboquant_k3v4_nc": ("q3_0", "q4_0"),
    "turboquant_3bit_nc": ("q3_0", "q3_0"),
}
"""Names of vLLM's ``--kv-cache-dtype`` -> ``k_quant`` and ``v_quant`` of the same widths."""

UNCOMPRESSED = "bf16"
_MOST_LAYERS = 10_000  # of a model: ranges of layers are written out

SHARING = ("gemma4", "gemma4_text")
"""Model types whose layers get from the model what the layer whose cache they read has stored."""


@dataclass(frozen=True)
class Settings:
    """A compressed cache as ``--additional-config`` asks for it.

    Attributes:
        config: widths.
        uncompressed: layers whose cache stays as it is.
        calibration: a file; or True, the one that is found, or else made and kept; or False, none.
    """

    config: TurboQuantConfig
    uncompressed: frozenset[int] = frozenset()
    calibration: str | bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings | None:
        """Read ``--additional-config``; None where it does not turn the compressed cache on.

        Raises:
            ValueError: a key is unknown, or what it says is of a wrong type or not known; the
                message says what is.
        """
        if given.get("turboquant", False) is False:
            return None
        _check_types(given)
        names = {key: given[key] for key in ("preset", "k_quant", "v_quant") if key in given}
        layers, uncompressed = _overrides(given.get("layer_overrides", {}))
        block_size = given.get("block_size", 16)
        try:
            config = TurboQuantConfig.from_names(**names, block_size=block_size, layers=layers)
        except ValueError as error:
            raise ValueError(f"--additional-config: {error}") from None
        return cls(config, uncompressed, given.get("calibration", True))

    @property
    def label(self) -> str:
        """How tables and logs name it."""
        layers = ",".join(f"{layer}={UNCOMPRESSED}" for layer in sorted(self.uncompressed))
        return f"{self.config.label},{layers}" if layers else self.config.label

    def for_layer(self, layer: int) -> TurboQuantConfig | None:
        """The widths of one layer, None where it is not compressed."""
        return None if layer in self.uncompressed else self.config.for_layer(layer)


def _check_types(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key in FOREIGN:
            continue
        if key not in KEYS:
            raise ValueError(
                f"--additional-config: {key!r} is unknown; known keys: {', '.join(KEYS)}"
            )
        if type(value) not in KEYS[key]:  # a bool is no int here
            allowed = " or ".join(kind.__name__ for kind in KEYS[key])
            raise ValueError(
                f"--additional-config: {key} must be {allowed}, not "
                f"{type(value).__name__} {value!r}"
            )


def _overrides(given: str | Mapping[str, Any]) -> tuple[str, frozenset[int]]:
    """Overrides as ``TurboQuantConfig.from_names`` takes them, and layers without compression."""
    parts = given.split(",") if isinstance(given, str) else [f"{k}={v}" for k, v in given.items()]
    layers, uncompressed = [], set()
    for part in filter(None, parts):
        where, _, name = part.partition("=")
        if name.strip() != UNCOMPRESSED:
            layers.append(part)
            continue
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", where)
        covered = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not covered:
            raise ValueError(f"--additional-config: layer_overrides {part!r} names no layers")
        if covered.stop > _MOST_LAYERS:
            raise ValueError(
                f"--additional-config: layer_overrides {part!r} names more layers than any model "
                f"has: the last may be {_MOST_LAYERS - 1}"
            )
        uncompressed |= set(covered)
    return ",".join(layers), frozenset(uncompressed)


def shared_complaint(model: str) -> str:
    """Why a model with layers that read the cache of others is refused."""
    return (
        f"turboquant: {model} has layers that read the cache of others, and vllm-metal would let "
        f"them write to it too (but for {', '.join(SHARING)}); turn turboquant off for this model"
    )


def assistant_complaint(model: str) -> str:
    """Why Gemma 4's assistant for drafts is refused."""
    return (
        f"turboquant: the assistant that drafts for {model} (MTP) reads an uncompressed cache; "
        "drop --speculative-config, or turn turboquant off"
    )


def mla_complaint(model: str, num_layers: int) -> str:
    """Why a model with multi-head latent attention is refused."""
    last = num_layers - 1
    return (
        f"turboquant: {model} uses multi-head latent attention (MLA) in layers.0.self_attn "
        f"to layers.{last}.self_attn, whose cache is a latent that is not compressed; turn "
        "turboquant off for this model"
    )

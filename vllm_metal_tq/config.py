"""Names a user may give, and what they mean: presets, key and value widths, block sizes."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

WIDTHS = (2, 3, 4, 5, 6, 8)
BLOCK_SIZES = (16, 32)

PRESETS = {
    "tq8": (8, 6),
    "tq6": (6, 5),
    "tq4": (4, 4),
    "tq3": (3, 3),
    "tq2": (2, 2),
}
"""Preset name -> (key bits, value bits)."""

DEFAULT_PRESET = "tq4"

CALIBRATION_TOKENS = 1024
"""Of a text that a calibration is measured on: more change nothing."""

QUANT_NAMES = {f"q{bits}_0": bits for bits in WIDTHS} | {
    f"{kind}{bits}": bits for bits in (2, 4, 8) for kind in ("int", "uint")
}
"""Width name -> bits, for keys and for values. Every name of vllm-metal is among them."""


@dataclass(frozen=True)
class TurboQuantConfig:
    """What the cache stores for one token of one KV head.

    Attributes:
        k_bits: bits of a key code, one of ``WIDTHS``.
        v_bits: bits of a value code, one of ``WIDTHS``.
        block_size: tokens a page holds, one of ``BLOCK_SIZES``.
        layer_overrides: layers with widths of their own, ``(first, last, k_bits, v_bits)`` each,
            both ends included; a later one takes precedence. Layers are counted from 0, those
            that are not compressed included.
    """

    k_bits: int
    v_bits: int
    block_size: int = 16
    layer_overrides: tuple[tuple[int, int, int, int], ...] = ()

    def __post_init__(self) -> None:
        _one_of("k_bits", self.k_bits, WIDTHS)
        _one_of("v_bits", self.v_bits, WIDTHS)
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        for first, last, k_bits, v_bits in self.layer_overrides:
            if not 0 <= first <= last:
                raise ValueError(f"layers {first}-{last} are no range")
            _one_of("k_bits", k_bits, WIDTHS)
            _one_of("v_bits", v_bits, WIDTHS)

    @classmethod
    def from_names(
        cls,
        preset: str | None = None,
        k_quant: str | None = None,
        v_quant: str | None = None,
        block_size: int = 16,
        layers: str | None = None,
    ) -> TurboQuantConfig:
        """Build a config from the names users write.

        Args:
            preset: one of ``PRESETS``; None: ``DEFAULT_PRESET``.
            k_quant: one of ``QUANT_NAMES``, the width of keys in place of the preset's.
            v_quant: likewise of values.
            block_size: tokens a page holds, one of ``BLOCK_SIZES``.
            layers: layers with widths of their own, as in ``0-1=tq8,29=q8_0/q6_0``.

        Raises:
            ValueError: a name is unknown, which the message answers with the known ones, or
                ``layers`` is not written like that.
        """
        preset = DEFAULT_PRESET if preset is None else preset
        _one_of("preset", preset, PRESETS)
        k_bits, v_bits = PRESETS[preset]
        if k_quant is not None:
            k_bits = _bits("k_quant", k_quant)
        if v_quant is not None:
            v_bits = _bits("v_quant", v_quant)
        overrides = tuple(map(_override, layers.split(","))) if layers else ()
        return cls(k_bits, v_bits, block_size, overrides)

    def for_layer(self, layer: int) -> TurboQuantConfig:
        """The config of one layer, counted from 0, without overrides."""
        widths = self.k_bits, self.v_bits
        for first, last, k_bits, v_bits in self.layer_overrides:
            widths = (k_bits, v_bits) if first <= layer <= last else widths
        return TurboQuantConfig(*widths, self.block_size)

    @property
    def layers(self) -> str:
        """The overrides as ``from_names`` takes them."""
        return ",".join(
            (f"{first}=" if first == last else f"{first}-{last}=") + TurboQuantConfig(k, v).label
            for first, last, k, v in self.layer_overrides
        )

    @property
    def k_quant(self) -> str:
        """The canonical name of the key width, such as ``q4_0``."""
        return f"q{self.k_bits}_0"

    @property
    def v_quant(self) -> str:
        """The canonical name of the value width, such as ``q4_0``."""
        return f"q{self.v_bits}_0"

    @property
    def preset(self) -> str | None:
        """The preset with these widths, or None."""
        widths = (self.k_bits, self.v_bits)
        return next((name for name, pair in PRESETS.items() if pair == widths), None)

    @property
    def label(self) -> str:
        """How tables name it: the preset, or both widths as ``q8_0/q3_0``, and the overrides."""
        name = self.preset or f"{self.k_quant}/{self.v_quant}"
        return f"{name},{self.layers}" if self.layer_overrides else name


def _override(text: str) -> tuple[int, int, int, int]:
    """``(first, last, k_bits, v_bits)`` of text such as ``0-1=tq8`` or ``29=q8_0/q6_0``."""
    found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?=(\w+)(?:/(\w+))?\s*", text)
    if not found:
        raise ValueError(f"layers {text!r}: expected such as 0-1=tq8 or 29=q8_0/q6_0")
    first, last, name, v_name = found.groups()
    if v_name:
        widths = _bits("k_quant", name), _bits("v_quant", v_name)
    else:
        _one_of("preset", name, PRESETS)
        widths = PRESETS[name]
    return (int(first), int(last or first), *widths)


def _bits(option: str, name: str) -> int:
    _one_of(option, name, QUANT_NAMES)
    return QUANT_NAMES[name]


def _one_of(option: str, given: object, allowed: Collection[object]) -> None:
    if given not in allowed:
        raise ValueError(
            f"{option} {given!r} is unknown: allowed are {', '.join(map(str, allowed))}"
        )

"""Names a user may give, and what they mean: presets, key and value widths, block sizes."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

TRELLIS = 16
"""A width is the bits of a scalar code, or this and the bits of a trellis code."""

T2 = TRELLIS + 2
"""The width of trellis codes of 2 bits."""
T3 = TRELLIS + 3
"""The width of trellis codes of 3 bits."""

SCALAR_WIDTHS = (2, 3, 4, 5, 6, 8)
TRELLIS_WIDTHS = (T2, T3)
WIDTHS = SCALAR_WIDTHS + TRELLIS_WIDTHS
BLOCK_SIZES = (16, 32)

PRESETS = {
    "tq8": (8, 6),
    "tq6": (6, 5),
    "tq4": (4, 4),
    "tq3": (T3, T3),
    "tq2": (T2, T2),
}
"""Preset name -> widths of keys and of values."""

DEFAULT_PRESET = "tq4"

CALIBRATION_TOKENS = 1024
"""Of a text that a calibration is measured on: more change nothing."""

_CANONICAL = {f"q{bits}_0": bits for bits in SCALAR_WIDTHS} | {"t2": T2, "t3": T3}

QUANT_NAMES = _CANONICAL | {f"{kind}{bits}": bits for bits in (2, 4, 8) for kind in ("int", "uint")}
"""Width name -> width, for keys and for values. Every name of vllm-metal is among them."""

QUANT_OF = {width: name for name, width in _CANONICAL.items()}
"""Width -> its canonical name."""


def bits_of(width: int) -> int:
    """Bits of a code of a width."""
    return width % TRELLIS


_IN_MESSAGES: dict[object, str] = {T2: f"T2 ({T2})", T3: f"T3 ({T3})"}


@dataclass(frozen=True)
class TurboQuantConfig:
    """What the cache stores for one token of one KV head.

    Attributes:
        k_width: code of keys, one of ``WIDTHS``: the bits of a scalar code, or ``T2`` or ``T3``,
            a trellis code of 2 or 3 bits.
        v_width: likewise of values.
        block_size: tokens a page holds, one of ``BLOCK_SIZES``.
        layer_overrides: layers with widths of their own, ``(first, last, k_width, v_width)`` each,
            both ends included; a later one takes precedence. Layers are counted from 0, those
            that are not compressed included.
    """

    k_width: int
    v_width: int
    block_size: int = 16
    layer_overrides: tuple[tuple[int, int, int, int], ...] = ()

    def __post_init__(self) -> None:
        _one_of("k_width", self.k_width, WIDTHS)
        _one_of("v_width", self.v_width, WIDTHS)
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        for first, last, k_width, v_width in self.layer_overrides:
            if not 0 <= first <= last:
                raise ValueError(f"layers {first}-{last} are no range")
            _one_of("k_width", k_width, WIDTHS)
            _one_of("v_width", v_width, WIDTHS)

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
            k_quant: one of ``QUANT_NAMES``, the code of keys in place of the preset's.
            v_quant: likewise of values.
            block_size: tokens a page holds, one of ``BLOCK_SIZES``.
            layers: layers with widths of their own, as in ``0-1=tq8,29=q8_0/q6_0``.

        Raises:
            ValueError: a name is unknown, which the message answers with the known ones, or
                ``layers`` is not written like that.
        """
        preset = DEFAULT_PRESET if preset is None else preset
        _one_of("preset", preset, PRESETS)
        k_width, v_width = PRESETS[preset]
        if k_quant is not None:
            k_width = _width("k_quant", k_quant)
        if v_quant is not None:
            v_width = _width("v_quant", v_quant)
        overrides = tuple(map(_override, layers.split(","))) if layers else ()
        return cls(k_width, v_width, block_size, overrides)

    def for_layer(self, layer: int) -> TurboQuantConfig:
        """The config of one layer, counted from 0, without overrides."""
        widths = self.k_width, self.v_width
        for first, last, k_width, v_width in self.layer_overrides:
            widths = (k_width, v_width) if first <= layer <= last else widths
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
        """The canonical name of the key width, such as ``q4_0`` or ``t3``."""
        return QUANT_OF[self.k_width]

    @property
    def v_quant(self) -> str:
        """The canonical name of the value width, such as ``q4_0`` or ``t3``."""
        return QUANT_OF[self.v_width]

    @property
    def preset(self) -> str | None:
        """The preset with these widths, or None."""
        widths = (self.k_width, self.v_width)
        return next((name for name, pair in PRESETS.items() if pair == widths), None)

    @property
    def label(self) -> str:
        """How tables name it: the preset, or both widths as ``q8_0/q3_0``, and the overrides."""
        name = self.preset or f"{self.k_quant}/{self.v_quant}"
        return f"{name},{self.layers}" if self.layer_overrides else name


def _override(text: str) -> tuple[int, int, int, int]:
    """``(first, last, k_width, v_width)`` of text such as ``0-1=tq8`` or ``29=q8_0/q6_0``."""
    found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?=(\w+)(?:/(\w+))?\s*", text)
    if not found:
        raise ValueError(f"layers {text!r}: expected such as 0-1=tq8 or 29=q8_0/q6_0")
    first, last, name, v_name = found.groups()
    if v_name:
        widths = _width("k_quant", name), _width("v_quant", v_name)
    else:
        _one_of("preset", name, PRESETS)
        widths = PRESETS[name]
    return (int(first), int(last or first), *widths)


def _width(option: str, name: str) -> int:
    _one_of(option, name, QUANT_NAMES)
    return QUANT_NAMES[name]


def _one_of(option: str, given: object, allowed: Collection[object]) -> None:
    if given not in allowed:
        names = ", ".join(str(_IN_MESSAGES.get(one, one)) for one in allowed)
        raise ValueError(f"{option} {given!r} is unknown: allowed are {names}")

"""Which part of a model this process holds, where several processes hold one together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.nn as nn

from .centre import Centre
from .config import TurboQuantConfig

_NAME = "turboquant_part"  # under which a model remembers it


@dataclass(frozen=True)
class Part:
    """Some layers of a model, and an equal share of the KV heads of each of them.

    Layers are counted as their caches are. What users say of layers, and a calibration, is always
    of the whole model; this takes from it what concerns the part.

    Attributes:
        layers: how many there are in the part.
        first: which layer of the whole model is its first.
        num_layers: layers of the whole model.
        share: which of the shares of KV heads it is.
        shares: into how many the heads are divided.
        fingerprint: of the whole model, or None where this is all of it.
    """

    layers: int
    first: int
    num_layers: int
    share: int = 0
    shares: int = 1
    fingerprint: str | None = None

    @classmethod
    def of(cls, model: nn.Module, layers: int) -> Part:
        """The part that ``remember`` was told of, or all of a model with so many layers."""
        known: Part | None = vars(model).get(_NAME)
        return known or cls(layers, 0, layers)

    def remember(self, model: nn.Module) -> None:
        """Let ``model`` be known as this part."""
        setattr(model, _NAME, self)

    def config(self, whole: TurboQuantConfig) -> TurboQuantConfig:
        """The config with its overrides counted from the part's first layer.

        Raises:
            ValueError: it names a layer that the whole model does not have.
        """
        beyond = [last for _, last, *_ in whole.layer_overrides if last >= self.num_layers]
        if beyond:
            raise ValueError(f"there is no layer {beyond[0]}: the model has {self.num_layers}")
        overrides = tuple(
            (max(first - self.first, 0), min(last - self.first, self.layers - 1), k_width, v_width)
            for first, last, k_width, v_width in whole.layer_overrides
            if last >= self.first and first < self.first + self.layers
        )
        return replace(whole, layer_overrides=overrides)

    def centres(self, whole: Sequence[Centre | None]) -> tuple[Centre | None, ...]:
        """The centres of the part's layers and heads.

        Raises:
            ValueError: they are not as many as the whole model's layers.
        """
        if len(whole) != self.num_layers:
            raise ValueError("the calibration was measured on a model of another shape")
        return tuple(map(self._own_heads, whole[self.first : self.first + self.layers]))

    def _own_heads(self, centre: Centre | None) -> Centre | None:
        if centre is None or self.shares == 1:
            return centre
        count = centre.mu.shape[0] // self.shares
        own = slice(self.share * count, (self.share + 1) * count)
        of_heads = centre.mu, centre.smoothing, centre.value_mean
        return Centre(centre.pairs, *(x[own] for x in of_heads))


def whole_fingerprint(model: nn.Module) -> str | None:
    """The fingerprint of the model that ``model`` is a part of, or None where it is whole."""
    known: Part | None = vars(model).get(_NAME)
    return known.fingerprint if known else None

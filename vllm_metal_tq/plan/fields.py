"""The fields of a ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

MOST = 1 << 40
"""No number of a model's is greater: products of a few stay within what a float holds."""
MOST_LAYERS = 10_000


class Fields:
    """A config.json, whose gaps are errors that name the model."""

    def __init__(self, name: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.name = name
        self.fields = {**defaults, **{k: v for k, v in fields.items() if v is not None}}

    def number(self, key: str, default: int | None = None, least: int = 0, most: int = MOST) -> int:
        """A whole number, ``default`` where the config is silent."""
        found = self.fields.get(key, default)
        if type(found) is not int or not least <= found <= most:
            self._refuse(key, found, f"a number of at least {least}, {most} at most")
        return found

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return self.number("num_hidden_layers", most=MOST_LAYERS)

    def listed(self, key: str) -> list[Any]:
        """A list, empty where the config is silent."""
        found = self.fields.get(key, [])
        if not isinstance(found, list):
            self._refuse(key, found, "a list")
        return found

    def _refuse(self, key: str, found: object, expected: str) -> NoReturn:
        what = "nothing" if found is None else repr(found)
        raise ValueError(f"{self.name}: its config gives {what} for {key}, expected {expected}")

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether the config says so."""
        return bool(self.fields.get(key, default))

    @property
    def head_dim(self) -> int:
        """Elements of a head: said, or what the width leaves for each."""
        heads = self.number("num_attention_heads", least=1)
        return self.number("head_dim", self.number("hidden_size") // heads)

    def kinds(self, otherwise: Callable[[int], str]) -> list[str]:
        """The kind of each layer: as ``layer_types`` lists them, or by a function of the index."""
        count = self.num_layers
        listed = self.listed("layer_types") or [otherwise(i) for i in range(count)]
        known = ("full_attention", "sliding_attention", "linear_attention")
        if len(listed) != count or any(kind not in known for kind in listed):
            raise ValueError(
                f"{self.name}: layer_types must name each of {count} layers, allowed are "
                f"{', '.join(known)}"
            )
        return listed

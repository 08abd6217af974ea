"""Names for what mlx_lm hands about without types of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeAlias

import mlx.nn as nn

PromptCache: TypeAlias = list[Any]
"""A cache for each layer: ours, mlx_lm's or the model's own, which share no useful base."""

MakeCaches: TypeAlias = Callable[[nn.Module], PromptCache]
"""From a model to an empty prompt cache of it."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how much is done, and how much there is in all."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer: mlx_lm's wrapper has it."""

    @property
    def eos_token_ids(self) -> Collection[int]:
        """Tokens that end a text."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """The tokens of a text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""

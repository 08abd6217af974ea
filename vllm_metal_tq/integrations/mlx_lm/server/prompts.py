"""mlx_lm's cache of earlier prompts, on pages that its entries share with running requests."""

from __future__ import annotations

from collections.abc import Callable

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache

from ....types import PromptCache as Caches
from .. import distributed

Found = tuple[Caches | None, list[int]]
"""An entry, if any is near enough, and the tokens that it lacks."""


class PromptCache(LRUPromptCache):
    """mlx_lm's LRU prompt cache, with the bytes of shared pages counted once.

    Args:
        max_size: entries to keep.
        max_bytes: bytes that pages in use may take before entries are dropped, running requests'
            included; None: no such limit.
        used_bytes: says how many they take.
    """

    def __init__(self, max_size: int, max_bytes: int | None, used_bytes: Callable[[], int]):
        super().__init__(max_size)
        self._limit = max_bytes
        self._used_bytes = used_bytes
        self._held: tuple[object, list[int], Found] | None = None

    def hold(self, model: object, tokens: list[int]) -> int:
        """Fetch for the ``fetch_nearest_cache`` to come, so that eviction cannot take it away.

        Returns:
            How many of ``tokens`` are cached.
        """
        self._held = None
        cache, rest = self.fetch_nearest_cache(model, tokens)
        self._held = (model, tokens, (cache, rest))
        return len(tokens) - len(rest)

    def let_go(self) -> None:
        """Give up what ``hold`` fetched."""
        self._held = None

    def fetch_nearest_cache(self, model: object, tokens: list[int]) -> Found:
        """A fork of the entry that shares most of ``tokens``, and the tokens that it lacks.

        At least one token is left over: mlx_lm's generation needs one to begin with, and its
        server's thread ends where there is none.
        """
        held, self._held = self._held, None
        if held is not None and held[:2] == (model, tokens):
            return held[2]
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and not rest:
            if can_trim_prompt_cache(cache):
                trim_prompt_cache(cache, 1)
                rest = tokens[-1:]
            else:
                cache, rest = None, tokens
        # Last of all: stages of a pipeline differ in what can be trimmed.
        if -distributed.most(-len(rest)) < distributed.most(len(rest)):
            return None, tokens
        return (None, tokens) if len(rest) == len(tokens) else (cache, rest)

    def insert_cache(
        self,
        model: object,
        tokens: list[int],
        prompt_cache: Caches,
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Take over ``prompt_cache``, which is left empty.

        mlx_lm's generation thread keeps the list in its variables until the next request: its
        blocks would outlive their entry.

        After speculation a cache may lack the last token, and the draft model's be of another
        length. What is kept are the tokens that all caches hold, or nothing where a cache that
        holds more cannot be trimmed.
        """
        taken = list(prompt_cache)
        prompt_cache.clear()
        held = min([len(tokens), *filter(None, map(_length, taken))])
        if held > 0 and _trim_to(taken, held):
            super().insert_cache(model, tokens[:held], taken, cache_type=cache_type)

    def evict(self) -> bool:
        """Drop the oldest entry; returns whether there was one, in any process."""
        count = len(self)
        if count:
            super().trim_to(n_sequences=count - 1)
        return distributed.most(count) > 0

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Drop entries until the limits hold.

        mlx_lm subtracts from ``n_bytes`` what running requests hold, and adds up entries, as if
        nothing were shared: with pages it is enough to look at what is in use.
        """
        if n_sequences is not None:
            super().trim_to(n_sequences=n_sequences)
        if n_bytes is not None and self._limit is not None:
            while distributed.most(self._used_bytes()) > self._limit and self.evict():
                pass


def _length(cache: object) -> int:
    """How many tokens went into a cache; 0 where it does not say, or is not used."""
    parts = getattr(cache, "caches", [cache])  # of one that is a list of others
    return max((int(getattr(part, "offset", 0)) for part in parts), default=0)


def _trim_to(caches: Caches, held: int) -> bool:
    """Trim all caches to so many tokens; returns whether that was possible."""
    longer = [(cache, _length(cache) - held) for cache in caches if _length(cache) > held]
    if longer and not can_trim_prompt_cache(caches):
        return False
    return all(cache.trim(count) == count for cache, count in longer)

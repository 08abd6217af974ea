"""Who may join: blocks are promised to a request before it starts, so that none runs out later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .. import distributed
from ..pools import CachePools
from .errors import APIError

RETRY_AFTER = 5  # seconds that a refused client is told to wait


class Pools(Protocol):
    """What admission asks of ``CachePools``."""

    block_size: int

    max_blocks: int | None

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold."""


class AgreedPools:
    """``CachePools`` as admission sees them: with numbers that are the same in all processes.

    Processes that hold a model together admit each request for themselves and have to decide
    alike; their pools may differ in bytes, or in how many layers they have.
    """

    def __init__(self, pools: CachePools):
        self._pools = pools
        self.block_size = pools.block_size
        self.max_blocks = distributed.least(pools.max_blocks)

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold."""
        return distributed.most(self._pools.used_blocks)


@dataclass(eq=False)
class Reservation:
    """What one request was promised, and what it took of that.

    Attributes:
        blocks: the most that it may cause to be taken, those it shares included.
        cached: tokens that came from the prompt cache.
        tokens: tokens that its cache holds by now.
    """

    blocks: int
    cached: int
    tokens: int


class Admission:
    """Promises blocks of the pools to requests. For the generation thread alone.

    What holds at all times: blocks in use, and what running requests may still take of what they
    were promised, are together no more than the pools' ``max_blocks``. A request takes from its
    promise as it runs; when it has finished, its blocks are in use by the prompt cache, until they
    are evicted. So the sum grows by admission alone.

    Args:
        pools: the page pools.
        evict: drops the prompt cache's oldest entry; returns whether there was one.
    """

    def __init__(self, pools: Pools, evict: Callable[[], bool]):
        self._pools = pools
        self._evict = evict
        self._running: set[Reservation] = set()

    def capacity(self, copies: int) -> int | None:
        """Tokens that one request alone can have, or None where there is no budget."""
        limit = self._pools.max_blocks
        return None if limit is None else max(limit - copies, 0) * self._pools.block_size

    def reserve(self, tokens: int, cached: int, copies: int) -> Reservation:
        """Promise a request what it needs, at the cost of the prompt cache if it must be.

        Args:
            tokens: the most that its cache will hold.
            cached: how many of them it shares already, and holds from now on.
            copies: blocks of which it will make its own copy, because it appends to one that
                others read.

        Raises:
            APIError: 400 where it could never fit, 503 where it does not fit now.
        """
        blocks = self._blocks(tokens) + copies
        capacity = self.capacity(copies)
        if capacity is not None and tokens > capacity:
            raise APIError(
                400,
                f"prompt and max_tokens are {tokens} tokens, but the KV cache has room for "
                f"{capacity}: shorten the prompt or lower max_tokens",
                "context_length_exceeded",
                "max_tokens",
            )
        reservation = Reservation(blocks, cached, cached)
        # Where the requests alone are too many, eviction would empty the prompt cache in vain.
        hopeless = self._missing_without_cache(reservation) > 0
        while self._missing(self._own(reservation)) > 0:
            if hopeless or not self._evict():
                raise APIError(
                    503,
                    "the KV cache is full: try again when other requests have finished",
                    "kv_cache_full",
                    retry_after=RETRY_AFTER,
                )
        self._running.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """End a promise; ending it again changes nothing."""
        self._running.discard(reservation)

    @property
    def outstanding(self) -> int:
        """Blocks that running requests may still take."""
        # A copy, because metrics are read while the generation thread goes on.
        return sum(max(r.blocks - self._blocks(r.tokens), 0) for r in tuple(self._running))

    def _missing_without_cache(self, reservation: Reservation) -> int:
        """The least that is missing for one more, whatever is evicted."""
        limit = self._pools.max_blocks
        if limit is None:
            return 0
        return sum(map(self._own, self._running)) + self._own(reservation) - limit

    def _own(self, reservation: Reservation) -> int:
        """What a request may take beyond the blocks that it shared when it was admitted."""
        return reservation.blocks - self._blocks(reservation.cached)

    def _missing(self, blocks: int) -> int:
        """How many blocks are too few for a request that takes so many; none or below: it fits."""
        limit = self._pools.max_blocks
        if limit is None:
            return 0
        return self._pools.used_blocks + self.outstanding + blocks - limit

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._pools.block_size)

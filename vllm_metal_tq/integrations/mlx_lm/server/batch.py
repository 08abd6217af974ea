"""mlx_lm's batch generator, which tells when a request has left it, and its samplers.

mlx_lm's server makes both itself, so two names are rebound in its module, here and nowhere else.
The batch generators of other servers in the process stay mlx_lm's own.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import mlx_lm.server as host
from mlx_lm.generate import BatchGenerator

from .. import distributed

if TYPE_CHECKING:
    from .generator import Generator
    from .sessions import Session

serving: ContextVar[Generator] = ContextVar("serving")
"""The ``Generator`` whose thread this is."""


class Batch(BatchGenerator):
    """A batch generator whose requests are sessions of a ``Generator``."""

    def __init__(self, *args: Any, owner: Generator, **options: Any):
        super().__init__(*args, **options)
        self._owner = owner
        self._sessions: dict[int, Session] = {}  # by uid

    def insert_segments(self, *args: Any, **options: Any) -> list[int]:
        """Let the request join that was admitted last."""
        (uid,) = super().insert_segments(*args, **options)
        if self._owner.joining is not None:
            self._sessions[uid] = self._owner.joining
        return [uid]

    def next(self) -> tuple[Any, Any]:
        """Take a step."""
        prompts, tokens = super().next()
        for response in tokens:
            if response.finish_reason is not None:
                self._sessions.pop(response.uid, None)
        self._owner.publish()
        return prompts, tokens

    def remove(self, uids: list[int], *args: Any, **options: Any) -> Any:
        """Drop requests before their end; their clients' threads are woken."""
        removed = super().remove(uids, *args, **options)
        for uid in uids:
            session = self._sessions.pop(uid, None)
            if session is not None and session.replies is not None:
                session.replies.put(session.why_stopped())
        return removed


def _make(*args: Any, **options: Any) -> BatchGenerator:
    owner = serving.get(None)
    return Batch(*args, owner=owner, **options) if owner else BatchGenerator(*args, **options)


_own_sampler = host._make_sampler


def _sampler(*args: Any) -> distributed.Sampler:
    """For a request in a batch, or one that is answered alone."""
    return distributed.same(_own_sampler(*args))


def install() -> None:
    """Have mlx_lm's server make ours of both; doing it again changes nothing."""
    host.BatchGenerator = _make
    host._make_sampler = _sampler

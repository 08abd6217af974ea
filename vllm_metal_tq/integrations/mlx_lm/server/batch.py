"""mlx_lm's batch generator, which tells when a request has left it.

mlx_lm's server makes its batch generator itself, so the name is rebound in its module, here and
nowhere else. The generators of other servers in the process stay mlx_lm's own.
"""

from __future__ import annotations

from contextvars import ContextVar

import mlx_lm.server as host
from mlx_lm.generate import BatchGenerator

serving: ContextVar = ContextVar("serving")
"""The ``Generator`` whose thread this is."""


class Batch(BatchGenerator):
    """A batch generator whose requests are sessions of a ``Generator``."""

    def __init__(self, *args, owner, **options):
        super().__init__(*args, **options)
        self._owner = owner
        self._sessions = {}  # by uid

    def insert_segments(self, *args, **options) -> list[int]:
        """Let the request join that was admitted last."""
        (uid,) = super().insert_segments(*args, **options)
        self._sessions[uid] = self._owner.joining
        return [uid]

    def next(self):
        """Take a step."""
        prompts, tokens = super().next()
        for response in tokens:
            if response.finish_reason is not None:
                self._sessions.pop(response.uid, None)
        self._owner.publish()
        return prompts, tokens

    def remove(self, uids, *args, **options):
        """Drop requests before their end; their clients' threads are woken."""
        removed = super().remove(uids, *args, **options)
        for uid in uids:
            if session := self._sessions.pop(uid, None):
                session.replies.put(session.why_stopped())
        return removed


def _make(*args, **options) -> BatchGenerator:
    owner = serving.get(None)
    return Batch(*args, owner=owner, **options) if owner else BatchGenerator(*args, **options)


def install() -> None:
    """Have mlx_lm's server make our batch generators; doing it again changes nothing."""
    host.BatchGenerator = _make

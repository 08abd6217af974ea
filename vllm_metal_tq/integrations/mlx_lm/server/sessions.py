"""A request on its way from a client to the generation thread and back."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Event, Lock, Thread

from mlx_lm.server import GenerationContext

from .admission import Reservation
from .errors import APIError, ClientGoneError, stopping

POLL_SECONDS = 0.2  # how soon it is noticed that a client has gone


class Session:
    """One request and what becomes of it.

    Args:
        connection: the client's socket; None in processes that the client does not speak to.
        explicit: whether the client itself said how many tokens it wants at most.

    Attributes:
        unstoppable: whether it is generated to its end, whoever has gone: mlx_lm cannot tell other
            processes to stop a request that it serves alone.
        gone: whether the client has closed its connection.
        stopped: whether its generation is to end early, by the client's doing or the server's.
        context: mlx_lm's, once the request was admitted.
        replies: what the generation thread answers with, once it has taken the request.
        reservation: what admission promised, until it is given back.
        error: why there is no answer.
    """

    def __init__(self, connection: socket.socket | None, explicit: bool):
        self.connection = connection
        self.explicit = explicit
        self.unstoppable = False
        self.started = time.monotonic()
        self.gone = self.stopped = False
        self.context: GenerationContext | None = None
        self.replies: Replies | None = None
        self.reservation: Reservation | None = None
        self.error: APIError | None = None

    def __reduce__(self) -> tuple[type[Session], tuple[None, bool]]:
        """What other processes are told of it."""
        return Session, (None, self.explicit)

    def cancel(self) -> None:
        """The client has gone: end its generation at the next step."""
        self.gone = True
        self.stop()

    def stop(self) -> None:
        """End its generation at the next step."""
        self.stopped = True
        if self.context is not None:
            self.context.stop()

    def why_stopped(self) -> Exception:
        """What to tell who waits for an answer that has been stopped."""
        return ClientGoneError() if self.gone else stopping()

    def admitted(self, context: GenerationContext) -> None:
        """mlx_lm's context has been made."""
        if self.unstoppable:  # for mlx_lm's handler as well, which calls it when it cannot write
            context.stop = lambda: None
        self.context = context
        if self.stopped:  # meanwhile
            context.stop()


class Replies:
    """The queue on which mlx_lm's generation thread answers a request.

    It keeps the books on the way: how much of its promise a request has taken, and when it ends.

    Args:
        queue: where the client's thread waits.
        session: the request.
        ended: called with the session when nothing more will be put.
    """

    def __init__(self, queue: Queue[object], session: Session, ended: Callable[[Session], None]):
        self._queue = queue
        self._session = session
        self._ended = ended

    def alone(self, published: Callable[[], None]) -> LoneReplies:
        """The same for a request that is served alone."""
        return LoneReplies(self._queue, self._session, self._ended, published)

    def put(self, item: object) -> None:
        """Pass on what mlx_lm answers.

        That is its context, then tuples (prompt tokens processed, of how many), then a response
        for each token, and at last None or, at any time, an exception.
        """
        session = self._session
        if item is None:
            self._ended(session)
        elif isinstance(item, BaseException):
            # Its traceback holds the frames of the generation thread, and they hold pages.
            item.__traceback__ = item.__context__ = None
            self._ended(session)
        elif isinstance(item, tuple):
            if session.reservation is not None:
                session.reservation.tokens = session.reservation.cached + item[0]
        elif isinstance(item, GenerationContext):
            session.admitted(item)
        elif session.reservation is not None:
            session.reservation.tokens += 1
        self._queue.put(item)


class LoneReplies(Replies):
    """The same for a request that mlx_lm serves alone, without a batch.

    Args:
        queue: as for ``Replies``.
        session: as for ``Replies``.
        ended: as for ``Replies``.
        published: called after everything that is put.
    """

    def __init__(
        self,
        queue: Queue[object],
        session: Session,
        ended: Callable[[Session], None],
        published: Callable[[], None],
    ):
        super().__init__(queue, session, ended)
        self._published = published

    def put(self, item: object) -> None:
        """Pass on what mlx_lm answers.

        Raises:
            Exception: in the middle of a prompt, to end it: mlx_lm does not look there whether
                it should.
        """
        session = self._session
        if session.stopped and (item is None or isinstance(item, tuple)):
            if item is not None:
                raise session.why_stopped()
            item = session.why_stopped()  # and not the end of a whole answer
        super().put(item)
        self._published()


class Watch:
    """Looks whether clients still hold their connections, in a thread of its own.

    A stream notices by itself, when it writes; an answer in one piece would not before its end.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._sessions: set[Session] = set()
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def over(self, session: Session) -> Iterator[None]:
        """Watch a session's connection for as long as the block runs."""
        with self._lock:
            self._sessions.add(session)
        try:
            yield
        finally:
            with self._lock:  # so that the socket is not closed while it is looked at
                self._sessions.discard(session)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            with self._lock:
                for session in self._sessions:
                    if session.connection and not session.gone and _closed(session.connection):
                        session.cancel()


def _closed(connection: socket.socket) -> bool:
    """Whether the other end has closed, without waiting and without reading anything."""
    try:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0)) and not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return True

"""The HTTP server around a ``Generator``."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from threading import Lock
from typing import Any, cast

from mlx_lm.server import get_system_fingerprint

from .generator import Generator
from .handler import Handler


@dataclass(frozen=True)
class ServerOptions:
    """Limits for clients.

    Attributes:
        max_body_bytes: a request's body may have so many.
        client_timeout: seconds within which a client must have sent its request, and within which
            it must take whatever is written to it.
    """

    max_body_bytes: int = 32 * 10**6
    client_timeout: float = 30.0


class Server(ThreadingHTTPServer):
    """Listens, with a thread for each connection.

    Args:
        host: name or address.
        port: 0 for any that is free.
        generator: answers requests.
        options: limits for clients.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = False  # which the interpreter would end in the middle of MLX's code
    request_queue_size = 128  # the default, 5, makes a crowd of clients wait for seconds

    def __init__(self, host: str, port: int, generator: Generator, options: ServerOptions):
        self.options = options
        self.generator = generator
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        handler = partial(Handler, generator, system_fingerprint=get_system_fingerprint())
        self._lock = Lock()
        self._open: set[socket.socket] = set()
        # Without IPv6, Python gives its addresses as bytes: then it cannot be had either.
        super().__init__(cast(tuple[str, int], address), handler)

    def service_actions(self) -> None:
        """Called now and then while it serves.

        Raises:
            Exception: what ended the generator.
        """
        if self.generator.failure is not None:
            raise self.generator.failure

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own."""
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Close all connections, and wait for their threads."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = cast(tuple[str, int], self.server_address[:2])
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

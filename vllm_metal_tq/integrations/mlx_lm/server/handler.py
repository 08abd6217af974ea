"""HTTP: mlx_lm's request handler, with limits, and with errors in OpenAI's form."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_lm.server import APIHandler

from .errors import APIError, ClientGoneError, as_api_error, invalid
from .metrics import exposition
from .origins import may_ask
from .sessions import Session

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .generator import Generator
    from .http import Server

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "xtc_probability",
    "xtc_threshold",
)
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_CONTEXT_SIZES = ("repetition_context_size", "presence_context_size", "frequency_context_size")
_MAX_LOGIT = 1e6  # of what is added to logits or multiplies them; float16 and float32 hold them
_MAX_CONTEXT_SIZE = 1 << 30  # MLX slices with 32 bits
# What apply_chat_template takes beyond what it passes on to the model's own template.
_TEMPLATE_OPTIONS = {
    "add_generation_prompt",
    "chat_template",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
_OUTCOMES = {
    "context_length_exceeded": "refused",
    "kv_cache_full": "refused",
}
# What mlx_lm raises where a field is not what it expects.
_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    OverflowError,
)
_DRAIN_SECONDS = 2.0  # that a client has left to take notice of an answer while it still sends


class Handler(APIHandler):
    """Answers one connection. Its server has ``options``, a ``ServerOptions``."""

    server: Server
    response_generator: Generator
    session: Session | None = None
    # What mlx_lm and http.server set.
    body: dict[str, Any]
    rfile: io.BufferedIOBase
    wfile: Any
    max_tokens: int | None
    top_k: int
    seed: int | None
    logit_bias: dict[int, float] | None
    stream_options: dict[str, Any] | None
    _headers_buffer: list[bytes]
    stream = False
    _begun = False  # whether headers have gone out
    _status = 200

    def setup(self) -> None:
        """Give the client ``client_timeout`` seconds to send, and as many for each write."""
        self.timeout = self.server.options.client_timeout
        super().setup()
        self._reader = io.BufferedReader(_Deadline(self.connection, self.timeout))
        self.rfile = self._reader

    def do_GET(self) -> None:  # noqa: N802 (http.server's name)
        """Answer ``/metrics``, and what mlx_lm answers."""
        if self.path == "/metrics":
            self._guard(self._metrics)
        else:
            self._guard(super().do_GET)

    def do_POST(self) -> None:  # noqa: N802
        """Read the body within its limits, then go on as mlx_lm does."""
        self._guard(self._post)

    def _post(self) -> None:
        # What mlx_lm reads is then there, and an answer meets a client that is done sending.
        body = self._read_body()
        self.rfile = io.BytesIO(body)
        try:
            if body and not isinstance(json.loads(body), dict):  # which mlx_lm would log in full
                raise invalid("the request must be a JSON object")
            super().do_POST()
        except _UNREADABLE as error:
            raise invalid(f"the request cannot be read: {error}") from error
        except RecursionError:
            raise invalid("the request is nested too deeply") from None

    def _guard(self, answer: Callable[[], None]) -> None:
        """Answer, or else say why not."""
        try:
            self._check_origin()
            answer()
        except APIError as error:
            self._answer_error(error)
        except (ConnectionError, TimeoutError, ClientGoneError):
            self.close_connection = True
        except Exception as error:
            logging.exception("a request failed")
            self._answer_error(as_api_error(error))

    def _check_origin(self) -> None:
        # A browser sends first, and only then looks whether the page may have the answer.
        origin = self.headers.get("Origin")
        if origin is not None and not self._may_ask(origin):
            message = f"pages of {origin} may not ask here: see --allowed-origins"
            raise APIError(403, message, "origin_not_allowed")

    def _may_ask(self, origin: str) -> bool:
        return may_ask(origin, self.response_generator.cli_args.allowed_origins)

    def _read_body(self) -> bytes:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            return b""  # mlx_lm says what is wrong with it
        limit = self.server.options.max_body_bytes
        if length < 0:
            raise invalid(f"Content-Length {length} must not be negative")
        if length > limit:
            message = f"the body has {length} bytes, but {limit} at most are allowed"
            raise APIError(413, message, "request_too_large")
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            message = f"the request took longer than {self.timeout:g} seconds to arrive"
            raise APIError(408, message, "timeout") from None
        if len(body) < length:
            raise invalid(f"the body ends after {len(body)} bytes of {length}")
        return body

    def validate_model_parameters(self) -> None:
        """Check what mlx_lm checks, and what else would end its generation thread.

        Raises:
            ValueError: something is wrong.
        """
        if self.max_tokens is None:  # null, which means the same as nothing
            self.max_tokens = self.response_generator.cli_args.max_tokens
        super().validate_model_parameters()
        if self.max_tokens < 1:
            raise invalid("max_tokens must be at least 1", "max_tokens")
        self._check_numbers()
        self._check_model()
        self._check_stop()
        self._check_messages()
        self._check_template_kwargs()
        self._check_stream_options()
        self._check_tokens()
        if self.seed is not None:
            self.seed %= 1 << 64  # of which there are so many

    def _check_numbers(self) -> None:
        # What MLX cannot convert would fail in the middle of a batch, for all who are in it.
        for name in _NUMBERS:
            setattr(self, name, _finite(getattr(self, name), name))
        for name in _PENALTIES:
            if abs(getattr(self, name)) > _MAX_LOGIT:
                raise invalid(f"{name} must be at most {_MAX_LOGIT:g} in size", name)
        for name in _CONTEXT_SIZES:
            if getattr(self, name) > _MAX_CONTEXT_SIZE:
                raise invalid(f"{name} must be at most {_MAX_CONTEXT_SIZE}", name)
        for value in (self.logit_bias or {}).values():
            if not abs(value) <= _MAX_LOGIT:  # nor is it NaN
                raise invalid(f"logit_bias must be at most {_MAX_LOGIT:g} in size", "logit_bias")

    def _check_model(self) -> None:
        args = self.response_generator.cli_args
        if self.requested_model not in ("default_model", args.model):
            message = f"the model {self.requested_model!r} is not served here, but {args.model!r}"
            raise APIError(404, message, "model_not_found", "model")
        if self.adapter not in (None, args.adapter_path):
            raise invalid("adapters are chosen when the server starts", "adapters")
        if self.requested_draft_model not in ("default_model", args.draft_model):
            raise invalid("the draft model is chosen when the server starts", "draft_model")

    def _check_stop(self) -> None:
        stop = self.body.get("stop")
        words = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
            raise invalid("stop must be a string or a list of strings, none of them empty", "stop")

    def _check_messages(self) -> None:
        if not self.path.endswith("/chat/completions"):
            if not isinstance(self.body.get("prompt"), str):
                raise invalid("prompt must be a string", "prompt")
            return
        messages = self.body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise invalid("messages must be a list with at least one message", "messages")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise invalid("a message must be an object with a role", "messages")
            self._check_content(message.get("content"))

    def _check_content(self, content: object) -> None:
        if content is None or isinstance(content, str):
            return
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise invalid("content must be a string or a list of objects", "messages")
        sees = getattr(self.response_generator.model_provider, "processor", None) is not None
        if not sees and any(part.get("type") != "text" for part in content):
            # mlx_lm would fetch an image from wherever it is said to be.
            raise invalid("this model takes content of type text only", "messages")

    def _check_template_kwargs(self) -> None:
        # A client's own template would run in the generation thread, for as long as it likes.
        given, name = self.chat_template_kwargs, "chat_template_kwargs"
        if given is not None and not isinstance(given, dict):
            raise invalid(f"{name} must be an object", name)
        if refused := sorted(_TEMPLATE_OPTIONS.intersection(given or ())):
            raise invalid(f"{name} must not have {', '.join(refused)}", name)

    def _check_stream_options(self) -> None:
        if self.stream_options is not None:
            if not isinstance(self.stream_options, dict):
                raise invalid("stream_options must be an object", "stream_options")
            self.stream_options = {"include_usage": False} | self.stream_options

    def _check_tokens(self) -> None:
        size = self.response_generator.model_provider.vocabulary
        if size is None:
            return
        if self.top_k >= size:
            self.top_k = 0  # all tokens
        if any(not 0 <= token < size for token in self.logit_bias or ()):
            raise invalid(f"logit_bias names a token that is not below {size}", "logit_bias")

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """As mlx_lm's, for a client that is watched and counted."""
        asked = [self.body.get(name) for name in ("max_tokens", "max_completion_tokens")]
        self.session = session = Session(self.connection, asked != [None, None])
        request.session = session
        stats = self.response_generator.stats
        stats.begin()
        outcome = "failed"
        try:
            with self.response_generator.watch.over(session):
                super().handle_completion(request, stop_words)
            outcome = "finished" if session.error is None else _outcome(session.error)
        except (ConnectionError, TimeoutError, ClientGoneError) as error:
            outcome = "cancelled"
            raise ClientGoneError from error
        except Exception as error:
            api_error = as_api_error(error)
            outcome = _outcome(api_error)
            if api_error is not error:
                logging.exception("a request failed")
            raise api_error from None
        finally:
            # mlx_lm writes an error's text even where nobody reads it.
            stats.end("cancelled" if session.gone else outcome, session.started)

    def handle_health_check(self) -> None:
        """Say whether requests are answered, and how full the cache is."""
        generator = self.response_generator
        healthy = generator.healthy
        fields = {"status": "ok" if healthy else "unavailable", "model": generator.cli_args.model}
        if healthy:
            fields |= generator.kv_state
        self._answer(200 if healthy else 503, json.dumps(fields).encode())

    def handle_models_request(self) -> None:
        """List the one model, or describe it."""
        name = self.response_generator.cli_args.model
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "local"}
        asked = self.path.removeprefix("/v1/models").strip("/")
        if asked not in ("", name):
            message = f"the model {asked!r} is not served here, but {name!r}"
            raise APIError(404, message, "model_not_found", "model")
        fields = model if asked else {"object": "list", "data": [model]}
        self._answer(200, json.dumps(fields).encode())

    def _metrics(self) -> None:
        generator = self.response_generator
        if not generator.healthy:
            raise APIError(503, "the server is not ready", "unavailable")
        text, kind = exposition(generator.stats, generator.kv_state)
        self._answer(200, text, kind)

    def _set_cors_headers(self) -> None:
        origin = self.headers.get("Origin")
        if origin is not None and self._may_ask(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
            self.send_header("Access-Control-Allow-Methods", "*")
            self.send_header("Access-Control-Allow-Headers", "*")

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # mlx_lm answers 404 to whatever went wrong with a prompt.
        if status_code >= 400 and self.session is not None and self.session.error is not None:
            raise self.session.error
        self._status = status_code
        super()._set_completion_headers(status_code)

    def end_headers(self) -> None:
        """End the headers; what mlx_lm writes after those of an error goes out in OpenAI's form."""
        super().end_headers()
        self._begun = True
        if self._status >= 400:
            self.wfile = _ErrorWriter(self.wfile, self._status)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As http.server's, in OpenAI's form."""
        self._answer_error(APIError(code, message or explain or self.responses[code][0]))

    def _answer_error(self, error: APIError) -> None:
        """Say what went wrong, as far as the client can still be told."""
        self.close_connection = True
        try:
            if not self._begun:
                self._headers_buffer = []  # of an answer that began well
                self._answer(error.status, error.body, retry_after=error.retry_after)
                self._drain()
            elif self.stream and self._status == 200:
                self.wfile.write(b"data: " + error.body + b"\n\n")
        except OSError:
            pass  # the client has gone

    def _answer(
        self,
        status: int,
        body: bytes,
        kind: str = "application/json",
        retry_after: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        if hasattr(self, "headers"):
            self._set_cors_headers()
        super().end_headers()
        self._begun = True
        self.wfile.write(body)

    def _drain(self) -> None:
        """Take what the client still sends: to close now would take our answer from it."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(_DRAIN_SECONDS)
        end = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < end and self.connection.recv(1 << 16):
            pass

    def finish(self) -> None:
        """Close, whatever took the place of the reader meanwhile."""
        self.rfile = self._reader
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Log a request where mlx_lm logs."""
        logging.info("%s %s", self.client_address[0], format % args)


def _finite(value: float, name: str) -> float:
    """``value`` as a float, which JSON's integers need not fit into."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise invalid(f"{name} must be a finite number", name)
    return number


def _outcome(error: APIError) -> str:
    return _OUTCOMES.get(error.code or "", "invalid" if error.status < 500 else "failed")


class _Deadline(io.RawIOBase):
    """Reads a socket until so many seconds have passed in all.

    A socket's own timeout begins anew with every byte.
    """

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection = connection
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._seconds)


class _ErrorWriter:
    """Takes an error as mlx_lm writes it, and writes it in OpenAI's form."""

    def __init__(self, file: Any, status: int):
        self._file = file
        self._status = status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: bytes) -> int:
        message = text.decode()
        with contextlib.suppress(ValueError, LookupError, TypeError):  # it may be no JSON
            message = json.loads(message)["error"]
        return int(self._file.write(APIError(self._status, message).body))

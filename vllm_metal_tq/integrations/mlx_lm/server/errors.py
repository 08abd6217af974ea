"""Errors as clients see them: a status, and OpenAI's JSON object."""

from __future__ import annotations

import json

_TYPES = {
    404: "not_found_error",
    500: "server_error",
    503: "server_error",
}


class APIError(Exception):
    """What a client is told.

    Args:
        status: of the HTTP answer.
        message: for people.
        code: for programs, such as ``context_length_exceeded``; None where the type says it all.
        param: the field of the request that is wrong.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def fields(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def body(self) -> bytes:
        """The error object as JSON."""
        return json.dumps(self.fields).encode()


class ClientGoneError(Exception):
    """The client has closed its connection: nobody waits for the answer."""


def invalid(message: str, param: str | None = None) -> APIError:
    """A request that is wrong in itself."""
    return APIError(400, message, "invalid_value", param)


def stopping() -> APIError:
    """The server ends before the answer does."""
    return APIError(503, "the server is stopping", "unavailable")


def as_api_error(error: BaseException) -> APIError:
    """``error`` if it is one for clients, or else one that says that the server failed."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ClientGoneError):  # it may have closed its own side alone, and read this
        return APIError(499, "the client has closed the connection", "client_gone")
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return APIError(500, f"the server failed: {reason}", "internal_error")

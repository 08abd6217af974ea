"""Which web pages may ask: browsers name the page's origin with what they send for it."""

from __future__ import annotations

import ipaddress
from collections.abc import Container
from urllib.parse import urlsplit

ANY, LOCAL = "*", "local"  # what stands for all origins, and for those of this machine


def may_ask(origin: str, allowed: Container[str]) -> bool:
    """Whether a page's requests are served.

    Args:
        origin: what the browser says, such as ``http://localhost:3000``, or ``null``.
        allowed: origins, ``ANY``, or ``LOCAL``: pages that this machine serves, and applications,
            whose schemes pages of the web cannot have.
    """
    return ANY in allowed or origin in allowed or (LOCAL in allowed and _is_local(origin))


def _is_local(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme not in ("http", "https"):
        return bool(parts.scheme)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")

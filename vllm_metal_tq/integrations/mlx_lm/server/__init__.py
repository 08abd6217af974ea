"""mlx_lm's server over page pools: admission by blocks, limits for clients, and metrics.

mlx_lm's own classes do the work, extended where they are meant to be called: ``Provider`` loads
the model, ``Generator`` runs its thread, ``Handler`` speaks HTTP. ``batch`` holds the two names
of mlx_lm's that are rebound.
"""

from .generator import Generator
from .http import Server, ServerOptions
from .metrics import Stats
from .provider import Provider

__all__ = ["Generator", "Provider", "Server", "ServerOptions", "Stats"]

"""The compressed cache as one of mlx_lm's prompt caches.

``mlx_lm.generate(model, tokenizer, prompt, prompt_cache=make_prompt_cache(model))`` is all that a
script changes.
"""

from .cache import BatchTurboQuantKVCache, TurboQuantKVCache
from .measure import calibrate
from .pools import CachePools
from .prompt_cache import CacheReport, make_prompt_cache, report
from .saved import load_prompt_cache, save_prompt_cache

__all__ = [
    "BatchTurboQuantKVCache",
    "CachePools",
    "CacheReport",
    "TurboQuantKVCache",
    "calibrate",
    "load_prompt_cache",
    "make_prompt_cache",
    "report",
    "save_prompt_cache",
]

"""A tiny model whose every step takes a known time."""

import time

import mlx.core as mx
import models
from mlx_lm.models import llama

SIZE, PRODUCTS = 384, 12


class Heavy(llama.Model):
    """Multiplies matrices before it answers; the product depends on the tokens."""

    def __call__(self, tokens, cache=None):
        return super().__call__(tokens, cache=cache) + work(tokens)


def work(tokens):
    product = mx.ones((SIZE, SIZE)) / SIZE + 0 * tokens.sum()
    for _ in range(PRODUCTS):
        product = product @ product
    return 0 * product[0, 0]


def model():
    """The model."""
    made = models.llama()
    made.__class__ = Heavy
    return made


def least_seconds():
    """What a step must take, with room for a machine that does other things too."""
    seconds = []
    for i in range(10):
        start = time.perf_counter()
        mx.eval(work(mx.array([[i]])))
        seconds.append(time.perf_counter() - start)
    return min(seconds) / 3

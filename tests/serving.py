"""A server of ours in this process, on a tiny model, and what tests need to talk to it."""

import json
import string
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import models
import openai
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from vllm_metal_tq import TurboQuantConfig, pages
from vllm_metal_tq.cli import serve
from vllm_metal_tq.integrations.mlx_lm import CachePools
from vllm_metal_tq.integrations.mlx_lm.server import (
    Generator,
    Provider,
    Server,
    ServerOptions,
    Stats,
)

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
END = 0  # the id of the token that ends a text; tests suppress it where length matters


def tokenizer():
    """One token for each character; text and tokens are equally long."""
    characters = [
        "</s>",
        *string.ascii_letters,
        *string.digits,
        *" \n:.,;!?-+*/=()[]{}<>@#$%&_'\"|~^",
    ]
    vocabulary = {c: i for i, c in enumerate(characters[: models.VOCAB])}
    own = Tokenizer(WordLevel(vocabulary, unk_token="</s>"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    own.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")
    fast.chat_template = TEMPLATE
    return TokenizerWrapper(fast)


def options(*flags):
    """The options of ``vllm-metal-tq serve``, with ``flags``."""
    import argparse

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["--model", "tiny", *flags])


@contextmanager
def server(*flags, model=None, words=None, blocks=None, limits=None, preset=None):
    """A running server; ``blocks``: so many fit into its budget."""
    model = model or models.llama()
    words = words or tokenizer()
    # MLX refuses to evaluate in one thread what was begun in another, and these may be kept from
    # a thread of another test that never came to need them.
    for kept in (pages.places, pages._offsets, pages._heads):
        kept.cache_clear()

    def pools(model, words):
        config = TurboQuantConfig.from_names(preset)
        made = CachePools(model, config)
        if blocks is not None:
            made = CachePools(model, config, max_bytes=blocks * made.block_bytes)
        return made

    provider = Provider(options(*flags), lambda *_: (model, words), pools)
    generator = Generator(provider, Stats())
    generator.wait_until_loaded()
    served = Server("127.0.0.1", 0, generator, limits or ServerOptions())
    thread = threading.Thread(target=served.serve_forever, args=[0.02])
    thread.start()
    try:
        yield served
    finally:
        served.shutdown()
        thread.join()
        generator.stop_and_join()
        served.server_close()
        provider.pools.detach()


def client(served, **fields):
    """The official client; it tries nothing twice."""
    fields = {"max_retries": 0, "timeout": 60} | fields
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", **fields)


def get(served, path):
    """``(status, text)`` of a GET."""
    return fetch(urllib.request.Request(served.url + path))[:2]


def post(served, body, path="/v1/completions", headers=()):
    """``(status, text, headers)`` of a POST of bytes, or of an object as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fetch(urllib.request.Request(served.url + path, data, dict(headers)))


def fetch(request):
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def health(served):
    """What ``/health`` says."""
    return json.loads(get(served, "/health")[1])


def wait_for(condition, seconds=10.0):
    """Whether ``condition`` comes true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()

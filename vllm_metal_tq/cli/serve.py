"""Serve a model over HTTP, as OpenAI's API, with a compressed KV cache.

Flags have the names of ``mlx_lm.server`` where both have them, and its defaults, but that pages of
other sites may not ask.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING

from . import common, exit_status, prompts

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..integrations.mlx_lm import CachePools
    from ..integrations.mlx_lm.server import Generator, Server

METAL_SHARE = 0.8  # of the memory that Metal recommends and the weights leave: the rest is for work
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}

LAST_PORT = 65535
LONGEST = 86400.0  # seconds; a socket waits no longer than the system's clock can say

EXAMPLES = (
    "vllm-metal-tq serve --model demo --port 8080 --kv-budget 1GB",
    "vllm-metal-tq serve --model ./Qwen3-8B-4bit --preset tq4 --decode-concurrency 16",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``serve``."""
    common.add_model_argument(parser)
    common.add_scheme_arguments(parser)
    common.add_layers_argument(parser)
    common.add_calibration_arguments(parser)
    _add_limits(parser)
    _add_model_options(parser)
    _add_generation_defaults(parser)
    _add_batching(parser)
    common.add_pipeline_argument(parser)
    # What mlx_lm's server reads, and ours does not offer: quantised dense caches.
    parser.set_defaults(kv_bits=None, kv_group_size=64, quantized_kv_start=0)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="port, or 0 for any that is free")
    parser.add_argument(
        "--allowed-origins",
        type=lambda text: text.split(","),
        default="local",
        help="web origins whose pages may ask, with commas between them; local: those of this "
        "machine (the default), *: all",
    )
    parser.add_argument(
        "--kv-budget",
        type=budget,
        help="the most that pages may take, such as 2GB, or none (default: with Metal, 80 %% of "
        "the memory it recommends and the weights leave; else none)",
    )
    parser.add_argument(
        "--max-body-size",
        type=size,
        default=32 * 10**6,
        metavar="SIZE",
        help="the most bytes of a request's body (default: 32MB)",
    )
    parser.add_argument(
        "--client-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time for a client to send its request, and to take each piece of the answer",
    )
    parser.add_argument(
        "--log-level",
        default="INFO",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        help="what is logged, to standard error",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter-path", help="trained adapter weights and their config")
    parser.add_argument("--draft-model", help="a smaller model that drafts (no batching then)")
    parser.add_argument("--num-draft-tokens", type=int, default=3, help="tokens drafted at a time")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that a tokenizer brings"
    )
    parser.add_argument("--chat-template", default="", help="in place of the tokenizer's own")
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="take the tokenizer's default where it has none",
    )
    parser.add_argument(
        "--chat-template-args",
        type=_json,
        default="{}",
        help="a JSON object for the chat template, such as '{\"enable_thinking\": false}'",
    )


def _add_generation_defaults(parser: argparse.ArgumentParser) -> None:
    defaults = "for requests that do not say"
    parser.add_argument("--temp", type=float, default=0.0, help=f"temperature {defaults}")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling, likewise")
    parser.add_argument("--top-k", type=int, default=0, help="top-k sampling, likewise")
    parser.add_argument("--min-p", type=float, default=0.0, help="min-p sampling, likewise")
    parser.add_argument("--max-tokens", type=int, default=512, help=f"tokens to make {defaults}")


def _add_batching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decode-concurrency", type=int, default=32, help="requests that decode together"
    )
    parser.add_argument(
        "--prompt-concurrency", type=int, default=8, help="prompts processed together"
    )
    parser.add_argument(
        "--prefill-step-size", type=int, default=2048, help="prompt tokens processed at a time"
    )
    parser.add_argument("--prompt-cache-size", type=int, default=10, help="earlier prompts to keep")
    parser.add_argument(
        "--prompt-cache-bytes",
        type=size,
        help="drop earlier prompts when pages take more, such as 1GB (default: --kv-budget alone)",
    )


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def size(text: str) -> int:
    """Bytes from a number and a unit of powers of 1000, such as ``2GB`` or ``512M``.

    Raises:
        ValueError: it is no such text, or not above 0.
    """
    upper = text.strip().upper().removesuffix("B")
    digits = upper.rstrip("KMG")
    count = float(digits) * UNITS[upper[len(digits) :]] if upper[len(digits) :] in UNITS else 0
    if not 1 <= count < math.inf:
        raise ValueError(f"{text!r} is no size")
    return int(count)


def budget(text: str) -> int | None:
    """A size; 0 stands for ``none``.

    Raises:
        ValueError: it is neither.
    """
    return 0 if text == "none" else size(text)


@common.together()
def run(args: argparse.Namespace) -> None:
    """Serve until interrupted or told to terminate."""
    _check(args)
    common.scheme(args)  # a bad name is an error before anything is loaded
    from ..integrations.mlx_lm import distributed
    from ..integrations.mlx_lm import server as ours

    first = distributed.rank() == 0
    if not first:
        # Keys reach all processes of a terminal: it is the first one that stops the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    level = args.log_level if first else "ERROR"  # others would repeat it
    logging.basicConfig(level=level, format="%(asctime)s - %(levelname)s - %(message)s")
    provider = ours.Provider(args, partial(_load, args), lambda *loaded: _pools(args, *loaded))
    options = ours.ServerOptions(args.max_body_size, args.client_timeout)
    generator = ours.Generator(provider, ours.Stats())
    generator.wait_until_loaded()
    try:
        if first:
            _listen(ours.Server(args.host, args.port, generator, options), args.model)
        else:
            _follow(generator)
    finally:
        generator.stop_and_join()
        provider.pools.detach()


def _say_what_is_compressed(pools: CachePools, drafts: bool) -> None:
    """Log what becomes of the model's layers, and whether requests are batched.

    The pools, and while it runs the model, are the generation thread's alone.
    """
    from ..integrations.mlx_lm import report
    from ..integrations.mlx_lm.parts import batchable

    log = logging.getLogger(__name__)
    caches = pools.make_prompt_cache()
    for name, what in prompts.layer_rows(report(caches), pools.model).items():
        log.info("%s: %s", name, what)
    if not drafts and not batchable(caches):
        log.info("requests are answered one at a time: this model's caches cannot be batched")


def _listen(server: Server, model: str) -> None:
    """Answer clients until interrupted or told to terminate."""
    # A service manager ends us with this signal.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(f"serving {model} on {server.url}/v1", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
        ended = server.generator.stop_and_join()  # first, so that whoever waits is told
        server.server_close()
        if not ended:
            print("error: another process does not answer", file=sys.stderr, flush=True)
            os._exit(exit_status.UNEXPECTED)  # else Python would wait for the thread


def _follow(generator: Generator) -> None:
    """Work for the first process until it says that this is all.

    Raises:
        Exception: why that was not to be.
    """
    generator.join()
    if generator.failure is not None:
        raise generator.failure


def _check(args: argparse.Namespace) -> None:
    from ..integrations.mlx_lm import distributed

    names = ("decode_concurrency", "prompt_concurrency", "prefill_step_size", "max_tokens")
    for name in names:
        common.check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    for name in ("num_draft_tokens", "prompt_cache_size"):
        common.check_count(f"--{name.replace('_', '-')}", getattr(args, name), least=0)
    common.check_sampling(args)
    if not 0 <= args.port <= LAST_PORT:
        raise ValueError(f"--port {args.port} must be from 0 to {LAST_PORT}")
    if not 0 < args.client_timeout <= LONGEST:
        raise ValueError(
            f"--client-timeout {args.client_timeout:g} must be above 0, and {LONGEST:g} at most"
        )
    if not isinstance(args.chat_template_args, dict):
        raise ValueError("--chat-template-args must be a JSON object")
    for flag in ("adapter_path", "draft_model"):
        if getattr(args, flag) and distributed.size() > 1:
            raise ValueError(f"{prompts.flag(flag)} cannot be given with mlx.launch")


def _load(
    args: argparse.Namespace, name: str, tokenizer_config: dict[str, object]
) -> tuple[nn.Module, TokenizerWrapper] | None:
    """What mlx_lm's server does not load as it is needed here, or None."""
    from ..integrations.mlx_lm import distributed

    if name != common.DEMO_MODEL and distributed.size() == 1:
        return None
    return common.load_model(name, args.pipeline, **tokenizer_config)


def _pools(args: argparse.Namespace, model: nn.Module, tokenizer: TokenizerWrapper) -> CachePools:
    """The page pools that the arguments ask for."""
    from ..integrations.mlx_lm import CachePools

    calibration = common.calibration_for(args, model, tokenizer)
    config = common.scheme(args, calibration)
    limit = default_budget() if args.kv_budget is None else args.kv_budget
    pools = CachePools(model, config, calibration=calibration, max_bytes=limit or None)
    if limit and pools.max_blocks is None:
        log = logging.getLogger(__name__)
        log.warning("no budget is kept: of this model all that is compressed is bounded by windows")
    _say_what_is_compressed(pools, args.draft_model is not None)
    return pools


def default_budget() -> int | None:
    """The most that pages should take on this machine, or None where nothing says so.

    Raises:
        ValueError: the weights alone take all the memory that Metal recommends.
    """
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended is None:
        return None
    left = int(METAL_SHARE * (int(recommended) - mx.get_active_memory()))
    if left <= 0:
        raise ValueError("the weights leave no memory for a KV cache: set --kv-budget to try")
    return left

"""Serve a model to several clients at a time, by mlx_lm's server and by ours."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import inspect
import io
import socket
import time
from typing import TYPE_CHECKING, Any

from . import bench_model, common, serve

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

HOST = "127.0.0.1"
FIGURES = {
    "requests": "requests",
    "prompt_tokens": "prompt tokens",
    "tokens_per_s": "tok/s",
    "first_token_s": "first token s",
    "first_token_p95_s": "p95",
    "latency_s": "latency s",
    "latency_p95_s": "p95",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``bench serve``."""
    common.add_model_argument(parser)
    common.add_scheme_arguments(parser)
    common.add_calibration_arguments(parser)
    counts = {
        "clients": (4, "clients that ask at a time"),
        "requests": (16, "requests of all of them, besides one each as a warm-up"),
        "prompt-words": (200, "words of a prompt"),
        "max-tokens": (64, "tokens of an answer"),
    }
    for name, (default, help_text) in counts.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{help_text} (default: {default})"
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Load one server after the other, each in a process of its own, and print figures."""
    prompts = _check(args)
    config = common.scheme(args)
    facts = bench_model.facts(args)
    from ..bench.caches import BASELINES

    caches = [*BASELINES, config.label]
    servers = []
    with common.progress_bar("bench serve") as advance:
        for cache in caches:
            servers.append({"cache": facts.label(cache), **_measure(args, cache, prompts)})
            advance(len(servers), len(caches))
    if args.json:
        fields = {"model": args.model, "clients": args.clients, "max_tokens": args.max_tokens}
        common.print_json(
            facts.machine | common.scheme_fields(config) | fields | {"servers": servers}
        )
        return
    machine = facts.machine
    common.print_table(
        {"device": machine["device"], "MLX": machine["mlx"], "mlx_lm": machine["mlx_lm"]}
        | {"model": args.model, "clients": str(args.clients), "runs": machine["runs"]}
    )
    common.print_columns(["cache", *FIGURES.values()], map(_cells, servers))


def _cells(server: dict[str, Any]) -> list[str]:
    if server["skipped"] is not None:
        return [server["cache"], f"skipped: {server['skipped']}"]
    shown = (server[name] for name in FIGURES)
    return [server["cache"], *(f"{x:.2f}" if isinstance(x, float) else str(x) for x in shown)]


def _check(args: argparse.Namespace) -> list[str]:
    """The prompts; bad arguments are errors before a model is loaded."""
    from ..bench.serve import excerpts

    for name in ("clients", "requests", "prompt_words", "max_tokens"):
        common.check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    text = common.read_text(None, "alice.txt")
    return excerpts(text, args.prompt_words, args.clients + args.requests)


def _measure(args: argparse.Namespace, cache: str, prompts: list[str]) -> dict[str, Any]:
    """Figures of one server, or the reason why there are none as ``skipped``."""
    from ..bench.caches import BASELINES, MLX_BITS
    from ..bench.process import background
    from ..bench.serve import load

    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    if cache in MLX_BITS and not _quantises():
        return {**figures, "skipped": "this mlx_lm's server has no quantised cache"}
    with socket.create_server((HOST, 0)) as free:
        address: tuple[str, int] = free.getsockname()[:2]
    work = _serve_theirs if cache in BASELINES else _serve_ours
    try:
        with background(work, args, cache, address[1]) as process:
            _wait_for(address, process)
            figures = load(address, "default_model", prompts, args.clients, args.max_tokens)
    except (ValueError, OSError, http.client.HTTPException) as error:
        return {**figures, "skipped": str(error) or type(error).__name__}
    return {**figures, "skipped": None}


def _quantises() -> bool:
    """Whether mlx_lm's server knows ``--kv-bits``, as it does since 0.32."""
    from mlx_lm import server

    return "kv_bits" in inspect.getsource(server.ResponseGenerator)


def _wait_for(address: tuple[str, int], process: BaseProcess) -> None:
    from ..bench.process import how_it_ended
    from ..bench.serve import TIMEOUT

    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(address):
            return
        if not process.is_alive():
            raise ValueError(f"the server did not start: {how_it_ended(process.exitcode)}")
        time.sleep(0.1)
    raise ValueError(f"the server did not start within {TIMEOUT:.0f} seconds")


def _options(args: argparse.Namespace, port: int) -> argparse.Namespace:
    """The options of ``serve``, its defaults and what was given here."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = ["--model", args.model, "--port", str(port), "--log-level", "ERROR"]
    options = parser.parse_args(flags)
    for name in ("preset", "k_quant", "v_quant", "calibration", "no_calibrate"):
        setattr(options, name, getattr(args, name))
    return options


def _serve_ours(args: argparse.Namespace, cache: str, port: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        serve.run(_options(args, port))


def _serve_theirs(args: argparse.Namespace, cache: str, port: int) -> None:
    """Mlx_lm's own server, which loads the demo model as we do."""
    from mlx_lm import server

    from ..bench.caches import MLX_BITS
    from ..plan.caches import MLX_GROUP

    class Provider(server.ModelProvider):
        """Loads by name what mlx_lm does not know."""

        model_key: Any

        def _load(self, model_path: str, *others: Any) -> None:
            if model_path != common.DEMO_MODEL:
                super()._load(model_path, *others)
                return
            self.model, self.tokenizer = common.load_model(model_path)
            self.model_key = (model_path, *others)
            self.is_batchable = True

    options = _options(args, port)
    options.kv_bits, options.kv_group_size = MLX_BITS.get(cache), MLX_GROUP
    with contextlib.redirect_stderr(io.StringIO()):  # a line for each request
        server.run(HOST, port, Provider(options))

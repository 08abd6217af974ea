"""Measure kernels and whole models beside what MLX and mlx_lm offer for the same work."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import TurboQuantConfig
from . import bench_context, bench_serve, common

_SHAPE = ["B", "context", "H", "HKV"]
NO_GPU = "no GPU: plain MLX operations take the place of the kernels, and defaults are small"

EXAMPLES = (
    'vllm-metal-tq bench decode --shapes "1,131072,32,8;8,32768,32,8" --head-dim 128',
    "vllm-metal-tq bench encode --tokens 1,8192",
    "vllm-metal-tq bench generate --model-shape llama-3.2-1b --batch 1,8 --context 4096,32768",
    "vllm-metal-tq bench serve --model demo --clients 4 --requests 16",
    "vllm-metal-tq bench context --model demo --memory 8GB --presets tq8,tq4",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks and their flags."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    decode = benchmarks.add_parser("decode", help="attention of one token over the cache")
    decode.add_argument("--shapes", help="B,ctx,H,HKV;... (sequences, tokens, heads, KV heads)")
    encode = benchmarks.add_parser("encode", help="encoding and storing new tokens")
    encode.add_argument("--tokens", help="tokens of a call, such as 1,8192")
    generate = benchmarks.add_parser("generate", help="decoding with a model of random weights")
    generate.add_argument("--model-shape", help="llama-3.2-1b, llama-3.1-8b or demo")
    generate.add_argument("--batch", help="sequences, such as 1,8")
    generate.add_argument("--context", help="tokens in the cache, such as 4096,32768")
    serve = benchmarks.add_parser("serve", help="a server that several clients ask")
    bench_serve.add_arguments(serve)
    context = benchmarks.add_parser("context", help="a context that grows until memory ends it")
    bench_context.add_arguments(context)
    for benchmark in (decode, encode):
        common.add_head_dim_argument(benchmark)
    for benchmark in (decode, encode, generate):
        common.add_scheme_arguments(benchmark)
        benchmark.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Run one benchmark and print its figures."""
    {
        "decode": _decode,
        "encode": _encode,
        "generate": _generate,
        "serve": bench_serve.run,
        "context": bench_context.run,
    }[args.benchmark](args)


def _decode(args: argparse.Namespace) -> None:
    from ..bench import clock, decode

    layout = common.page_layout(args)
    shapes = decode.GPU_SHAPES if clock.gpu_backend() else decode.CPU_SHAPES
    if args.shapes is not None:
        shapes = [decode.Shape.parse(text) for text in args.shapes.split(";")]
    for shape in shapes:
        clock.check_room(shape.bf16_bytes(args.head_dim), f"shape {shape.text}")
    bandwidth = clock.copy_bandwidth()
    figures = []
    with common.progress_bar("bench decode") as advance:
        for shape in shapes:
            figures.append(decode.bench_decode(shape, args.head_dim, layout.config, bandwidth))
            advance(len(figures), len(shapes))
    fields = {"head_dim": args.head_dim, "copy_gbps": bandwidth / 1e9}
    if args.json:
        common.print_json(_machine(layout.config) | fields | {"shapes": figures})
        return
    _print_machine(layout.config, fields)
    common.print_columns(
        [
            *(*_SHAPE, "us", "bf16 us", "mlx 8-bit us", "4-bit us"),
            *("speedup", "GB/s", "of copy", "error"),
        ],
        [
            [
                *_shape(x),
                *map(_micro, (x["kernel_us"], x["sdpa_us"], x["mlx_8bit_us"], x["mlx_4bit_us"])),
                *(f"{x['speedup']:.2f}x", *_bandwidth(x), f"{x['rel_error']:.1e}"),
            ]
            for x in figures
        ],
    )
    names = ("call_us", "sdpa_call_us", "chain_us", "sdpa_chain_us")
    common.print_columns(
        [*_SHAPE, "wall us, evaluated at once", "bf16", "in a chain", "bf16"],
        [[*_shape(x), *(f"{x[name]:.1f}" for name in names)] for x in figures],
    )


def _micro(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:.1f}"


def _shape(figures: dict[str, Any]) -> list[str]:
    return [str(figures[name]) for name in ("batch", "context", "heads", "kv_heads")]


def _bandwidth(figures: dict[str, Any]) -> list[str]:
    return [f"{figures['gbps']:.1f}", f"{100 * figures['copy_share']:.0f} %"]


def _encode(args: argparse.Namespace) -> None:
    from ..bench import clock, encode

    layout = common.page_layout(args)
    gpu = clock.gpu_backend()
    counts = encode.GPU_TOKENS if gpu else encode.CPU_TOKENS
    if args.tokens is not None:
        counts = _integers("--tokens", args.tokens)
    for count in counts:
        clock.check_room(encode.bf16_bytes(count, args.head_dim), f"--tokens {count}")
    bandwidth = clock.copy_bandwidth()
    sizes = encode.GPU_CACHE_TOKENS if gpu else encode.CPU_CACHE_TOKENS
    encoded, appended = [], []
    with common.progress_bar("bench encode") as advance:
        for number, count in enumerate(counts, 1):
            encoded.append(encode.bench_encode(count, args.head_dim, layout.config, bandwidth))
            advance(number, len(counts) + len(sizes))
        for number, size in enumerate(sizes, len(counts) + 1):
            appended.append(encode.bench_append(size, args.head_dim, layout.config))
            advance(number, len(counts) + len(sizes))
    fields = {"head_dim": args.head_dim, "copy_gbps": bandwidth / 1e9}
    if args.json:
        results = {"encode": encoded, "append": appended}
        common.print_json(_machine(layout.config) | fields | results)
        return
    _print_machine(layout.config, fields)
    common.print_columns(
        ["tokens", "encode us", "GB/s", "of copy", "wall us, encode", "bf16 append", "mlx 4-bit"],
        [
            [
                *(str(x["tokens"]), f"{x['encode_us']:.1f}", *_bandwidth(x)),
                *(f"{x['encode_call_us']:.1f}", f"{x['bf16_append_call_us']:.1f}"),
                _micro(x["mlx_4bit_call_us"]),
            ]
            for x in encoded
        ],
    )
    common.print_columns(
        ["tokens in pages", "bytes", "append of 1 token, us", "memory it takes"],
        [
            [
                *(str(x["cache_tokens"]), common.size(int(x["cache_bytes"]))),
                *(f"{x['append_us']:.1f}", common.size(int(x["extra_bytes"]))),
            ]
            for x in appended
        ],
    )


def _generate(args: argparse.Namespace) -> None:
    from ..bench import clock, generate

    gpu, config = clock.gpu_backend(), common.scheme(args)
    name = args.model_shape or ("llama-3.2-1b" if gpu else "demo")
    if name not in generate.MODEL_SHAPES:
        known = ", ".join(generate.MODEL_SHAPES)
        raise ValueError(f"--model-shape {name!r} is unknown: allowed are {known}")
    batches = _integers("--batch", args.batch or ("1,8" if gpu else "1"))
    contexts = _integers("--context", args.context or ("4096,32768,131072" if gpu else "1024"))
    bench = generate.GenerateBench(name, config)
    cases = [(c, b, n) for b in batches for n in contexts for c in bench.makers]
    figures = []
    with common.progress_bar("bench generate") as advance:
        for case in cases:
            figures.append(bench.run(*case))
            advance(len(figures), len(cases))
    fields = {"model_shape": name, "steps": clock.REPEATS, "weight_bytes": bench.weight_bytes}
    if args.json:
        common.print_json(_machine(config) | fields | {"cases": figures})
        return
    _print_machine(config, fields)
    common.print_columns(
        ["batch", "context", "cache", "tok/s", "peak memory", "KV bytes"],
        [[str(x["batch"]), str(x["context"]), x["cache"], *_generated(x)] for x in figures],
    )


def _generated(case: dict[str, Any]) -> list[str]:
    if case["skipped"] is not None:
        return [f"skipped: {case['skipped']}", "", ""]
    sizes = [common.size(case[name]) for name in ("peak_bytes", "kv_bytes")]
    return [f"{case['tokens_per_s']:.1f}", *sizes]


def _integers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} must be numbers with commas between them") from None
    if min(numbers) < 1:
        raise ValueError(f"{flag} {text!r}: all must be at least 1")
    if max(numbers) > common.MOST:
        raise ValueError(f"{flag} {text!r}: all must be at most {common.MOST}")
    return numbers


def _machine(config: TurboQuantConfig) -> dict[str, Any]:
    from ..bench import clock

    return {**clock.machine(), "runs": clock.runs(), **common.scheme_fields(config)}


def _print_machine(config: TurboQuantConfig, fields: dict[str, Any]) -> None:
    machine = _machine(config)
    line = {"device": machine["device"], "MLX": machine["mlx"], "scheme": config.label}
    shown = {_LABELS[name]: _figure(name, value) for name, value in fields.items()}
    common.print_table(line | shown)
    if machine["runs"] == "reference":
        print(NO_GPU)


_LABELS = {
    "head_dim": "head_dim",
    "copy_gbps": "copy GB/s",
    "model_shape": "model shape",
    "steps": "steps",
    "weight_bytes": "weights",
}


def _figure(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return common.size(value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)

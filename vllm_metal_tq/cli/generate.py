"""Generate text with a compressed KV cache.

Flags have the names and defaults of ``mlx_lm.generate`` where both have them.
"""

from __future__ import annotations

import argparse
import sys

from . import common

DEFAULT_PREFILL_STEP_SIZE = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``generate``."""
    common.add_model_argument(parser)
    common.add_scheme_arguments(parser)
    common.add_layers_argument(parser)
    common.add_calibration_arguments(parser)
    parser.add_argument("--prompt", "-p", default="hello", help="the message, '-' for stdin")
    parser.add_argument("--system-prompt", help="system message of the chat template")
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="pass the prompt on as it is"
    )
    parser.add_argument("--max-tokens", "-m", type=int, default=100, help="tokens to generate")
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling")
    parser.add_argument("--min-p", type=float, default=0.0, help="min-p sampling")
    parser.add_argument("--top-k", type=int, default=0, help="top-k sampling")
    parser.add_argument("--seed", type=int, help="seed of the sampler")
    parser.add_argument(
        "--max-kv-size",
        type=int,
        help="tokens the cache keeps; beyond it the oldest blocks but the first are dropped",
    )
    parser.add_argument(
        "--prefill-step-size",
        type=int,
        default=DEFAULT_PREFILL_STEP_SIZE,
        help="prompt tokens processed at a time",
    )
    parser.add_argument(
        "--prompt-cache-file",
        help="a cache saved by save_prompt_cache; the prompt continues it, in its widths",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no text")


def run(args: argparse.Namespace) -> None:
    """Generate, stream the text, and say what the cache held."""
    _check(args)
    config = common.scheme(args)
    import mlx.core as mx

    from ..integrations import mlx_lm as ours

    if args.seed is not None:
        mx.random.seed(args.seed)
    model, tokenizer = common.load_model(args.model)
    if args.prompt_cache_file:
        cache = ours.load_prompt_cache(args.prompt_cache_file, model)
        config = next((c.config for c in cache if isinstance(c, ours.TurboQuantKVCache)), config)
    else:
        calibration = common.calibration_for(args, model, tokenizer)
        config = common.scheme(args, calibration)
        cache = ours.make_prompt_cache(model, config, args.max_kv_size, calibration)
    prompt = _tokens(args, tokenizer)
    text, last = _stream(args, model, tokenizer, prompt, cache)
    held = ours.report(cache)
    if args.json:
        common.print_json(
            {"text": text, "model": args.model}
            | common.scheme_fields(config)
            | {
                "layers_compressed": held.layers_compressed,
                "layers": held.layers,
                "prompt_tokens": last.prompt_tokens,
                "tokens": last.generation_tokens,
                "kv_bytes": held.kv_bytes,
                "kv_bytes_bf16": held.kv_bytes_bf16,
                "ratio": held.ratio,
                "prefill_tps": last.prompt_tps,
                "decode_tps": last.generation_tps,
                "peak_bytes": mx.get_peak_memory(),
            }
        )
        return
    print("\n")
    common.print_table(
        {
            "scheme": config.label,
            "layers compressed": f"{held.layers_compressed} of {held.layers}",
            "KV bytes held": common.size(held.kv_bytes),
            "KV bytes in bf16": common.size(held.kv_bytes_bf16),
            "ratio": f"{held.ratio:.2f}x",
            "prefill tok/s": f"{last.prompt_tps:.1f}",
            "decode tok/s": f"{last.generation_tps:.1f}",
            "peak memory": common.size(mx.get_peak_memory()),
        }
    )


def _check(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "prefill_step_size", "max_kv_size"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} {number} must be at least 1")
    if args.system_prompt is not None and args.ignore_chat_template:
        raise ValueError("--system-prompt cannot be given with --ignore-chat-template")
    if args.prompt_cache_file:
        for name in ("preset", "k_quant", "v_quant", "layers", "max_kv_size", "calibration"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} cannot be given with --prompt-cache-file, "
                    "whose cache has its own"
                )


def _tokens(args: argparse.Namespace, tokenizer) -> list[int]:
    """The prompt as token ids, under the chat template where there is one.

    With a cache to continue, what the template puts before the prompt is left out, as mlx_lm does:
    the cache holds it.
    """
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)

    def templated(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    start = templated("<query>").index("<query>") if args.prompt_cache_file else 0
    return tokenizer.encode(templated(prompt)[start:], add_special_tokens=False)


def _stream(args: argparse.Namespace, model, tokenizer, prompt: list[int], cache: list):
    """Generate; returns the text and mlx_lm's last response."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    text = ""
    with common.progress_bar("prompt") as advance:
        responses = stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=args.max_tokens,
            sampler=make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k),
            prompt_cache=cache,
            prefill_step_size=args.prefill_step_size,
            prompt_progress_callback=advance,
        )
        response = next(responses)
    while True:
        text += response.text
        if not args.json:
            print(response.text, end="", flush=True)
        if response.finish_reason is not None:
            return text, response
        response = next(responses)

"""Process a prompt once and keep its compressed cache in a file, for ``generate``.

Flags have the names of ``mlx_lm.cache_prompt`` where both have them.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from . import common, prompts

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..types import PromptCache

EXAMPLES = (
    "vllm-metal-tq cache-prompt --model demo -p - --prompt-cache-file book.safetensors < book.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``cache-prompt``."""
    prompts.add_arguments(parser)
    parser.add_argument(
        "--prompt-cache-file",
        required=True,
        help="the file to write, which generate takes under the same flag; ends in .safetensors",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@common.together()
def run(args: argparse.Namespace) -> None:
    """Process the prompt, write the file, and say what is in it."""
    prompts.check(args)
    import mlx.core as mx

    from ..integrations import mlx_lm as ours
    from ..integrations.mlx_lm.saved import check_target

    file = check_target(prompts.cache_file(args))  # before the work, not after it
    model, tokenizer = common.load_model(args.model, args.pipeline)
    prompt = prompts.tokens(args, tokenizer, ends=False)
    config, cache = prompts.empty_cache(args, model, tokenizer)
    start = time.perf_counter()
    _process(args, model, prompt, cache)
    tps = len(prompt) / (time.perf_counter() - start)
    with common.progress_bar("save"):
        ours.save_prompt_cache(file, cache, model, {"model": args.model})
    held = ours.report(cache)
    figures = {
        "layers_compressed": held.layers_compressed,
        "layers": held.layers,
        "prompt_tokens": len(prompt),
        "kv_bytes": held.kv_bytes,
        "kv_bytes_bf16": held.kv_bytes_bf16,
        "ratio": held.ratio,
        "prefill_tps": tps,
        "peak_bytes": mx.get_peak_memory(),
    }
    if args.json:
        named = {"model": args.model, "file": str(file), "bytes": file.stat().st_size}
        common.print_json(named | common.scheme_fields(config) | figures)
        return
    common.print_table(
        {"scheme": config.label}
        | prompts.layer_rows(held, model)
        | {
            "prompt tokens": str(len(prompt)),
            "prefill tok/s": f"{tps:.1f}",
            "KV bytes held": common.size(held.kv_bytes),
            "KV bytes in bf16": common.size(held.kv_bytes_bf16),
            "size of the file": common.size(file.stat().st_size),
            "peak memory": common.size(mx.get_peak_memory()),
        }
    )
    print(file)  # alone on its line, so that it can be copied


def _process(
    args: argparse.Namespace, model: nn.Module, prompt: list[int], cache: PromptCache
) -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    with common.progress_bar("prompt") as advance:
        steps = generate_step(
            mx.array(prompt),
            model,
            max_tokens=0,
            prompt_cache=cache,
            prefill_step_size=args.prefill_step_size,
            prompt_progress_callback=advance,
        )
        for _ in steps:
            pass

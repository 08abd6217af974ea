"""Generate text with a compressed KV cache.

Flags have the names and defaults of ``mlx_lm.generate`` where both have them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from . import common, prompts

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..config import TurboQuantConfig
    from ..types import Progress, PromptCache

EXAMPLES = (
    'vllm-metal-tq generate --model demo --prompt "Why is the sky blue?"',
    "vllm-metal-tq generate --model demo --preset tq3 --max-tokens 200 --json",
    "vllm-metal-tq generate --model demo --prompt - --k-quant q8_0 --v-quant q3_0 < book.txt",
    'vllm-metal-tq generate --model demo --prompt-cache-file book.safetensors -p "Who is she?"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``generate``."""
    prompts.add_arguments(parser, prompt="hello")
    parser.add_argument("--max-tokens", "-m", type=int, default=100, help="tokens to generate")
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling")
    parser.add_argument("--min-p", type=float, default=0.0, help="min-p sampling")
    parser.add_argument("--top-k", type=int, default=0, help="top-k sampling")
    parser.add_argument("--seed", type=int, help="seed of the sampler")
    parser.add_argument(
        "--prompt-cache-file",
        help="a cache saved by cache-prompt; the prompt continues it, in its widths",
    )
    parser.add_argument(
        "--draft-model",
        help="a smaller model with the same vocabulary, which drafts tokens for this one to verify",
    )
    parser.add_argument(
        "--num-draft-tokens", type=int, default=3, help="tokens that it drafts at a time"
    )
    parser.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="draft up to N tokens at a time without another model: those that followed the last "
        "words before",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no text")


@common.together()
def run(args: argparse.Namespace) -> None:
    """Generate, stream the text, and say what the cache held."""
    _check(args)
    import mlx.core as mx

    from ..integrations import mlx_lm as ours

    if args.seed is not None:
        mx.random.seed(args.seed)
    model, tokenizer = common.load_model(args.model, args.pipeline)
    config, cache = _cache(args, model, tokenizer)
    draft_model, draft_cache = _drafter(args, model, tokenizer, cache)
    prompt = prompts.tokens(args, tokenizer, begins=not args.prompt_cache_file)
    text, last, drafted = _stream(args, model, tokenizer, prompt, cache + draft_cache, draft_model)
    held = ours.report(cache + draft_cache)
    if args.json:
        common.print_json(
            {"text": text, "model": args.model}
            | common.scheme_fields(config)
            | {
                "layers_compressed": held.layers_compressed,
                "layers": held.layers,
                "prompt_tokens": last.prompt_tokens,
                "tokens": last.generation_tokens,
                "tokens_drafted": drafted,
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
    drafts = {"drafted": f"{drafted} of {last.generation_tokens} tokens"}
    common.print_table(
        {"scheme": config.label}
        | prompts.layer_rows(held, *filter(None, (model, draft_model)))
        | {
            "KV bytes held": common.size(held.kv_bytes),
            "KV bytes in bf16": common.size(held.kv_bytes_bf16),
            "ratio": f"{held.ratio:.2f}x",
            "prefill tok/s": f"{last.prompt_tps:.1f}",
            "decode tok/s": f"{last.generation_tps:.1f}",
        }
        | (drafts if args.draft_model or args.prompt_lookup else {})
        | {"peak memory": common.size(mx.get_peak_memory())}
    )


def _check(args: argparse.Namespace) -> None:
    from ..integrations.mlx_lm import distributed

    prompts.check(args, "max_tokens", "num_draft_tokens", "prompt_lookup")
    common.check_sampling(args)
    if args.seed is not None and not 0 <= args.seed < 1 << 64:
        raise ValueError(f"--seed {args.seed} must be from 0 to {(1 << 64) - 1}")
    own = ("preset", "k_quant", "v_quant", "layers", "max_kv_size", "calibration")
    with_file = "--prompt-cache-file, whose cache has its own"
    conflicts = {
        "prompt_cache_file": dict.fromkeys(own, with_file)
        | {"draft_model": "--prompt-cache-file, which holds no draft model's cache"},
        "draft_model": {"prompt_lookup": "--draft-model"}
        | {"max_kv_size": "--draft-model: what is dropped leaves nothing to go back to"},
        "prompt_lookup": {
            "max_kv_size": "--prompt-lookup: what is dropped leaves nothing to go back to"
        },
    }
    for name, unfit in conflicts.items():
        for other, reason in unfit.items() if getattr(args, name) else ():
            if getattr(args, other) is not None:
                raise ValueError(f"{prompts.flag(other)} cannot be given with {reason}")
    if args.draft_model and distributed.size() > 1:
        raise ValueError("--draft-model cannot be given with mlx.launch: mlx_lm divides no drafts")


def _cache(
    args: argparse.Namespace, model: nn.Module, tokenizer: TokenizerWrapper
) -> tuple[TurboQuantConfig, PromptCache]:
    """The config of the cache to generate with, and the cache."""
    from ..integrations import mlx_lm as ours

    if not args.prompt_cache_file:
        return prompts.empty_cache(args, model, tokenizer)
    from ..integrations.mlx_lm.parts import all_compressed

    with common.progress_bar("prompt cache"):
        cache = ours.load_prompt_cache(prompts.cache_file(args), model)
    widths = (c.layout.config for c in all_compressed(cache))
    return next(widths, common.scheme(args)), cache


def _drafter(
    args: argparse.Namespace, model: nn.Module, tokenizer: TokenizerWrapper, cache: PromptCache
) -> tuple[nn.Module | None, PromptCache]:
    """The draft model, if any, and its cache: compressed like the model's, layers aside."""
    if not args.draft_model and not args.prompt_lookup:
        return None, []
    from ..integrations.mlx_lm import lookup

    name, number = "prompt_lookup", args.prompt_lookup
    draft_model: nn.Module | None = None
    draft_cache: PromptCache = []
    if args.draft_model:
        name, number = "num_draft_tokens", args.num_draft_tokens
        draft_model, its = common.load_model(args.draft_model)
        if its.vocab_size != tokenizer.vocab_size or len(cache) != len(model.layers):
            raise ValueError(
                f"--draft-model {args.draft_model!r} cannot draft for {args.model!r}: vocabularies "
                f"of {its.vocab_size} and {tokenizer.vocab_size} tokens, "
                f"{len(cache)} caches for {len(model.layers)} layers"
            )
        others = {"model": args.draft_model, "calibration": None, "layers": None}
        _, draft_cache = prompts.empty_cache(
            argparse.Namespace(**vars(args) | others), draft_model, its
        )
    if number > lookup.MAX_DRAFT:
        raise ValueError(f"{prompts.flag(name)} {number} is too many: at most {lookup.MAX_DRAFT}")
    lookup.check_trimmable(cache + draft_cache, few=draft_model is None)
    return draft_model, draft_cache


def _stream(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    cache: PromptCache,
    draft_model: nn.Module | None,
) -> tuple[str, GenerationResponse, int]:
    """Generate; returns the text, mlx_lm's last response, and how many tokens were drafted."""
    with common.progress_bar("prompt") as advance:
        responses = _responses(args, model, tokenizer, prompt, cache, draft_model, advance)
        response = next(responses)
    shown = nullcontext() if not args.json else common.progress_bar("generate")
    text, drafted = "", 0
    with shown as advance:
        while True:
            text, drafted = text + response.text, drafted + response.from_draft
            if advance:
                advance(response.generation_tokens, args.max_tokens)
            else:
                print(response.text, end="", flush=True)
            if response.finish_reason is not None:
                return text, response, drafted
            response = next(responses)


def _responses(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    cache: PromptCache,
    draft_model: nn.Module | None,
    advance: Progress,
) -> Iterator[GenerationResponse]:
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from ..integrations.mlx_lm import distributed

    sampler = make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k)
    options = {
        "max_tokens": args.max_tokens,
        "sampler": distributed.same(sampler),
        "prompt_cache": cache,
        "prefill_step_size": args.prefill_step_size,
        "prompt_progress_callback": advance,
    }
    if args.prompt_lookup:
        from ..integrations.mlx_lm import lookup

        options["num_draft_tokens"] = args.prompt_lookup
        return lookup.stream_lookup(model, tokenizer, prompt, **options)
    options |= {"draft_model": draft_model, "num_draft_tokens": args.num_draft_tokens}
    return stream_generate(model, tokenizer, prompt, **options)

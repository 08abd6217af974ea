"""What ``generate`` and ``cache-prompt`` share: a prompt, and a cache to put it in."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

from . import common

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..config import TurboQuantConfig
    from ..integrations.mlx_lm import CacheReport
    from ..types import PromptCache

DEFAULT_PREFILL_STEP_SIZE = 2048
_QUERY = "<query>"  # takes the place of a prompt in the chat template


def add_arguments(parser: argparse.ArgumentParser, prompt: str | None = None) -> None:
    """Add the flags of the model, its cache and the prompt, which may have a default."""
    common.add_model_argument(parser)
    common.add_scheme_arguments(parser)
    common.add_layers_argument(parser)
    common.add_calibration_arguments(parser)
    common.add_pipeline_argument(parser)
    parser.add_argument(
        "--prompt", "-p", default=prompt, required=prompt is None, help="the message, '-' for stdin"
    )
    parser.add_argument("--system-prompt", help="system message of the chat template")
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="pass the prompt on as it is"
    )
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


def check(args: argparse.Namespace, *more: str) -> None:
    """Check what ``add_arguments`` added, and the counts that are named in ``more``.

    Raises:
        ValueError: the message names the flag.
    """
    from ..integrations.mlx_lm import distributed

    for name in (*more, "prefill_step_size", "max_kv_size"):
        common.check_count(flag(name), getattr(args, name))
    if args.system_prompt is not None and args.ignore_chat_template:
        raise ValueError("--system-prompt cannot be given with --ignore-chat-template")
    if args.prompt == "-" and distributed.size() > 1:
        raise ValueError("--prompt - cannot be given with mlx.launch, which never ends the input")
    common.scheme(args)


def flag(name: str) -> str:
    """The flag of an argument."""
    return f"--{name.replace('_', '-')}"


def cache_file(args: argparse.Namespace) -> Path:
    """The file of the prompt cache: with several processes, each has its own beside the others."""
    from ..integrations.mlx_lm import distributed

    file = Path(args.prompt_cache_file)
    if distributed.size() == 1:
        return file
    part = f"{distributed.rank() + 1}-of-{distributed.size()}"
    return file.with_name(f"{file.stem}.{part}{file.suffix}")


def empty_cache(
    args: argparse.Namespace, model: nn.Module, tokenizer: TokenizerWrapper
) -> tuple[TurboQuantConfig, PromptCache]:
    """The config that the arguments ask for, and a cache of it."""
    from ..integrations import mlx_lm as ours

    calibration = common.calibration_for(args, model, tokenizer)
    config = common.scheme(args, calibration)
    return config, ours.make_prompt_cache(model, config, args.max_kv_size, calibration)


def layer_rows(held: CacheReport, *models: nn.Module) -> dict[str, str]:
    """Rows of a table: how many layers of the models are compressed, and why others are not."""
    from ..integrations.mlx_lm.probe import Reader, attention

    rows = {"layers compressed": f"{held.layers_compressed} of {held.layers}"}
    layers = [layer for model in models for layer in attention(model)]
    others = Counter(layer for layer in layers if isinstance(layer, str))
    restored = sum(not isinstance(x, str) and x.reader is Reader.CODE for x in layers)
    if restored:
        rows["restored every step"] = f"{restored}: the model's own code reads them"
    if others:
        rows["kept as they are"] = ", ".join(f"{count}: {why}" for why, count in others.items())
    return rows


def tokens(
    args: argparse.Namespace,
    tokenizer: TokenizerWrapper,
    *,
    begins: bool = True,
    ends: bool = True,
) -> list[int]:
    """The prompt as token ids, under the chat template where there is one.

    Args:
        args: the arguments.
        tokenizer: the model's.
        begins: whether to put before the prompt what the template does.
        ends: whether to put after it what the template does, up to the answer.

    Raises:
        ValueError: the prompt is empty.
    """
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return cast(list[int], tokenizer.encode(prompt))

    def templated(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return cast(str, text)

    start = templated(_QUERY).index(_QUERY)
    if ends:
        text = templated(prompt)[0 if begins else start :]
    else:
        text = templated(_QUERY)[:start] + prompt
    return cast(list[int], tokenizer.encode(text, add_special_tokens=False))

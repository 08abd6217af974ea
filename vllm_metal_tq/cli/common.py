"""What several subcommands share: flags, model loading, progress, output."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..config import DEFAULT_PRESET, PRESETS, QUANT_NAMES, TurboQuantConfig

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..calibration import Calibration
    from ..layout import PageLayout
    from ..types import Tokenizer

DEMO_MODEL = "demo"
MOST = (1 << 31) - 1
"""The largest count that a flag takes: MLX's sizes and positions have 32 bits."""


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model",
        required=True,
        help=f"a local folder, a Hugging Face id, or {DEMO_MODEL!r} (SmolLM2-135M-Instruct)",
    )


def add_scheme_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--preset``, ``--k-quant`` and ``--v-quant``, checked by ``scheme``."""
    names = ", ".join(QUANT_NAMES)
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: {DEFAULT_PRESET})")
    parser.add_argument("--k-quant", help=f"width of keys, in place of the preset's: {names}")
    parser.add_argument("--v-quant", help="width of values, likewise")


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--calibration`` and ``--no-calibrate``, obeyed by ``calibration_for``."""
    parser.add_argument(
        "--calibration", help="a file of `calibrate` (default: the model's own, made at first use)"
    )
    parser.add_argument(
        "--no-calibrate", action="store_true", help="neither use nor make a calibration"
    )


def add_pipeline_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--pipeline``."""
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="with mlx.launch: some layers for each process, not some heads of all layers",
    )


@contextmanager
def together() -> Iterator[None]:
    """Where there are several processes: the first alone prints, and none ends before the others.

    One that fails does, and what the others wait for then fails as well.
    """
    from ..integrations.mlx_lm import distributed

    quiet = redirect_stdout(StringIO()) if distributed.rank() else nullcontext()
    with quiet:
        yield
        distributed.finish()


def add_head_dim_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--head-dim``."""
    parser.add_argument(
        "--head-dim", type=int, default=128, help="elements of a key (default: 128)"
    )


def add_layers_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--layers``, checked by ``scheme``."""
    parser.add_argument(
        "--layers", help="layers with widths of their own, such as 0-1=tq8,29=q8_0/q6_0"
    )


def check_count(flag: str, number: int | None, least: int = 1) -> None:
    """Raise a ValueError where the number of a flag is too small or too large."""
    if number is not None and number < least:
        raise ValueError(f"{flag} {number} must be at least {least}")
    if number is not None and number > MOST:
        raise ValueError(f"{flag} {number} must be at most {MOST}")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise a ValueError where the flags of sampling make no sense."""
    if not 0 <= args.temp < math.inf:
        raise ValueError(f"--temp {args.temp:g} must be a number of at least 0")
    for flag, share in (("--top-p", args.top_p), ("--min-p", args.min_p)):
        if not 0 <= share <= 1:
            raise ValueError(f"{flag} {share:g} must be from 0 to 1")
    check_count("--top-k", args.top_k, least=0)


def scheme(args: argparse.Namespace, calibration: Calibration | None = None) -> TurboQuantConfig:
    """The config that the scheme arguments name, or else the calibration's where it has one."""
    given = ("preset", "k_quant", "v_quant", "layers")
    names: dict[str, Any] = {name: getattr(args, name, None) for name in given}
    if calibration and calibration.config and not any(names.values()):
        return calibration.config
    return TurboQuantConfig.from_names(**names)


def page_layout(args: argparse.Namespace) -> PageLayout:
    """The pages that the scheme arguments and ``--head-dim`` name, where kernels can read them.

    Raises:
        ValueError: a name is unknown or the head_dim too large.
    """
    from ..kernels.decode import MAX_DIM
    from ..layout import PageLayout

    layout = PageLayout(scheme(args), args.head_dim)
    if layout.dim > MAX_DIM:
        raise ValueError(f"--head-dim {args.head_dim} is too large: the kernels take {MAX_DIM}")
    return layout


def scheme_fields(config: TurboQuantConfig) -> dict[str, str | None]:
    """The config as ``--json`` states it."""
    return {"preset": config.preset, "k_quant": config.k_quant, "v_quant": config.v_quant}


def load_model(
    name: str, pipeline: bool = False, **tokenizer_config: Any
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load ``(model, tokenizer)`` by the name given as ``--model``.

    Args:
        name: the name.
        pipeline: of several processes, whether each gets some layers, not a share of all heads.
        tokenizer_config: options of the tokenizer, as mlx_lm takes them.

    Raises:
        ValueError: it cannot be had; the message says why.
    """
    if name == DEMO_MODEL:
        with progress_bar("demo model", DownloadColumn()) as advance:
            from .. import demo_model

            model, tokenizer = demo_model.load(advance)
        _shard(model, pipeline)
        return model, tokenizer
    with progress_bar("import mlx_lm"):
        import mlx_lm

    try:
        loaded = mlx_lm.load(name, tokenizer_config, lazy=True)  # shows a download by itself
        model, tokenizer = loaded[:2]
        _shard(model, pipeline)
        _read_weights(model)
        return model, tokenizer
    except Exception as error:  # hub, network and format errors share no base class
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error


def _shard(model: nn.Module, pipeline: bool) -> None:
    from ..integrations.mlx_lm import distributed

    distributed.shard(model, pipeline)


def _read_weights(model: nn.Module) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(model.parameters())).values()
    done, total = 0, sum(array.nbytes for array in weights)
    with progress_bar("weights", DownloadColumn()) as advance:
        for array in weights:
            mx.eval(array)
            done += array.nbytes
            advance(done, total)


def calibration_for(
    args: argparse.Namespace, model: nn.Module, tokenizer: Tokenizer
) -> Calibration | None:
    """The calibration that the arguments ask for: read, or made and kept where there is none.

    Returns:
        A ``Calibration``, or None with ``--no-calibrate``.

    Raises:
        ValueError: the file cannot be used, or the arguments contradict each other.
    """
    from .. import calibration

    if args.no_calibrate:
        if args.calibration:
            raise ValueError("--calibration cannot be given with --no-calibrate")
        return None
    if args.calibration:
        return calibration.load(Path(args.calibration), model)
    from ..integrations.mlx_lm.measure import find_or_calibrate

    with progress_bar("calibrate") as advance:
        return find_or_calibrate(model, tokenizer, args.model, advance)


def calibrate(model: nn.Module, token_ids: list[int]) -> Calibration:
    """Calibrate a model under a progress bar."""
    from ..integrations import mlx_lm

    with progress_bar("calibrate") as advance:
        return mlx_lm.calibrate(model, token_ids, advance)


def read_text(name: str | None, shipped: str) -> str:
    """The text file ``name``, or the one that is shipped under the name ``shipped``.

    Raises:
        ValueError: it is empty or not UTF-8.
    """
    source = Path(name) if name else files("vllm_metal_tq") / "data" / shipped
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {str(source)!r} is not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"text {str(source)!r} is empty")
    return text


@contextmanager
def progress_bar(
    label: str, count: ProgressColumn | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show progress on standard error where that is a terminal.

    Args:
        label: what is being done.
        count: how done and total are shown: as plain numbers, or by rich's column for their unit.

    Yields:
        A function of done and total. Until it is called, only the time shows that work goes on.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), count or MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        redirect_stdout=False,  # it would end up on standard error
    )
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(fields: Mapping[str, object]) -> None:
    """Print one JSON object to standard output."""
    print(json.dumps(fields))


def print_table(rows: dict[str, str]) -> None:
    """Print names and figures, a row each, to standard output."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, figure in rows.items():
        table.add_row(name, figure)
    Console().print(table)


def print_columns(header: list[str], rows: Iterable[list[str]]) -> None:
    """Print a table with a header to standard output."""
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A file has no width: nothing there is folded.
    console = console if console.is_terminal else Console(width=200)
    console.print(table)


def size(num_bytes: int) -> str:
    """``num_bytes`` for people, in units of 1024."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"

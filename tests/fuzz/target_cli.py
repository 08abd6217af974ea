"""Command lines, up to where a model would be loaded or a kernel run."""

import contextlib
import io
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

from harness import Finding, Target
from hypothesis import strategies as st
from mutations import EDGES, mostly, texts

from vllm_metal_tq import cli
from vllm_metal_tq.cli import exit_status
from vllm_metal_tq.cli.parser import every

LOADED = "a model would be loaded here"
NUMBERS = [str(x) for x in EDGES] + ["1e3", "0x10", "1_000", "--", "-", "٣"]
SIZES = [
    "8GB",
    "0GB",
    "-1GB",
    "1e400GB",
    "nanGB",
    "inf",
    "1.5TB",
    "9" * 30 + "GB",
    "8 GB",
    "GB",
    "none",
]
WORDS = [
    "tq4",
    "q8_0",
    "tq9",
    "q4_0/q3_0",
    "t3/t2",
    "0-1=tq8,29=q8_0/q6_0",
    "9-1=tq4",
    "M1",
    "M4 Max",
    "vllm",
]
LISTS = [
    "1,8192",
    "1,1024,4,2",
    "1,1024,4,2;1,1,1,1",
    "0,0,0,0",
    "1,1,3,2",
    "-1",
    "1,,2",
    ",",
    "1,99999999999",
]
MODELS = ["demo", "llama-3.2-1b", "qwen3-8b", "./nowhere", "", "\0", "a/b/c/d", "x" * 300]
PROMPTS = ["hello", "", " ", "\\n", "é" * 99, "\0", "{{ 7*7 }}"]
ANY = mostly(st.sampled_from([*NUMBERS, *SIZES, *WORDS, *LISTS]), texts, 4)


@cache
def flags() -> dict[str, list]:
    """Of each subcommand the flags, and those flags that must be given."""
    found = {}
    for parser in every(cli.whole_parser()):
        command = parser.prog.partition(" ")[2]
        if command and command != "bench":
            found[command] = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    return found


@cache
def _folder() -> Path:
    """Where the commands run: a text, a picture's name, and files that are none."""
    folder = tempfile.TemporaryDirectory()
    _folder.kept = folder
    path = Path(folder.name)
    (path / "text.txt").write_text("once upon a time " * 500)
    (path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    (path / "empty").write_bytes(b"")
    (path / "folder").mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


PATHS = [
    "text.txt",
    "bytes.bin",
    "empty",
    "folder",
    "config.json",
    "nowhere/x.png",
    "x.safetensors",
]
ODD_PATHS = ["/", "", "\0", "../..", "x" * 5000, "/dev/null/x"]


def value(action) -> st.SearchStrategy[str]:
    """What may be given for a flag: mostly of its kind."""
    if action.type is int or action.type is float:
        return mostly(st.integers(-2, 5000).map(str) | st.sampled_from(NUMBERS), ANY)
    own = {
        "model": MODELS + PATHS,
        "prompt": PROMPTS,
        **dict.fromkeys(("memory", "kv_budget", "max_body_size", "prompt_cache_bytes"), SIZES),
        **dict.fromkeys(("preset", "k_quant", "v_quant", "layers", "schemes", "presets"), WORDS),
        **dict.fromkeys(("shapes", "tokens", "batch", "context"), LISTS),
        "chat_template_args": ["{}", "[]", "{", "[" * 20_000, '{"a": 1e999}'],
        "engine": ["vllm", "mlx_lm", "x"],
        "chip": ["M1", "M4 Max", "M9"],
        "print_completion": ["bash", "zsh", "x"],
    }
    files = ("text", "csv", "plot", "output", "out", "calibration", "prompt_cache_file", "gsm8k")
    own |= dict.fromkeys((*files, "adapter_path", "draft_model"), PATHS + ODD_PATHS)
    return mostly(st.sampled_from(own[action.dest]), ANY) if action.dest in own else ANY


@st.composite
def command_lines(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(flags())))
    argv = command.split()
    known = flags()[command]
    chosen = [a for a in known if a.required and draw(mostly(st.just(True), st.just(False)))]
    chosen += draw(st.lists(st.sampled_from(known), max_size=4))
    for action in chosen:
        if action.dest == "debug":
            continue
        argv.append(draw(st.sampled_from(action.option_strings)))
        if action.nargs != 0:
            argv.append(draw(value(action)))
    if draw(mostly(st.just(False), st.just(True))):
        argv.insert(draw(st.integers(0, len(argv))), draw(ANY))
    return argv


@contextlib.contextmanager
def nothing_runs():
    """Models are not loaded, kernels do not run, nothing is fetched, no process is started."""

    def loaded(*_, **__):
        raise ValueError(LOADED)

    from vllm_metal_tq.bench import clock, decode, encode, generate
    from vllm_metal_tq.cli import bench_model, common
    from vllm_metal_tq.integrations.mlx_lm import server
    from vllm_metal_tq.kernels import selfcheck
    from vllm_metal_tq.plan import sources

    with contextlib.ExitStack() as stack:
        for holder, name in (
            (common, "load_model"),
            (bench_model, "facts"),
            (server, "Provider"),
            (sources, "_downloaded"),
            (clock, "copy_bandwidth"),
            (decode, "bench_decode"),
            (encode, "bench_encode"),
            (generate, "GenerateBench"),
        ):
            stack.enter_context(mock.patch.object(holder, name, loaded))
        stack.enter_context(mock.patch.object(selfcheck, "check", return_value=[]))
        yield


def check_command_line(argv: list[str]) -> str:
    out, err = io.StringIO(), io.StringIO()
    here = Path.cwd()
    os.chdir(_folder())
    try:
        with (
            nothing_runs(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "stdin", io.StringIO("a prompt")),
        ):
            status = cli.main(argv)
    except SystemExit as exit_:
        status = exit_.code
    finally:
        os.chdir(here)
    said = err.getvalue()
    if status not in (exit_status.DONE, exit_status.WRONG, exit_status.BAD_INPUT):
        raise Finding(f"exit status {status}: {said[-500:]}")
    if "Traceback" in said or "unexpected error" in said:
        raise Finding(said[-500:])
    if status == exit_status.BAD_INPUT and not re.fullmatch(r"error: .*\S.*\n", said):
        raise Finding(f"not one line that says what is wrong: {said[-500:]!r}")
    if LOADED in said:
        return "taken, up to the model"
    return "refused" if status else "done"


TARGETS = [Target("command lines", 1500, command_lines(), check_command_line)]

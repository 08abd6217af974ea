"""Every shell and Python block of the documentation runs, or is checked as far as it can be."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import openai
import pytest
import serving
from blocks import NOT_RUN, PYTHON_PAGES, ROOT, RUN, SHELL_BLOCKS, Refused, check_shell, read
from stand_in import load

HERE = Path(__file__).parent
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8


def marked(*marks):
    chosen = [block for block in SHELL_BLOCKS if block.mark in marks]
    return pytest.mark.parametrize("block", chosen, ids=str)


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_a_shell_block_says_how_it_is_tested(block):
    assert block.mark in RUN | NOT_RUN


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_a_shell_block_s_commands_and_flags_are_there(block):
    check_shell(block.text)


@pytest.mark.parametrize(
    "text",
    [
        "vllm-metal-tq generate --modle demo",
        "vllm-metal-tq generate",
        "vllm-metal-tq calibrate --model demo --tokens many",
        "vllm-metal-tq forget",
        "python benchmarks/quality.py --tokns 3",
        "python benchmarks/none.py",
        "make none",
        "pip install 'vllm-metal-tq[none]'",
        'vllm serve x --additional-config \'{"turboquant": true, "preset": "tq9"}\'',
        "rm -r book",
        "mlx.launch -n 2 vllm-metal-tq generate --model demo",
        "mlx.launch -n 2 -- vllm-metal-tq generate --modle demo",
        "echo 'no end",
    ],
)
def test_what_would_not_work_is_refused(text):
    with pytest.raises(Refused):
        check_shell(text)


def test_blocks_are_found_where_they_are_indented_and_marked():
    page = "a\n\n<!-- test: tiny -->\n```sh\nx\n```\n\n    ```python\n    y\n    ```\n"
    first, second = read(ROOT / "README.md", page)
    assert (first.line, first.language, first.mark, first.text) == (4, "sh", "tiny", "x\n")
    assert (second.line, second.language, second.mark, second.text) == (8, "python", None, "y\n")


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A function that runs shell text in a folder like a checkout; ``tiny``: on a tiny model."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")

    def start(text, tiny=True, **options):
        own = "-c 'from vllm_metal_tq.cli import main; raise SystemExit(main())'"
        command = str(HERE / "stand_in.py") if tiny else own
        program = programs / "vllm-metal-tq"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        program.chmod(0o755)
        if tiny:
            # Its calibration belongs into no user's cache directory.
            monkeypatch.setenv("HOME", str(tmp_path))
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        words = ["bash", "-euo", "pipefail", "-c", text]
        return subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, **options)

    return start


@marked("tiny")
def test_a_shell_block_runs(block, shell):
    process = shell(block.text)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert said.strip()
    assert_shown(block, said)


@pytest.mark.slow
@marked("slow")
def test_a_slow_shell_block_runs(block, shell):
    process = shell(block.text, tiny=False)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    assert_shown(block, said)


@marked("server")
def test_a_server_starts_and_ends_when_told_to(block, shell):
    process = shell(f"exec {block.text}")
    try:
        url = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
            assert json.load(answer)["data"]
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


@marked("client")
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_a_client_is_answered(block, shell):
    with serving.server("--max-tokens", "4") as served:
        process = shell(block.text.replace("http://127.0.0.1:8080", served.url))
        said, _ = process.communicate(timeout=60)
    assert json.loads(said)["choices"][0]["message"]["role"] == "assistant"


def assert_shown(block, said):
    """Where the next block of the page shows a table, the command printed its rows."""
    later = [b for b in read(block.page) if b.line > block.line]
    shown = later[0].text if later and not later[0].language else ""
    for line in shown.splitlines():
        if line.startswith("│"):
            assert f"│ {line.split('│')[1].strip()}" in said


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What a reader has when a page's first Python block begins."""
    import mlx.core as mx
    import mlx_lm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlx_lm, "load", load)
    model, tokenizer = load()
    prompts = [tokenizer.encode(text) for text in ("Hello, you.", "And you?")]
    names = {"model": model, "draft_model": model, "tokenizer": tokenizer}
    names |= {"text": TEXT, "prompt": "Hello!", "prompt_tokens": mx.array(prompts[0])}
    return names | {"prompts": prompts, "system_prompt": tokenizer.encode("Be brief.")}


PAGES_WITH_PYTHON = [page for page, blocks in PYTHON_PAGES.items() if blocks]


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=lambda page: page.name)
def test_a_page_s_python_runs_from_its_first_block_to_its_last(page, given, monkeypatch):
    from vllm_metal_tq.integrations.mlx_lm import hook

    official = openai.OpenAI
    with serving.server("--max-tokens", "4") as served:
        url = f"{served.url}/v1"
        monkeypatch.setattr(
            openai, "OpenAI", lambda base_url, **rest: official(base_url=url, **rest)
        )
        for block in PYTHON_PAGES[page]:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, given)
    hook.uninstall()

"""Every message that the page of troubles quotes is one that the code can give."""

import ast
import re
from functools import cache

import pytest
from blocks import ROOT
from tables import tables

MESSAGES = [
    re.fullmatch(r"(`+) ?(.+?) ?\1", row["message"])[2]
    for rows in tables("troubleshooting")
    for row in rows
    if "message" in row
]
LEAST = 10  # literal characters of a template, or `{x} {y}` would be every message


@cache
def templates():
    """A pattern for each string of the package that may be a message, fields standing for any."""
    found = set()
    for file in (ROOT / "vllm_metal_tq").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = [node] if isinstance(node, ast.Constant) else getattr(node, "values", [])
            if not isinstance(node, ast.JoinedStr | ast.Constant):
                continue
            words = [p.value if isinstance(p, ast.Constant) else None for p in parts]
            if sum(len(w) for w in words if isinstance(w, str)) < LEAST:
                continue
            if all(w is None or isinstance(w, str) for w in words):
                found.add("".join(".+" if w is None else re.escape(w) for w in words))
    return [re.compile(pattern, re.DOTALL) for pattern in found]


def given_by_the_code(message):
    return any(template.fullmatch(message) for template in templates())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_a_quoted_message_is_the_codes(message):
    assert given_by_the_code(message)


@pytest.mark.parametrize(
    "message",
    [
        "the key-value cache is full: 2 more blocks are needed, 8 of 8 are in use",
        "max_kv_size 16 is too few: at least 32",
        "calibration 'x' was measured on a different model",
    ],
)
def test_a_message_that_was_reworded_is_found_out(message):
    assert not given_by_the_code(message)

"""Kinds of models that the page of supported ones names are kinds that other tests build."""

import re

import pytest
from blocks import ROOT
from tables import quoted, tables

KINDS = sorted(
    {
        kind
        for row in tables("models")[0]
        for kind in quoted(row["kinds that tests build"])
        if kind != "layer_types"
    }
)
TESTS = "\n".join(
    file.read_text(encoding="utf-8")
    for file in (ROOT / "tests").rglob("*.py")
    if "docs" not in file.parts
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_built_by_a_test(kind):
    built = re.escape(kind)
    assert re.search(rf'build\(\s*"{built}"|\(\s*"{built}",\s*\{{|def {built}\(', TESTS)

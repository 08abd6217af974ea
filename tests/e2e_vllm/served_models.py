"""Writes the table of docs/supported_models.md, "With vLLM": ``python FILE``, where vLLM is."""

from pathlib import Path

import paths  # noqa: F401 (where the kinds are)

# isort: split
from kinds import KINDS, Kind
from matrix import Outcome, outcome

from vllm_metal_tq.integrations.vllm import plugin

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
START, END = (
    "<!-- written by tests/e2e_vllm/served_models.py -->\n\n",
    "\n<!-- end of vLLM's -->\n",
)
HEAD = "| mlx_lm's | compressed | why not |\n|---|---|---|\n"


def row(kind: Kind, found: Outcome) -> str:
    name = str(kind).replace(kind.model_type, f"`{kind.model_type}`", 1)
    if found.theirs:  # the plugin was not tried
        return f"| {name} | – | vllm-metal: {found.theirs} |\n"
    return f"| {name} | {found.compressed} of {found.layers} | {found.refused} |\n"


def written(page: str, rows: str) -> str:
    before, rest = page.split(START)
    return before + START + HEAD + rows + END + rest.split(END)[1]


if __name__ == "__main__":
    plugin.register()
    rows = "".join(row(kind, outcome(kind)) for kind in KINDS)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")

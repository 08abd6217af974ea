"""Writes the table of docs/supported_models.md: ``python FILE``, after a change of the kinds."""

from collections import Counter
from pathlib import Path

from kinds import KINDS, Kind

PAGE = Path(__file__).parents[3] / "docs" / "supported_models.md"
START, END = (
    "<!-- written by tests/integrations/mlx_lm/supported_models.py -->\n\n",
    "\n<!-- end -->\n",
)
HEAD = "| mlx_lm's | its attention | compressed | kept as they are |\n|---|---|---|---|\n"


def written(page: str) -> str:
    """The page with the table as the kinds have it."""
    before, rest = page.split(START)
    return before + START + HEAD + "".join(map(row, KINDS)) + END + rest.split(END)[1]


def row(kind: Kind) -> str:
    others = Counter(x for x, ours in zip(kind.caches, kind.compressed, strict=True) if not ours)
    kept = ", ".join(f"{count}: {why}" for why, count in others.items())
    name = str(kind).replace(kind.model_type, f"`{kind.model_type}`", 1)
    count = f"{sum(kind.compressed)} of {len(kind.caches)}"
    return f"| {name} | {kind.what} | {count} | {kept} |\n"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

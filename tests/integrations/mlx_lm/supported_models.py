"""Writes the tables of docs/supported_models.md: ``python FILE``, after a change of the kinds."""

from collections import Counter
from pathlib import Path

from alike import ALIKE, NOT_RUN
from kinds import FETCHED, KINDS, NAMED, SHARED, Kind

PAGE = Path(__file__).parents[3] / "docs" / "supported_models.md"
START, END = (
    "<!-- written by tests/integrations/mlx_lm/supported_models.py -->\n\n",
    "\n<!-- end -->\n",
)
HEAD = "| mlx_lm's | its attention | compressed | kept as they are |\n|---|---|---|---|\n"
ALIKE_HEAD = "| attends as | modules of mlx_lm |\n|---|---|\n"


def written(page: str) -> str:
    """The page with the table as the kinds have it."""
    before, rest = page.split(START)
    table = HEAD + "".join(map(row, KINDS)) + "\n" + ALIKE_HEAD + "".join(map(others, ALIKE))
    table += "\nNot run: " + "; ".join(f"`{name}` ({why})" for name, why in NOT_RUN.items()) + ".\n"
    return before + START + table + END + rest.split(END)[1]


def row(kind: Kind) -> str:
    others = Counter(x for x, ours in zip(kind.caches, kind.compressed, strict=True) if not ours)
    kept = ", ".join(f"{count}: {why}" for why, count in others.items())
    count = f"{sum(kind.compressed)} of {len(kind.caches)}"
    for how, word in ((SHARED, "shared"), (FETCHED, "restored")):
        count += f", {kind.caches.count(how)} {word}" if how in kind.caches else ""
    return f"| {named(kind)} | {kind.what} | {count} | {kept} |\n"


def others(name: str) -> str:
    modules = ", ".join(f"`{module}`" for module in ALIKE[name])
    return f"| {named(NAMED[name])} | {modules} |\n"


def named(kind: Kind) -> str:
    return str(kind).replace(kind.model_type, f"`{kind.model_type}`", 1)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

"""Tables of the documentation, as the tests read them."""

import re

from blocks import ROOT


def tables(name: str) -> list[list[dict[str, str]]]:
    """Each table of ``docs/NAME.md``: a dict a row, from the words over a column to its cell."""
    found, lines = [], (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            header, rows = _cells(lines[i - 1]), []
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(dict(zip(header, _cells(row), strict=True)))
            found.append(rows)
    return found


def quoted(cell: str) -> list[str]:
    """What a cell has as code."""
    return re.findall(r"`([^`]+)`", cell)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]

"""What the Pareto benchmark says of points, and that it goes on where it was broken off."""

import json

import pareto
import pytest

from vllm_metal_tq.evaluate import OURS, Quality
from vllm_metal_tq.sweep import Point

RUN = {"text": "a.txt", "sha256": "0", "window": 64, "tokens": 5}


def point(family, bits, kl):
    return Point(family, f"{family} {bits}", Quality(11.0, 10.0, kl, 10 * kl, 0.9, bits, 5))


MINE = [point(OURS, 3, 0.1), point(OURS, 5, 0.001)]


def test_a_point_between_two_of_ours_is_named():
    beaten, unbeaten = point("x", 3.5, 0.2), point("x", 4, 0.05)
    assert pareto.verdict(MINE, [beaten]).startswith("Whatever their bits")
    assert "x 4 (4.00 bits, KL 0.05000)" in pareto.verdict(MINE, [beaten, unbeaten])


def test_points_beyond_the_budgets_do_not_count():
    assert pareto.verdict(MINE, [point("x", 2.25, 1), point("x", 9, 1e-6)]).startswith("Whatever")


def test_the_budget_table_compares_the_best():
    rows = pareto.budget_table(MINE, [point("x", 4, 0.05)]).splitlines()[2:]
    table = {float(row.split("|")[1]): row for row in rows}
    assert sorted(table) == pareto.BUDGETS
    assert table[2.5] == "| 2.50 | none |  | none |  |  |"
    assert table[5.0].endswith("| vllm-metal-tq 5 (5.00) | 0.00100 | x 4 (4.00) | 0.05000 | 50.0 |")


def test_schemes_that_were_given_our_tail_are_judged_apart():
    points = [*MINE, point("x", 4, 0.2), point("x + tail 32", 4.5, 0.02)]
    before, after = pareto.report(points, RUN).split("## Others that were given our tail")
    assert "Whatever their bits" in before
    assert "Not beaten by one of ours with as many bits: x + tail 32 4.5" in after


def test_stored_points_are_those_of_the_same_run(tmp_path):
    file = tmp_path / "points.json"
    assert pareto._stored(file, RUN) == []
    file.write_text(json.dumps(RUN | {"points": [p.fields() for p in MINE]}))
    assert pareto._stored(file, RUN) == MINE
    with pytest.raises(SystemExit, match="of another run"):
        pareto._stored(file, RUN | {"window": 128})

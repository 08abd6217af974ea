"""The tables about several machines are what their script prints, and say what the page says."""

import pytest
import scaling
from tables import tables


@pytest.fixture(scope="module")
def shown():
    """Column names -> the table of the page."""
    return {tuple(rows[0]): rows for rows in tables("scaling")}


@pytest.mark.parametrize("table", scaling.TABLES)
def test_a_table_is_what_the_script_prints(table, shown):
    rows = table()
    assert shown[tuple(rows[0])] == rows


def test_links_are_those_of_the_script(shown):
    rows = shown["link", "bandwidth", "latency", "from"]
    assert [row["link"] for row in rows] == [link.name for link in scaling.LINKS]
    for row, link in zip(rows, scaling.LINKS, strict=True):
        assert row["bandwidth"] == f"{link.bandwidth / 1e9:g} GB/s"
        assert row["latency"] == f"{link.latency * 1e6:g} µs"


def test_a_machine_alone_sends_and_shares_nothing():
    sized = scaling.Sized(scaling.MODEL)
    whole = sized.seconds("tq4", 8192)
    # Two read half of it each, but for the head, which both read.
    assert whole / 2 < sized.seconds("tq4", 8192, 2) < 0.6 * whole
    assert sized.longest("tq4", "16GB", 2) > 2 * sized.longest("tq4", "16GB")


def test_affinity_finds_everything_once_all_conversations_are_kept():
    run = scaling.route(4, True, scaling.CONVERSATIONS, seed=0)
    turns = range(1, scaling.TURNS + 1)
    prompts = [scaling.SYSTEM + turn * scaling.TURN for turn in turns]
    assert run.tokens == scaling.CONVERSATIONS * sum(prompts)
    # Lacking are the last turn of each prompt, and what all share at each replica's first.
    lacking = scaling.CONVERSATIONS * len(turns) * scaling.TURN + 4 * scaling.SYSTEM
    assert run.tokens - run.cached == lacking

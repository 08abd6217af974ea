"""The soak's verdict finds what is planted, and its traffic has every outcome."""

import json
import sys
from dataclasses import replace

import pytest
import soak
from serving import server

FLAT = soak.Sample(
    seconds=0,
    rss_bytes=800_000_000,
    mlx_active_bytes=0,
    mlx_cache_bytes=0,
    kv_bytes_allocated=0,
    kv_blocks_used=0,
    kv_blocks_reserved=0,
    prompt_cache_sequences=0,
    threads=1,
    open_files=1,
    requests=0,
    tokens=0,
)
EMPTY = soak.Quiet(blocks=0, array_bytes=5_000_000)


def samples(rss):
    """Half an hour of samples; ``rss(seconds)`` is what is added to resident memory."""
    bytes_at = {s: FLAT.rss_bytes + int(rss(s)) for s in range(2, 1802)}
    return [replace(FLAT, seconds=s, rss_bytes=count) for s, count in bytes_at.items()]


def sawtooth(seconds):
    return 80e6 * (seconds % 37) / 37


def warm_up(seconds):
    return 200e6 * min(seconds / 500, 1)


def test_flat_memory_passes_though_batches_come_and_go():
    assert soak.faults(samples(lambda s: sawtooth(s) + warm_up(s)), EMPTY, EMPTY, 0) == []


@pytest.mark.parametrize("mb_an_hour", [30, 100])
def test_a_leak_is_found_under_the_noise(mb_an_hour):
    leaking = samples(lambda s: sawtooth(s) + mb_an_hour * 1e6 * s / 3600)
    assert soak.growth(leaking) == pytest.approx(mb_an_hour * 1e6, rel=0.2)
    (fault,) = soak.faults(leaking, EMPTY, EMPTY, 0)
    assert "resident memory grows" in fault


def test_what_is_left_at_the_end_is_a_fault():
    flat = samples(lambda s: 0)
    assert "1 blocks in use" in soak.faults(flat, EMPTY, replace(EMPTY, blocks=1), 0)[0]
    assert "left over" in soak.faults(flat, EMPTY, replace(EMPTY, array_bytes=7_000_000), 0)[0]
    assert "2 requests" in soak.faults(flat, EMPTY, EMPTY, 2)[0]


def test_traffic_has_every_outcome_and_nothing_goes_wrong():
    with server(blocks=80) as served:
        traffic = soak.Traffic(served.url, "tiny", words=8, max_tokens=12)
        traffic.run(clients=6, seconds=6)
        counts = soak.metrics(served.url)
    assert traffic.wrong == []
    assert {"answered", "left", "too long", "invalid"} <= set(traffic.outcomes)
    assert counts["requests_total"] >= traffic.outcomes["answered"]


def test_a_server_that_fails_is_noticed(monkeypatch):
    with server() as served:

        def failing(*_, **__):
            raise RuntimeError("planted")

        monkeypatch.setattr(served.generator.admission, "reserve", failing)
        traffic = soak.Traffic(served.url, "tiny", words=8, max_tokens=4)
        traffic.run(clients=2, seconds=1)
    assert any("planted" in line for line in traffic.wrong)


@pytest.mark.slow
def test_a_short_soak_writes_samples_figures_and_a_drawing(monkeypatch, tmp_path, capsys):
    arguments = ["--model", "tiny", "--minutes", "0.3", "--clients", "3", "--kv-budget", "2MB"]
    monkeypatch.setattr(sys, "argv", ["soak", *arguments, "--out", str(tmp_path)])
    # Seconds say nothing of growth an hour.
    monkeypatch.setattr(soak, "MAX_GROWTH", float("inf"))
    with pytest.raises(SystemExit) as ended:
        soak.main()
    figures = json.loads(capsys.readouterr().out)
    assert (ended.value.code, figures["faults"]) == (0, [])
    assert figures == json.loads((tmp_path / "soak.json").read_text())
    assert len((tmp_path / "soak.csv").read_text().splitlines()) > 4
    assert "RSS" in (tmp_path / "flat_memory.svg").read_text()

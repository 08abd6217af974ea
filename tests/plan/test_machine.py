import mlx.core as mx
import pytest

from vllm_metal_tq.plan import machine


@pytest.mark.parametrize(
    ("memory", "share"),
    [(8, 2 / 3), (16, 2 / 3), (32, 2 / 3), (36, 3 / 4), (48, 3 / 4), (128, 3 / 4)],
)
def test_a_process_may_use_a_share_of_the_memory(memory, share):
    mac = machine.estimated(memory * machine.GIB)
    assert mac.working_set_bytes == pytest.approx(share * memory * machine.GIB, abs=1)
    assert not mac.measured


@pytest.mark.parametrize(
    ("text", "gib"),
    [("8GB", 8), ("16 gb", 16), ("24GiB", 24), ("512MB", 0.5), ("1.5T", 1536), ("8G", 8)],
)
def test_sizes_of_memory_are_in_units_of_1024(text, gib):
    assert machine.memory_size(text) == gib * machine.GIB


@pytest.mark.parametrize(
    "text", ["0GB", "-8GB", "8", "GB", "eight", "8 KB", "", "8GBs", "nan GB", "9" * 400 + "GB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size: expected such as 8GB"):
        machine.memory_size(text)


@pytest.mark.parametrize("name", ["M4 Max", "m4max", "Apple M4 Max", "m4-max", "M4_MAX"])
def test_chips_are_found_by_the_names_people_write(name):
    assert machine.bandwidth(name) == 546e9


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="--chip 'M9' is unknown: allowed are M1, M1 Pro"):
        machine.bandwidth("M9")


def test_a_mac_says_itself_what_a_process_may_use(monkeypatch):
    info = {"memory_size": 8 << 30, "max_recommended_working_set_size": 5_726_633_984.0}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert machine.this_mac() == machine.Machine(8 << 30, 5_726_633_984, measured=True)


def test_a_machine_without_metal_is_no_mac(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "x86_64"})
    assert machine.this_mac() is None

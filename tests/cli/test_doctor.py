import json

import pytest

from vllm_metal_tq import msl
from vllm_metal_tq.bench import clock
from vllm_metal_tq.cli import main
from vllm_metal_tq.msl import simulate as simulator

FIELDS = {"device", "mlx", "executor", "kernels", "ok"}
KERNEL_FIELDS = {"name", "variant", "ok", "max_rel_error"}
KERNELS = ["encode", "encode", "gather", *2 * ["decode", "decode", "merge"]]
"""Encode for few vectors and for many; the others for the second time with a centre."""


def doctor(capsys, *flags):
    status = main(["doctor", *flags])
    return status, *capsys.readouterr()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(clock, "gpu_backend", lambda: None)


@pytest.fixture
def broken(no_gpu, monkeypatch):
    """A simulator that runs nothing."""

    def simulate(launch):
        raise RuntimeError(f"{launch.kernel} is broken")

    monkeypatch.setattr(msl.compiler, "why_not_simulate", lambda: None)
    monkeypatch.setattr(simulator, "simulate", simulate)


@pytest.mark.skipif(
    clock.gpu_backend() is None and not msl.can_simulate(),
    reason=str(msl.compiler.why_not_simulate()),
)
def test_the_kernels_agree_with_their_oracles_here(capsys):
    status, out, err = doctor(capsys, "--json")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert set(answer) == FIELDS
    assert answer["ok"] is True
    assert answer["executor"] == (clock.gpu_backend() or "simulator")
    assert [kernel["name"] for kernel in answer["kernels"]] == KERNELS
    for kernel in answer["kernels"]:
        assert set(kernel) == KERNEL_FIELDS
        assert kernel["ok"] is True
        assert 0 <= kernel["max_rel_error"] < 5e-4


def test_a_broken_kernel_is_a_failure(capsys, broken):
    status, out, err = doctor(capsys, "--json")
    answer = json.loads(out)
    assert status == 1
    assert set(answer) == FIELDS
    assert (answer["executor"], answer["ok"]) == ("simulator", False)
    assert [kernel["ok"] for kernel in answer["kernels"]] == [False] * 9
    assert {kernel["max_rel_error"] for kernel in answer["kernels"]} == {None}
    assert "encode is broken" in err


def test_every_check_is_progress(broken, bars, capsys):
    doctor(capsys)
    assert bars == {"kernels": [(done, 9) for done in range(1, 10)]}


def test_the_table_shows_what_broke(capsys, broken):
    status, out, _ = doctor(capsys, "--preset", "tq2", "--head-dim", "64")
    assert status == 1
    for words in ("Metal GPU", "CUDA GPU", "WRONG", "decode_fma is broken"):
        assert words in out
    assert out.endswith("not ok: 9 of 9 checks failed on the simulator (tq2, head_dim 64)\n")


def test_without_gpu_and_simulator_nothing_is_claimed(capsys, no_gpu, monkeypatch):
    monkeypatch.setattr(msl.compiler, "why_not_simulate", lambda: "no clang")
    status, out, _ = doctor(capsys)
    assert status == 0
    assert out.splitlines()[-1].startswith("not checked: ")
    answer = json.loads(doctor(capsys, "--json")[1])
    assert (answer["executor"], answer["kernels"]) == ("reference", [])


def test_bad_input_gets_one_clear_line(capsys):
    status, out, err = doctor(capsys, "--head-dim", "512")
    assert (status, out) == (2, "")
    assert err == "error: --head-dim 512 is too large: the kernels take 256\n"

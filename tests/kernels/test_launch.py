from pathlib import Path

import pytest

from vllm_metal_tq.kernels import launch


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def test_cuda_includes_a_file_that_holds_the_text(cache):
    text = launch.header("merge", "cuda")
    included = launch._by_reference(text)
    name = included.removeprefix('#include "').removesuffix('"\n')
    assert cache in Path(name).parents
    assert Path(name).read_text() == text


def test_a_damaged_file_is_written_anew(cache):
    name = launch._by_reference("int x;").split('"')[1]
    Path(name).write_text("int")
    launch._by_reference("int x;")
    assert Path(name).read_text() == "int x;"


def test_other_text_gets_another_file(cache):
    assert launch._by_reference("int x;") != launch._by_reference("int y;")


def test_text_is_handed_over_whole_where_no_file_can_be_written(cache):
    (cache / "vllm-metal-tq").write_text("a file where the folder would be")
    assert launch._by_reference("int x;") == "int x;"


def test_a_kernel_gets_what_its_headers_include_and_nothing_else():
    assert "tq_pair" in launch.header("decode_fma", "metal")
    assert "tq_hadamard(" in launch.header("decode_fma", "metal")
    assert "tq_pair" not in launch.header("merge", "metal")
    assert '#include "' not in launch.header("decode_fma", "metal")

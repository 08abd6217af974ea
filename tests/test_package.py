import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vllm_metal_tq

HEAVY = ("vllm", "torch", "transformers", "mlx_lm")


def loaded_after(statement):
    code = f"import sys; {statement}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import vllm_metal_tq",
        "import vllm_metal_tq.cli",
        "from vllm_metal_tq import attention, codec, config, layout, pages",
    ],
)
def test_importing_the_core_imports_no_host(statement):
    assert loaded_after(statement) == []


def seconds(statement):
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize(
    ("statement", "share"),
    [
        ("import vllm_metal_tq", 0.3),
        ("from vllm_metal_tq import attention, codec, config, layout, pages", 3.0),
        ("import vllm_metal_tq.cli", 3.0),
    ],
)
def test_importing_is_quick_beside_mlx_itself(statement, share):
    # Each time the two in turn, so that a busy machine slows both; mlx_lm takes ten times as long.
    pairs = [(seconds("import mlx.core, numpy"), seconds(statement)) for _ in range(3)]
    mlx, ours = map(min, zip(*pairs, strict=True))
    print(f"{statement}: {ours:.3f} s, mlx and numpy {mlx:.3f} s")
    assert ours < share * mlx


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vllm_metal_tq.nothing  # noqa: B018


def test_help_and_version_need_no_model(capsys):
    from vllm_metal_tq.cli import main

    for flags, words in ((["--version"], vllm_metal_tq.__version__), (["--help"], "generate")):
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert stop.value.code == 0
        assert words in capsys.readouterr().out


def test_the_wheel_holds_the_shaders_the_text_and_the_licence(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(root)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shaders = {f"vllm_metal_tq/metal/{file.name}" for file in (root / "metal").iterdir()}
    assert shaders <= set(names)
    assert {"vllm_metal_tq/data/alice.txt", "vllm_metal_tq/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/")) for name in names)

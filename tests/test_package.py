import subprocess
import sys

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


def test_the_public_api():
    assert sorted(vllm_metal_tq.__all__) == [
        "TurboQuantConfig",
        "TurboQuantKVCache",
        "load_prompt_cache",
        "make_prompt_cache",
        "save_prompt_cache",
    ]
    for name in vllm_metal_tq.__all__:
        assert getattr(vllm_metal_tq, name).__name__ == name


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

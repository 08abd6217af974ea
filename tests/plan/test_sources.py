import json

import huggingface_hub
import pytest

from vllm_metal_tq.plan import sources

CONFIG = {"model_type": "llama"}


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"]
)
def test_a_shipped_model_needs_no_network(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert sources.find(name) == (sources.shipped()["llama-3.2-1b"]["config"], None)


def test_a_folder_says_how_large_its_weights_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert sources.find(str(tmp_path)) == (CONFIG, None)
    for name in ("model-1.safetensors", "model-2.safetensors", "turboquant.safetensors"):
        (tmp_path / name).write_bytes(bytes(100))
    assert sources.find(str(tmp_path)) == (CONFIG, 200)


def test_a_file_is_read(tmp_path):
    file = tmp_path / "some.json"
    file.write_text(json.dumps(CONFIG))
    assert sources.find(str(file)) == (CONFIG, None)


def test_only_the_config_is_fetched_from_the_hub(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or str(file)
    )
    assert sources.find("someone/something") == (CONFIG, None)
    assert asked == [("someone/something", "config.json")]


def test_no_network_gets_one_clear_error(monkeypatch):
    def offline(*args):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"not shipped.*cannot be fetched: no route to host$"):
        sources.find("someone/something")


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", '{"a":' * 100_000])
def test_a_file_without_a_json_object_is_refused(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config.json (is no JSON|holds no JSON object)"):
        sources.find(str(file))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config\.json in that folder"):
        sources.find(str(tmp_path))

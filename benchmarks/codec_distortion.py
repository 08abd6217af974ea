"""Error of every key and value width on N(0, 1) and on the demo model's own keys and values.

Mean square error relative to the vectors' energy, per coordinate after rotation. The model's
keys and values are captured after RoPE from all layers over the shipped text.

    python benchmarks/codec_distortion.py [--tokens 1024]
"""

import argparse

from vllm_metal_tq import openblas

openblas.preload()

from importlib.resources import files  # noqa: E402

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from vllm_metal_tq import TurboQuantConfig, codec, demo_model  # noqa: E402
from vllm_metal_tq.config import QUANT_OF  # noqa: E402
from vllm_metal_tq.layout import PageLayout  # noqa: E402
from vllm_metal_tq.pages import BlockTable, PagePool  # noqa: E402
from vllm_metal_tq.rotation import rotate  # noqa: E402


def captured(tokens: int) -> tuple[mx.array, mx.array]:
    """Keys and values of the demo model, ``(layers * heads, tokens, head_dim)`` each."""
    model, tokenizer = demo_model.load()
    text = (files("vllm_metal_tq") / "data" / "alice.txt").read_text(encoding="utf-8")
    cache = make_prompt_cache(model)
    model(mx.array([tokenizer.encode(text)[:tokens]]), cache=cache)
    keys, values = zip(
        *((c.keys[0, :, :tokens], c.values[0, :, :tokens]) for c in cache), strict=True
    )
    return mx.concatenate(keys), mx.concatenate(values)


def errors(keys: mx.array, values: mx.array, width: int) -> tuple[float, float]:
    """Relative mean square error of keys and of values at a width, averaged over heads."""
    layout = PageLayout(TurboQuantConfig(width, width), keys.shape[-1])
    table = BlockTable(PagePool(layout, keys.shape[0]))
    table.append(codec.encode(keys, values, layout))
    decoded = codec.decode(table.read(table.num_tokens), layout)
    pairs = zip((keys, values), decoded, strict=True)
    return tuple(_relative(rotate(x), y.flatten(1, 2)[:, : x.shape[1]]) for x, y in pairs)


def _relative(x: mx.array, y: mx.array) -> float:
    per_head = mx.square(x - y).sum(axis=(-1, -2)) / mx.square(x).sum(axis=(-1, -2))
    return per_head.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    tokens = parser.parse_args().tokens
    sources = {
        f"N(0, 1), D={d}": (mx.random.normal((4, 4096, d), key=mx.random.key(d)),) * 2
        for d in (64, 128)
    } | {"SmolLM2-135M, D=64": captured(tokens)}
    table = Table("width", *(f"{kind}: {name}" for name in sources for kind in ("keys", "values")))
    for width, name in QUANT_OF.items():
        figures = (figure for pair in sources.values() for figure in errors(*pair, width))
        table.add_row(name, *(f"{figure:.6f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()

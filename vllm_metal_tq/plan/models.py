"""What the planner knows of a model, read from its Hugging Face ``config.json``.

Layers are described as mlx_lm's model classes build them: what each keeps of a sequence, and how
many elements its weights have. Vision and audio towers are left out, as mlx_lm leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NoReturn

from .weights import NOTHING, Weights, linear, vector

BF16 = 2  # bytes of an element
FLOAT32 = 4


@dataclass(frozen=True)
class Layer:
    """What one layer keeps of a sequence.

    Attributes:
        kv_heads: heads of what it keeps of each token; 1 for the latent of MLA, 0 for none.
        key_dim: elements of a key; of MLA, of the latent.
        value_dim: elements of a value; of MLA, of the key that carries the position.
        window: the last tokens that it keeps; 0 is all.
        shared: whether other layers read what it keeps.
        state_bytes: bytes of a state that does not grow (linear attention).
    """

    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    shared: bool = False
    state_bytes: int = 0

    @property
    def is_attention(self) -> bool:
        """Whether it keeps keys and values of one size: what can be compressed."""
        return self.kv_heads > 0 and self.key_dim == self.value_dim

    @property
    def bf16_token_bytes(self) -> int:
        """Bytes of what it keeps of one token, uncompressed."""
        return BF16 * self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Model:
    """A model as the planner sees it.

    Attributes:
        name: how the user called it.
        layers: those that keep something of a sequence.
        weights: elements of its weights.
        max_position: the longest context that it was made for, None where its config is silent.
        quantization: what its config says of quantised weights.
    """

    name: str
    layers: tuple[Layer, ...]
    weights: Weights
    max_position: int | None
    quantization: Mapping[str, Any]

    def weight_bytes(self, bits: int | None, part: Weights | None = None) -> int:
        """Bytes of the weights in ``bits``, or as they were published where it is None.

        Args:
            bits: as mlx_lm quantises, in groups of 64; 16 is bf16.
            part: elements to count in place of all.

        Raises:
            ValueError: they were published in a format whose size is not known here.
        """
        weights = self.weights if part is None else part
        if bits is not None:
            return weights.nbytes(bits)
        said = self.quantization
        if not said:
            return weights.nbytes(16)
        if said.get("quant_method") == "mxfp4":
            return weights.mxfp4_bytes
        if "quant_method" not in said and {"bits", "group_size"} <= said.keys():  # mlx_lm's own
            return weights.nbytes(said["bits"], said["group_size"])
        raise ValueError(
            f"{self.name}: its weights are quantised by {said.get('quant_method', 'some method')}, "
            "whose size is not known here: say --weights-bits"
        )


class _Config:
    """A config.json, whose gaps are errors that name the model."""

    def __init__(self, name: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.name = name
        self.fields = {**defaults, **{k: v for k, v in fields.items() if v is not None}}

    def number(self, key: str, default: int | None = None, least: int = 0) -> int:
        found = self.fields.get(key, default)
        if type(found) is not int or found < least:
            self._refuse(key, found, f"a number of at least {least}")
        return found

    def listed(self, key: str) -> list[Any]:
        found = self.fields.get(key, [])
        if not isinstance(found, list):
            self._refuse(key, found, "a list")
        return found

    def _refuse(self, key: str, found: object, expected: str) -> NoReturn:
        what = "nothing" if found is None else repr(found)
        raise ValueError(f"{self.name}: its config gives {what} for {key}, expected {expected}")

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.fields.get(key, default))

    @property
    def head_dim(self) -> int:
        heads = self.number("num_attention_heads", least=1)
        return self.number("head_dim", self.number("hidden_size") // heads)

    def kinds(self, otherwise: Callable[[int], str]) -> list[str]:
        """The kind of each layer: as ``layer_types`` lists them, or by a function of the index."""
        count = self.number("num_hidden_layers")
        listed = self.listed("layer_types") or [otherwise(i) for i in range(count)]
        known = ("full_attention", "sliding_attention", "linear_attention")
        if len(listed) != count or any(kind not in known for kind in listed):
            raise ValueError(
                f"{self.name}: layer_types must name each of {count} layers, allowed are "
                f"{', '.join(known)}"
            )
        return listed


@dataclass(frozen=True)
class _Family:
    """How the layers of a model type differ from Llama's.

    Attributes:
        qkv_bias: whether these have biases; None: ``attention_bias`` says.
        o_bias: likewise.
        qk_norm: whether queries and keys are normalised.
        norms: of a layer.
        gated: whether attention has an output gate as wide as its queries.
        interval: a layer in so many is full attention, where nothing lists them; 1: all.
        other: the kind of the others.
        defaults: what its configs leave out.
    """

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    norms: int = 2
    gated: bool = False
    interval: int = 1
    other: str = "sliding_attention"
    defaults: tuple[tuple[str, object], ...] = ()


_GEMMA_3 = (
    *(("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 256)),
    *(("vocab_size", 262208), ("sliding_window", 4096), ("tie_word_embeddings", True)),
    ("max_position_embeddings", 131072),
)
_DELTA_NET = _Family(qk_norm=True, gated=True, interval=4, other="linear_attention")
_LLAMA = _Family()
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _Family(qkv_bias=True, o_bias=False),
    "qwen3": _Family(qk_norm=True),
    "qwen3_moe": _Family(qk_norm=True),
    "gemma3_text": _Family(qk_norm=True, norms=4, interval=6, defaults=_GEMMA_3),
    "gemma4_text": _Family(
        qk_norm=True, norms=4, interval=6, defaults=(("tie_word_embeddings", True),)
    ),
    "gpt_oss": _Family(qkv_bias=True, o_bias=True, interval=2),
    "qwen3_next": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
    "deepseek_v3": _LLAMA,
}
"""Model types that are known; ``text_config`` of multimodal ones."""


def read(name: str, config: Mapping[str, Any]) -> Model:
    """Describe the model of a ``config.json``.

    Raises:
        ValueError: its ``model_type`` is not known, or a number is missing or makes no sense.
    """
    text, merged = config.get("text_config"), config
    if isinstance(text, Mapping):
        merged = {"tie_word_embeddings": config.get("tie_word_embeddings"), **text}
        kind = text.get("model_type") or f"{config.get('model_type')}_text"
    else:
        kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{name}: model_type {kind!r} is not known, allowed are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    c = _Config(name, merged, dict(family.defaults))
    build = {"deepseek_v3": _deepseek, "gemma4_text": _gemma4}.get(kind, _plain)
    layers, weights = build(c, family, kind)
    if not any(layer.bf16_token_bytes for layer in layers):
        raise ValueError(f"{name}: its config has no attention layers")
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ValueError(f"{name}: its config gives {quantization!r} for quantization")
    limit = c.number("max_position_embeddings", 0) or None
    return Model(name, tuple(layers), weights + _embeddings(c), limit, quantization)


def _embeddings(c: _Config) -> Weights:
    """Embeddings, output projection and the last norm."""
    hidden, vocabulary = c.number("hidden_size"), c.number("vocab_size")
    table = linear(hidden, vocabulary)
    if not c.flag("tie_word_embeddings"):
        table += linear(hidden, vocabulary).as_table()
    return table + vector(hidden)


def _plain(c: _Config, family: _Family, kind: str) -> tuple[list[Layer], Weights]:
    interval = c.number("full_attention_interval", family.interval, least=1)
    interval = c.number("sliding_window_pattern", interval, least=1)
    kinds = c.kinds(lambda i: family.other if (i + 1) % interval else "full_attention")
    weights = [
        (_delta_net(c) if each == "linear_attention" else _attention(c, family))
        + _feed_forward(c, index, kind)
        + vector(family.norms * c.number("hidden_size"))
        for index, each in enumerate(kinds)
    ]
    if kind == "gpt_oss":
        weights.append(vector(len(kinds) * c.number("num_attention_heads")))  # sinks
    return [_layer(c, each) for each in kinds], reduce(add, weights, NOTHING)


def _layer(c: _Config, kind: str) -> Layer:
    if kind == "linear_attention":
        return Layer(state_bytes=_state_bytes(c))
    heads = c.number("num_key_value_heads", c.number("num_attention_heads"))
    window = c.number("sliding_window") if kind == "sliding_attention" else 0
    return Layer(heads, c.head_dim, c.head_dim, window)


def _attention(c: _Config, family: _Family) -> Weights:
    hidden, dim, heads = c.number("hidden_size"), c.head_dim, c.number("num_attention_heads")
    kv_heads = c.number("num_key_value_heads", heads)
    said = c.flag("attention_bias")
    qkv = said if family.qkv_bias is None else family.qkv_bias
    out = said if family.o_bias is None else family.o_bias
    return (
        linear(hidden, heads * dim * (2 if family.gated else 1), qkv)
        + linear(hidden, 2 * kv_heads * dim, qkv)
        + linear(heads * dim, hidden, out)
        + vector(2 * dim if family.qk_norm else 0)
    )


def _delta_net(c: _Config) -> Weights:
    """A Gated DeltaNet (arXiv:2412.06464) as Qwen3-Next and Qwen3.5 have it."""
    hidden, heads = c.number("hidden_size"), c.number("linear_num_value_heads")
    convolved, values = _convolved(c), heads * c.number("linear_value_head_dim")
    return (
        linear(hidden, convolved + values + 2 * heads)
        + linear(values, hidden)
        + vector(convolved * c.number("linear_conv_kernel_dim"))
        + vector(2 * heads + c.number("linear_value_head_dim"))
    )


def _convolved(c: _Config) -> int:
    """Channels of a DeltaNet's convolution: queries, keys and values."""
    keys = c.number("linear_num_key_heads") * c.number("linear_key_head_dim")
    return 2 * keys + c.number("linear_num_value_heads") * c.number("linear_value_head_dim")


def _state_bytes(c: _Config) -> int:
    """Bytes of a DeltaNet's state: the convolution's last inputs, and a matrix for each head."""
    last = (c.number("linear_conv_kernel_dim") - 1) * _convolved(c)
    matrix = c.number("linear_key_head_dim") * c.number("linear_value_head_dim")
    return BF16 * last + FLOAT32 * c.number("linear_num_value_heads") * matrix


def _feed_forward(c: _Config, index: int, kind: str) -> Weights:
    """Gate, up and down projections: of a layer, or of its experts and their router."""
    hidden = c.number("hidden_size")
    experts = c.number("num_experts", c.number("num_local_experts", 0))
    step = c.number("decoder_sparse_step", 1, least=1)
    if not experts or (index + 1) % step or index in c.listed("mlp_only_layers"):
        return _mlp(hidden, c.number("intermediate_size"), c.flag("mlp_bias"))
    width = c.number("moe_intermediate_size", c.number("intermediate_size"))
    biased = kind == "gpt_oss"
    weights = linear(hidden, experts, biased)
    weights += _mlp(hidden, width, biased).as_experts(experts, c.number("num_experts_per_tok"))
    if shared := c.number("shared_expert_intermediate_size", 0):
        weights += _mlp(hidden, shared) + linear(hidden, 1)
    return weights


def _mlp(hidden: int, width: int, bias: bool = False) -> Weights:
    return linear(hidden, 2 * width, bias) + linear(width, hidden, bias)


def _gemma4(c: _Config, family: _Family, kind: str) -> tuple[list[Layer], Weights]:
    """Gemma 4: full attention has wider heads, and the last layers read the cache of others."""
    every = c.number("sliding_window_pattern", family.interval, least=1)
    kinds = c.kinds(lambda i: family.other if (i + 1) % every else "full_attention")
    own = len(kinds) - c.number("num_kv_shared_layers", 0)
    weights = [_gemma4_weights(c, each, index >= own) for index, each in enumerate(kinds)]
    layers = [_gemma4_layer(c, each) for each in kinds[:own]]
    if not set(kinds[own:]) <= set(kinds[: max(own, 0)]):
        raise ValueError(f"{c.name}: num_kv_shared_layers leaves no layers for others to read")
    for each in set(kinds[own:]):  # its last own layer of the kind is the one that is read
        last = max(i for i in range(own) if kinds[i] == each)
        layers[last] = Layer(**vars(layers[last]) | {"shared": True})
    return layers, reduce(add, weights, _per_layer_inputs(c, len(kinds)))


def _gemma4_layer(c: _Config, kind: str) -> Layer:
    if kind == "sliding_attention":
        return _layer(c, kind)
    heads = c.number("num_key_value_heads")
    if c.flag("attention_k_eq_v"):
        heads = c.number("num_global_key_value_heads", heads)
    dim = c.number("global_head_dim", c.head_dim)
    return Layer(heads, dim, dim)


def _gemma4_weights(c: _Config, kind: str, reads_other: bool) -> Weights:
    hidden, heads = c.number("hidden_size"), c.number("num_attention_heads")
    layer = _gemma4_layer(c, kind)
    dim = layer.key_dim
    weights = linear(hidden, heads * dim) + linear(heads * dim, hidden) + vector(dim)
    if not reads_other:
        one_for_both = c.flag("attention_k_eq_v") and kind == "full_attention"
        weights += linear(hidden, layer.kv_heads * dim * (1 if one_for_both else 2)) + vector(dim)
    wide = 2 if reads_other and c.flag("use_double_wide_mlp") else 1
    weights += _mlp(hidden, wide * c.number("intermediate_size")) + vector(4 * hidden + 1)
    if c.flag("enable_moe_block"):
        experts = c.number("num_experts")
        each = _mlp(hidden, c.number("moe_intermediate_size"))
        weights += each.as_experts(experts, c.number("top_k_experts"))
        weights += linear(hidden, experts) + vector(4 * hidden + experts)
    if width := c.number("hidden_size_per_layer_input", 0):
        weights += linear(hidden, width) + linear(width, hidden) + vector(hidden)
    return weights


def _per_layer_inputs(c: _Config, layers: int) -> Weights:
    """Gemma 4's second table of embeddings, of which a token reads one row."""
    width = c.number("hidden_size_per_layer_input", 0)
    if not width:
        return NOTHING
    table = linear(layers * width, c.number("vocab_size_per_layer_input", c.number("vocab_size")))
    return table.as_table() + linear(c.number("hidden_size"), layers * width) + vector(width)


def _deepseek(c: _Config, family: _Family, kind: str) -> tuple[list[Layer], Weights]:
    """Multi-head latent attention: a layer keeps a latent of each token, and one rotated key."""
    count, hidden = c.number("num_hidden_layers"), c.number("hidden_size")
    latent, rope = c.number("kv_lora_rank"), c.number("qk_rope_head_dim")
    weights = [
        _latent_attention(c) + _deepseek_feed_forward(c, index) + vector(2 * hidden)
        for index in range(count)
    ]
    return [Layer(1, latent, rope)] * count, reduce(add, weights, NOTHING)


def _latent_attention(c: _Config) -> Weights:
    hidden, heads, latent = (
        c.number(key) for key in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    plain, rope, value = (
        c.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    queries = heads * (plain + rope)
    if rank := c.number("q_lora_rank", 0):
        weights = linear(hidden, rank) + vector(rank) + linear(rank, queries)
    else:
        weights = linear(hidden, queries)
    weights += linear(hidden, latent + rope) + vector(latent)
    weights += linear(plain, heads * latent) + linear(latent, heads * value)
    return weights + linear(heads * value, hidden)


def _deepseek_feed_forward(c: _Config, index: int) -> Weights:
    hidden, experts = c.number("hidden_size"), c.number("n_routed_experts", 0)
    step = c.number("moe_layer_freq", 1, least=1)
    if not experts or index < c.number("first_k_dense_replace", 0) or index % step:
        return _mlp(hidden, c.number("intermediate_size"))
    width = c.number("moe_intermediate_size")
    weights = _mlp(hidden, width).as_experts(experts, c.number("num_experts_per_tok"))
    weights += _mlp(hidden, width * c.number("n_shared_experts", 0))
    return weights + vector(experts * (hidden + 1))  # the router is not quantised

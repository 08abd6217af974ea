"""Small models of mlx_lm with random weights, one for each kind of attention."""

import importlib

import mlx.core as mx
from mlx_lm.generate import generate_step

PROMPT = 40  # tokens of greedy's own prompt
VOCAB = 97
_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}


def build(model_type: str, **arguments):
    """A model of ``mlx_lm.models.<model_type>`` with ``arguments`` over small defaults.

    So has the ``text_config`` of a model with media, where it is given.
    """
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(0)
    fields = _COMMON | {"model_type": model_type} | arguments
    if "text_config" in arguments:
        fields["text_config"] = fields | arguments["text_config"]
    model = module.Model(module.ModelArgs.from_dict(fields))
    mx.eval(model.parameters())
    return model


def llama(**arguments):
    """Three layers of plain attention, two query heads to a KV head."""
    return build("llama", **({"head_dim": 64} | arguments))


def tokens(count: int, seed: int = 0, batch: int = 1) -> mx.array:
    """Random token ids ``(batch, count)``."""
    return mx.random.randint(0, VOCAB, (batch, count), key=mx.random.key(seed))


def greedy(model, cache, prompt=None, count=12, **options) -> list[int]:
    """The tokens that mlx_lm generates greedily after ``prompt``."""
    prompt = tokens(PROMPT)[0] if prompt is None else prompt
    steps = generate_step(prompt, model, max_tokens=count, prompt_cache=cache, **options)
    return [token for token, _ in steps]

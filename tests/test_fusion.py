"""What could be folded into a model's weights: the values' rotation can, the keys' cannot."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from models import llama, tokens

from vllm_metal_tq import rope
from vllm_metal_tq.centre import turn
from vllm_metal_tq.rotation import rotate

HEAD_DIM = 64


def test_rotating_keys_before_rope_is_wrong():
    """RoPE does not commute with the rotation: scores come out as of another model."""
    pairs = rope.probe(nn.RoPE(HEAD_DIM, base=1e4), HEAD_DIM).pairs
    q, k = (mx.random.normal((2000, HEAD_DIM), key=mx.random.key(i)) for i in (0, 1))
    k = k + 0.5 * q  # scores of a trained model are not pure noise
    where = [mx.random.randint(0, 4096, (2000,), key=mx.random.key(i)) for i in (2, 3)]

    def scores(q, k):
        turned = (turn(x, j, pairs) for x, j in zip((q, k), where, strict=True))
        a, b = turned
        return np.array((a * b).sum(axis=-1))

    true, folded = scores(q, k), scores(rotate(q), rotate(k))
    after = np.array((rotate(turn(q, where[0], pairs)) * rotate(turn(k, where[1], pairs))).sum(-1))
    assert np.abs(after - true).max() < 1e-3
    assert abs(np.corrcoef(true, folded)[0, 1]) < 0.4


def test_rotating_values_in_the_weights_is_exact():
    """Attention mixes values linearly: v_proj may rotate them, and o_proj rotate back."""
    model, ids = llama(), tokens(50)
    expected = model(ids)
    for layer in model.layers:
        attention = layer.self_attn
        by_head = attention.v_proj.weight.reshape(2, HEAD_DIM, -1).swapaxes(1, 2)
        attention.v_proj.weight = rotate(by_head).swapaxes(1, 2).reshape(2 * HEAD_DIM, -1)
        # Rows of o_proj meet rotated values: the rotation is orthogonal.
        by_head = attention.o_proj.weight.reshape(-1, 4, HEAD_DIM)
        attention.o_proj.weight = rotate(by_head).reshape(-1, 4 * HEAD_DIM)
    assert mx.abs(model(ids) - expected).max().item() < 1e-4

"""vllm-metal's native operations for an uncompressed cache, in plain MLX.

Signatures are those of its ``paged_ops.cpp``. Its own TurboQuant is not here.
"""

import mlx.core as mx


def nax_supported() -> bool:
    """Whether the GPU has tensor units."""
    return False


def reshape_and_cache(keys, values, key_pages, value_pages, slots):
    """Write ``keys`` and ``values``, ``(tokens, heads, dim)``, into their slots of the pages."""
    return _scatter(key_pages, slots, keys), _scatter(value_pages, slots, values)


def _scatter(pages, slots, rows):
    flat = pages.reshape(-1, *pages.shape[2:])
    flat[slots] = rows.astype(pages.dtype)
    return flat.reshape(pages.shape)


def paged_attention_primitive(
    queries,
    key_pages,
    value_pages,
    num_kv_heads,
    scale,
    softcap,
    block_tables,
    seq_lens,
    cu_seqlens_q,
    block_size,
    max_seq_len,
    sliding_window,
    out,
    *,
    sinks=None,
    use_turboquant=False,
    window_seqlen_q=0,
):
    """Causal attention of each sequence's query rows over its pages, into ``out``."""
    if use_turboquant or softcap:
        raise NotImplementedError("the Linux stand-in has no TurboQuant and no softcap")
    ends = cu_seqlens_q.tolist()
    rows = []
    for i, length in enumerate(seq_lens.tolist()):
        first, last = ends[i], ends[i + 1]
        if first == last:
            continue
        blocks = block_tables[i, : -(-length // block_size)]
        keys, values = (_gather(pages, blocks, length) for pages in (key_pages, value_pages))
        mask = _mask(last - first, length, sliding_window)
        rows.append(_attend(queries[first:last], keys, values, scale, mask, sinks))
    # In place: on a Mac the primitive, too, gives the caller's ``out`` a new content.
    out += mx.concatenate(rows).astype(queries.dtype)


def _gather(pages, blocks, length):
    return pages[blocks].reshape(-1, *pages.shape[2:])[:length].astype(mx.float32)


def _mask(num_queries, length, sliding_window):
    query = mx.arange(length - num_queries, length)[:, None]
    key = mx.arange(length)[None]
    seen = key <= query
    if sliding_window is not None and sliding_window > 0:
        seen = seen & (key > query - sliding_window)
    return seen


def _attend(queries, keys, values, scale, mask, sinks):
    def heads_first(rows):
        return rows.astype(mx.float32).swapaxes(0, 1)[None]

    attended = mx.fast.scaled_dot_product_attention(
        *map(heads_first, (queries, keys, values)), scale=scale, mask=mask, sinks=sinks
    )
    return attended[0].swapaxes(0, 1)


def gdn_linear_attention(
    queries, keys, values, decay, beta, states, cu_seqlens, slots, out, *sizes
):
    """The gated delta rule over packed sequences, ``out`` and the states of their slots in place.

    ``queries``, ``keys`` ``(tokens, Hk, Dk)``, ``values``, ``out`` ``(tokens, Hv, Dv)``, ``decay``,
    ``beta`` ``(tokens, Hv)``, ``states`` ``(slots, Hv, Dv, Dk)``; ``sizes`` repeats Hk, Hv, Dk, Dv.
    """
    del sizes
    shared = values.shape[1] // keys.shape[1]
    queries, keys = mx.repeat(queries, shared, axis=1), mx.repeat(keys, shared, axis=1)
    ends = cu_seqlens.tolist()
    for i, slot in enumerate(slots.tolist()):
        state = states[slot]
        for t in range(ends[i], ends[i + 1]):
            state = state * decay[t, :, None, None]
            seen = (state * keys[t, :, None]).sum(-1)
            delta = (values[t] - seen) * beta[t, :, None]
            state = state + delta[..., None] * keys[t, :, None]
            out[t] = (state * queries[t, :, None]).sum(-1)
        states[slot] = state


def gdn_state_scatter(pool, rows, slots):
    """Write ``rows`` into the slots of a pool of states."""
    pool[slots] = rows
    return pool

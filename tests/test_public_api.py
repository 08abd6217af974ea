"""What scripts rely on. A change here is a change for users: it goes into the changelog, too."""

import inspect
import re

import vllm_metal_tq
from vllm_metal_tq.integrations import mlx_lm

PACKAGE = """
T2 = 18
T3 = 19
TurboQuantConfig(k_width, v_width, block_size=16, layer_overrides=())
TurboQuantConfig.for_layer(self, layer)
TurboQuantConfig.from_names(preset=None, k_quant=None, v_quant=None, block_size=16, layers=None)
TurboQuantConfig.k_quant
TurboQuantConfig.label
TurboQuantConfig.layers
TurboQuantConfig.preset
TurboQuantConfig.v_quant
TurboQuantKVCache(pool, *, centre=None, max_kv_size=None, window=0)
TurboQuantKVCache.attend(self, queries, keys, values, scale, mask, sinks)
TurboQuantKVCache.bits
TurboQuantKVCache.compacted(self)
TurboQuantKVCache.empty(self)
TurboQuantKVCache.extract(self, idx)
TurboQuantKVCache.filter(self, batch_indices)
TurboQuantKVCache.from_state(state, meta_state=None)
TurboQuantKVCache.is_trimmable(self)
TurboQuantKVCache.keys
TurboQuantKVCache.layout
TurboQuantKVCache.make_mask(self, N, window_size=None, return_array=False)
TurboQuantKVCache.merge(caches)
TurboQuantKVCache.nbytes
TurboQuantKVCache.of(sequences)
TurboQuantKVCache.offset
TurboQuantKVCache.pool
TurboQuantKVCache.size(self)
TurboQuantKVCache.state
TurboQuantKVCache.trim(self, n)
TurboQuantKVCache.update_and_fetch(self, keys, values)
load_prompt_cache(file_name, model, return_metadata=False)
make_prompt_cache(model, config=None, max_kv_size=None, calibration=None)
save_prompt_cache(file_name, prompt_cache, model, metadata=None)
"""

MLX_LM = """
BatchTurboQuantKVCache(pool, *, centre=None, max_kv_size=None, window=0)
BatchTurboQuantKVCache.extend(self, other)
BatchTurboQuantKVCache.filter(self, batch_indices)
BatchTurboQuantKVCache.finalize(self)
BatchTurboQuantKVCache.offset
BatchTurboQuantKVCache.prepare(self, *, left_padding=None, lengths=None, right_padding=None)
BatchTurboQuantKVCache.update_and_fetch(self, keys, values)
CachePools(model, config=None, *, max_kv_size=None, calibration=None, max_bytes=None)
CachePools.attach(self)
CachePools.block_bytes
CachePools.detach(self)
CachePools.make_prompt_cache(self)
CachePools.max_blocks
CachePools.nbytes
CachePools.num_blocks
CachePools.pools
CachePools.used_blocks
CachePools.used_bytes
CacheReport(layers, layers_compressed, kv_bytes, kv_bytes_bf16)
CacheReport.ratio
calibrate(model, token_ids, progress=Ellipsis)
report(prompt_cache)
"""


def surface(module, names):
    """A line for every function, class and public member of a class.

    Annotations are left out: the type checker sees to them.
    """
    lines = [""]
    for name in sorted(names):
        thing = getattr(module, name)
        lines.append(line(name, thing))
        for member in sorted(vars(thing)) if inspect.isclass(thing) else ():
            found = inspect.getattr_static(thing, member)
            if not member.startswith("_") and (callable(found) or isinstance(found, KINDS)):
                lines.append(line(f"{name}.{member}", getattr(thing, member)))
    return "\n".join(lines) + "\n"


KINDS = (property, classmethod, staticmethod)


def line(name, thing):
    if isinstance(thing, property):
        return name
    if isinstance(thing, int):
        return f"{name} = {thing}"
    parameters = [
        p.replace(annotation=p.empty, default=... if inspect.isfunction(p.default) else p.default)
        for p in inspect.signature(thing).parameters.values()
    ]
    return f"{name}{inspect.Signature(parameters)}"


def test_the_package():
    assert surface(vllm_metal_tq, vllm_metal_tq.__all__) == PACKAGE


def test_the_mlx_lm_integration():
    shared = set(mlx_lm.__all__) & set(vllm_metal_tq.__all__)
    assert all(getattr(mlx_lm, name) is getattr(vllm_metal_tq, name) for name in shared)
    assert surface(mlx_lm, set(mlx_lm.__all__) - shared) == MLX_LM


def test_every_parameter_is_explained():
    for module in (vllm_metal_tq, mlx_lm):
        for thing in filter(callable, (getattr(module, name) for name in module.__all__)):
            members = [
                getattr(thing, member)
                for member in (vars(thing) if inspect.isclass(thing) else ())
                if not member.startswith("_")
            ]
            for function in [thing, *filter(inspect.isroutine, members)]:
                assert unexplained(function) == [], function


def unexplained(function):
    """The parameters, where there are several, that a docstring does not mention as code."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    text = inspect.getdoc(function) or ""
    mentioned = set(re.findall(r"``(\w+)``", text)) | set(re.findall(r"^ +(\w+): ", text, re.M))
    return [name for name in names if len(names) > 1 and name not in mentioned]


def test_a_changed_signature_would_be_found():
    class Cache:
        def trim(self, n: int, *, keep=1): ...

        @property
        def size(self): ...

        @classmethod
        def of(cls, sequences=lambda: 1): ...

        def _private(self): ...

    class Module:
        cache = Cache

    lines = surface(Module, ["cache"]).split()
    assert " ".join(lines) == (
        "cache() cache.of(sequences=Ellipsis) cache.size cache.trim(self, n, *, keep=1)"
    )

"""Words and numbers that users and files give: configs, settings, and models to plan for."""

import json
import tempfile
from functools import cache
from pathlib import Path

from harness import Finding, Target, refusal
from hypothesis import strategies as st
from mutations import EDGES, json_values, mostly, mutated, numbers, texts

from vllm_metal_tq.config import BLOCK_SIZES, PRESETS, QUANT_NAMES, WIDTHS, TurboQuantConfig
from vllm_metal_tq.integrations.vllm.settings import KEYS, Settings
from vllm_metal_tq.plan import models, plan, sources
from vllm_metal_tq.plan.machine import GIB, estimated

unknown = st.sampled_from(["bf16", "tq5", "q1_0", "TQ4", "tq4 ", "q8_0/q8_0", ""]) | texts
presets = mostly(st.sampled_from(sorted(PRESETS)), unknown)
quants = mostly(st.sampled_from(sorted(QUANT_NAMES)), unknown)
sizes = mostly(st.sampled_from(BLOCK_SIZES), numbers)
layers = mostly(
    st.integers(0, 40).map(str),
    st.sampled_from([str(x) for x in EDGES if isinstance(x, int)] + ["²", "٣", "1_0", ""]),
)


@st.composite
def overrides(draw) -> str:
    """What names layers and their widths, nearly as it should."""
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        first = draw(layers)
        last = draw(layers | st.just(first))
        where = draw(st.sampled_from([first, f"{first}-{last}"]))
        name = draw(presets | st.just(f"{draw(quants)}/{draw(quants)}") | st.just("bf16"))
        parts.append(where + draw(mostly(st.just("="), st.just(":"))) + name)
    return draw(mostly(st.just(","), st.just(";"))).join(parts)


layer_overrides = mostly(overrides(), st.text(max_size=12))


def check_names(case: dict) -> str:
    try:
        config = TurboQuantConfig.from_names(**case)
    except Exception as error:
        return refusal(error)
    if config.k_width not in WIDTHS or config.v_width not in WIDTHS:
        raise Finding(f"widths of {config}")
    if config.block_size not in BLOCK_SIZES:
        raise Finding(f"block size of {config}")
    again = TurboQuantConfig.from_names(
        k_quant=config.k_quant,
        v_quant=config.v_quant,
        block_size=config.block_size,
        layers=config.layers,
    )
    if again != config or config.for_layer(3).layer_overrides:
        raise Finding(f"{config} does not come back from its names")
    return "taken"


config_names = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.none() | presets,
        **dict.fromkeys(("k_quant", "v_quant"), st.none() | quants),
        "layers": st.none() | layer_overrides,
        "block_size": sizes,
    },
)


@st.composite
def additional_configs(draw) -> dict:
    """What JSON of ``--additional-config`` may be: known keys mostly, and mostly of their types."""
    fit = {
        "turboquant": st.just(True),
        "preset": presets,
        **dict.fromkeys(("k_quant", "v_quant"), quants),
        "layer_overrides": layer_overrides | st.dictionaries(layers, presets, max_size=3),
        "calibration": st.booleans() | texts,
        "block_size": sizes,
    }
    given = draw(st.fixed_dictionaries({}, optional=fit)) | {"turboquant": True}
    if draw(st.integers(0, 3)) == 0:
        given[draw(st.sampled_from(sorted(KEYS)) | texts)] = draw(json_values)
    return json.loads(json.dumps(given))


def check_settings(given: dict) -> str:
    try:
        found = Settings.parse(given)
    except Exception as error:
        return refusal(error)
    if found is None:
        if given.get("turboquant"):
            raise Finding("a setting that asks for compression turns it off")
        return "off"
    if not isinstance(found.label, str) or len(found.label) > 100 * len(str(given)) + 100:
        raise Finding(f"the label has {len(found.label)} characters")
    for layer in (0, 1, 10**9):
        found.for_layer(layer)
    return "taken"


@st.composite
def model_configs(draw) -> bytes:
    """A ``config.json``: of a shipped model with parts of it changed, or anything."""
    shipped = sources.shipped()
    config = shipped[draw(st.sampled_from(sorted(shipped)))]["config"]
    claims = numbers | json_values | st.sampled_from(["llama", "full_attention", "deepseek_v3"])
    match draw(st.sampled_from(["changed"] * 6 + ["anything", "deep", "bytes"])):
        case "changed":
            text = json.dumps(draw(mutated(config, claims)))
        case "anything":
            text = json.dumps(draw(json_values))
        case "deep":
            depth = draw(st.sampled_from([500, 100_000]))
            text = '{"a":' * depth + "1" + "}" * depth
        case "bytes":
            return json.dumps(config).encode()[:20] + draw(st.binary(max_size=8))
    return text.encode()


@cache
def _folder():
    return tempfile.TemporaryDirectory()  # kept as long as the process


def check_model_config(data: bytes) -> str:
    file = Path(_folder().name) / "config.json"
    file.write_bytes(data)
    try:
        config, file_bytes = sources.find(str(file))
        question = plan.Question(
            models.read("model", config),
            estimated(8 * GIB),
            file_bytes=file_bytes,
            weights_bits=4,
            kv_budget=2 * GIB,
            context=32768,
            concurrency=4,
            engine="vllm" if len(data) % 2 else "mlx_lm",
            bandwidth=1e11,
        )
        made = plan.plan(question, plan.schemes())
        json.dumps(made.fields(), allow_nan=False)
    except Exception as error:
        return refusal(error)
    return "planned"


TARGETS = [
    Target("names of configs", 4000, config_names, check_names),
    Target("additional_config", 4000, additional_configs(), check_settings),
    Target("config.json of models", 3000, model_configs(), check_model_config),
]

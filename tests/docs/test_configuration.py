"""The page of all keys says what the code does: names, defaults, what is allowed, errors."""

import inspect
import json
from dataclasses import MISSING, fields

import pytest
from tables import quoted, tables

from vllm_metal_tq import TurboQuantConfig
from vllm_metal_tq.cli.common import (
    add_calibration_arguments,
    add_layers_argument,
    add_scheme_arguments,
)
from vllm_metal_tq.config import BLOCK_SIZES, DEFAULT_PRESET, PRESETS, QUANT_NAMES
from vllm_metal_tq.integrations.vllm.settings import CACHE_DTYPES, FOREIGN, KEYS, Settings

KEY_ROWS, FIELD_ROWS, DTYPE_ROWS, _, _, ERROR_ROWS = tables("configuration")


def column(rows, name):
    return [word for row in rows for word in quoted(row[name])]


def row_of(rows, name, key):
    return next(row for row in rows if quoted(row[name]) == [key])


def test_every_key_of_the_engine_has_a_row():
    assert sorted(column(KEY_ROWS, "vLLM's `--additional-config`")) == sorted(KEYS)


def test_every_name_of_a_script_has_a_row():
    taken = [*inspect.signature(TurboQuantConfig.from_names).parameters, "calibration"]
    assert sorted(column(KEY_ROWS, "in a script")) == sorted(taken)


def test_every_flag_of_the_command_line_has_a_row():
    import argparse

    parser = argparse.ArgumentParser(add_help=False)
    for add in (add_scheme_arguments, add_calibration_arguments, add_layers_argument):
        add(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert sorted(column(KEY_ROWS, "command line")) == sorted(flags)


def test_the_defaults_are_the_codes():
    def default(key):
        return row_of(KEY_ROWS, "vLLM's `--additional-config`", key)["default"]

    parameters = inspect.signature(TurboQuantConfig.from_names).parameters
    assert default("preset") == f"`{DEFAULT_PRESET}`"
    assert default("block_size") == f"`{parameters['block_size'].default}`"
    assert Settings.parse({}) is None
    assert default("turboquant") == "`false`"
    settings = Settings.parse({"turboquant": True})
    assert settings.calibration is True
    assert default("calibration") == "a script: none; else `true`"
    assert not settings.config.layer_overrides
    assert default("layer_overrides") == "none"


def test_what_is_allowed_is_what_the_code_allows():
    def allowed(key):
        return quoted(row_of(KEY_ROWS, "in a script", key)["allowed"])

    assert allowed("preset") == [*PRESETS]
    assert sorted(allowed("k_quant")) == sorted(QUANT_NAMES)
    assert allowed("block_size") == [str(size) for size in BLOCK_SIZES]


def test_every_field_of_the_config_has_its_default():
    assert column(FIELD_ROWS, "field") == [field.name for field in fields(TurboQuantConfig)]
    for field, row in zip(fields(TurboQuantConfig), FIELD_ROWS, strict=True):
        given = "none: must be given" if field.default is MISSING else f"`{field.default}`"
        assert row["default"] == given
    for row in FIELD_ROWS[:2]:
        with pytest.raises(ValueError, match="is unknown: allowed are ") as caught:
            TurboQuantConfig(0, 0)
        assert str(caught.value).endswith(f"allowed are {row['allowed']}")


def test_vllms_own_names_are_all_there():
    rows = {quoted(row["`--kv-cache-dtype`"])[0]: row for row in DTYPE_ROWS}
    assert {
        name: tuple(quoted(row["`k_quant`, `v_quant`"])) for name, row in rows.items()
    } == CACHE_DTYPES


def test_foreign_keys_are_named():
    from blocks import ROOT

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [key for key in FOREIGN if f"`{key}`" not in page] == []


@pytest.mark.parametrize("row", ERROR_ROWS, ids=lambda row: row["given"])
def test_an_error_is_word_for_word(row):
    (given,), (message,) = quoted(row["given"]), quoted(row["error"])
    with pytest.raises(ValueError, match="--additional-config") as caught:
        Settings.parse({"turboquant": True} | json.loads(given))
    assert str(caught.value) == message


def test_every_key_has_an_error():
    wrong = {key for row in ERROR_ROWS for key in json.loads(quoted(row["given"])[0])}
    assert set(KEYS) <= wrong

"""The self-check passes where kernels are right and says which one is wrong."""

from dataclasses import replace

import mlx.core as mx
import pytest
from simulator import simulate

from vllm_metal_tq import msl
from vllm_metal_tq.config import T2, T3, TurboQuantConfig
from vllm_metal_tq.kernels.selfcheck import check
from vllm_metal_tq.layout import PageLayout

LAYOUT = PageLayout(TurboQuantConfig(4, 4), 128)  # doctor's, so that its kernels are built once
TRELLIS = PageLayout(TurboQuantConfig(T3, T2), 64)
ALL = [
    ("encode", "few"),
    ("encode", "many"),
    ("gather", None),
    ("decode", "mma"),
    ("decode", "fma"),
    ("merge", "tail, sinks"),
]
CENTRED = [(name, f"{variant}, centre") for name, variant in ALL[3:]]

needs_simulator = pytest.mark.skipif(
    not msl.can_simulate(), reason=str(msl.compiler.why_not_simulate())
)


def failed(execute):
    return {(c.name, c.variant) for c in check(LAYOUT, execute) if not c.ok}


def changing(kernel, change):
    """The simulator, but for what ``change`` makes of one kernel's first output."""

    def execute(launch):
        first, *others = simulate(launch)
        return [change(first) if launch.kernel == kernel else first, *others]

    return execute


def worse_scales(rows):
    """The two fp16 scales of each row, 5 % too large."""
    scales = rows[..., -4:].view(mx.float16) * mx.array(1.05, mx.float16)
    return mx.concatenate([rows[..., :-4], scales.view(mx.uint8)], axis=-1)


@needs_simulator
def test_every_kernel_is_checked_and_right():
    checks = check(LAYOUT, simulate)
    assert [(c.name, c.variant) for c in checks] == ALL
    assert all(c.ok for c in checks), checks
    assert all(0 <= c.max_rel_error < 5e-4 and c.message == "" for c in checks)


@needs_simulator
def test_decode_and_merge_are_checked_with_a_centre_too():
    checks = check(LAYOUT, simulate, centred=True)
    assert [(c.name, c.variant) for c in checks] == ALL + CENTRED
    assert all(c.ok for c in checks), checks
    assert all(0 <= c.max_rel_error < 5e-4 for c in checks)


@needs_simulator
def test_trellis_codes_are_checked_and_right():
    checks = check(TRELLIS, simulate, centred=True)
    assert [(c.name, c.variant) for c in checks] == ALL + CENTRED
    assert all(c.ok for c in checks), checks


@needs_simulator
@pytest.mark.parametrize("widths", [(4, 4), (T2, T3)])
def test_without_variants_what_decode_does_not_take_is_checked(widths):
    checks = check(PageLayout(TurboQuantConfig(*widths), 512), simulate, variants=[])
    assert [(c.name, c.variant) for c in checks] == ALL[:3]
    assert all(c.ok for c in checks), checks


@needs_simulator
def test_another_trellis_is_noticed_by_all_that_read_or_write_it():
    taps = {"K_TAPS", "KT"}

    def another(launch):
        changed = {name: launch.template[name] ^ 1 for name in taps & launch.template.keys()}
        return simulate(replace(launch, template=launch.template | changed))

    checks = check(TRELLIS, another)
    assert [c.name for c in checks if c.ok] == []


@needs_simulator
def test_a_centred_token_without_its_mean_is_noticed():
    def without_mean(launch):
        if launch.kernel == "merge" and launch.template["CENTRE"]:
            nothing = mx.zeros_like(launch.inputs["value_mean"])
            launch = replace(launch, inputs=launch.inputs | {"value_mean": nothing})
        return simulate(launch)

    checks = check(LAYOUT, without_mean, centred=True)
    assert [(c.name, c.variant) for c in checks if not c.ok] == CENTRED


@needs_simulator
@pytest.mark.parametrize(
    ("kernel", "change", "wrong"),
    [
        ("encode", worse_scales, set(ALL[:2])),
        ("gather", lambda keys: keys * 1.0001, {("gather", None)}),
        ("decode_mma", lambda partial: partial[:, :1], {("decode", "mma"), ("merge", ALL[5][1])}),
        ("decode_fma", lambda partial: partial * 1.01, {("decode", "fma")}),
        ("merge", lambda attended: attended * 1.001, set(ALL[3:])),
    ],
)
def test_a_wrong_kernel_is_named(kernel, change, wrong):
    def keep_shape(x):
        y = change(x)
        return y if y.shape == x.shape else mx.broadcast_to(y, x.shape)

    assert failed(changing(kernel, keep_shape)) == wrong


@needs_simulator
def test_nan_is_no_agreement():
    checks = check(LAYOUT, changing("merge", lambda x: x * mx.nan))
    wrong = [c for c in checks if not c.ok]
    assert [(c.name, c.variant) for c in wrong] == ALL[3:]
    assert all(c.max_rel_error is None and "NaN" in c.message for c in wrong)


def test_what_a_kernel_raises_is_kept():
    def broken(launch):
        raise RuntimeError(f"{launch.kernel} does not compile")

    checks = check(LAYOUT, broken)
    assert [(c.name, c.variant) for c in checks] == ALL
    assert not any(c.ok for c in checks)
    assert all(c.max_rel_error is None and "does not compile" in c.message for c in checks)

"""Several processes that hold a model together see what one sees that holds it alone."""

import mlx.core as mx
import mlx_lm.models.cache as host
import numpy as np
import part_of_model
import pytest
import ranks
from models import build, llama, tokens
from part_of_model import HEADS, MODELS

from vllm_metal_tq import calibration
from vllm_metal_tq.integrations.mlx_lm import calibrate, distributed, measure
from vllm_metal_tq.part import Part

CLOSE = 1e-3  # of the logits' spread: sums are in another order, and a code may round otherwise


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process sees, by kind of model, and where it keeps the whole's calibrations."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "CALIBRATION_TOKENS", 100)
        found = {}
        for kind, (make, _) in MODELS.items():
            own = folder / kind
            patch.setattr(calibration, "user_cache_path", lambda name, own=own: own / name)
            measured = calibrate(make(), tokens(100)[0].tolist())
            measured.save(own / "whole.safetensors")
            found[kind] = part_of_model.seen(kind, own)
    return folder, found


@pytest.fixture(
    scope="module",
    params=[
        "2 over ring",
        pytest.param("3 over ring", marks=pytest.mark.slow),
        pytest.param("2 over mpi", marks=pytest.mark.slow),
    ],
)
def together(request, alone, tmp_path_factory):
    """What each of several processes sees, by kind of model."""
    count, folder = int(request.param[0]), tmp_path_factory.mktemp("together")
    for kind in MODELS:
        (folder / kind).mkdir()
        whole = alone[0] / kind / "whole.safetensors"
        (folder / kind / whole.name).write_bytes(whole.read_bytes())
    command = part_of_model.__file__, str(folder)
    if "mpi" in request.param:
        assert ranks.mpirun(count, folder, *command) == ""
    else:
        with ranks.started(count, folder, *command) as processes:
            statuses = ranks.wait(processes)
        assert statuses == [0] * count, "\n".join(ranks.said(folder, count))
    return {kind: [np.load(folder / kind / f"{r}.npz") for r in range(count)] for kind in MODELS}


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_and_logits_are_those_of_one_process(kind, alone, together):
    whole = alone[1][kind]
    for own in together[kind]:
        assert own["greedy"].tolist() == whole["greedy"].tolist()
        assert own["drafted"].tolist() == whole["drafted"].tolist()
        for name in ("logits", "uncentred", "from_file"):
            assert np.abs(own[name] - whole[name]).max() < CLOSE * whole[name].std(), name


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_the_same_to_the_bit_in_all_of_them(kind, together):
    first, *others = (own["logits"] for own in together[kind])
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("kind", MODELS)
def test_each_compresses_its_own_heads_or_layers(kind, alone, together):
    whole, parts = alone[1][kind], together[kind]
    if kind == "pipeline":  # the first process has the last layers
        for name in ("heads", "k_width", "block_bytes"):
            assert np.concatenate([own[name] for own in parts[::-1]]).tolist() == list(whole[name])
        return
    for own in parts:
        assert (own["heads"] * len(parts)).tolist() == whole["heads"].tolist()
        assert (own["block_bytes"] * len(parts)).tolist() == whole["block_bytes"].tolist()
        assert own["k_width"].tolist() == whole["k_width"].tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_what_they_calibrate_together_is_what_one_does(kind, alone, together):
    whole = alone[1][kind]
    centred = [f"{part}{i}" for i in np.flatnonzero(whole["centred"]) for part in ("mu", "t", "m")]
    assert centred
    for own in together[kind]:
        assert own["fingerprint"].tolist() == whole["fingerprint"].tolist()
        assert own["centred"].tolist() == whole["centred"].tolist()
        for name in centred:
            assert np.allclose(own[name], whole[name], atol=1e-5), name
        assert own["kept"].all()
        assert own["found_again"].all()


@pytest.mark.parametrize("kind", MODELS)
def test_each_saves_its_own_prompt_cache(kind, together):
    for own in together[kind]:
        assert own["saved_as_never_saved"].all()
        assert own["others_refused"].all()


def test_heads_that_cannot_be_shared_evenly_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    with pytest.raises(ValueError, match="4 processes cannot share 6 KV heads evenly: allowed"):
        distributed.shard(llama(**HEADS))


def test_a_model_that_mlx_lm_does_not_divide_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ValueError, match="runs no llama model as a pipeline"):
        distributed.shard(llama(), pipeline=True)
    with pytest.raises(ValueError, match="does not divide the heads of gemma models"):
        distributed.shard(build("gemma", head_dim=64, num_hidden_layers=1))


def test_a_whole_model_is_calibrated_without_the_other_processes(monkeypatch):
    def most(number):
        raise AssertionError("the others may be at something else")

    monkeypatch.setattr(distributed, "most", most)
    assert len(calibrate(llama(), tokens(64)[0].tolist()).centres) == 3


def test_what_a_stage_sets_while_it_is_measured_reaches_the_cache():
    cache = host.KVCache()
    recorder = measure._Recorder(cache, None)
    recorder.keys = mx.ones(3)
    assert cache.keys is recorder.keys


def test_alone_nothing_is_asked_of_anybody():
    model, sampler = llama(), lambda logprobs: logprobs
    distributed.shard(model)
    assert Part.of(model, 3) == Part(3, 0, 3)
    assert distributed.same(sampler) is sampler
    assert (distributed.most(3), distributed.least(None), distributed.least(4)) == (3, None, 4)
    arrays = {"a": np.array(mx.arange(3))}
    assert distributed.gather(arrays) == [arrays]

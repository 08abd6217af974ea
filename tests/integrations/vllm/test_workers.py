"""What vLLM's executors send to workers arrives there as it was.

``mp`` pickles: the configuration for processes that it spawns, specs and plans in its message
queue. Ray has a copy of cloudpickle, and is not installed here: cloudpickle itself stands in.
vLLM's msgspec messages carry requests and their outputs, nothing of ours.
"""

import io
import json
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

import cloudpickle
from planning import dense, layers, packed, planned, sliding

from vllm_metal_tq.integrations.vllm import plugin
from vllm_metal_tq.integrations.vllm.settings import Settings

WORKER = Path(__file__).with_name("worker.py")
GIVEN = {
    "turboquant": True,
    "preset": "tq6",
    "layer_overrides": {"1": "q8_0/q4_0", "3": "bf16"},
    "calibration": "/a/file.safetensors",
}


def forking(obj):
    """As ``multiprocessing`` sends arguments to a spawned process."""
    stream = io.BytesIO()
    ForkingPickler(stream, pickle.HIGHEST_PROTOCOL).dump(obj)
    return stream.getvalue()


WAYS = pickle.dumps, forking, cloudpickle.dumps


def things(config):
    """Of each kind that travels, one: a configuration, specs, a plan, settings."""
    config.additional_config = {plugin.OWN_KEY: GIVEN}  # as it is once it was checked
    alike = layers(packed("tq4"), packed("tq4", sliding()))
    return {
        "config": config,
        "specs": [packed("tq4"), packed("tq8", sliding()), dense()],
        "plan": planned(config, alike, 1 << 28),
        "settings": Settings.parse(GIVEN),
    }


def facts(sent):
    """What a worker should find."""
    groups = sent["plan"].kv_cache_groups
    return {
        "registered": True,
        "types": ["TurboQuantAttentionSpec", "TurboQuantSlidingWindowSpec", "FullAttentionSpec"],
        "page_bytes": [spec.page_size_bytes for spec in sent["specs"]],
        "merged": [True] * 3,
        "planned_bytes": [group.kv_cache_spec.page_size_bytes for group in groups],
        "settings": repr(sent["settings"]),
    }


def test_a_worker_that_has_imported_nothing_finds_what_was_sent(vllm_config, tmp_path):
    sent, output = things(vllm_config()), tmp_path / "output"
    messages = pickle.dumps([dumps(sent) for dumps in WAYS])
    command = [sys.executable, WORKER, output]
    run = subprocess.run(command, input=messages, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    found, _, back = output.read_bytes().partition(b"\n")
    assert json.loads(found) == {"imported": [], "things": [facts(sent)] * len(WAYS)}
    for returned in pickle.loads(back):
        assert list(map(type, returned["specs"])) == list(map(type, sent["specs"]))
        for name in ("specs", "plan", "settings"):
            assert returned[name] == sent[name]
        assert list(map(hash, returned["specs"])) == list(map(hash, sent["specs"]))
        assert hash(returned["settings"]) == hash(sent["settings"])
        ours, theirs = sent["config"], returned["config"]
        assert theirs.additional_config == ours.additional_config
        assert theirs.compute_hash() == ours.compute_hash()

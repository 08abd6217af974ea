"""What a worker of vLLM finds in what it is sent: ``python FILE OUTPUT < MESSAGES``.

Reads a pickle of pickles of ``{name: object}``, loads vLLM's plugins as workers do, and writes
what it found in each as a line of JSON, then a pickle of them all, for the way back.
"""

import json
import pickle
import sys
from pathlib import Path


def main() -> None:
    messages = pickle.load(sys.stdin.buffer)
    imported = sorted({name.partition(".")[0] for name in sys.modules} & {"vllm", "vllm_metal_tq"})
    # As spawned processes and Ray's do, before plugins are loaded.
    received = [pickle.loads(message) for message in messages]

    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = {"imported": imported, "things": [facts(things) for things in received]}
    output = json.dumps(found).encode() + b"\n" + pickle.dumps(received)
    Path(sys.argv[1]).write_bytes(output)  # vLLM may print its log


def facts(things: dict) -> dict:
    from vllm_metal_tq.integrations.vllm import plugin

    specs, plan = things["specs"], things["plan"]
    return {
        "registered": plugin._registered,
        "types": [type(spec).__name__ for spec in specs],
        "page_bytes": [spec.page_size_bytes for spec in specs],
        "merged": [type(spec).merge([spec, spec]) == spec for spec in specs],
        "planned_bytes": [group.kv_cache_spec.page_size_bytes for group in plan.kv_cache_groups],
        "settings": repr(plugin.settings_of(things["config"])),
    }


if __name__ == "__main__":
    main()

"""``vllm serve`` as a subprocess, and what tests ask of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
from prometheus_client.parser import text_string_to_metric_families

BLOCK_SIZE = 16
CHUNK = 256  # tokens of one prefill step: prompts of tests fit into one
MODEL = "demo"
STARTED_WITHIN = 900.0  # seconds: a busy machine imports vLLM for minutes, in each process


class Server:
    """A running server: its address, log and metrics."""

    def __init__(self, port: int, log: Path):
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    @property
    def log(self) -> str:
        """All it has printed."""
        return self._log.read_text(errors="replace")

    def client(self) -> openai.OpenAI:
        """The official client; it tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def metric(self, name: str) -> float:
        """The sum of ``vllm:<name>`` over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [s for family in families for s in family.samples]
        names = (f"vllm:{name}", f"vllm:{name}_total")
        found = [s.value for s in samples if s.name in names]
        assert found, f"no metric {name}"
        return sum(found)

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        """``count`` greedy tokens after the tokens ``prompt``."""
        answer = self.client().completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=count,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return answer.choices[0].token_ids


def _command(model: Path, port: int, additional: dict | None, flags: tuple) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(model), "--served-model-name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-num-batched-tokens", str(CHUNK), "--block-size", str(BLOCK_SIZE), *flags]
    if additional is not None:
        command += ["--additional-config", json.dumps(additional)]
    return command


def _environment(variables: dict[str, str]) -> dict[str, str]:
    own = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)),
        "VLLM_METAL_USE_PAGED_ATTENTION": "1",
    }
    return os.environ | own | variables


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(model, port, additional, flags, variables, stream) -> subprocess.Popen:
    return subprocess.Popen(
        _command(model, port, additional, flags),
        env=_environment(variables),
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that it can be ended with all it started
    )


def _end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def serve(model: Path, log: Path, additional=None, flags=(), **variables):
    """A server that answers; where it does not come to that, its log is in the error."""
    server = Server(free_port(), log)
    with log.open("w") as stream:
        port = int(server.url.rpartition(":")[2])
        process = _start(model, port, additional, flags, variables, stream)
    try:
        _wait_until_healthy(process, server)
        yield server
    except BaseException:
        print(server.log[-20000:])
        raise
    finally:
        _end(process)


def _wait_until_healthy(process: subprocess.Popen, server: Server) -> None:
    end = time.monotonic() + STARTED_WITHIN
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(f"vllm serve was not healthy within {STARTED_WITHIN:.0f} s")


def refused(model: Path, log: Path, additional=None, flags=(), **variables) -> str:
    """What ``vllm serve`` prints before it ends by itself, which it must, with an error."""
    with log.open("w") as stream:
        process = _start(model, free_port(), additional, flags, variables, stream)
    try:
        process.wait(STARTED_WITHIN)
    finally:
        _end(process)
    assert process.returncode != 0
    return log.read_text(errors="replace")

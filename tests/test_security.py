"""What SECURITY.md says of the code: nothing in it runs what it was given."""

import argparse
import ast
import ipaddress
from pathlib import Path

import pytest

import vllm_metal_tq
from vllm_metal_tq.cli import serve, whole_parser

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in (Path(vllm_metal_tq.__file__).parent, ROOT / "scripts", ROOT / "benchmarks")
    for file in folder.rglob("*.py")
)
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "os.popen2",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
}
FLAGS = {"shell", "allow_pickle", "trust_remote_code"}


def offences(source):
    """Names of what ``source`` does that could run what it was given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
            found += [n for n in names if n.split(".")[0] in MODULES or n in CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS else []
            found += [
                f"{k.arg}={ast.unparse(k.value)}"
                for k in node.keywords
                if k.arg in FLAGS and not (isinstance(k.value, ast.Constant) and not k.value.value)
            ]
        elif isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            found.append("listens on all addresses")
    return found


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "os.system('ls')",
        "from os import system",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "socket.bind(('0.0.0.0', 80))",
    ],
)
def test_what_is_looked_for_is_found(planted):
    assert offences(planted)


@pytest.mark.parametrize(
    "harmless",
    [
        "mx.eval(x)",
        "model.eval()",
        "subprocess.run(command, shell=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=False)",
    ],
)
def test_what_is_harmless_is_not(harmless):
    assert offences(harmless) == []


def test_all_sources_are_looked_at():
    assert len(SOURCES) > 100
    assert Path(serve.__file__) in SOURCES


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_runs_what_it_was_given(file):
    assert offences(file.read_text(encoding="utf-8")) == []


def test_the_server_listens_to_this_machine_alone_unless_told():
    args = whole_parser().parse_args(["serve", "--model", "demo"])
    assert ipaddress.ip_address(args.host).is_loopback
    assert args.allowed_origins == ["local"]


def test_no_command_runs_a_models_code_unless_told():
    (commands,) = (
        action
        for action in whole_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    flags = [
        (name, action)
        for name, parser in commands.choices.items()
        for action in parser._actions
        if "--trust-remote-code" in action.option_strings
    ]
    assert [name for name, _ in flags] == ["serve"]
    assert [action.default for _, action in flags] == [False]


def test_the_threat_model_is_written_down():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for word in ("prompt-cache", "additional_config", "loopback", "--trust-remote-code"):
        assert word in text

"""Refuses what Apple's compiler would refuse: clang with real address spaces, and what it lacks.

Metal is C++14 or C++17 with address spaces and without a number of features. Clang knows the
address spaces; the missing features are found in clang's syntax tree and in the text itself.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_metal_tq.msl import compiler
from vllm_metal_tq.msl.compiler import MetalError
from vllm_metal_tq.msl.text import (
    THREADGROUP_VARIABLE,
    as_cpp,
    blank,
    kernel_bodies,
    without_comments,
)

MAX_BUFFERS = 31

_OPTIONS = [
    *("-DMSL_CHECK", "-fsyntax-only", "-Xclang", "-ast-dump", "-ferror-limit=0"),
    *("-Wall", "-Wno-unused", "-Wno-undefined-inline", "-Wno-undefined-internal"),
    *("-Wno-c++17-extensions", "-Wno-duplicate-decl-specifier"),
    *("-Werror=return-type", "-Werror=shift-count-overflow"),
    *("-Werror=uninitialized", "-Werror=sometimes-uninitialized"),
    "-Werror=zero-length-array",
]


def check(text: str, std: str = "c++14") -> list[str]:
    """Check a kernel as Apple's compiler would.

    Args:
        text: A whole Metal text, such as ``generated_text`` returns.
        std: ``"c++14"`` for Metal 3 or ``"c++17"`` for Metal 4.

    Returns:
        Clang's warnings, one a line of the list.

    Raises:
        MetalError: All faults found, one a line, or that there is no clang.
    """
    faults = list(_faults_of_text(text))
    folder = compiler.new_folder()
    try:
        result = compiler.compile_kernel(as_cpp(text), [f"-std={std}", *_OPTIONS], folder)
    finally:
        shutil.rmtree(folder)
    faults += _messages(result.stderr, "error")
    if result.returncode == 0:
        faults += _faults_of_tree(result.stdout)
    elif not faults:
        faults.append(result.stderr)
    if faults:
        raise MetalError("\n".join(dict.fromkeys(faults)))
    return _messages(result.stderr, "warning")


_IN_KERNEL = re.compile(r"kernel\.cpp:(\d+):\d+: ")
_MESSAGE = re.compile(r"(\S+?):\d+:\d+: (?:fatal )?(error|warning|note): (.*)")


def _messages(stderr: str, kind: str) -> list[str]:
    """Clang's messages of a kind, with the line of the kernel that they are about."""
    messages = []
    found = [match for row in stderr.splitlines() if (match := _MESSAGE.match(row))]
    rows = [match.string for match in found]
    for number, match in enumerate(found):
        _, its_kind, what = match.groups()
        if its_kind != kind:
            continue
        # For a message about stdlib.h, a note behind it says which line of the kernel led there.
        place = next(filter(None, map(_IN_KERNEL.match, rows[number:])), None)
        messages.append(f"line {place[1]}: {what}" if place else what)
    return messages


# ---- The text: what needs no compiler or what the stand-in library hides from it.

_RESERVED_WORD = re.compile(
    r"\b(?:vertex|fragment|kernel|visible|stitchable|mesh|object|intersection|access|sampler|"
    r"texture1d|texture2d|texture3d|ray_data|object_data|imageblock|coherent)\b"
    r"(?!\s*(?:\]\]|void\b))"
)
_DIRECTIVE = re.compile(r"(?m)^[ \t]*#(?:[^\n]*\\\n)*[^\n]*")
_SCALARS = (
    r"(?:u?(?:char|short|int|long)|half|bfloat|float|bool|u?int(?:8|16|32|64)_t|"
    r"b?float(?:16|32)_t|bfloat16_t)[234]?"
)


def _faults_of_text(text: str) -> Iterator[str]:
    plain = without_comments(text)
    yield from _bare_pointers(plain)
    yield from _reserved_words(plain)
    yield from _misplaced_threadgroup_variables(plain)
    if len(re.findall(r"\[\[buffer\(", plain)) > MAX_BUFFERS:
        yield f"more than {MAX_BUFFERS} buffers"


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _bare_pointers(plain: str) -> Iterator[str]:
    """Pointers and references without an address space, which Metal 3 has not."""
    plain = _DIRECTIVE.sub(blank, plain)
    names = re.findall(r"\b(?:typename|class|struct)\s+(\w+)", plain)
    types = "|".join([_SCALARS, "auto", *sorted(set(names))])
    pointer = (
        r"(?:^|[;{}(,<]|\breturn\b)\s*"
        rf"((?:const\s+|static\s+|constexpr\s+|inline\s+)*(?:{types})(?:\s+const)?\s*(?:\*|&(?!&)))"
        r"\s*(?:const\s+)?(?:\w+\s*(?=[=,;)\[({])|(?=[>)]))"
    )
    for match in re.finditer(pointer, plain):
        line = _line(plain, match.start(1))
        yield f"line {line}: pointer or reference without an address space: {match[1]}"


def _reserved_words(plain: str) -> Iterator[str]:
    plain = re.sub(r"\[\[.*?\]\]", blank, _DIRECTIVE.sub(blank, plain))
    for match in _RESERVED_WORD.finditer(plain):
        yield f"line {_line(plain, match.start())}: {match[0]} is a word of Metal"


def _misplaced_threadgroup_variables(plain: str) -> Iterator[str]:
    bodies = kernel_bodies(plain)
    for match in THREADGROUP_VARIABLE.finditer(plain):
        if not any(start <= match.start() < end for start, end in bodies):
            yield f"line {_line(plain, match.start(2))}: threadgroup variable outside a kernel"


# ---- The syntax tree, as "clang -ast-dump" prints it: one node a line, indented by depth.

_FORBIDDEN = [
    (r"LambdaExpr\b", "lambda"),
    (r"GotoStmt\b", "goto"),
    (
        r"CXX(?:New|Delete|Throw|Typeid|DynamicCast)Expr\b|CXXTryStmt\b",
        "run-time feature of C++",
    ),
    (r".*<AddressSpaceConversion>", "cast between address spaces"),
    (r".*'[^']*\blong long\b[^']*'", "long long"),
    (r"(?!FloatingLiteral\b).*'[^']*\bdouble\b[^']*'", "double"),
    (r"FloatingLiteral\b.*'long double'", "double"),
    (r"(?:ParmVar|Var|Field)Decl .*\(\*(?:const)?\)\(", "function pointer"),
    (r"CXXMethodDecl .* virtual\b", "virtual function"),
    (
        r"ImplicitCastExpr .*'(?:const )?(?:bfloat16_t|bfloat|__bf16)'(?::'__bf16')?"
        r" <FloatingCast>(?! part_of_explicit)",
        "implicit conversion to bfloat",
    ),
]
# A quick look at a row, as most rows have nothing of the above.
_SUSPICIOUS = re.compile(
    r"Lambda|Goto|New|Delete|Throw|Typeid|DynamicCast|Try|AddressSpace|long|double|\(\*|virtual|"
    r"FloatingCast|VarDecl"
)
# Address space 2 is "constant".
_STATIC_VARIABLE = r"VarDecl (?!.*address_space\(2\)).* static\b"
_VARIABLE = r"VarDecl (?!.*address_space\(2\))"

_NODE = re.compile(
    r"([|`\- ]*)(\w+) (0x[0-9a-f]+) (?:parent 0x[0-9a-f]+ )?(?:prev (0x[0-9a-f]+) )?(.*)"
)
_PLACES = re.compile(r"(?:<.*?>(?= |$))?(?: (?:[\w./]+|line):\d+:\d+)?")
_PLACE = re.compile(r"([\w./-]+):(\d+):\d+")
_CALLEE = re.compile(r"(?:Function|CXXMethod) (0x[0-9a-f]+) '")


@dataclass
class _Node:
    """One node: its kind and address, the declaration it repeats, its place, the rest."""

    depth: int
    kind: str
    address: str
    previous: str | None
    details: str
    line: int
    in_kernel: bool  # in the text itself, not in stdlib.h


def _nodes(dump: str) -> Iterator[_Node]:
    in_kernel, line = False, 0
    for row in dump.splitlines():
        match = _NODE.match(row)
        if not match:
            continue
        # A place that repeats the file, or the line too, of the place before leaves it out.
        places = _PLACES.match(match[5])
        if places and ":" in match[5]:
            for file, number in _PLACE.findall(places[0]):
                line = int(number)
                if file != "line":
                    in_kernel = file.endswith("kernel.cpp")
        yield _Node(len(match[1]), match[2], match[3], match[4], match[5], line, in_kernel)


@dataclass
class _Calls:
    """Which functions mention which; a function goes by the address of its first declaration."""

    first: dict[str, str] = field(default_factory=dict)  # by the address of any declaration
    faults: dict[str, str] = field(default_factory=dict)  # what to say if it is recursive
    callees: dict[str, list[str]] = field(default_factory=dict)

    def declare(self, node: _Node) -> str:
        """Note a declaration; returns the address of the function's first one."""
        previous = self.first.get(node.previous, node.previous) if node.previous else node.address
        function = self.first.setdefault(node.address, previous)
        name = node.details.split("'")[0].split()[-1]
        self.faults[function] = f"line {node.line}: recursion of {name}"
        return function

    def recursive(self) -> Iterator[str]:
        """Functions that come to call themselves."""
        done: set[str] = set()
        active: set[str] = set()

        def visit(function: str) -> Iterator[str]:
            active.add(function)
            for callee in self.callees.get(function, ()):
                callee = self.first.get(callee, callee)
                if callee in active:
                    yield self.faults[callee]
                elif callee not in done:
                    yield from visit(callee)
            active.discard(function)
            done.add(function)

        for function in list(self.callees):
            if function not in done:
                yield from visit(function)


def _faults_of_tree(dump: str) -> list[str]:
    calls, faults = _Calls(), []
    enclosing: list[tuple[int, str]] = []  # depth and address of the functions around a node
    for node in _nodes(dump):
        while enclosing and enclosing[-1][0] >= node.depth:
            enclosing.pop()
        if node.kind in ("FunctionDecl", "CXXMethodDecl"):
            enclosing.append((node.depth, calls.declare(node)))
        if enclosing and " 0x" in node.details:
            calls.callees.setdefault(enclosing[-1][1], []).extend(_CALLEE.findall(node.details))
        if node.in_kernel:
            faults += [f"line {node.line}: {what}" for what in _forbidden(node, bool(enclosing))]
    faults += calls.recursive()
    return faults


def _forbidden(node: _Node, in_function: bool) -> Iterator[str]:
    row = f"{node.kind} {node.details}"
    if not _SUSPICIOUS.search(row):
        return
    for pattern, what in _FORBIDDEN:
        if re.match(pattern, row):
            yield what
    if in_function and re.match(_STATIC_VARIABLE, row):
        yield "static local variable"
    if not in_function and re.match(_VARIABLE, row):
        yield "variable outside functions that is not constant"

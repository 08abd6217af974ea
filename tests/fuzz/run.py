"""`make fuzz`: every target in a process of its own, under limits, with a table at the end.

A case at which a process dies, hangs or finds something is kept in a file of ``fuzz-findings/``,
which ``--replay`` puts in again. Exit status 1 says that there is one.
"""

import argparse
import ast
import faulthandler
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
# As pytest has them.
sys.path[:0] = map(str, [HERE, HERE.parent, HERE.parent / "integrations" / "mlx_lm"])

MODULES = ("target_files", "target_words", "target_cli", "target_server")
FINDINGS = Path("fuzz-findings")
SILENCE = 600  # seconds without a new case after which a process is ended
ADDRESS_SPACE = 4 << 30  # bytes that a process may ask for beyond what it begins with


def targets():
    return [target for name in MODULES for target in importlib.import_module(name).TARGETS]


def named(name: str):
    return next(target for target in targets() if target.name == name)


def work(name: str, count: int, seed: int, file: Path) -> None:
    """Run one target; every case is in ``file`` before it is put in."""
    import harness

    faulthandler.enable()
    target = named(name)
    _limit_memory()

    def keep(case: object) -> None:
        file.write_text(repr(case))

    try:
        came = harness.run(target, count, seed, keep)
    finally:
        target.close()
    print(json.dumps(came))


def _limit_memory() -> None:
    if sys.platform != "linux":  # elsewhere the limit holds for nothing
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def supervise(target, count: int, seed: int) -> tuple[Counter, float, str]:
    """Outcomes of a target, seconds, and what was found, or nothing."""
    file = FINDINGS / f"{target.name.replace(' ', '-')}-{seed}.txt"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--work", target.name, str(count), str(seed), str(file)]
    start = time.monotonic()
    # Output goes to files: a pipe that nobody reads would stop the process.
    with (
        file.with_suffix(".out").open("w+") as out,
        file.with_suffix(".err").open("w+") as err,
        subprocess.Popen(command, stdout=out, stderr=err) as process,
    ):
        found = _end(process, file)
        out.seek(0)
        err.seek(0)
        lines, complaint = out.read().splitlines(), err.read()
    seconds = time.monotonic() - start
    if not found and process.returncode:
        last = complaint.strip().splitlines()[-1:] or [""]
        found = last[0] if process.returncode > 0 else f"died of signal {-process.returncode}"
        file.with_suffix(".log").write_text(complaint)
    for suffix in (".out", ".err"):
        file.with_suffix(suffix).unlink()
    if found:
        return Counter(), seconds, f"{found} ({file})"
    file.unlink(missing_ok=True)
    return Counter(json.loads(lines[-1])), seconds, ""


def _end(process: subprocess.Popen, file: Path) -> str:
    """Wait for the end of a process, or end it where no new case comes."""
    begun = time.time()
    while process.poll() is None:
        time.sleep(0.2)
        last = file.stat().st_mtime if file.exists() else begun
        if time.time() - max(last, begun) > SILENCE:
            process.kill()
            return f"hung: no new case for {SILENCE} s"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of every target")
    parser.add_argument("--only", help="one target")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        name, count, seed, file = args.work
        work(name, int(count), int(seed), Path(file))
        return 0
    if args.replay:
        name, file = args.replay
        print(named(name).check(ast.literal_eval(Path(file).read_text())))
        return 0
    FINDINGS.mkdir(exist_ok=True)
    print(f"seed {args.seed}\n\n| target | cases | seconds | outcomes |\n|---|---|---|---|")
    total, findings = 0, []
    for target in targets():
        if args.only not in (None, target.name):
            continue
        came, seconds, found = supervise(target, round(args.share * target.count), args.seed)
        outcomes = ", ".join(f"{what} {n:,}" for what, n in came.most_common())
        print(
            f"| {target.name} | {came.total():,} | {seconds:.0f} | {found or outcomes} |",
            flush=True,
        )
        total += came.total()
        findings += [found] if found else []
    print(f"\n{total:,} cases, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    sys.exit(main())

"""What this environment's packages are licensed under, and which have known vulnerabilities.

    python scripts/audit.py

pip-audit looks every package up in PyPI's advisories. The exit status is 0 where all were looked
up and none has any, 1 where one has, and 2 where some could not be looked up, of which nothing is
then known.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from typing import Any

OURS = "vllm-metal-tq"
COMMAND = ["-m", "pip_audit", "--local", "--skip-editable", "--format", "json"]
SAFE, VULNERABLE, UNKNOWN = 0, 1, 2

Package = dict[str, Any]
"""As pip-audit describes one: name, version, vulns, skip_reason."""


def audited() -> list[Package]:
    """What pip-audit says of each package.

    Raises:
        ValueError: it says nothing, as where there is no network.
    """
    command = [sys.executable, *COMMAND, "--progress-spinner", "off"]
    ended = subprocess.run(command, capture_output=True, text=True)
    try:
        packages: list[Package] = json.loads(ended.stdout)["dependencies"]
    except (ValueError, LookupError, TypeError):
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise ValueError(f"pip-audit failed: {lines[-1]}") from None
    return [package for package in packages if package["name"] != OURS]


def verdict(packages: list[Package]) -> tuple[int, list[str]]:
    """The exit status, and lines that say why."""
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, "
        f"fixed in {', '.join(found['fix_versions']) or 'no version'}"
        for package in packages
        for found in package.get("vulns", ())
    ]
    missed = [package for package in packages if "skip_reason" in package]
    if missed:
        lines.append(
            f"{len(missed)} of {len(packages)} packages could not be looked up, and nothing is "
            f"known of them: {missed[0]['skip_reason']}"
        )
    status = VULNERABLE if len(lines) > bool(missed) else UNKNOWN if missed else SAFE
    return status, lines or [f"{len(packages)} packages, no known vulnerability"]


def licence(package: Distribution) -> str:
    """What a package says of its licence, in one line."""
    said = package.metadata
    classifiers = [c for c in said.get_all("Classifier") or () if c.startswith("License ::")]
    named = [c.rsplit(" :: ", 1)[-1] for c in classifiers]
    text = said.get("License-Expression") or ", ".join(named) or said.get("License") or "not said"
    return text.strip().splitlines()[0]


def main() -> int:
    """Print both lists; returns the exit status."""
    found = {d.metadata["Name"]: d for d in distributions() if d.metadata["Name"] != OURS}
    for name in sorted(found, key=str.lower):
        print(f"{name} {found[name].version}: {licence(found[name])}")
    try:
        status, lines = verdict(audited())
    except ValueError as error:
        status, lines = UNKNOWN, [str(error)]
    print("", *lines, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

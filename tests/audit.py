"""What the project depends on, looked over: ``python -m tests.audit``, or ``make audit``.

Licences of all that is installed for it, from the packages' own metadata, must go with Apache-2.0; known
vulnerabilities are looked up by pip-audit where that is installed and gets an answer; a line says so where not.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

EXTRAS = ("demo", "ray", "small", "docs", "dev")

PERMISSIVE = re.compile(
    r"0BSD|(3-Clause )?BSD( License|-[23]-Clause)?|MIT( License|-CMU|-0)?|ISC|ISC License( \(ISCL\))?|Zlib|CC0-1\.0"
    r"|Apache([ -]2\.0)?( Software)?( License)?|Apache License 2\.0|LLVM-exception|CNRI-Python|Unlicense"
    r"|BSL-1\.0|PSF-2\.0|Python Software Foundation License"
)
"""Licences whose code can be used by, and shipped beside, Apache-2.0 code."""

EXCEPTIONS = {
    "certifi": "MPL-2.0: certificates, used unchanged",
    "hypothesis": "MPL-2.0: used unchanged, for development only",
    "pathspec": "MPL-2.0: used unchanged, for development only",
    "tqdm": "MPL-2.0 in part: used unchanged",
}
"""Others, and why they may be used all the same."""


def dependencies(name: str = "maskgym", extras: Sequence[str] = EXTRAS) -> dict[str, Distribution]:
    """What is installed of all that a package needs, with what that needs, by normalised name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting = [(name, tuple(extras))]
    while waiting:
        package, wanted = waiting.pop()
        package = re.sub(r"[-_.]+", "-", package).lower()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        try:
            found[package] = distribution(package)
        except PackageNotFoundError:  # of another platform, or an extra that is not installed
            continue
        needed = map(Requirement, found[package].requires or [])
        waiting += [(each.name, tuple(sorted(each.extras))) for each in needed if _applies(each, wanted)]
    return found


def _applies(requirement: Requirement, extras: Sequence[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": each}) for each in ("", *extras))


def licences(package: Distribution) -> list[str]:
    """The licences that a package's metadata names, each by itself."""
    metadata = package.metadata
    classified = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    named = metadata.get("License-Expression") or "; ".join(line.rpartition(" :: ")[2] for line in classified)
    named = named or next(iter((metadata.get("License") or "").splitlines()), "")
    parts = re.split(r"\s+(?:AND|OR|WITH)\s+|;|\(MPL 2\.0\)", named.replace("OSI Approved", ""))
    return [part.strip() for part in parts if part.strip()] or ["no licence named"]


def unsuitable(packages: dict[str, Distribution]) -> Iterator[str]:
    """A line for each package whose licence is neither permissive nor an exception that has been thought about."""
    for name, package in sorted(packages.items()):
        if name not in EXCEPTIONS:
            bad = [licence for licence in licences(package) if not PERMISSIVE.fullmatch(licence)]
            if bad:
                yield f"{name} {package.version}: {', '.join(bad)}"


def vulnerabilities(packages: dict[str, Distribution]) -> int:
    """Ask pip-audit about exactly these versions: 1 if it knows of any, 0 if not, or where it cannot work."""
    if importlib.util.find_spec("pip_audit") is None:
        print("vulnerabilities: not looked up, pip-audit is not installed")
        return 0
    pinned = "".join(
        f"{name}=={package.version.partition('+')[0]}\n" for name, package in packages.items() if name != "maskgym"
    )
    audit = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--requirement", "/dev/stdin"]
    done = subprocess.run([*audit, "--format", "json"], input=pinned, text=True, capture_output=True)
    try:
        looked_up = json.loads(done.stdout)["dependencies"]
    except ValueError:
        why = next(reversed(done.stderr.strip().splitlines()), f"status {done.returncode}")
        print(f"vulnerabilities: not looked up, pip-audit got no answer ({why})")
        return 0
    known = [(each["name"], each["version"], found["id"]) for each in looked_up for found in each.get("vulns", ())]
    print(f"vulnerabilities: {len(known)} known in {len(looked_up)} packages")
    print("".join(f"  {name} {version}: {found}\n" for name, version, found in known), end="")
    return int(bool(known))


def main() -> int:
    """Print what was found; 1 if something should be done about it."""
    packages = dependencies()
    bad = list(unsuitable(packages))
    print(f"licences: {len(packages)} packages, {len(bad)} that do not go with Apache-2.0")
    print("".join(f"  {line}\n" for line in bad), end="")
    return bool(bad) | bool(vulnerabilities(packages))


if __name__ == "__main__":
    raise SystemExit(main())

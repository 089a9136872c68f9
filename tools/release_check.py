"""Checks and lists of tools/release.sh.

python tools/release_check.py repack SDIST      the same bytes whenever it is built
python tools/release_check.py contents WHEEL SDIST
python tools/release_check.py sbom              CycloneDX of the package and what it needs
"""

from __future__ import annotations

import configparser
import gzip
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "frugal-bonsai"
_MADE = re.compile(r"(PKG-INFO|setup\.cfg|frugal_bonsai\.egg-info/.*)")
_EXTRA = re.compile(r";.*\bextra\b")


def repack(path: Path) -> None:
    """Write a source archive again with the time of the commit, no owner, and sorted names."""
    when, packed = int(os.environ["SOURCE_DATE_EPOCH"]), io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=packed, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = when, 0, 0, "", ""
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    path.write_bytes(gzip.compress(packed.getvalue(), mtime=when))


def check_contents(wheel: Path, sdist: Path) -> None:
    """Compare the archives with the files of the commit."""
    tracked = set(subprocess.check_output(["git", "ls-files"], text=True).splitlines())
    package = {name for name in tracked if name.startswith("frugal_bonsai/")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        scripts = configparser.ConfigParser()
        [file] = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        scripts.read_string(archive.read(file).decode())
    _require_equal("the wheel", names, package)
    if dict(scripts["console_scripts"]) != {NAME: "frugal_bonsai.cli:main"}:
        sys.exit(f"the wheel's scripts are {dict(scripts['console_scripts'])}")
    with tarfile.open(sdist) as source:
        found = {m.name.partition("/")[2] for m in source.getmembers() if m.isfile()}
    found = {name for name in found if not _MADE.fullmatch(name)}
    if found - tracked or package - found:
        sys.exit(f"the source archive: {sorted(found - tracked)}, lacks {sorted(package - found)}")
    print(f"{len(names)} files in the wheel, {len(found)} in the source archive, none stray")


def _require_equal(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        sys.exit(f"{what} has {sorted(found - expected)}, lacks {sorted(expected - found)}")


def bill_of_materials() -> dict[str, Any]:
    """Return the package and all that it needs here, as CycloneDX 1.5."""
    needs = dict(_closure(NAME))
    components = [_component(importlib.metadata.distribution(name)) for name in sorted(needs)]
    [own] = [part for part in components if part["name"] == NAME]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {**own, "type": "application"}},
        "components": [part for part in components if part is not own],
        "dependencies": [
            {"ref": part["bom-ref"], "dependsOn": sorted(map(_reference, needs[part["name"]]))}
            for part in components
        ],
    }


def _closure(name: str) -> Iterator[tuple[str, set[str]]]:
    """Yield every package that one needs, and what that needs itself; what is absent is left."""
    todo, seen = [name], set[str]()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        needs = set()
        for line in importlib.metadata.requires(at) or ():
            found = re.match(r"[\w.-]+", line)
            needed = _normal(found[0]) if found and not _EXTRA.search(line) else ""
            if needed and _is_installed(needed):
                needs.add(needed)
        todo += needs
        yield at, needs


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _reference(name: str) -> str:
    return f"pkg:pypi/{name}@{importlib.metadata.version(name)}"


def _component(package: importlib.metadata.Distribution) -> dict[str, Any]:
    metadata: Any = package.metadata
    name = _normal(metadata["Name"])
    licence = metadata.get("License-Expression") or metadata.get("License") or ""
    classified = [
        value.rpartition(" :: ")[2]
        for value in metadata.get_all("Classifier") or ()
        if value.startswith("License ::")
    ]
    names = [licence] if licence and "\n" not in licence else classified
    return {
        "type": "library",
        "bom-ref": _reference(name),
        "name": name,
        "version": package.version,
        "purl": _reference(name),
        "licenses": [{"license": {"name": each}} for each in names],
    }


def main() -> None:
    what, *paths = sys.argv[1:]
    if what == "repack":
        repack(Path(paths[0]))
    elif what == "contents":
        check_contents(Path(paths[0]), Path(paths[1]))
    else:
        print(json.dumps(bill_of_materials(), indent=2))


if __name__ == "__main__":
    main()

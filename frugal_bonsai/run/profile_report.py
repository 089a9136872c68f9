"""``profile --report FILE``: what machines can prune, at which cap, in what time.

In: hardware profiles. Out: a page. Plans the default method at the shapes of models from 1B to 70B,
whose architectures are built without memory. Reads and measures nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.folder import CONFIG_FILE
from frugal_bonsai.errors import BudgetError
from frugal_bonsai.hardware import profile as profiles
from frugal_bonsai.hardware.profile import HardwareProfile, find_profile, read_profile
from frugal_bonsai.progress import Progress, Silent
from frugal_bonsai.report.pages.profile import machines_page
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.plan import PlannedPrune, plan_fitting
from frugal_bonsai.run.report import render_page
from frugal_bonsai.run.resolve import resolve
from frugal_bonsai.version import package_version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHAPES_FILE = Path(profiles.__file__).with_name("shapes.toml")
# Windows of this many tokens are planned for.
WINDOWS = (512, 2048)
# Too small for any plan, so that the planner names the smallest cap that works.
_NO_BYTES = 1


def profile_report(
    names: Sequence[str | Path] = (),
    *,
    measured: HardwareProfile | None = None,
    kind: str = "html",
    progress: Progress | None = None,
) -> str:
    """Return the page on what machines can prune.

    Args:
        names: Profiles: files, or names of the package's.
        measured: Profile of this machine, which comes first. None leaves it out.
        kind: ``html``, ``md`` or ``json``. ``html`` needs matplotlib.
        progress: Told of each shape.

    Raises:
        OptionError: A profile cannot be read, or matplotlib is not installed.
    """
    progress = progress or Silent()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = {}
        if measured is not None:
            files[folder / "here.toml"] = measured
            profiles.write_profile(measured, folder / "here.toml")
        files |= {find_profile(name): read_profile(find_profile(name)) for name in names}
        machines = [
            {"label": file.stem.replace("here", "this machine"), **asdict(profile), "plans": []}
            for file, profile in files.items()
        ]
        for title, config in tomllib.loads(SHAPES_FILE.read_text(encoding="utf-8")).items():
            progress.note(f"planning {title}")
            with _shape(folder / title.partition(" ")[0], config) as model:
                for file, machine in zip(files, machines, strict=True):
                    for window in WINDOWS:
                        machine["plans"].append({"shape": title, **_plan(model, file, window)})
        return render_page(machines_page(machines, version=package_version()), kind)


def _shape(folder: Path, config: Mapping[str, Any]) -> Any:
    """Write a config, and open the model of its shapes."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return open_model(str(folder), headers_only=True, config_alone=True)


def _plan(model: Model, profile: Path, window: int) -> dict[str, Any]:
    """Return the smallest cap that works, and the time at it and with all memory of the machine."""
    found: dict[str, Any] = {
        "parameters": model.spec.parameters,
        "window": window,
        "needed": {},
        "at_cap": None,
        "whole": None,
    }
    whole = _planned(model, profile, window)
    if isinstance(whole, PlannedPrune):
        found["whole"] = _figures(whole)
    for cap in ("max_gpu_mem", "max_cpu_mem"):
        refused = _planned(model, profile, window, cap, _NO_BYTES)
        if not isinstance(refused, BudgetError) or cap not in refused.option.replace("-", "_"):
            continue
        found["needed"][cap] = refused.needed_bytes
        fitting = _planned(model, profile, window, cap, refused.needed_bytes)
        if found["at_cap"] is None and isinstance(fitting, PlannedPrune):
            found["at_cap"] = _figures(fitting)
    return found


def _planned(
    model: Model, profile: Path, window: int, cap: str | None = None, size_bytes: int = 0
) -> PlannedPrune | BudgetError:
    """Plan a prune on the profile's machine; return the refusal if it does not fit."""
    options = PruneOptions(
        profile=profile,
        window=window,
        max_gpu_mem=size_bytes if cap == "max_gpu_mem" else None,
        max_cpu_mem=size_bytes if cap == "max_cpu_mem" else None,
    )
    try:
        resolved = resolve(model, options, elsewhere=True)
        return plan_fitting(model, resolved, resolved.windows)
    except BudgetError as error:
        return error


def _figures(planned: PlannedPrune) -> dict[str, Any]:
    """Return the memory and the time of a plan as plain values."""
    time = planned.estimate()
    return {
        "seconds": time.total_seconds,
        "binds": time.binds,
        "totals": {where: planned.memory.total_bytes(where) for where in ("host", "gpu", "disk")},
        "caps": {"host": planned.memory.budget.host_bytes, "gpu": planned.memory.budget.gpu_bytes},
        "written": planned.work.written,
        "phases": dict(_resources(time.phases)),
    }


def _resources(phases: Sequence[Any]) -> Iterator[tuple[str, float]]:
    """Yield the seconds of each resource, summed over the phases."""
    for name in ("compute", "elementwise", "disk", "copy"):
        yield name, sum(getattr(phase, name) for phase in phases)

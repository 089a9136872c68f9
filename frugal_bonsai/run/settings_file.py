"""The file ``run.toml`` in an output: options of the command as the run resolved them.

In: a prune or an adaptation that is planned. Out: a file that ``--config`` takes: the same command
with it makes the same output. Options keep their names on the command line. Absolute paths are cut
to their last part, and a comment says so: outputs are published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from frugal_bonsai.adaptation.settings import LORA
from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.checkpoint.commit import write_bytes
from frugal_bonsai.plain_toml import exact_size, toml_literal
from frugal_bonsai.run.adapt_plan import AdaptPlans
from frugal_bonsai.run.adaptation import Adaptation
from frugal_bonsai.run.keywords import ADAPT_RENAMED, ADAPT_SETTINGS_ONLY, PRUNE_SETTINGS_ONLY
from frugal_bonsai.run.options import CommandOptions, PruneOptions
from frugal_bonsai.run.prepare import PruneRun
from frugal_bonsai.version import package_version

SETTINGS_FILE = "run.toml"
# Settings of recovery: they are refused where it is off.
_OF_RECOVERY = ("refine", "rescale", "self_windows")
_SIZES = ("max_gpu_mem", "max_cpu_mem", "max_shard_size")


def write_prune_settings(staged: Path, run: PruneRun, options: PruneOptions) -> None:
    """Write ``run.toml`` of a prune.

    Args:
        staged: Folder that is written.
        run: The prune, with its options resolved.
        options: The user's options.
    """
    resolved = run.resolved
    settings = resolved.settings.to_json()
    plain = make_settings(resolved.method, {})
    left_out = [n for n in PRUNE_SETTINGS_ONLY if settings.pop(n) != getattr(plain, n)]
    if not resolved.settings.recovery:
        settings = {name: settings[name] for name in settings if name not in _OF_RECOVERY}
    tasks = options.eval_tasks
    values = {
        "model": run.model.name,
        "method": resolved.method,
        "layout": resolved.rules.layout,
        "tile": resolved.rules.tile,
        "as_mistral": options.as_mistral,
        "calibration": resolved.source,
        "windows": resolved.windows,
        **settings,
        "eval_tasks": tasks if tasks is None or isinstance(tasks, str) else ",".join(tasks),
        "task_data": list(options.task_data) or None,
        "eval_limit": options.eval_limit,
        "assume_family": options.assume_family,
        "profile": None if options.profile is None else str(options.profile),
        **_common(options, resolved.window, str(resolved.machine.device)),
    }
    _write(staged, "prune", values, left_out)


def write_adapt_settings(staged: Path, job: Adaptation, plans: AdaptPlans) -> None:
    """Write ``run.toml`` of an adaptation.

    Args:
        staged: Folder that is written.
        job: The adaptation, with its settings resolved.
        plans: Its plans, which decide on the form of the weights and the optimiser.
    """
    options, kept, training = job.options, job.teacher_settings, plans.training
    settings = vars(job.settings) | {"optimiser": training.optimiser}
    names = {setting: name for name, setting in ADAPT_RENAMED.items()}
    named = {names.get(n, n): settings[n] for n in settings if n not in ADAPT_SETTINGS_ONLY}
    if named["minutes"] is not None:
        named["minutes"] /= 60.0
    layers = None if kept is None or not kept.layers else ",".join(map(str, kept.layers))
    values = {
        "pruned": job.pruned.name,
        "teacher": options.teacher,
        "data": list(options.data),
        **named,
        "weights": training.weights if job.settings.method == LORA else options.weights,
        "top": None if kept is None else kept.top,
        "hidden_layers": layers,
        "temperature": options.temperature,
        "teacher_cache": None if options.teacher_cache is None else str(options.teacher_cache),
        "windows": options.windows,
        **_common(options, job.window, str(job.device)),
    }
    _write(staged, "adapt", values, ())


def _common(options: CommandOptions, window: int, device: str) -> dict[str, Any]:
    """Return the options that both commands have."""
    sizes = {name: getattr(options, name) for name in _SIZES}
    return {
        "window": window,
        "eval_text": options.eval_text,
        "text_only": options.text_only,
        "device": device,
        **{name: None if size is None else exact_size(size) for name, size in sizes.items()},
    }


def _write(staged: Path, command: str, values: Mapping[str, Any], left_out: Any) -> None:
    local = [name for name, value in values.items() if value != _public(value)]
    lines = [
        f"# Options of frugal-bonsai {command} {package_version()}, as this run resolved them.",
        f"# Again: frugal-bonsai {command} --config {SETTINGS_FILE} --out DIR",
        *(f"# {name} was set from Python, and is not in this file." for name in sorted(left_out)),
        *(
            f"# {name.replace('_', '-')} was on the machine of this run; give its path on the "
            "command line, which wins."
            for name in local
        ),
        *(
            f"{name.replace('_', '-')} = {toml_literal(_public(value))}"
            for name, value in values.items()
            if value is not None
        ),
    ]
    write_bytes(staged / SETTINGS_FILE, ("\n".join(lines) + "\n").encode())


def _public(value: Any) -> Any:
    """Return a value with the names of absolute paths; an output may be published."""
    if isinstance(value, list):
        return [_public(each) for each in value]
    if not isinstance(value, str):
        return value
    before, equals, path = value.rpartition("=")  # of --task-data
    if PureWindowsPath(path).is_absolute() or path.startswith(("/", "~")):
        return before + equals + PureWindowsPath(path).name
    return value

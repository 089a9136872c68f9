"""What reads files of this program: masks, states, logs, caches, reports, profiles, settings.

In: samples, a mutator, an empty folder; see targets.py.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import click

from frugal_bonsai.adaptation.optimiser import make_optimiser
from frugal_bonsai.adaptation.state import STATE_FILE as TRAINING_FILE
from frugal_bonsai.adaptation.state import TrainingFolder
from frugal_bonsai.adaptation.teacher_cache import CACHE_FILE, TeacherCache
from frugal_bonsai.bonsai.round_log import ROUND_LOG, RoundLog
from frugal_bonsai.bonsai.settings import STATE_FILE
from frugal_bonsai.bonsai.state import StateFolder, saved_progress
from frugal_bonsai.checkpoint.checksum import CHECKSUM, with_checksum
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.cli import cli
from frugal_bonsai.hardware.profile import find_profile, read_profile
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.rewrite.mask_file import read_mask
from frugal_bonsai.run.events import read_events
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.options import EvalOptions
from frugal_bonsai.run.provenance import ADAPT_REPORT_FILE, MASK_FILE, REPORT_FILE, read_provenance
from frugal_bonsai.run.report import report_page
from frugal_bonsai.run.run_folder import EVENTS_FILE
from frugal_bonsai.run.runs import list_runs
from frugal_bonsai.run.settings_file import SETTINGS_FILE
from fuzzing.mutate import Mutator, safetensors_bytes
from fuzzing.samples import MOST_MEMORY, QUICK, Samples
from fuzzing.targets import CONFIG, Target, copy_model


@cache
def _spec(model: Path) -> ModelSpec:
    with open_model(str(model), headers_only=True) as opened:
        return opened.spec


def read_masks(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read a mask file."""
    values = json.loads((samples.pruned / MASK_FILE).read_text())
    (folder / MASK_FILE).write_bytes(mutator.json(values))
    read_mask(folder / MASK_FILE, _spec(samples.models[0]))


def _mutate_tensors(path: Path, mutator: Mutator) -> None:
    """Damage a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if mutator.draws.random() < 0.5:
        path.write_bytes(mutator.data(data))
        return
    header = mutator.json(json.loads(data[8 : 8 + length]), edits=2)
    path.write_bytes(safetensors_bytes(header, data[8 + length :]))


def _mutate_json(path: Path, mutator: Mutator) -> None:
    """Damage a JSON file; one with a checksum gets one that is right again, most of the time."""
    values = json.loads(path.read_text())
    signed = values.pop(CHECKSUM, None) is not None
    text = mutator.json(values)
    if signed and mutator.draws.random() < 0.8:
        with suppress(ValueError, RecursionError):
            changed = json.loads(text)
            text = json.dumps(
                with_checksum(changed) if isinstance(changed, dict) else changed
            ).encode()
    path.write_bytes(text)


def read_state(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read the state of a prune, and all its tensors."""
    run, spec = folder / "out.run", _spec(samples.models[0])
    shutil.copytree(samples.run, run)
    identity = json.loads((run / STATE_FILE).read_text())["identity"]
    if mutator.draws.random() < 0.6:
        _mutate_json(run / STATE_FILE, mutator)
    else:
        _mutate_tensors(mutator.draws.choice(sorted(run.rglob("*.safetensors"))), mutator)
    saved_progress(run)
    state = StateFolder(run, identity)
    loaded = state.load(spec.table)
    for group in spec.table.groups:
        state.imputation(len(loaded.rounds), group)
    if loaded.refit_mask is not None:
        readers = state.refits(len(loaded.rounds), spec, loaded.refit_mask, loaded.mask)
        for reader in readers.values():
            reader()


def resume(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Resume a prune whose state or log is damaged."""
    from frugal_bonsai.run.prune import prune

    run = folder / "out.run"
    shutil.copytree(samples.run, run)
    files = [STATE_FILE, *([ROUND_LOG] if (run / ROUND_LOG).exists() else []), EVENTS_FILE]
    name = mutator.draws.choice(files)
    if name == STATE_FILE:
        _mutate_json(run / name, mutator)
    else:
        (run / name).write_bytes(mutator.data((run / name).read_bytes()))
    model = str(samples.models[0])
    prune(model, folder / "out", resume=True, progress=False, **QUICK)


def evaluate_config(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Measure a model whose config or tokenizer is wrong."""
    from frugal_bonsai.run.evaluate import evaluate

    model = mutator.draws.choice(samples.models)
    copy_model(model, folder)
    _mutate_json(folder / mutator.draws.choice((CONFIG, CONFIG, "tokenizer_config.json")), mutator)
    options = EvalOptions(
        text="stdlib", window=16, windows=1, max_cpu_mem=MOST_MEMORY, device="cpu"
    )
    evaluate(str(folder), options, progress=False)


def read_round_log(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read and continue the log of a round."""
    values = [{"key": str(at % 2), "values": [0.5, 1.5], "tokens": 64} for at in range(4)]
    path = folder / ROUND_LOG
    path.write_bytes(b"".join(mutator.json(line, edits=1) + b"\n" for line in values))
    log = RoundLog(path)
    log.find("0")
    log.append("0", [1.0], 3)
    if RoundLog(path).find("0") != log.find("0"):
        if all(number == number for number in log.find("0").values):
            raise AssertionError("a log that was continued reads differently")


def read_event_log(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """List runs whose logs are damaged, and make their pages."""
    source = mutator.draws.choice((samples.run, samples.training, samples.pruned))
    place = folder / source.name
    place.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".jsonl"):
            shutil.copy(path, place)
    lines = (source / EVENTS_FILE).read_text().splitlines()
    damaged = [
        mutator.json(json.loads(line), edits=1) if mutator.draws.random() < 0.3 else line.encode()
        for line in lines
    ]
    (place / EVENTS_FILE).write_bytes(b"\n".join(damaged))
    read_events(place)
    list_runs(folder)
    report_page(place, kind="md")


def read_reports(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Make the page of an output whose reports are damaged; read its provenance."""
    source = mutator.draws.choice((samples.pruned, samples.adapted))
    place = folder / "out"
    shutil.copytree(source, place)
    for name in (REPORT_FILE, ADAPT_REPORT_FILE, MASK_FILE):
        if (place / name).exists() and mutator.draws.random() < 0.7:
            _mutate_json(place / name, mutator)
    if mutator.draws.random() < 0.3:
        card = place / "README.md"
        card.write_bytes(mutator.data(card.read_bytes()))
    list_runs(folder)
    with open_model(str(place), headers_only=True, check_config=False) as model:
        read_provenance(model)
    report_page(place, kind=mutator.draws.choice(("md", "json")))


def read_cache(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Open a teacher's cache and read its answers."""
    place = folder / "cache"
    shutil.copytree(samples.cache, place)
    identity = json.loads((place / CACHE_FILE).read_text())["identity"]
    if mutator.draws.random() < 0.6:
        _mutate_json(place / CACHE_FILE, mutator)
    else:
        _mutate_tensors(next(place.glob("*.safetensors")), mutator)
    cache_of = TeacherCache(place, identity)
    try:
        for window in range(min(cache_of.windows, 20)):
            cache_of.read([window])
        if cache_of.windows:
            cache_of.rest_mass()
    finally:
        cache_of.close()


def read_training(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Load the state of an adaptation."""
    import torch

    place = folder / "out.run"
    shutil.copytree(samples.training, place)
    entries, metadata = read_header(place / TRAINING_FILE)
    identity = json.loads(metadata["adapt"])["identity"]
    parameters = {
        name: torch.nn.Parameter(torch.zeros(entry.shape))
        for name, entry in entries.items()
        if not name.endswith((".exp_avg", ".exp_avg_sq", ".step"))
    }
    data = (place / TRAINING_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if mutator.draws.random() < 0.5:
        state = json.loads(metadata["adapt"])
        header["__metadata__"]["adapt"] = mutator.json(state).decode("utf-8", "replace")
        raw = json.dumps(header).encode()
        (place / TRAINING_FILE).write_bytes(safetensors_bytes(raw, data[8 + length :]))
    else:
        _mutate_tensors(place / TRAINING_FILE, mutator)
    saved = TrainingFolder(place, identity)
    saved.load(parameters, make_optimiser("adamw", parameters.values(), 1e-3))
    saved.load_best(parameters)


def read_toml(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read run.toml as options of a command."""
    source, command = mutator.draws.choice(((samples.pruned, "prune"), (samples.adapted, "adapt")))
    path = folder / SETTINGS_FILE
    path.write_bytes(_mutate_lines((source / SETTINGS_FILE).read_bytes(), mutator))
    words = [command, "--config", str(path), "--out", str(folder / "out")]
    with mock.patch.object(click.Command, "invoke", autospec=True, side_effect=_ignore):
        cli.commands[command].main(words[1:], standalone_mode=False)


def _ignore(*_: Any) -> None:
    """Stand in for the body of a command."""


def read_profiles(samples: Samples, mutator: Mutator, folder: Path) -> None:
    """Read a hardware profile."""
    path = folder / "machine.toml"
    path.write_bytes(_mutate_lines(find_profile("rtx-12gb").read_bytes(), mutator))
    read_profile(path)


def _mutate_lines(data: bytes, mutator: Mutator) -> bytes:
    """Return TOML with hostile values, keys or bytes."""
    lines = data.splitlines()
    for _ in range(mutator.draws.randint(1, 3)):
        at, kind = mutator.draws.randrange(len(lines)), mutator.draws.randrange(6)
        key, _, value = lines[at].partition(b" = ")
        if kind <= 1:
            hostile = json.dumps(mutator.hostile()).encode("utf-8", "surrogatepass")
            lines[at] = key + b" = " + hostile
        elif kind == 2:
            deep = (b"[" * 3000, b"9" * 5000, b"nan", b"-inf", b"2020-01-01", b'"\\ud800"', b"")
            lines[at] = key + b" = " + mutator.draws.choice(deep)
        elif kind == 3:
            lines[at] = mutator.draws.choice((b"x", b"a.b.c", b"[x]", b"[[y]]")) + b" = " + value
        elif kind == 4:
            lines.insert(at, lines[at])
        else:
            lines[at] = mutator.data(lines[at])
    return b"\n".join(lines)


RUN_TARGETS = {
    "mask": Target(read_masks, 60),
    "state": Target(read_state, 60),
    "resume": Target(resume, 1),
    "eval": Target(evaluate_config, 10),
    "round-log": Target(read_round_log, 60),
    "events": Target(read_event_log, 40),
    "reports": Target(read_reports, 40),
    "teacher-cache": Target(read_cache, 40),
    "training": Target(read_training, 19),
    "run.toml": Target(read_toml, 50),
    "profile": Target(read_profiles, 30),
}

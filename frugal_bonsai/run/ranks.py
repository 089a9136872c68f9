"""``prune`` on several ranks: what rank 0 tells the others, and what they do.

In: a launch, and the same command on every rank. Out: rank 0 prunes as alone, and each other rank
evaluates masks and candidates for it until it ends the run. A worker opens the model at once, and
makes its engine when rank 0 has found that the prune fits. It prints nothing; an error of it ends
the run, and rank 0 says so. Holds on a worker the memory of its sweeps, within rank 0's plan and
its own caps.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frugal_bonsai.bonsai.fingerprint import model_fingerprint
from frugal_bonsai.bonsai.masks.pairs import Utility, utility_name
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.bonsai.shared import SharedSearch
from frugal_bonsai.bonsai.state import StateFolder
from frugal_bonsai.bonsai.worker import Places, SearchWorker
from frugal_bonsai.checkpoint.commit import output_errors, remove_folder, write_bytes
from frugal_bonsai.errors import BudgetError, CheckpointError, OptionError
from frugal_bonsai.memory.budget import (
    Budget,
    enforce_gpu_cap,
    enforce_host_cap,
    find_device,
    make_budget,
)
from frugal_bonsai.memory.work import SweepLimits
from frugal_bonsai.ranks.group import Group, connect
from frugal_bonsai.ranks.launch import Launch
from frugal_bonsai.ranks.message import Message
from frugal_bonsai.ranks.tasks import Tasks
from frugal_bonsai.ranks.watch import following, leading
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.run.options import PruneOptions
from frugal_bonsai.run.prepare import PruneRun
from frugal_bonsai.run.run_folder import run_folder
from frugal_bonsai.sizes import format_bytes
from frugal_bonsai.stream.engine import Engine, compute_dtype

STORE = "store"
_TOKEN_FILE = "ranks.token"


@contextmanager
def led(launch: Launch | None) -> Iterator[Group | None]:
    """Meet the other ranks as rank 0; None if this process was started alone.

    Raises:
        RankError: The ranks do not meet, or one of them fails meanwhile.
    """
    if launch is None:
        yield None
        return
    group = connect(launch)
    with leading(group):
        yield group


def start_workers(
    group: Group, run: PruneRun, identity: dict[str, Any], state: StateFolder
) -> SharedSearch:
    """Tell the workers of a prune that is ready to begin, as rank 0.

    Args:
        group: The ranks.
        run: The prune.
        identity: Values that are equal on all ranks: settings, model, text, utility.
        state: The run directory.
    """
    token = secrets.token_hex(16)
    write_bytes(state.folder / _TOKEN_FILE, token.encode())
    memory, settings = run.memory, run.resolved.settings
    values = {
        "identity": identity,
        "limits": asdict(memory.limits),
        "needs": {"host": memory.total_bytes("host"), "gpu": memory.total_bytes("gpu")},
        "device": run.engine.device.type,
        "arithmetic": settings.arithmetic,
        "imputes": settings.imputes(uniform=run.resolved.rules.uniform),
        "keep_inputs": memory.keep_inputs,
        "token": token,
    }
    group.put("run", Message(values, {"windows": run.calibration.windows_NS}).to_bytes())
    return SharedSearch(group, state, run.engine)


def remove_token(folder: Path) -> None:
    """Remove the file by which workers recognise the run directory."""
    (folder / _TOKEN_FILE).unlink(missing_ok=True)


def work(
    launch: Launch, model: str, out: Path, options: PruneOptions, utility: Utility | None
) -> None:
    """Work for rank 0 until it ends the run.

    Args:
        launch: The place of this rank.
        model: Folder, GGUF file, hub id or ``example``.
        out: Rank 0's output folder, as this rank names it.
        options: The options of the prune.
        utility: The user's utility.

    Raises:
        RankError: Rank 0 died.
    """
    group = connect(launch)
    family, text_only = options.assume_family, options.text_only
    with (
        following(group),
        open_model(model, assume_family=family, text_only=text_only) as opened,
    ):
        told = Message.from_bytes(group.get("run"))
        places, visible = _find_places(launch, run_folder(out).absolute(), told, group)
        try:
            _require_equal(opened, told.values["identity"], utility)
            worker = SearchWorker(
                group,
                _make_engine(opened, options, told.values, places),
                PruneSettings(**told.values["identity"]["settings"]),
                told.tensors["windows"],
                places,
                imputes=told.values["imputes"],
                keep_inputs=told.values["keep_inputs"],
                utility=utility,
            )
            ready = Message({"host": launch.host, "visible": visible})
            group.put(f"ready/{launch.rank}", ready.to_bytes())
            Tasks(group).serve(worker)
        finally:
            _clear(places)


def _find_places(launch: Launch, folder: Path, told: Message, group: Group) -> tuple[Places, bool]:
    """Return the folders of a worker, and whether it sees rank 0's run directory."""
    token = folder / _TOKEN_FILE
    visible = token.is_file() and token.read_bytes() == told.values["token"].encode()
    rank_0 = Message.from_bytes(group.get("rank/0")).values
    here = visible and launch.host == rank_0["host"]
    store = folder / STORE if here else None
    own = (store or folder) / f"rank-{launch.rank}"
    with output_errors(own):
        own.mkdir(parents=True, exist_ok=True)
    return Places(run=folder, store=store, own=own), visible


def _clear(places: Places) -> None:
    """Remove a worker's folder, and a run directory that it made on another host."""
    remove_folder(places.own)
    if places.store is None and places.run.is_dir() and not any(places.run.iterdir()):
        places.run.rmdir()


def _require_equal(model: Model, identity: dict[str, Any], utility: Utility | None) -> None:
    """Check that this rank has rank 0's model and utility.

    Raises:
        CheckpointError: The model here is another one.
        OptionError: The utility here is another one.
    """
    if model_fingerprint(model.checkpoint) != identity["model"]:
        raise CheckpointError(
            f"{model.name}: config or tensor headers differ from those that rank 0 reads; put the "
            f"same model on each host"
        )
    name = None if utility is None else utility_name(utility)
    if name != identity["utility"]:
        raise OptionError(
            f"utility: is {name} here and {identity['utility']} on rank 0; call prune with the "
            f"same arguments on each rank"
        )


def _make_engine(
    model: Model, options: PruneOptions, told: dict[str, Any], places: Places
) -> Engine:
    """Return an engine within rank 0's limits and this rank's caps.

    Raises:
        BudgetError: The device is of another kind, or a cap here cannot hold rank 0's plan.
    """
    device = find_device(options.device)
    if device.type != told["device"]:
        raise BudgetError(
            f"--device: computes on {device.type} here, rank 0 on {told['device']}; use one kind "
            f"of device, or --device cpu on all ranks"
        )
    budget, needs = make_budget(device, options.caps), told["needs"]
    shares_plan = places.store is not None and options.caps.host_bytes is None
    _require_room(budget, needs, host=not shares_plan)
    enforce_host_cap(budget.host_bytes, needs["host"])
    if budget.gpu_bytes is not None:
        enforce_gpu_cap(device, budget)
    return Engine(
        model.checkpoint,
        model.spec,
        device=device,
        dtype=compute_dtype(device),
        limits=SweepLimits(**told["limits"]),
        arithmetic=told["arithmetic"],
        disk=places.own,
    )


def _require_room(budget: Budget, needs: dict[str, int], *, host: bool) -> None:
    """Check that this rank's caps hold rank 0's plan.

    Raises:
        BudgetError: A cap is too small.
    """
    caps = [("--max-gpu-mem", budget.gpu_bytes, needs["gpu"])]
    if host:
        caps.append(("--max-cpu-mem", budget.host_bytes, needs["host"]))
    for option, cap, needed in caps:
        if cap is not None and needed > cap:
            raise BudgetError(
                f"{option}: {format_bytes(cap)} here cannot hold the plan of rank 0, which takes "
                f"{format_bytes(needed)}; give all ranks {option} {cap}, so that rank 0 plans with "
                f"it too",
                option=option,
                needed_bytes=needed,
            )

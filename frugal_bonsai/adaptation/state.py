"""The state of a training on disk, from which it can be resumed.

In: parameters, the optimiser's moments, progress. Out: ``adapt.safetensors``, with the progress in
its header so that both always belong to the same step, and ``best.safetensors`` with the parameters
of the best held-out perplexity. Each file is replaced as a whole. Random numbers are seeded by seed
and pass, so no generator is saved. Holds one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frugal_bonsai.adaptation.optimiser import kept_state, restore_state
from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import open_tensors, write_tensors
from frugal_bonsai.errors import WRONG_VALUES, CheckpointError, StateError
from frugal_bonsai.plain_json import parse_json

STATE_FILE, BEST_FILE = "adapt.safetensors", "best.safetensors"
VERSION = 1
# Entries of the optimisers' states that have the parameter's shape.
_MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}


@dataclass(kw_only=True)
class TrainingState:
    """Progress of a training.

    Attributes:
        step: number of finished steps.
        seconds: time spent, with held-out measurements.
        best_step: step of the best held-out perplexity; 0 is the untrained model.
        best_perplexity: best held-out perplexity; None before the first measurement.
        history: one entry for each measurement.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_perplexity: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def _require_types(state: TrainingState) -> None:
    """Raise ``TypeError`` unless a state has values that a training can have."""
    for name, value in (("step", state.step), ("best_step", state.best_step)):
        if not isinstance(value, int) or value < 0:
            raise TypeError(f"{name} is {value!r:.80}")
    if not isinstance(state.seconds, int | float) or not 0 <= state.seconds < math.inf:
        raise TypeError(f"seconds is {state.seconds!r:.80}")
    if not isinstance(state.history, list):
        raise TypeError(f"history is {state.history!r:.80}")
    if not isinstance(state.best_perplexity, int | float | None):
        raise TypeError(f"best_perplexity is {state.best_perplexity!r:.80}")
    if not all(isinstance(entry, dict) for entry in state.history):
        raise TypeError("an entry of history is no object")


class TrainingFolder:
    """Reads and writes a training's state.

    Args:
        folder: the run directory; created at the first save.
        identity: plain values that must be equal for a resume (settings, model, windows).
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, json.loads(json.dumps(identity))

    @property
    def exists(self) -> bool:
        """Whether a state has been saved."""
        return (self.folder / STATE_FILE).exists()

    def save(
        self,
        state: TrainingState,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Replace the saved state.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {name: value.detach() for name, value in parameters.items()}
        for name, value in parameters.items():
            for entry, kept in kept_state(optimiser, value).items():
                tensors[f"{name}.{entry}"] = kept
        header = {"version": VERSION, "identity": self._identity, "state": asdict(state)}
        self._write(STATE_FILE, tensors, {"adapt": json.dumps(header)})

    def load(
        self, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
    ) -> TrainingState:
        """Copy the saved values into parameters and optimiser; return the progress.

        Raises:
            StateError: the state is damaged, of another version, or made with other options.
        """
        state = self._read_progress()
        with open_tensors(self.folder / STATE_FILE) as file:
            self._copy(file, parameters)
            for name, value in parameters.items():
                kept = {
                    entry.removeprefix(f"{name}."): file.read(entry)
                    for entry in file.tensors
                    if entry.startswith(f"{name}.")
                }
                for entry in _MOMENTS & kept.keys():
                    if kept[entry].shape != value.shape:
                        raise StateError(
                            f"{self.folder / STATE_FILE}: {name}.{entry} has shape "
                            f"{list(kept[entry].shape)}, expected {list(value.shape)}; "
                            f"{self._advice}"
                        )
                if kept:
                    restore_state(optimiser, value, kept, state.step)
        return state

    def save_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Save these parameters as the best so far."""
        self._write(BEST_FILE, {name: value.detach() for name, value in parameters.items()})

    def load_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the best parameters into these.

        Raises:
            CheckpointError: their file is missing or damaged.
            StateError: they have other names or shapes.
        """
        with open_tensors(self.folder / BEST_FILE) as file:
            self._copy(file, parameters)

    @torch.no_grad()
    def _copy(self, file: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy a file's tensors into the parameters."""
        for name, value in parameters.items():
            shape = tuple(value.shape)
            if name not in file.tensors or file.tensors[name].shape != shape:
                raise StateError(
                    f"{self.folder}: has no saved {name!r} of shape {shape}; {self._advice}"
                )
            value.copy_(file.read(name))

    @property
    def _advice(self) -> str:
        return f"delete {self.folder} and start again"

    def _write(
        self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.folder / name, tensors, metadata)

    def _read_progress(self) -> TrainingState:
        """Return the saved progress, if it belongs to this run."""
        path = self.folder / STATE_FILE
        try:
            _, metadata = read_header(path)
            saved = parse_json(metadata["adapt"])
            version, identity = saved["version"], dict(saved["identity"])
            state = TrainingState(**saved["state"])
            _require_types(state)
        except (CheckpointError, *WRONG_VALUES) as error:
            raise StateError(f"{path}: cannot be read ({error}); {self._advice}") from error
        if version != VERSION:
            raise StateError(f"{path}: version {version!r}, expected {VERSION}; {self._advice}")
        differ = [key for key in self._identity if identity.get(key) != self._identity[key]]
        if differ:
            raise StateError(
                f"{path}: was made with other options ({', '.join(differ)}); resume with the same "
                f"ones, or {self._advice}"
            )
        return state

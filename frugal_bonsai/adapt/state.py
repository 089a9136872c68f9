"""What a training run needs to go on: one file, replaced whole.

In: parameters, the optimiser's moments, where the training stands. Out: ``adapt.safetensors`` with
the numbers in its header, so that both are of the same step; and ``best.safetensors``, the
parameters of the best held-out perplexity so far, written before it. Draws are seeded by seed and
pass, so no generator is kept. Holds one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frugal_bonsai.adapt.optimiser import kept_state, restore_state
from frugal_bonsai.checkpoint.commit import output_errors
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import open_tensors, write_tensors
from frugal_bonsai.errors import CheckpointError, StateError

STATE_FILE, BEST_FILE = "adapt.safetensors", "best.safetensors"
VERSION = 1


@dataclass(kw_only=True)
class TrainingState:
    """Where a training stands.

    Attributes:
        step: steps done.
        seconds: spent so far.
        best_step: of the best held-out perplexity; 0 is the pruned model as it came.
        best_perplexity: None before the first measurement.
        history: one report a measurement.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_perplexity: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class TrainingFolder:
    """Reads and writes a training's state.

    Args:
        folder: the run directory.
        identity: what must be equal for a resume, plain values.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, json.loads(json.dumps(identity))

    @property
    def exists(self) -> bool:
        """Whether a state has been saved here."""
        return (self.folder / STATE_FILE).exists()

    def save(
        self,
        state: TrainingState,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Replace the state.

        Raises:
            OutputError: it cannot be written.
        """
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach() for name, value in parameters.items()}
        for name, value in parameters.items():
            for part, kept in kept_state(optimiser, value).items():
                tensors[f"{name}.{part}"] = kept
        said = {"version": VERSION, "identity": self._identity, "state": asdict(state)}
        write_tensors(self.folder / STATE_FILE, tensors, {"adapt": json.dumps(said)})

    def load(
        self, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
    ) -> TrainingState:
        """Put the saved values into parameters and optimiser; where the training stands.

        Raises:
            StateError: damaged, of another version, or made with other options.
        """
        path = self.folder / STATE_FILE
        advice = f"delete {self.folder} and start again"
        try:
            entries, metadata = read_header(path)
            said = json.loads(metadata["adapt"])
            version, identity = said["version"], said["identity"]
            state = TrainingState(**said["state"])
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"{path}: cannot be read ({error}); {advice}") from error
        if version != VERSION:
            raise StateError(f"{path}: version {version!r}, expected {VERSION}; {advice}")
        differ = [key for key in self._identity if identity.get(key) != self._identity[key]]
        if differ:
            raise StateError(
                f"{path}: was made with other options ({', '.join(differ)}); resume with the same "
                f"ones, or {advice}"
            )
        expected = {name: tuple(value.shape) for name, value in parameters.items()}
        if any(entries[n].shape != s if n in entries else True for n, s in expected.items()):
            raise StateError(f"{path}: has not the adapters of this model; {advice}")
        with Checkpoint(self.folder, {}, entries) as file, torch.no_grad():
            for name, value in parameters.items():
                value.copy_(file.read(name))
                kept = {
                    entry.removeprefix(f"{name}."): file.read(entry)
                    for entry in entries
                    if entry.startswith(f"{name}.")
                }
                if kept:
                    restore_state(optimiser, value, kept, state.step)
        return state

    def save_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep these parameters as the best so far."""
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self.folder / BEST_FILE, {n: v.detach() for n, v in parameters.items()})

    def load_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the best parameters in place.

        Raises:
            CheckpointError: their file is missing or damaged.
        """
        with open_tensors(self.folder / BEST_FILE) as file, torch.no_grad():
            for name, value in parameters.items():
                value.copy_(file.read(name))

"""What a resume needs: saved after every round, atomically.

In: the search's state. Out: a folder ``round_NNN`` (prior, refit projections) and ``state.json``,
which names it and is replaced last; a run stopped at any moment finds the last whole round. Random
draws are seeded by seed and round, so no generator has to be kept. Holds one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.importance.scores import ImportanceScores
from frugal_bonsai.bonsai.masks.curve_priors import Ahead
from frugal_bonsai.checkpoint.commit import output_errors, write_json
from frugal_bonsai.checkpoint.header import read_header
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.tensor_file import read_tensor, write_tensors
from frugal_bonsai.errors import StateError
from frugal_bonsai.model.cut import kept_indices, slices_by_tensor
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.mask_json import mask_from_json, mask_to_json
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitTable

STATE_FILE = "state.json"
VERSION = 2
PRIOR_FILE = "prior.safetensors"
_NORM_FILE = "refit_norm.safetensors"
_SCORE = "score"
_KEYS = ["ahead", "forward_tokens", "identity", "prior", "refit", "removed", "rounds", "version"]


@dataclass(kw_only=True)
class PruneState:
    """Where a prune stands.

    Attributes:
        mask: units kept.
        rounds: one report a finished round.
        forward_tokens: tokens spent so far.
        prior: for the next round.
        refit_mask: the mask that the saved refits' columns belong to; None before any recovery.
        ahead: what the last round's curves foretell of more units; None where it had none.
    """

    mask: KeepMask
    rounds: list[dict[str, Any]] = field(default_factory=list)
    forward_tokens: int = 0
    prior: ImportanceScores | None = None
    refit_mask: KeepMask | None = None
    ahead: Ahead | None = None


class StateFolder:
    """Reads and writes a run's state.

    Args:
        folder: the run directory.
        identity: what must be equal for a resume (settings, model, text), plain values.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity

    @property
    def exists(self) -> bool:
        """Whether a state has been saved here."""
        return (self.folder / STATE_FILE).exists()

    def round_folder(self, number: int) -> Path:
        """Where a round's tensors lie."""
        return self.folder / f"round_{number:03d}"

    def save(self, state: PruneState) -> None:
        """Commit the state of a finished round; the round's refits are in its folder already."""
        number = len(state.rounds)
        folder = self.round_folder(number)
        _make_folder(folder)
        if state.prior is not None:
            write_tensors(
                folder / PRIOR_FILE, {_SCORE: state.prior.score_N, **(state.prior.means or {})}
            )
        write_json(
            self.folder / STATE_FILE,
            {
                "version": VERSION,
                "identity": self._identity,
                "rounds": state.rounds,
                "forward_tokens": state.forward_tokens,
                "removed": mask_to_json(state.mask),
                "prior": None if state.prior is None else state.prior.name,
                "refit": state.refit_mask is not None,
                "ahead": None if state.ahead is None else state.ahead._asdict(),
            },
        )
        for old in self.folder.glob("round_*"):
            if old != folder:
                shutil.rmtree(old)

    def load(self, table: UnitTable) -> PruneState:
        """The last committed state.

        Raises:
            StateError: damaged, of another version, or made with other options.
        """
        path = self.folder / STATE_FILE
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StateError(
                f"{path}: cannot be read ({error}); delete {self.folder} and start again"
            ) from error
        found = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        if found != _KEYS:
            raise StateError(
                f"{path}: is damaged (found {found}, expected {_KEYS}); delete {self.folder} and "
                f"start again"
            )
        if saved["version"] != VERSION:
            raise StateError(
                f"{path}: version {saved['version']!r}, expected {VERSION}; resume with the "
                f"frugal-bonsai that began it, or delete {self.folder}"
            )
        self._compare(path, saved["identity"])
        mask = mask_from_json(table, saved["removed"])
        state = PruneState(
            mask=mask, rounds=saved["rounds"], forward_tokens=saved["forward_tokens"]
        )
        folder = self.round_folder(len(state.rounds))
        if saved["prior"] is not None:
            state.prior = _read_prior(folder / PRIOR_FILE, saved["prior"])
        if saved["refit"]:
            state.refit_mask = mask
        if saved["ahead"] is not None:
            state.ahead = Ahead(**saved["ahead"])
        return state

    def _compare(self, path: Path, saved: dict[str, Any]) -> None:
        then, now = _flat(saved), _flat(self._identity)
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key):
                raise StateError(
                    f"{path}: was made with {key} = {then.get(key)!r}, now it is "
                    f"{now.get(key)!r}; use the same options to resume, or delete {self.folder}"
                )

    # -- stand-ins ------------------------------------------------------------------------------
    def save_stand_in(
        self, number: int, group: UnitGroup, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Keep one group's stand-ins for the round after ``number``."""
        path = self._stand_in(number, group)
        _make_folder(path.parent)
        write_tensors(path, tensors)

    def stand_in(self, number: int, group: UnitGroup) -> dict[str, torch.Tensor] | None:
        """What :meth:`save_stand_in` kept; None where it kept nothing."""
        path = self._stand_in(number, group)
        if not path.exists():
            return None
        return {name: read_tensor(path, name) for name in ("columns", "matrix")}

    def _stand_in(self, number: int, group: UnitGroup) -> Path:
        kind = group.kind if group.expert is None else f"{group.kind}_{group.expert:05d}"
        return self.round_folder(number) / f"stand_in_{group.layer:05d}_{kind}.safetensors"

    # -- refits ---------------------------------------------------------------------------------
    def save_refit(
        self,
        number: int,
        layer: int | None,
        weights: dict[str, torch.Tensor],
        dtypes: dict[str, torch.dtype] | None = None,
    ) -> None:
        """Keep one layer's refit projections for round ``number``, in these dtypes.

        No layer: the final norm.
        """
        folder = self.round_folder(number)
        _make_folder(folder)
        name = _NORM_FILE if layer is None else f"refit_{layer:05d}.safetensors"
        write_tensors(folder / name, weights, dtypes=dtypes)

    def refits(
        self, number: int, spec: ModelSpec, refit_mask: KeepMask, mask: KeepMask
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """Round ``number``'s refit weights as functions that read them, cut to ``mask``.

        Args:
            number: the round that saved them.
            spec: the dense model.
            refit_mask: the units kept in that round.
            mask: the units kept now, a subset.
        """
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        cuts = slices_by_tensor(spec.table)
        for layer in range(spec.layers):
            path = self.round_folder(number) / f"refit_{layer:05d}.safetensors"
            entries, _ = read_header(path)
            for name in entries:
                if name not in cuts:  # a bias of an output projection: nothing is cut from it
                    readers[name] = partial(read_tensor, path, name)
                    continue
                axis = cuts[name][0][1].axis
                extent = spec.layer_tensors[layer][name.removeprefix(spec.prefix(layer))][axis]
                then_K = kept_indices(extent, cuts[name], refit_mask)
                stay_K = torch.isin(then_K, kept_indices(extent, cuts[name], mask))
                readers[name] = _RefitReader(path, name, axis, stay_K.nonzero().flatten())
        norm = self.round_folder(number) / _NORM_FILE
        if norm.exists():
            readers |= {name: partial(read_tensor, norm, name) for name in read_header(norm)[0]}
        return readers


def _make_folder(folder: Path) -> None:
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in this folder; empty where there is none, or none that can be read.

    What is wrong with a state is :meth:`StateFolder.load`'s to say.
    """
    try:
        saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return dict(saved["identity"]["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _flat(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in a group are compared, and named, one by one: ``settings.masks``."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


@dataclass(frozen=True)
class _RefitReader:
    """Reads one refit weight and drops the rows or columns of units that have gone since."""

    path: Path
    name: str
    axis: int
    stay_K: torch.Tensor

    def __call__(self) -> torch.Tensor:
        return read_tensor(self.path, self.name).index_select(self.axis, self.stay_K)


def _read_prior(path: Path, name: str) -> ImportanceScores:
    entries, _ = read_header(path)
    means = {entry: read_tensor(path, entry) for entry in entries if entry != _SCORE}
    return ImportanceScores(name, read_tensor(path, _SCORE), means or None)


def fingerprint(*parts: bytes) -> str:
    """A short hash that tells two inputs apart."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of a checkpoint's config and headers, not of its weights."""
    entries = sorted(
        (name, entry.dtype, entry.shape, entry.start) for name, entry in checkpoint.tensors.items()
    )
    return fingerprint(
        json.dumps(checkpoint.config, sort_keys=True).encode(), repr(entries).encode()
    )

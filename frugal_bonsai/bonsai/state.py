"""The state of a prune, saved atomically after the first scores and after every round.

In: the search's state. Out: a folder ``round_NNN`` (importance scores, imputations, refit
projections) and ``state.json``, which names it and is replaced last, so that a run stopped at any
moment resumes after its last whole round. Random draws depend on seed and round alone; no generator
is saved. Holds one tensor at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.bonsai.importance.scores import ImportanceScores
from frugal_bonsai.bonsai.settings import STATE_FILE
from frugal_bonsai.checkpoint.checksum import CHECKSUM, is_whole, with_checksum
from frugal_bonsai.checkpoint.commit import output_errors, write_json
from frugal_bonsai.checkpoint.header import TensorEntry, read_header
from frugal_bonsai.checkpoint.tensor_file import read_tensor, write_tensors
from frugal_bonsai.errors import OptionError, StateError
from frugal_bonsai.model.cut import kept_indices, slices_by_tensor
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.mask_json import mask_from_json, mask_to_json
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitTable
from frugal_bonsai.plain_json import read_json

VERSION = 3
PRIOR_FILE = "prior.safetensors"
_NORM_FILE = "refit_norm.safetensors"
_SCORE = "score"
# Keys of the state and the types of their values.
_TYPES: dict[str, Any] = {
    **{"forward_tokens": int, "identity": dict, "prior": str | None, "refit": bool},
    **{"removed": dict, "rounds": list, "version": int},
}


@dataclass(kw_only=True)
class PruneState:
    """The state of a prune after a round, or before the first one.

    Attributes:
        mask: Units alive.
        rounds: One report per finished round.
        forward_tokens: Tokens through the model so far.
        importance: Scores of the units for the next round.
        refit_mask: The mask whose columns the saved refits have; None before any reconstruction.
    """

    mask: KeepMask
    rounds: list[dict[str, Any]] = field(default_factory=list)
    forward_tokens: int = 0
    importance: ImportanceScores | None = None
    refit_mask: KeepMask | None = None


class StateFolder:
    """Reads and writes the state of a run.

    Args:
        folder: The run directory.
        identity: Plain values that must be equal for a resume (settings, model, text).
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity

    @property
    def exists(self) -> bool:
        """True if a state has been saved here."""
        return (self.folder / STATE_FILE).exists()

    def round_folder(self, number: int) -> Path:
        """Return the folder of a round's tensors."""
        return self.folder / f"round_{number:03d}"

    def save(self, state: PruneState) -> None:
        """Commit the state after a round, whose refits are in its folder already."""
        number = len(state.rounds)
        folder = self.round_folder(number)
        _make_folder(folder)
        scores = state.importance
        if scores is not None:
            write_tensors(folder / PRIOR_FILE, {_SCORE: scores.score_N, **(scores.means or {})})
        write_json(
            self.folder / STATE_FILE,
            with_checksum(
                {
                    "version": VERSION,
                    "identity": self._identity,
                    "rounds": state.rounds,
                    "forward_tokens": state.forward_tokens,
                    "removed": mask_to_json(state.mask),
                    "prior": None if scores is None else scores.name,
                    "refit": state.refit_mask is not None,
                }
            ),
        )
        for old in self.folder.glob("round_*"):
            if old != folder:
                shutil.rmtree(old)

    def load(self, table: UnitTable) -> PruneState:
        """Return the last committed state.

        Raises:
            StateError: The state is damaged, of another version, or made with other options.
        """
        path = self.folder / STATE_FILE
        try:
            saved = read_json(path)
        except (OSError, ValueError) as error:
            raise StateError(
                f"{path}: cannot be read ({error}); delete {self.folder} and start again"
            ) from error
        version = saved.get("version") if isinstance(saved, dict) else None
        if version not in (None, VERSION):
            raise StateError(
                f"{path}: version {version!r}, expected {VERSION}; resume with the "
                f"frugal-bonsai that began it, or delete {self.folder}"
            )
        fault = _find_fault(saved)
        if fault is not None:
            raise self._damaged(path, fault)
        self._compare(path, saved["identity"])
        try:
            mask = mask_from_json(table, saved["removed"])
        except OptionError as error:
            raise self._damaged(path, str(error)) from error
        state = PruneState(
            mask=mask, rounds=saved["rounds"], forward_tokens=saved["forward_tokens"]
        )
        folder = self.round_folder(len(state.rounds))
        if saved["prior"] is not None:
            state.importance = _read_prior(folder / PRIOR_FILE, saved["prior"])
        if saved["refit"]:
            state.refit_mask = mask
        return state

    def _damaged(self, path: Path, fault: str) -> StateError:
        return StateError(f"{path}: is damaged ({fault}); delete {self.folder} and start again")

    def _compare(self, path: Path, saved: dict[str, Any]) -> None:
        then, now = _flat(saved), _flat(self._identity)
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key):
                raise StateError(
                    f"{path}: was made with {key} = {then.get(key)!r}, now it is "
                    f"{now.get(key)!r}; use the same options to resume, or delete {self.folder}"
                )

    # -- imputations ----------------------------------------------------------------------------
    def save_imputation(
        self, number: int, group: UnitGroup, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Save one group's imputation for the round after ``number``."""
        path = self._imputation_path(number, group)
        _make_folder(path.parent)
        write_tensors(path, tensors)

    def imputation(self, number: int, group: UnitGroup) -> dict[str, torch.Tensor] | None:
        """Return the tensors of :meth:`save_imputation`; None where nothing was saved."""
        path = self._imputation_path(number, group)
        if not path.exists():
            return None
        return {name: read_tensor(path, name) for name in ("columns", "matrix")}

    def _imputation_path(self, number: int, group: UnitGroup) -> Path:
        kind = group.kind if group.expert is None else f"{group.kind}_{group.expert:05d}"
        return self.round_folder(number) / f"imputation_{group.layer:05d}_{kind}.safetensors"

    # -- refits ---------------------------------------------------------------------------------
    def save_refit(
        self,
        number: int,
        layer: int | None,
        weights: dict[str, torch.Tensor],
        dtypes: dict[str, torch.dtype] | None = None,
    ) -> None:
        """Save one layer's refit projections of round ``number``, in these dtypes.

        The layer None stands for the final norm.
        """
        path = self._refit_path(number, layer)
        _make_folder(path.parent)
        write_tensors(path, weights, dtypes=dtypes)

    def layer_refits(self, number: int, layer: int) -> dict[str, Callable[[], torch.Tensor]]:
        """Return readers of one layer's refit projections of round ``number``, uncut."""
        path = self._refit_path(number, layer)
        return {name: partial(read_tensor, path, name) for name in read_header(path)[0]}

    def _refit_path(self, number: int, layer: int | None) -> Path:
        name = _NORM_FILE if layer is None else f"refit_{layer:05d}.safetensors"
        return self.round_folder(number) / name

    def refits(
        self, number: int, spec: ModelSpec, refit_mask: KeepMask, mask: KeepMask
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """Return readers of round ``number``'s refit weights, cut to ``mask``.

        Args:
            number: The round that saved them.
            spec: The dense model.
            refit_mask: Units alive in that round.
            mask: Units alive now, a subset.
        """
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        cuts = slices_by_tensor(spec.table)
        for layer in range(spec.layers):
            path = self._refit_path(number, layer)
            entries, _ = read_header(path)
            for name in entries:
                if name not in cuts:  # a bias of an output projection: nothing is cut from it
                    readers[name] = partial(read_tensor, path, name)
                    continue
                axis = cuts[name][0][1].axis
                extent = spec.layer_tensors[layer][name.removeprefix(spec.prefix(layer))][axis]
                then_K = kept_indices(extent, cuts[name], refit_mask)
                _require_length(path, entries[name], axis, len(then_K))
                stay_K = torch.isin(then_K, kept_indices(extent, cuts[name], mask))
                readers[name] = partial(_read_rest, path, name, axis, stay_K.nonzero().flatten())
        norm = self._refit_path(number, None)
        if norm.exists():
            readers |= {name: partial(read_tensor, norm, name) for name in read_header(norm)[0]}
        return readers


def _make_folder(folder: Path) -> None:
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def saved_progress(folder: Path) -> tuple[dict[str, Any], int]:
    """Return the settings and the number of finished rounds of the run in this folder.

    They are empty and 0 if they cannot be read: :meth:`StateFolder.load` reports faults of a state.
    """
    try:
        saved = read_json(folder / STATE_FILE)
    except (OSError, ValueError):
        return {}, 0
    if not isinstance(saved, dict) or _find_fault(saved) is not None:
        return {}, 0
    settings = saved["identity"].get("settings")
    return (dict(settings), len(saved["rounds"])) if isinstance(settings, dict) else ({}, 0)


def _find_fault(saved: Any) -> str | None:
    """Return what a state lacks or has of a wrong type; None if nothing is wrong."""
    if not isinstance(saved, dict):
        return f"found {type(saved).__name__}, expected an object"
    if not is_whole(saved):
        return "it differs from its checksum"
    found = sorted(saved.keys() - {CHECKSUM})
    if found != sorted(_TYPES):
        return f"found {found}, expected {sorted(_TYPES)}"
    for key, expected in _TYPES.items():
        value = saved[key]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is int):
            return f"{key} is {type(value).__name__}"
    if not all(isinstance(report, dict) for report in saved["rounds"]):
        return "a round's report is no object"
    return None


def _flat(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values, so that errors can name each one: ``settings.masks``."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _require_length(path: Path, entry: TensorEntry, axis: int, expected: int) -> None:
    """Check that a refit weight has as many rows or columns as there were units."""
    if len(entry.shape) <= axis or entry.shape[axis] != expected:
        raise StateError(
            f"{path}: tensor {entry.name!r} has shape {list(entry.shape)}, expected {expected} in "
            f"dimension {axis}; delete {path.parent.parent} and start again"
        )


def _read_rest(path: Path, name: str, axis: int, stay_K: torch.Tensor) -> torch.Tensor:
    """Read one refit weight and drop the rows or columns of units that have gone since."""
    return read_tensor(path, name).index_select(axis, stay_K)


def _read_prior(path: Path, name: str) -> ImportanceScores:
    entries, _ = read_header(path)
    means = {entry: read_tensor(path, entry) for entry in entries if entry != _SCORE}
    return ImportanceScores(name, read_tensor(path, _SCORE), means or None)

"""Masks as files: shared without weights, applied on any machine.

In: a :class:`ModelSpec` and a :class:`KeepMask`, or a JSON file. Out: the file, or the mask after
every check that a stranger's file needs. docs/formats.md describes the format. A file belongs to a
model by its geometry (architecture, head counts, names and shapes of all tensors), not by its
weights: a fine-tune of the same model takes the same mask. Holds one number a removed unit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugal_bonsai.checkpoint.commit import write_json
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.rewrite.layouts.widths import require_units

FORMAT = 2
_KEYS = ("format", "model", "removed")
_MODEL_KEYS = ("name", "family", "geometry")


def geometry(spec: ModelSpec) -> str:
    """SHA-256 of what a mask's indices refer to: two models with equal ones share masks.

    Not in it: weights, their dtype, the order of files, a tied head that is stored twice, and
    config keys that change no shape.
    """
    layers = [sorted((name, list(shape)) for name, shape in t.items()) for t in spec.layer_tensors]
    others = sorted((name, list(shape)) for name, shape in spec.other_tensors.items())
    heads = [spec.heads, spec.kv_heads, spec.head_dim]
    facts = [spec.family.model_type, heads, spec.tied, layers, others]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_mask(path: Path, name: str, spec: ModelSpec, mask: KeepMask) -> None:
    """Write a mask file, atomically.

    Args:
        path: of the file.
        name: what the dense model is called, for people; nothing is looked up by it.
        spec: the dense model.
        mask: the units kept.

    Raises:
        OutputError: the file cannot be written.
    """
    model = {"name": name, "family": spec.family.model_type, "geometry": geometry(spec)}
    write_json(path, {"format": FORMAT, "model": model, "removed": mask.to_json()})


def read_mask(path: Path, spec: ModelSpec) -> KeepMask:
    """The mask in a file, for the dense model that it was made for.

    Raises:
        OptionError: unreadable, another format, unknown or missing keys, another model's mask, or
            units that do not exist; the text names what is wrong and where.
    """
    path = Path(path)
    values = _read_json(path)
    found = values.get("format") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or found != FORMAT or isinstance(found, bool):
        raise OptionError(
            f"--mask {path}: format is {found!r}, expected {FORMAT}; is it the pruning_mask.json "
            "of a prune with this version?"
        )
    _require_keys(path, "the file", values, _KEYS)
    _require_keys(path, "'model'", values["model"], _MODEL_KEYS)
    _require_model(path, values["model"], spec)
    return _read_units(path, values["removed"], spec)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(
            f"--mask {path}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    except RecursionError as error:
        raise OptionError(f"--mask {path}: is nested too deeply to be a mask") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise OptionError(f"--mask {path}: is not JSON ({error}); get the file again") from error


def _require_keys(path: Path, what: str, values: Any, expected: tuple[str, ...]) -> None:
    """Exactly these keys: one that is not understood may change what the mask means."""
    if not isinstance(values, Mapping):
        raise OptionError(f"--mask {path}: {what} is {_kind(values)}, expected an object")
    if set(values) != set(expected):
        unknown = sorted(set(values) - set(expected))
        missing = sorted(set(expected) - set(values))
        said = [f"unknown keys {unknown}"] * bool(unknown) + [f"no {missing}"] * bool(missing)
        raise OptionError(
            f"--mask {path}: {what} has {' and '.join(said)}; expected exactly "
            f"{', '.join(expected)}"
        )


def _require_model(path: Path, model: Mapping[str, Any], spec: ModelSpec) -> None:
    expected = geometry(spec)
    if model["geometry"] != expected:
        raise OptionError(
            f"--mask {path}: belongs to another model: {model['name']!r} (family "
            f"{model['family']!r}, geometry {str(model['geometry'])[:12]}...), this one is a "
            f"{spec.family.model_type} of geometry {expected[:12]}...; name the dense model that "
            "the mask was made from, or one of the same shapes"
        )


def _read_units(path: Path, removed: Any, spec: ModelSpec) -> KeepMask:
    table = spec.table
    _require_keys(path, "'removed'", removed, table.kinds)
    mask = KeepMask(table)
    for kind, layers in removed.items():
        groups = [group for group in table.groups if group.kind == kind]
        if not isinstance(layers, list) or len(layers) != len(groups):
            found = f"{len(layers)} layers" if isinstance(layers, list) else _kind(layers)
            raise OptionError(
                f"--mask {path}: removed[{kind!r}] lists {found}, the model has {len(groups)} "
                "layers; expected one list a layer"
            )
        for group, units in zip(groups, layers, strict=True):
            _remove(path, mask, group, units)
    try:
        require_units(spec, mask)
    except OptionError as error:
        raise OptionError(f"--mask {path}: {error}") from error
    return mask


def _remove(path: Path, mask: KeepMask, group: UnitGroup, units: Any) -> None:
    """Mark one group's units as removed; its list is sorted out first."""
    where = f"--mask {path}: removed[{group.kind!r}], layer {group.layer}"
    if not isinstance(units, list):
        raise OptionError(f"{where}: is {_kind(units)}, expected a list of unit numbers")
    for unit in units:
        if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < group.count:
            raise OptionError(
                f"{where}: names unit {unit!r}, expected whole numbers 0..{group.count - 1}"
            )
    if len(set(units)) != len(units):
        twice = next(unit for unit in units if units.count(unit) > 1)
        raise OptionError(f"{where}: names unit {twice} twice")
    mask.of(group)[units] = False


def _kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")

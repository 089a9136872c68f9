"""Mask files: a mask without weights that can be shared and applied on another machine.

In: a :class:`ModelSpec` and a :class:`KeepMask`, or a JSON file. Out: the file, or the mask after
checks of everything in the file, which may come from a stranger. docs/formats.md describes the
format. A file belongs to all models of one geometry (architecture, head counts, names and shapes of
all tensors), whatever their weights: a fine-tuned model takes the mask of its base model. Holds one
number per removed unit.
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
from frugal_bonsai.model.mask_json import json_type, mask_from_json, mask_to_json
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.plain_json import read_json
from frugal_bonsai.rewrite.layouts.widths import require_units

FORMAT = 2
_KEYS = ("format", "model", "removed")
_MODEL_KEYS = ("name", "family", "geometry")


def geometry(spec: ModelSpec) -> str:
    """Return the SHA-256 of everything that a mask's indices refer to.

    Models with equal hashes share masks. The hash does not depend on weights, their dtype, the
    order of files, a tied head that is stored twice, or config keys that change no shape.
    """
    layers = [sorted((name, list(shape)) for name, shape in t.items()) for t in spec.layer_tensors]
    others = sorted((name, list(shape)) for name, shape in spec.other_tensors.items())
    heads = [spec.heads, spec.kv_heads, spec.head_dim]
    facts = [spec.family.model_type, heads, spec.tied, layers, others]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_mask(path: Path, name: str, spec: ModelSpec, mask: KeepMask) -> None:
    """Write a mask file atomically.

    Args:
        path: the file.
        name: name of the dense model, for people. The program does not look it up.
        spec: the dense model.
        mask: the units kept.

    Raises:
        OutputError: the file cannot be written.
    """
    model = {"name": name, "family": spec.family.model_type, "geometry": geometry(spec)}
    write_json(path, {"format": FORMAT, "model": model, "removed": mask_to_json(mask)})


def read_mask(path: Path, spec: ModelSpec) -> KeepMask:
    """Read a mask file for the dense model that it was made for.

    Raises:
        OptionError: the file cannot be read, has another format, unknown or missing keys, belongs
            to another model, or names units that do not exist. The text says what and where.
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
    _require_keys(path, "'removed'", values["removed"], spec.table.kinds)
    try:
        mask = mask_from_json(spec.table, values["removed"])
        require_units(spec, mask)
    except OptionError as error:
        raise OptionError(f"--mask {path}: {error}") from error
    return mask


def _read_json(path: Path) -> Any:
    """Return the parsed content of a file."""
    try:
        return read_json(path)
    except OSError as error:
        raise OptionError(
            f"--mask {path}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise OptionError(f"--mask {path}: is not JSON ({error}); get the file again") from error


def _require_keys(path: Path, what: str, values: Any, expected: tuple[str, ...]) -> None:
    """Check for exactly these keys: an unknown key may change the meaning of the mask."""
    if not isinstance(values, Mapping):
        raise OptionError(f"--mask {path}: {what} is {json_type(values)}, expected an object")
    unknown, missing = sorted(set(values) - set(expected)), sorted(set(expected) - set(values))
    if unknown or missing:
        found = [f"unknown keys {unknown}"] * bool(unknown) + [f"no {missing}"] * bool(missing)
        raise OptionError(
            f"--mask {path}: {what} has {' and '.join(found)}; expected exactly "
            f"{', '.join(expected)}"
        )


def _require_model(path: Path, model: Mapping[str, Any], spec: ModelSpec) -> None:
    """Check that the file was made for this model's geometry."""
    expected = geometry(spec)
    if model["geometry"] != expected:
        raise OptionError(
            f"--mask {path}: belongs to another model: {model['name']!r} (family "
            f"{model['family']!r}, geometry {str(model['geometry'])[:12]}...), this one is a "
            f"{spec.family.model_type} of geometry {expected[:12]}...; name the dense model that "
            "the mask was made from, or one of the same shapes"
        )

"""Masks as JSON: the removed units of each group, by index.

In: a :class:`KeepMask`, or the parsed JSON of one and the model's units. Out: the other one. The
JSON may come from a stranger, so every value is checked. ``rewrite/mask_file.py`` reads and writes
the files. Holds one number per removed unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.units import KeepMask, UnitGroup, UnitTable


def mask_to_json(mask: KeepMask) -> dict[str, list[list[int]]]:
    """Return kind -> for each group of this kind, the indices of its removed units."""
    removed: dict[str, list[list[int]]] = {kind: [] for kind in mask.table.kinds}
    for group in mask.table.groups:
        removed[group.kind].append((~mask.of(group)).nonzero().flatten().tolist())
    return removed


def mask_from_json(table: UnitTable, removed: Mapping[str, Any]) -> KeepMask:
    """Return the mask that :func:`mask_to_json` describes.

    Args:
        table: the units of the dense model.
        removed: parsed JSON. A kind that is absent keeps all its units.

    Raises:
        OptionError: a kind, group or unit does not exist in this model, or a value is no list of
            unit indices. The text says where.
    """
    mask = KeepMask(table)
    for kind, lists in removed.items():
        groups = [group for group in table.groups if group.kind == kind]
        per = "expert" if any(group.expert is not None for group in groups) else "layer"
        if not isinstance(lists, list) or len(lists) != len(groups):
            found = f"{len(lists)} {per}s" if isinstance(lists, list) else json_type(lists)
            raise OptionError(
                f"removed[{kind!r}] lists {found}, the model has {len(groups)} {per}s; expected "
                f"one list per {per}"
            )
        for group, units in zip(groups, lists, strict=True):
            _remove(mask, group, units)
    return mask


def json_type(value: Any) -> str:
    """Return the JSON type of a value with its article, for error texts."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _remove(mask: KeepMask, group: UnitGroup, units: Any) -> None:
    """Remove units of one group after checking their list."""
    expert = "" if group.expert is None else f" expert {group.expert}"
    where = f"removed[{group.kind!r}], layer {group.layer}{expert}"
    if not isinstance(units, list):
        raise OptionError(f"{where}: is {json_type(units)}, expected a list of unit numbers")
    for unit in units:
        if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < group.count:
            raise OptionError(
                f"{where}: names unit {unit!r}, expected whole numbers 0..{group.count - 1}"
            )
    if len(set(units)) != len(units):
        twice = next(unit for unit in units if units.count(unit) > 1)
        raise OptionError(f"{where}: names unit {twice} twice")
    mask.of(group)[units] = False

"""Keywords of the Python interface: the names of the command line's options, with underscores.

In: keywords, or an options object. Out: the options object. An unknown keyword is an error that
names the nearest one. The command line makes its options here too, so both have the same names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from frugal_bonsai.adaptation.settings import AdaptSettings
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.errors import OptionError
from frugal_bonsai.run.options import AdaptOptions, PruneOptions
from frugal_bonsai.sizes import parse_count

T = TypeVar("T")
# Settings without an option: they are passed as PruneOptions(settings=...), AdaptOptions likewise.
PRUNE_SETTINGS_ONLY = {"utility", "pool"}
ADAPT_SETTINGS_ONLY = {"warm_up", "clip"}
# Settings whose option has another name.
ADAPT_RENAMED = {"optimizer": "optimiser", "minutes": "seconds"}


def _names(options: type) -> set[str]:
    return {field.name for field in fields(options)} - {"settings"}


PRUNE_KEYWORDS = _names(PruneOptions) | (_names(PruneSettings) - PRUNE_SETTINGS_ONLY)
ADAPT_KEYWORDS = (
    _names(AdaptOptions)
    | (_names(AdaptSettings) - ADAPT_SETTINGS_ONLY - set(ADAPT_RENAMED.values()))
    | set(ADAPT_RENAMED)
)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is nearest to a wrong one, or at all of them."""
    known = sorted(known)
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"known are {', '.join(known)}"


def prune_options(named: Mapping[str, Any], options: PruneOptions | None = None) -> PruneOptions:
    """Return the options of ``prune`` and ``plan``.

    Args:
        named: Keywords.
        options: Options instead of keywords.

    Raises:
        OptionError: A keyword is unknown, both are given, or a value cannot work.
    """
    if options is not None:
        return _alone(options, named)
    _require_known(named, PRUNE_KEYWORDS | {"regression"})  # removed; refused with what to take
    own = _names(PruneOptions)
    settings = {name: value for name, value in named.items() if name not in own}
    return PruneOptions(settings=settings, **{name: named[name] for name in named if name in own})


def adapt_options(named: Mapping[str, Any], options: AdaptOptions | None = None) -> AdaptOptions:
    """Return the options of ``adapt``; the arguments are those of :func:`prune_options`."""
    if options is not None:
        return _alone(options, named)
    _require_known(named, ADAPT_KEYWORDS)
    given = dict(named)
    if "data" in given:
        given["data"] = (given["data"],) if isinstance(given["data"], str) else tuple(given["data"])
    if "hidden_layers" in given:
        given["hidden_layers"] = _layers(given["hidden_layers"])
    for name in ("rank", "tokens"):
        if name in given:
            given[name] = _count(given[name], f"--{name}")
    if given.get("minutes") is not None:
        given["minutes"] = 60.0 * given["minutes"]
    own = _names(AdaptOptions)
    settings = {
        ADAPT_RENAMED.get(name, name): given.pop(name) for name in list(given) if name not in own
    }
    return AdaptOptions(settings=settings, **given)


def one_of(kind: type[T], named: Mapping[str, Any], options: T | None = None) -> T:
    """Return an options object of a class whose fields are the keywords."""
    if options is not None:
        return _alone(options, named)
    _require_known(named, _names(kind))
    return kind(**named)


def _alone(options: T, named: Mapping[str, Any]) -> T:
    """Return the options; raise if there are keywords too."""
    if named:
        raise OptionError(
            f"{', '.join(sorted(named))}: pass keywords or options={type(options).__name__}(...), "
            "not both"
        )
    return options


def _require_known(named: Iterable[str], known: set[str]) -> None:
    for name in named:
        if name not in known:
            raise OptionError(f"unknown keyword {name!r}; {nearest(name, known)}")


def _count(value: str | int | None, option: str) -> int | None:
    """Return a count; None for ``auto``."""
    if value in (None, "auto"):
        return None
    return parse_count(value, option=option) if isinstance(value, str) else value


def _layers(value: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return numbers of layers, which the command line separates by commas."""
    if isinstance(value, str):
        return tuple(
            parse_count(part, option="--hidden-layers", least=0) for part in value.split(",")
        )
    return None if value is None else tuple(value)

"""``--config FILE``: options of a command from a TOML file.

In: a file whose keys are the options' names on the command line. Out: defaults of the command, that
environment variables and the command line override. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from frugal_bonsai.errors import OptionError
from frugal_bonsai.plain_json import read_toml


def config_option(*, ignored: Collection[str] = ()) -> Any:
    """Return the option ``--config``.

    Args:
        ignored: Options of another command that a file for both may have.
    """

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            defaults = _Reader(ctx, Path(value)).read(ignored)
            ctx.default_map = {**(ctx.default_map or {}), **defaults}

    return click.option(
        "--config",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=read,
        help="Read options from a TOML file, such as run.toml of an output; those on the command "
        "line win.",
    )


class _Reader:
    """Reads the options of one command from a file.

    Args:
        ctx: Context of the command.
        path: The file.
    """

    def __init__(self, ctx: click.Context, path: Path) -> None:
        self._ctx, self._path = ctx, path
        self._params: dict[str, click.Parameter] = {}
        self._negations: dict[str, click.Parameter] = {}
        for param in ctx.command.params:
            if not param.expose_value or getattr(param, "hidden", False):
                continue
            if isinstance(param, click.Argument):
                self._params[str(param.name)] = param
            for name in param.opts if isinstance(param, click.Option) else ():
                self._params[name.lstrip("-")] = param
            for name in param.secondary_opts:
                self._negations[name.lstrip("-")] = param

    def read(self, ignored: Collection[str]) -> dict[str, Any]:
        """Return the value of each parameter by its name in Python.

        Raises:
            OptionError: The file cannot be read, or a key is unknown or has a wrong value.
        """
        found: dict[str, Any] = {}
        for key, value in self._load().items():
            param = self._params.get(key) or self._negations.get(key)
            if param is None and key in ignored:
                continue
            if param is None:
                raise self._error(f"unknown option {key!r}; {self._nearest(key)}")
            if str(param.name) in found:
                raise self._error(f"{key!r}: the same option is there under another name")
            found[str(param.name)] = self._value(key, param, value)
        return found

    def _load(self) -> dict[str, Any]:
        try:
            return read_toml(self._path)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise self._error(f"is no TOML file: {error}") from error

    def _value(self, key: str, param: click.Parameter, value: Any) -> Any:
        """Return a value that the parameter takes, as the command line would give it."""
        if getattr(param, "is_flag", False):
            if not isinstance(value, bool):
                raise self._error(f"{key!r}: {value!r} is not true or false")
            turns_off = key in self._negations or getattr(param, "flag_value", None) is False
            return value is not turns_off
        if isinstance(value, list) is not bool(getattr(param, "multiple", False)):
            wanted = "one value" if isinstance(value, list) else "a list"
            raise self._error(f"{key!r}: {value!r} is not {wanted}")
        values = [self._text(key, part) for part in (value if isinstance(value, list) else [value])]
        text = values if isinstance(value, list) else values[0]
        try:
            param.type_cast_value(self._ctx, text)
        except (click.BadParameter, OptionError) as error:
            reason = error.message if isinstance(error, click.BadParameter) else str(error)
            raise self._error(f"{key!r}: {reason}") from error
        return text

    def _text(self, key: str, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._error(f"{key!r}: {value!r} is not a text or a number")
        return str(value)

    def _nearest(self, key: str) -> str:
        from frugal_bonsai.run.keywords import nearest

        return nearest(key.replace("_", "-"), {*self._params, *self._negations})

    def _error(self, text: str) -> OptionError:
        return OptionError(f"--config {self._path}: {text}")

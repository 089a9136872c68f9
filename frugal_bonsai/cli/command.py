"""A command of the command line: groups of options in its help, examples, how much it says.

``--help`` shows the first group of options, the common ones. ``--help-all`` shows every group.
Imports no torch.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click
import cloup

from frugal_bonsai.errors import FrugalBonsaiError, RankError
from frugal_bonsai.ranks.launch import launched

COMMON = "Common options"
_PREFIX = "frugal_bonsai"
_ALL, _VERBOSITY = f"{_PREFIX}.help_all", f"{_PREFIX}.verbosity"
QUIET, NORMAL, VERBOSE = -1, 0, 1


class Command(cloup.Command):
    """A command with examples, and with options that only ``--help-all`` shows.

    Args:
        examples: Lines of a shell that show the use of the command.
        ranks: The ranks of a launch share the command's work; else it runs in one process alone.
        arguments: Arguments of :class:`cloup.Command`.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[str] = (),
        ranks: bool = False,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self.examples, self.ranks = tuple(examples), ranks
        if len(self.option_groups) > 1:
            show_all = cloup.Option(
                ["--help-all"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_all,
                help="Show every option, and exit.",
            )
            self.params.append(show_all)
            self.ungrouped_options.append(show_all)

    def format_params(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the common options, or every group with ``--help-all``."""
        every, shown = self.option_groups, self.option_groups
        if not ctx.meta.get(_ALL):
            shown = every[:1]
        self.option_groups = shown
        try:
            super().format_params(ctx, formatter)
        finally:
            self.option_groups = every

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.examples:
            formatter.write("\nExamples:\n")
            for line in self.examples:
                formatter.write(f"  {line}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ``--verbose`` prints where an error of the user was found.

        Raises:
            RankError: Several ranks run a command whose work they cannot share; only rank 0
                says so.
        """
        launch = launched()
        if launch is not None and not self.ranks:
            if launch.rank:
                ctx.exit()
            raise RankError(
                f"{self.name}: runs in one process, {launch.ranks} were launched; leave torchrun "
                f"or accelerate launch out (only prune shares its work among ranks)"
            )
        try:
            return super().invoke(ctx)
        except FrugalBonsaiError:
            if verbosity(ctx) >= VERBOSE:
                traceback.print_exc(file=sys.stderr)
            raise


def verbosity(ctx: click.Context) -> int:
    """Return how much a command says: :data:`QUIET`, :data:`NORMAL` or :data:`VERBOSE`."""
    level: int = ctx.meta.get(_VERBOSITY, NORMAL)
    return level


def set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Remember ``--quiet`` or ``--verbose``.

    Raises:
        click.UsageError: Both are given.
    """
    if not value:
        return
    wanted = QUIET if param.name == "quiet" else VERBOSE
    if ctx.meta.setdefault(_VERBOSITY, wanted) != wanted:
        raise click.UsageError("--quiet and --verbose: leave one out", ctx)


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the whole help and end."""
    if value and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()

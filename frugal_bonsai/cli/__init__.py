"""The command line: options in, tables or JSON out.

Has no logic of its own, and imports no torch until a command runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import cloup

from frugal_bonsai.cli.adapt import adapt_command
from frugal_bonsai.cli.measure import eval_command, inspect_command, profile_command
from frugal_bonsai.cli.prune import plan_command, prune_command
from frugal_bonsai.cli.report import report_command, runs_command
from frugal_bonsai.cli.rewrite import bench_command, export_command, shrink_command
from frugal_bonsai.cli.running import is_worker
from frugal_bonsai.cli.signals import exit_code, stopped_by_signals
from frugal_bonsai.errors import FrugalBonsaiError, OutputError

_SECTIONS = (
    cloup.Section("Prune", [plan_command, prune_command, adapt_command, shrink_command]),
    cloup.Section("Measure and look", [eval_command, bench_command, inspect_command]),
    cloup.Section(
        "Reports, machines, other runtimes",
        [report_command, runs_command, profile_command, export_command],
    ),
)


class _Commands(cloup.Group):
    """The group of all commands; its help ends with the exit codes."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the exit codes mean, and where more is explained."""
        formatter.write(_EPILOG)


_EPILOG = """
Exit codes:
  0    done
  1    a defect of the program: a traceback, which a bug report needs
  2    an error that you can mend: an option, file or cap; the text says what to try
  130  stopped with Ctrl-C; prune and adapt keep what was finished for --resume
  143  stopped by SIGTERM, as a scheduler sends it; the same (129: the terminal closed)

Start with: frugal-bonsai prune example --out out/example
Completion in your shell: docs/command-line.md
"""


@cloup.group(
    cls=_Commands,
    sections=_SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="frugal-bonsai")
def cli() -> None:
    """Prune language models with forward passes only, within a memory cap."""


def main() -> None:
    """Run the command line; a user's error is a text on standard error and exit code 2."""
    try:
        if is_worker():  # torch's own words on a lost connection, which rank 0 explains
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with stopped_by_signals():
            cli.main(standalone_mode=False)
    except FrugalBonsaiError as error:
        hint = _kept_hint(_option_value("--out")) if isinstance(error, OutputError) else ""
        click.echo(f"frugal-bonsai: {error}{hint}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        if is_worker():
            sys.exit(exit_code(error))  # rank 0 says it
        out = _option_value("--out")
        nothing = " before a round was finished; nothing is left behind" if out else ""
        click.echo(f"frugal-bonsai: stopped{_kept_hint(out) or nothing}", err=True)
        sys.exit(exit_code(error))
    except (MemoryError, RuntimeError) as error:
        from frugal_bonsai.stream.micro_batch import is_out_of_memory, out_of_memory_text

        if not is_out_of_memory(error):
            raise
        click.echo(f"frugal-bonsai: {out_of_memory_text(error)}", err=True)
        sys.exit(2)


def _kept_hint(out: str | None) -> str:
    """Return how to resume, if the run directory is kept."""
    if out is None or not Path(f"{out}.run").is_dir():
        return ""
    return f"; what was done is in {out}.run, add --resume to continue"


def _option_value(name: str) -> str | None:
    """Return the value of an option as typed, for the message about a run that ended early."""
    for at, word in enumerate(sys.argv):
        if word == name and at + 1 < len(sys.argv):
            return sys.argv[at + 1].rstrip("/\\")
        if word.startswith(name + "="):
            return word.partition("=")[2].rstrip("/\\")
    return None

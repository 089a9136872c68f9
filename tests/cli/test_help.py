"""The help of every command: short first, complete on request, true."""

from __future__ import annotations

import shlex

import click
import pytest
from click.testing import CliRunner

from frugal_bonsai.cli import cli
from frugal_bonsai.cli.command import Command

COMMANDS = sorted(cli.commands)


def shown(*words: str) -> str:
    """The output of a command that ends well, on a terminal of 80 columns."""
    done = CliRunner().invoke(cli, words, env={"COLUMNS": "80"}, terminal_width=80)
    assert done.exit_code == 0, done.output
    return done.output


def command(name: str) -> Command:
    found = cli.commands[name]
    assert isinstance(found, Command)
    return found


def options_of(name: str) -> list[click.Option]:
    params = command(name).params
    return [p for p in params if isinstance(p, click.Option) and not p.hidden]


def test_the_list_of_commands_cuts_no_summary_and_explains_the_exit_codes() -> None:
    text = shown("--help")
    assert "..." not in text.partition("Prune:")[2]
    for name in COMMANDS:
        assert f"  {name} " in text and str(command(name).short_help) in text
    for code in ("0  ", "1  ", "2  ", "130 "):
        assert f"\n  {code}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described(name: str) -> None:
    for option in options_of(name):
        text = (option.help or "").partition("[default")[0].strip()
        assert len(text) > 10 and text.endswith((".", "omitted")), (name, option.opts, text)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_about_a_dozen_options_and_help_all_shows_every_one(name: str) -> None:
    grouped = len(command(name).option_groups) > 1
    common, every = shown(name, "--help"), shown(name, "--help-all" if grouped else "--help")
    names = [option.opts[-1] for option in options_of(name)]
    assert sum(f"  {option}" in common for option in names) <= 18
    for option in names:
        assert option in every


@pytest.mark.parametrize("name", COMMANDS)
def test_two_examples_that_the_command_understands(name: str) -> None:
    found = command(name)
    lines = shlex.split("\n".join(found.examples).replace("\\\n", " "))
    starts = [at for at, word in enumerate(lines) if word == "frugal-bonsai"]
    assert len(starts) == 2
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        assert lines[start + 1] == name
        found.make_context(name, lines[start + 2 : end])
    assert f"  {found.examples[0]}\n" in shown(name, "--help")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("frugal-bonsai prune --spars", "--sparsity"),
        ("frugal-bonsai prune --layout p", "per-layer"),
        ("frugal-bonsai sh", "shrink"),
    ],
)
def test_the_shell_completes_commands_options_and_choices(words: str, expected: str) -> None:
    count = str(len(words.split()) - 1)
    environment = {
        "COMP_WORDS": words,
        "COMP_CWORD": count,
        "_FRUGAL_BONSAI_COMPLETE": "bash_complete",
    }
    done = CliRunner().invoke(cli, prog_name="frugal-bonsai", env=environment)
    assert f"plain,{expected}" in done.output.splitlines()

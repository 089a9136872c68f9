"""The command starts fast: no torch before a command needs it."""

from __future__ import annotations

import pytest
from commands import python, started


def test_help_names_the_commands_and_imports_no_torch() -> None:
    done = started("--help")
    assert done.returncode == 0
    commands = {"prune", "adapt", "plan", "inspect", "eval", "shrink", "export", "bench"}
    assert commands <= set(done.stdout.split())
    loaded = python(
        "import sys, frugal_bonsai, frugal_bonsai.cli; print(' '.join(sys.modules))"
    ).split()
    assert not {
        "torch",
        "transformers",
        "numpy",
        "rich",
        "scipy",
        "peft",
        "datasets",
        "gguf",
    } & set(loaded)


@pytest.mark.parametrize("first", ["frugal_bonsai", "frugal_bonsai.evaluation.perplexity"])
def test_every_public_name_is_what_it_is_whatever_was_imported_before(first: str) -> None:
    """A folder of the package would take the place of a function of its name."""
    # Written into models, the entry point, and what needs the extra eval.
    left_out = ("modeling_", "__main__", "harness_model")
    code = (
        "import importlib, pkgutil, sys, types\n"
        f"import {first}, frugal_bonsai\n"
        "for module in pkgutil.walk_packages(frugal_bonsai.__path__, 'frugal_bonsai.'):\n"
        f"    if not any(part in module.name for part in {left_out}):\n"
        "        importlib.import_module(module.name)\n"
        "for _ in range(2):\n"
        "    values = [getattr(frugal_bonsai, name) for name in frugal_bonsai.__all__]\n"
        "    wrong = [v for v in values if isinstance(v, types.ModuleType) or not callable(v)]\n"
        "    assert not wrong, wrong\n"
        "print('all callable')"
    )
    assert python(code) == "all callable\n"


def test_every_option_of_prune_is_explained() -> None:
    done = started("prune", "--help")
    assert done.returncode == 0
    for option in ("--sparsity", "--max-gpu-mem", "--max-cpu-mem", "--calibration", "--resume"):
        assert option in done.stdout


def test_an_unknown_option_is_a_usage_error() -> None:
    done = started("prune", "example", "--no-such-option")
    assert done.returncode == 2
    assert "no-such-option" in done.stderr and "Traceback" not in done.stderr


def test_inspect_reads_headers_alone() -> None:
    done = started("inspect", "example")
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout and "module" in done.stdout

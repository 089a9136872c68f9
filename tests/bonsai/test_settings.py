"""Methods are bundles of settings; what contradicts itself is refused with the option's name."""

from __future__ import annotations

from typing import Any

import pytest

from frugal_bonsai.bonsai.methods import METHODS, make_settings
from frugal_bonsai.bonsai.selection.schedule import round_goals
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.cli import prune_command
from frugal_bonsai.errors import OptionError


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_valid_bundle_and_options_override_it(method: str) -> None:
    settings = make_settings(method, {"sparsity": 0.3, "seed": 7, "masks": None})
    assert (settings.sparsity, settings.seed) == (0.3, 7)
    for name, value in METHODS[method].items():
        assert getattr(settings, name) == value
    assert make_settings(method, {"ridge": 0.5}).ridge == 0.5
    without = make_settings("default", {"recovery": False, "refine": 0, "rescale": False})
    assert not (without.recovery or without.refine or without.rescale)


def test_no_two_methods_are_the_same() -> None:
    bundles = [make_settings(method, {}).to_json() for method in METHODS]
    assert all(bundles.count(bundle) == 1 for bundle in bundles)
    assert make_settings("default", {"regression": None}) == PruneSettings()


def test_the_command_line_offers_every_method() -> None:
    [option] = [o for o in prune_command.params if o.name == "method"]
    assert set(option.type.choices) == set(METHODS)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("best", {}, r"--method: 'best' is not one of default, group"),
        ("default", {"level": "layer"}, r"--level: 'layer' is not one of group, unit, none"),
        ("default", {"per": "unit"}, r"unknown setting 'per'; known: allocation, arithmetic"),
        ("default", {"allocation": "ffn"}, r"take --level none, or --allocation global"),
        ("paper", {"allocation": "equal"}, r"--allocation equal: .* at --level unit"),
        ("unit", {}, r"--method unit: was removed; .* take --method default, or --method paper"),
        ("paper", {"regression": "paper"}, r"--regression: was removed; the level decides"),
        ("default", {"draw": "kind"}, r"--draw: was removed; --level unit draws half of each"),
        ("default", {"step": 1.1}, r"--step: 1\.1 is outside \(0, 1\]"),
        ("default", {"sparsity": 1.0}, r"--sparsity: 1\.0 is outside \(0, 1\)"),
        ("default", {"objective": "speed"}, r"--objective: 'speed' is not one of parameters"),
        ("default", {"prompt_tokens": 0}, r"--prompt-tokens: 0 is not at least 1"),
        ("default", {"generated_tokens": -1}, r"--generated-tokens: -1 is negative"),
        ("wanda", {"objective": "latency"}, r"--objective latency: .* --allocation equal"),
        ("default", {"prior": "similarity"}, r"--prior similarity: .* take --method depth"),
        ("depth", {"bias": True}, r"take it with --no-recovery and --no-bias"),
        ("paper", {"rescale": True}, r"--rescale: belongs to recovery, .* or --method paper"),
        ("default", {"refine": 2, "recovery": False}, r"--refine: .* add --recovery, or leave"),
    ],
)
def test_settings_that_cannot_work(method: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        make_settings(method, options)


@pytest.mark.parametrize(
    ("options", "goals"),
    [
        ({"sparsity": 0.2}, [0.2]),
        ({"sparsity": 0.26}, [0.26]),  # no sliver behind the first round
        ({"sparsity": 0.35}, [0.25, 0.35]),
        ({"sparsity": 0.5}, [0.25, 0.35, 0.45, 0.5]),
        ({"sparsity": 0.3, "step": 0.1}, [0.1, 0.2, 0.3]),
        ({"sparsity": 0.31, "step": 0.1}, [0.1, 0.2, 0.31]),
    ],
)
def test_rounds_end_at(options: dict[str, float], goals: list[float]) -> None:
    assert round_goals(make_settings("default", options)) == pytest.approx(goals)

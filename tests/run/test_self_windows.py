"""Text that the dense model writes for the last reconstruction: how much, when, and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import fail, succeed

from frugal_bonsai import PruneOptions, plan
from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.plan import PruneWorkload
from frugal_bonsai.run import plan as planning
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.plan import plan_fitting
from frugal_bonsai.run.resolve import resolve

QUICK = ("--windows", "12", "--window", "64", "--masks", "4", "--mask-windows", "4")


def written(calibration: str = "stdlib", **settings: Any) -> int | None:
    """Return the number of windows that a prune of the example resolves to; None for auto."""
    options = PruneOptions(windows=12, window=64, calibration=calibration, settings=settings)
    with open_model("example", headers_only=True) as example:
        return resolve(example, options).settings.self_windows


def test_the_user_and_the_calibration_decide() -> None:
    assert written() is None and written(self_windows=5) == 5 and written(self_windows=0) == 0
    assert written("self") == 0 and written("self", self_windows=3) == 3
    assert written(recovery=False) == 0


def test_a_resumed_run_keeps_its_number() -> None:
    options = PruneOptions(windows=12, window=64)
    with open_model("example", headers_only=True) as example:
        resolved = resolve(example, options, begun={"self_windows": 6})
    assert resolved.settings.self_windows == 6


@pytest.mark.parametrize(("fitting", "expected"), [(99, 24), (12, 12), (11, 6), (2, 0)])
def test_as_many_windows_as_fit(
    fitting: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = planning.plan_prune

    def plan_prune(model: Any, resolved: Any, work: PruneWorkload) -> Any:
        if work.written > fitting:
            raise BudgetError("too large")
        return real(model, resolved, work)

    monkeypatch.setattr(planning, "plan_prune", plan_prune)
    options = PruneOptions(windows=12, window=64)
    with open_model("example", headers_only=True) as example:
        planned = plan_fitting(example, resolve(example, options), 12)
    assert planned.work.written == planned.resolved.settings.self_windows == expected


def test_the_plan_counts_the_text() -> None:
    def planned(count: int) -> dict[str, Any]:
        settings = {"self_windows": count}
        return plan("example", PruneOptions(windows=12, window=512, settings=settings))

    none, some = planned(0), planned(8)
    assert some["forward_tokens"] > none["forward_tokens"] + 8 * 512
    for phases in ("phases", "memory_phases"):
        assert "writing text" in [phase["name"] for phase in some[phases]]
        assert "writing text" not in [phase["name"] for phase in none[phases]]


def test_a_prune_says_how_much_the_model_wrote(tmp_path: Path) -> None:
    def pruned(name: str, *words: str) -> dict[str, Any]:
        words = ("--sparsity", "0.2", "--layout", "per-layer", *QUICK, *words)
        return succeed("prune", "example", "--out", tmp_path / name, *words)

    without, auto = (
        pruned("without", "--self-windows", "0"),
        pruned("auto", "--self-windows", "auto"),
    )
    assert without["calibration"]["written_windows"] == 0
    assert auto["calibration"]["written_windows"] == auto["settings"]["self_windows"] == 24
    card = (tmp_path / "auto" / "README.md").read_text(encoding="utf-8")
    assert "| windows that the dense model wrote for the last recovery | 24 |" in card
    # The same masks: only the last reconstruction sees the text. And it learns from it.
    assert auto["kept"] == without["kept"]
    assert auto["after"]["perplexity"] < without["after"]["perplexity"]
    assert not list(tmp_path.glob("*.run"))


def test_numbers_that_cannot_work(tmp_path: Path) -> None:
    words = ("prune", "example", "--out", tmp_path / "out")
    assert "--self-windows: -1 is negative" in fail(*words, "--self-windows", "-1")
    assert "'some' is neither a number nor auto" in fail(*words, "--self-windows", "some")
    assert "--self-windows: belongs to recovery" in fail(
        *words, "--self-windows", "4", "--no-recovery"
    )

"""Measure whether int8 arithmetic changes the ranking of units: Kendall's tau against fp32.

Evaluates the same masks on the same windows with fp32 and with int8 products (both from the int8
working store) in the first round of a prune, and compares the relevances that the regression gives
and the losses that it explains, at the `unit` and at the `group` level.

    python tools/compare_arithmetic.py MODEL --calibration SOURCE [--window 256] [--windows 128]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from scipy.stats import kendalltau

from frugal_bonsai.bonsai.importance.imputation import Imputations, ImputationWriter, Tensors
from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.masks.design import Design
from frugal_bonsai.bonsai.masks.estimate import RoundInputs, estimate_round
from frugal_bonsai.bonsai.masks.evaluate import MaskEvaluator, Observations
from frugal_bonsai.bonsai.masks.regression import Fit
from frugal_bonsai.bonsai.selection.schedule import Schedule
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.layout import PER_LAYER, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.texts import read_windows
from frugal_bonsai.stream.engine import ARITHMETICS, Engine
from frugal_bonsai.stream.store import INT8, LayerStore, build_store

LIMITS = SweepLimits(
    micro_batch=8, windows_in_flight=10**6, resident_windows=0, head_rows=8192, head_tokens=256
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--masks", type=int, default=12)
    parser.add_argument("--mask-windows", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--levels", default="unit,group")
    given = parser.parse_args()
    print("| level | seed | relevances | tau of relevance | tau of losses | largest loss error |")
    print("|---|---|---|---|---|---|")
    with open_model(given.model) as model, tempfile.TemporaryDirectory() as work:
        _, windows_NS = read_windows(
            model,
            given.calibration,
            given.window,
            windows=given.windows,
            option="--calibration",
        )
        store = build_store(Path(work) / "store", model.checkpoint, model.spec, weights=INT8)
        engines = [
            Engine(
                model.checkpoint,
                model.spec,
                device=torch.device("cpu"),
                dtype=torch.float32,
                limits=LIMITS,
                arithmetic=arithmetic,
            )
            for arithmetic in ARITHMETICS
        ]
        for level in given.levels.split(","):
            for seed in range(given.seeds):
                settings = PruneSettings(
                    level=level,
                    seed=seed,
                    masks=given.masks,
                    mask_windows=given.mask_windows,
                    certainty=1,  # all masks at once: both see the same ones
                )
                judged = [
                    judge(engine, store, windows_NS, settings, Path(work) / "head", {})
                    for engine in engines
                ]
                report(level, seed, *judged)


class Recorder(MaskEvaluator):
    """Keeps the observations that it makes."""

    seen: list[Observations]

    def evaluate(self, design: Design, masks: int) -> Observations:
        """Evaluate a design and keep its observations."""
        self.seen = [*getattr(self, "seen", []), super().evaluate(design, masks)]
        return self.seen[-1]


def judge(
    engine: Engine,
    store: LayerStore,
    windows_NS: torch.Tensor,
    settings: PruneSettings,
    head: Path,
    imputations: dict[str, Tensors],
) -> tuple[Fit, Observations]:
    """Return the first round's regression and the losses that it explains."""
    spec, rules = engine.spec, layout_rules(engine.spec, PER_LAYER)
    mask = KeepMask(spec.table)
    schedule = Schedule(settings=settings, rules=rules, blocks=spec.block_parameters)
    generator = torch.Generator().manual_seed(settings.seed)
    compensates = settings.imputes(uniform=rules.uniform)
    writer = ImputationWriter(
        share=settings.pool * schedule.share(mask),
        rules=rules,
        damping=settings.ridge,
        save=lambda group, tensors: imputations.update({group.name: tensors}),
    )
    builder = ImportanceBuilder(
        settings.prior,
        mask,
        damping=settings.ridge,
        generator=generator,
        imputations=writer if compensates else None,
    )
    with engine.stream(store) as stream:
        engine.sweep.run(stream, windows_NS, tap=builder)
    masks = Recorder(
        engine,
        store,
        lambda: engine.evaluation_head(head),
        settings,
        windows_NS,
        generator,
        imputations=Imputations(lambda group: imputations.get(group.name)) if compensates else None,
    )

    estimate = estimate_round(
        RoundInputs(mask=mask, score_N=builder.build().score_N, schedule=schedule, evaluator=masks)
    )
    assert estimate.fit is not None
    return estimate.fit, masks.seen[-1]


def report(
    level: str,
    seed: int,
    exact: tuple[Fit, Observations],
    rounded: tuple[Fit, Observations],
) -> None:
    """One row."""
    relevances = [fit.relevance_K for fit, _ in (exact, rounded)]
    losses = [seen.loss_I for _, seen in (exact, rounded)]
    error, largest = (losses[0] - losses[1]).abs().max(), losses[0].abs().max()
    print(
        f"| {level} | {seed} | {len(relevances[0])} "
        f"| {kendalltau(*relevances).statistic:.4f} | {kendalltau(*losses).statistic:.4f} "
        f"| {float(error):.4f} of {float(largest):.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

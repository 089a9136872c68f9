"""Does int8 arithmetic change which units are judged relevant? Kendall's tau against fp32.

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

from frugal_bonsai.bonsai.design import Design
from frugal_bonsai.bonsai.evaluate import Observations, evaluate_masks
from frugal_bonsai.bonsai.prior import PriorBuilder, PriorTap
from frugal_bonsai.bonsai.relevance import JUDGES, Judgement, RoundInputs
from frugal_bonsai.bonsai.settings import PruneSettings
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.layout import layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.run.prepare import open_model, read_windows
from frugal_bonsai.stream.engine import ARITHMETICS, Engine
from frugal_bonsai.stream.store import INT8, build_store

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
        for level in ("unit", "group"):
            for seed in range(given.seeds):
                settings = PruneSettings(
                    level=level, seed=seed, masks=given.masks, mask_windows=given.mask_windows
                )
                judged = [
                    judge(engine, store, windows_NS, settings, Path(work) / "head")
                    for engine in engines
                ]
                report(level, seed, *judged)


def judge(
    engine: Engine, store: object, windows_NS: torch.Tensor, settings: PruneSettings, head: Path
) -> tuple[Judgement, Observations]:
    """The first round's judgement of all units."""
    mask, seen = KeepMask(engine.spec.table), []
    generator = torch.Generator().manual_seed(settings.seed)
    builder = PriorBuilder(settings.prior, mask, damping=settings.ridge, generator=generator)
    with engine.stream(store) as stream:
        engine.sweep.run(stream, windows_NS, tap=PriorTap(builder, engine.device))
    chosen = torch.randperm(len(windows_NS), generator=generator)[: settings.mask_windows]

    def evaluate(design: Design) -> Observations:
        with engine.evaluation_stream(store) as stream:
            seen.append(
                evaluate_masks(
                    engine,
                    stream,
                    engine.evaluation_head(head),
                    design,
                    settings.masks,
                    windows_NS[chosen],
                    shared=False,
                    perplexity=False,
                )
            )
        return seen[-1]

    judgement = JUDGES[settings.level](
        RoundInputs(
            mask=mask,
            prior=builder.build(),
            settings=settings,
            rules=layout_rules(engine.spec, "per-layer"),
            share=settings.step * engine.spec.block_parameters / mask.table.parameters,
            parameters_left=round(settings.sparsity * engine.spec.block_parameters),
            masks=settings.masks * len(chosen),
            evaluate=evaluate,
            generator=generator,
        )
    )
    return judgement, seen[-1]


def report(
    level: str,
    seed: int,
    exact: tuple[Judgement, Observations],
    rounded: tuple[Judgement, Observations],
) -> None:
    """One row."""
    relevances = [judgement.fit.relevance_K for judgement, _ in (exact, rounded)]
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

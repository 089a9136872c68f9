"""Predicted against measured peak of resident memory, phase by phase.

    python tools/measure_peaks.py CHECKPOINT --max-cpu-mem 2GB --windows 16 --window 256

Each phase of a prune runs in a separate process, on a checkpoint of any shape (random weights
will do: make_shape_checkpoint.py writes them), with the plan that ``prune`` would make. Linux only:
the peak is reset before the phase (/proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Phase of this tool -> beginning of the plan's phases that it measures.
PHASES = {
    "perplexity": "perplexity",
    "store": "building the store",
    "statistics": "statistics",
    "masks": "masked evaluation",
    "recovery": "recovery",
    "refinement": "refinement",
    "rewrite": "rewriting",
    "verify": "verifying",
}


def main() -> None:
    options = _options()
    if options.only:
        print(json.dumps(measure(options)))
        return
    work = Path(tempfile.mkdtemp(prefix="measure-peaks-", dir=options.scratch))
    print(f"{Path(options.checkpoint).name}: {' '.join(sys.argv[2:])}")
    print("| phase | base MiB | predicted MiB | measured MiB | predicted / measured |")
    print("|---|---|---|---|---|")
    results = []
    try:
        for phase in options.phases or PHASES:
            words = [sys.executable, __file__, *sys.argv[1:], "--only", phase, "--work", str(work)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            results.append(result)
            print(_row(result), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="predicted against measured peak memory")
    parser.add_argument("checkpoint")
    parser.add_argument("--max-cpu-mem")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--masks", type=int, default=2)
    parser.add_argument("--mask-windows", type=int, default=8)
    parser.add_argument("--refit", default="all")
    parser.add_argument("--layout", default="uniform", help="per-layer masks use imputation")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--arithmetic", default="float", help="of masked evaluation")
    parser.add_argument("--phases", nargs="*", choices=list(PHASES))
    parser.add_argument("--scratch", help="folder for the stores")
    parser.add_argument("--json", help="write the results to this file too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def _row(result: dict[str, Any]) -> str:
    mib = {key: result[key] / 2**20 for key in ("base", "predicted", "measured")}
    ratio = result["predicted"] / result["measured"]
    figures = " | ".join(f"{value:.0f}" for value in mib.values())
    return f"| {result['phase']} | {figures} | {ratio:.3f} |"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run one phase; its peak beside the plan's."""
    import torch

    from frugal_bonsai.memory.meter import peak_resident_bytes, resident_bytes
    from frugal_bonsai.run.engine import make_engine
    from frugal_bonsai.run.open import open_model
    from frugal_bonsai.run.options import PruneOptions
    from frugal_bonsai.run.plan import plan_prune
    from frugal_bonsai.run.resolve import resolve
    from frugal_bonsai.run.workload import prune_workload

    with open_model(options.checkpoint) as opened:
        ready = resolve(
            opened,
            PruneOptions(
                window=options.window,
                windows=options.windows,
                max_cpu_mem=options.max_cpu_mem,
                calibration="stdlib",
                device="cpu",
                layout=options.layout,
                settings={
                    "masks": options.masks,
                    "mask_windows": options.mask_windows,
                    "refit": options.refit,
                    "weights": options.weights,
                    "arithmetic": options.arithmetic,
                },
            ),
        )
        plan = plan_prune(opened, ready, prune_workload(opened, ready, options.windows))
        engine = make_engine(
            opened,
            plan,
            ready.machine.device,
            None,
            arithmetic=ready.settings.arithmetic,
        )
        generator = torch.Generator().manual_seed(0)
        tokens_NS = torch.randint(
            opened.spec.vocabulary, (options.windows, options.window), generator=generator
        )
        run = PHASE_FUNCTIONS[options.only]
        work = Path(options.work)
        resident = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        run(opened, ready, plan, engine, tokens_NS, work)
    mine = [p for p in plan.phases if p.name.startswith(PHASES[options.only])]
    base = next(i.size_bytes for i in plan.items if i.name == "Python and libraries")
    return {
        "phase": options.only,
        "base": base,
        "resident_before": resident,
        "predicted": max(p.total_bytes("host") for p in mine),
        "measured": peak_resident_bytes(),
        "cap": plan.budget.host_bytes,
        "phases": {p.name: p.total_bytes("host") for p in mine},
        "items": {p.name: {i.name: i.size_bytes for i in p.items} for p in mine},
        "limits": vars(plan.limits),
    }


def run_perplexity(
    opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path
) -> None:
    from frugal_bonsai.bonsai.calibration import held_out_count

    with engine.native() as stream:
        engine.losses(stream, tokens_NS[: held_out_count(len(tokens_NS))], "perplexity")


def run_store(opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path) -> None:
    """The dense store, and one without a few units, whose tensors are copied as they are cut."""
    from frugal_bonsai.stream.store import build_store

    weights, mask = ready.settings.weights, _without_channels(opened, 16)
    dense = build_store(
        work / "store", opened.checkpoint, opened.spec, weights=weights, check_finite=True
    )
    dense.close()
    build_store(work / "cut", opened.checkpoint, opened.spec, weights=weights, mask=mask).close()
    shutil.rmtree(work / "cut")


def run_statistics(
    opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path
) -> None:
    """Measure the statistics, imputation matrices included."""
    import torch

    builder = _prior(opened, ready, work)
    with engine.stream(_store(opened, work)) as stream:
        engine.sweep.run(stream, tokens_NS, tap=builder)
    torch.save(builder.build().score_N, work / "score.pt")


def run_masks(opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path) -> None:
    import torch

    from frugal_bonsai.bonsai.importance.imputation import Imputations
    from frugal_bonsai.bonsai.masks.design import draw_group_masks, draw_pools
    from frugal_bonsai.bonsai.masks.evaluate import MaskEvaluator
    from frugal_bonsai.bonsai.state import StateFolder
    from frugal_bonsai.model.units import KeepMask
    from frugal_bonsai.run.workload import prune_workload

    folder = StateFolder(work / "state", {})
    mask, settings = KeepMask(opened.spec.table), ready.settings
    windows_WS = tokens_NS[: settings.mask_windows]
    generator = torch.Generator().manual_seed(0)
    # The pools that imputation was computed for.
    share = prune_workload(opened, ready, len(tokens_NS)).imputed_share or 0.1
    pools = draw_pools(mask, torch.load(work / "score.pt"), share)
    pairs = settings.masks * len(windows_WS) // 2
    design = draw_group_masks(pools, pairs, 0.1, generator)
    evaluator = MaskEvaluator(
        engine,
        _store(opened, work),
        lambda: engine.evaluation_head(work / "head"),
        settings,
        windows_WS,
        generator,
        imputations=Imputations(lambda group: folder.imputation(0, group)),
    )
    evaluator.evaluate(design, settings.masks)


def run_recovery(
    opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path
) -> None:
    """Measure a round before the last, which computes the next scores and imputation too."""
    _recover(opened, ready, plan, engine, tokens_NS, work, _prior(opened, ready, work), 0)


def run_refinement(
    opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path
) -> None:
    """The last round's recovery, which makes no prior."""
    _recover(opened, ready, plan, engine, tokens_NS, work, None, ready.settings.refine)


def _recover(
    opened: Any,
    ready: Any,
    plan: Any,
    engine: Any,
    tokens_NS: Any,
    work: Path,
    prior: Any,
    refine: int,
) -> None:
    import torch

    from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
    from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
    from frugal_bonsai.checkpoint.tensor_file import write_tensors
    from frugal_bonsai.dtypes import torch_dtype
    from frugal_bonsai.model.units import KeepMask

    def dtype(name: str) -> Any:
        return torch_dtype(opened.checkpoint.tensors[name].dtype)

    def save(layer: int, weights: Any) -> None:
        dtypes = {name: dtype(name) for name in weights}
        write_tensors(work / f"refit_{layer}.safetensors", weights, dtypes=dtypes)

    options = ReconstructionOptions(
        ridge=ready.settings.ridge,
        mask=KeepMask(opened.spec.table) if ready.settings.refit == "all" else None,
        channel_updates=refine,
        keep_inputs=plan.keep_inputs,
        keep_updates=plan.keep_updates,
        saved_dtype=dtype,
    )
    reconstruction = Reconstruction(engine.sweep, options, save=save)
    store = _store(opened, work)
    with engine.dense_stream(store) as dense, engine.dense_stream(store) as pruned:
        result = reconstruction.run(dense, pruned, tokens_NS, prior)
    with torch.inference_mode():
        engine.head.nll(result.hidden_pruned, tokens_NS)
        engine.head.nll(result.hidden_dense, tokens_NS)


def run_rewrite(
    opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path
) -> None:
    from frugal_bonsai.rewrite.shrink import shrink

    mask = _without_channels(opened, 2)
    (work / "out").mkdir()
    shrink(opened.checkpoint, opened.spec, mask, work / "out", rules=ready.rules)


def run_verify(opened: Any, ready: Any, plan: Any, engine: Any, tokens_NS: Any, work: Path) -> None:
    from frugal_bonsai.rewrite.verify import compare_logits
    from frugal_bonsai.run.engine import make_engine
    from frugal_bonsai.run.open import open_output
    from frugal_bonsai.stream.source import CheckpointSource

    with open_output(work / "out", opened) as output:
        rewritten = make_engine(output, plan, ready.machine.device, None)
        masked = CheckpointSource(opened.checkpoint, opened.spec, mask=_without_channels(opened, 2))
        compare_logits(engine, masked, rewritten, tokens_NS[:2])


def _without_channels(opened: Any, every: int) -> Any:
    """Return a mask that removes every n-th FFN channel."""
    from frugal_bonsai.model.units import FFN, KeepMask

    mask = KeepMask(opened.spec.table)
    for group in opened.spec.table.groups:
        if group.kind == FFN:
            mask.of(group)[::every] = False
    return mask


def _store(opened: Any, work: Path) -> Any:
    from frugal_bonsai.stream.store import LayerStore

    return LayerStore(work / "store", opened.spec.layers)


def _prior(opened: Any, ready: Any, work: Path) -> Any:
    """Build importance scores that also compute the imputation of the next round."""
    import torch

    from frugal_bonsai.bonsai.importance.imputation import ImputationWriter
    from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
    from frugal_bonsai.bonsai.state import StateFolder
    from frugal_bonsai.model.units import KeepMask
    from frugal_bonsai.run.workload import prune_workload

    folder, settings = StateFolder(work / "state", {}), ready.settings
    writer = ImputationWriter(
        share=prune_workload(opened, ready, ready.windows).imputed_share,
        rules=ready.rules,
        damping=settings.ridge,
        save=lambda group, tensors: folder.save_imputation(0, group, tensors),
    )
    return ImportanceBuilder(
        settings.prior,
        KeepMask(opened.spec.table),
        damping=settings.ridge,
        generator=torch.Generator().manual_seed(0),
        imputations=writer if settings.imputes(uniform=ready.rules.uniform) else None,
    )


PHASE_FUNCTIONS: dict[str, Callable[..., None]] = {
    "perplexity": run_perplexity,
    "store": run_store,
    "statistics": run_statistics,
    "masks": run_masks,
    "recovery": run_recovery,
    "refinement": run_refinement,
    "rewrite": run_rewrite,
    "verify": run_verify,
}


if __name__ == "__main__":
    main()

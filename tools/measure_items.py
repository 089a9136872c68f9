"""Predicted against measured bytes of single items of the memory plan.

    python tools/measure_items.py CHECKPOINT --windows 4 --window 256

Each item is made alone, in one process, after a warm-up, and its growth of peak resident memory is
set beside the plan's formula. Linux only (/proc/self/clear_refs). measure_peaks.py measures whole
phases.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted against measured bytes of plan items")
    parser.add_argument("checkpoint")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--share", type=float, default=0.25, help="imputed share of a group")
    parser.add_argument("--scratch", help="folder for the store")
    options = parser.parse_args()
    print("| item | predicted MiB | measured MiB | predicted / measured |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.scratch) as work:
        for name, predicted, measured in measure(options, Path(work)):
            ratio = predicted / measured
            print(
                f"| {name} | {predicted / 2**20:.1f} | {measured / 2**20:.1f} | {ratio:.3f} |",
                flush=True,
            )


def growth(make: Callable[[], Any]) -> tuple[int, Any]:
    """Return the peak of resident memory above the present, and the result of the call."""
    from frugal_bonsai.memory.meter import peak_resident_bytes, resident_bytes

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes()
    made = make()
    return peak_resident_bytes() - before, made


def measure(options: argparse.Namespace, work: Path) -> Any:
    """Yield (item, predicted bytes, measured bytes)."""
    import torch

    from frugal_bonsai.memory.budget import Budget, enforce_host_cap
    from frugal_bonsai.memory.prune_items import PruneItems
    from frugal_bonsai.memory.work import Choice, PruneWorkload, SweepLimits
    from frugal_bonsai.run.engine import measured_base_bytes
    from frugal_bonsai.run.open import open_model
    from frugal_bonsai.stream.engine import Engine
    from frugal_bonsai.stream.store import INT8, build_store

    cpu = torch.device("cpu")
    enforce_host_cap(0, 1)  # blocks go back to the system when they are freed
    with open_model(options.checkpoint) as opened, torch.inference_mode():
        measured_base_bytes(opened.spec)
        todo = PruneWorkload(
            window=options.window,
            windows=options.windows,
            weights=INT8,
            source_bytes=2,
            goals=(0.49,),
            part_windows=options.windows,
            imputation_pool=2 * options.share,
        )
        items = PruneItems(opened.spec, Budget(device="cpu", host_bytes=0), todo)
        choice = Choice(
            micro_batch=options.windows, in_flight=options.windows, resident=0, keep_inputs=False
        )
        rows, tokens = items.head_sizes(choice)
        limits = SweepLimits(
            micro_batch=options.windows,
            windows_in_flight=options.windows,
            resident_windows=0,
            head_rows=rows,
            head_tokens=tokens,
        )
        engine = Engine(
            opened.checkpoint, opened.spec, device=cpu, dtype=torch.float32, limits=limits
        )
        size, store = growth(
            lambda: build_store(work, opened.checkpoint, opened.spec, weights=INT8)
        )
        yield "building the store", items.building()[0].size_bytes, size
        yield from _measure_layer(engine, store, items, choice, options)
        yield from _measure_products(engine, store, items, choice, options)
        yield from _measure_solve(opened.spec, items)
        yield from _measure_stand_ins(opened.spec, items, todo.imputed_share)


def _measure_layer(
    engine: Any, store: Any, items: Any, choice: Any, options: argparse.Namespace
) -> Any:
    import torch

    from frugal_bonsai.stream.call import call_layer

    spec = engine.spec
    tokens_NS = torch.randint(spec.vocabulary, (options.windows, options.window))
    kwargs = engine.skeleton.layer_kwargs(options.window)
    hidden = engine.sweep.embed(tokens_NS)
    with engine.stream(store) as stream:

        def first_two() -> Any:
            visits = stream.visit()
            next(visits)
            return visits, next(visits)[1]

        size, (visits, parameters) = growth(first_two)
        planned = {item.name: item.size_bytes for item in items.stream(choice, "int8")}
        yield "layer buffers", planned["layer buffers"], size
        yield "dequantised rows", planned["dequantised rows"], _growth_of_products(parameters)
        hooks = {
            group.output: lambda x_BSC: x_BSC.mul_(torch.ones(len(x_BSC), 1, x_BSC.shape[-1]))
            for group in spec.table.of_layer(1)
        }
        everything = slice(0, options.windows)
        size, _ = growth(
            lambda: call_layer(
                engine.skeleton.layers[1], parameters, hidden.read(everything), kwargs[1], hooks
            )
        )
        predicted = items.activations(choice, options.windows).size_bytes
        yield "activations of a micro-batch", predicted, size
        visits.close()
    size, _ = growth(lambda: engine.head.nll(hidden, tokens_NS))
    predicted = sum(item.size_bytes for item in items.head_rows(choice))
    yield "head chunks and logits", predicted + items.logits(choice).size_bytes, size


def _measure_products(
    engine: Any, store: Any, items: Any, choice: Any, options: argparse.Namespace
) -> Any:
    """All products of a layer, one after the other: they share their scratch memory."""
    import torch

    from frugal_bonsai.stream.layers import CODES, LayerStream

    device = engine.device
    with LayerStream(store, device=device, dtype=torch.float32, products=CODES) as stream:
        parameters = next(stream.visit())[1]
        size = _growth_of_products(parameters)
    planned = items.stream(choice, "int8", products=True)
    predicted = next(item.size_bytes for item in planned if item.name == "int8 products")
    yield "int8 products", predicted, size


def _growth_of_products(parameters: Any) -> int:
    """All products of a layer with 256 tokens, one after the other: they share their memory."""
    import torch

    from frugal_bonsai.stream.stored_weight import multiply_into

    weights = [weight for weight in parameters.values() if weight.dim() == 2]
    inputs = [torch.ones(256, weight.shape[1]) for weight in weights]
    outputs = [torch.zeros(256, weight.shape[0]).add_(1) for weight in weights]

    def multiply() -> None:
        for input_TI, weight_OI, output_TO in zip(inputs, weights, outputs, strict=True):
            multiply_into(input_TI, weight_OI, output_TO)

    return growth(multiply)[0]


def _measure_stand_ins(spec: Any, items: Any, share: float) -> Any:
    """Made from a group's Gram matrix, saved, and loaded with as few inputs as can be."""
    import torch

    from frugal_bonsai.bonsai.importance.gram import Moments
    from frugal_bonsai.bonsai.importance.imputation import Imputations, ImputationWriter
    from frugal_bonsai.model.layout import PER_LAYER, layout_rules

    group = spec.table.of_layer(0)[-1]
    moments = Moments(group.columns, device=torch.device("cpu"), gram=True)
    moments.add(torch.randn(1, 16, group.columns))
    saved: dict[str, Any] = {}
    writer = ImputationWriter(
        share=share,
        rules=layout_rules(spec, PER_LAYER),
        damping=1e-3,
        save=lambda group, tensors: saved.update(tensors),
    )
    size, _ = growth(lambda: writer.add(group, moments, torch.rand(group.count)))
    yield "computing imputation", items.solve(share=share).size_bytes, size
    loaded = Imputations(lambda group: saved)
    size, _ = growth(lambda: loaded.of(group, torch.randn(1, 1, group.columns)))
    yield "imputation of a group", items.imputation()[0].size_bytes, size


def _measure_solve(spec: Any, items: Any) -> Any:
    import torch

    from frugal_bonsai.bonsai.importance.gram import Moments, exact_loss_U
    from frugal_bonsai.bonsai.reconstruction.least_squares import ridge_refit_

    groups = spec.table.of_layer(0)
    cpu = torch.device("cpu")

    def collect() -> list[Moments]:
        both = [Moments(group.columns, device=cpu, gram=True) for group in groups]
        for moments in both:
            moments.add(torch.randn(1, 16, len(moments.sum_C)))
        return both

    size, both = growth(collect)
    yield "Gram matrices", items.gram().size_bytes, size
    moments, group = both[-1], groups[-1]
    weight_HC = torch.randn(spec.hidden, group.columns)
    cross_HC = torch.randn(spec.hidden, group.columns)

    def solve() -> None:
        factor = moments.factor(1e-3, where="here")
        ridge_refit_(factor, cross_HC, weight_HC)
        exact_loss_U(factor, weight_HC, group.columns_per_unit)

    yield "blocks of a solve", items.solve().size_bytes, growth(solve)[0]


if __name__ == "__main__":
    main()

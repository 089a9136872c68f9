"""The streaming engine against its yardsticks: ratios within one run, on this machine.

Figures, each the ratio of the medians of runs that alternate (above 1: ours is faster):

    streamed      the same model resident in memory, same sweep and arithmetic, against streamed
    blocks        the same sweep with every layer made dense as a whole, once a visit, against large
                  weights made dense some rows at a time for each product (CPU)
    masked        Hugging Face's own forward over the same tokens (fp32) against the masked sweep
    int8          the same forward against the masked sweep with int8 products
    offload       accelerate.disk_offload running the masks one at a time, against the masked sweep,
                  both with everything in the page cache
    offload-cold  the same for a model larger than memory: of what either side reads, nothing is in
                  the page cache when a mask (theirs) or a sweep (ours) begins
    cold          a plain sequential pread of the bytes that a sweep reads (the working store, the
                  head as it is in the arithmetic) against a sweep of few windows, cold
    utilisation   the masked sweep's arithmetic at the measured rate of matrix products, against
                  the sweep (model FLOP utilisation)

`--device cuda` computes on a GPU, where `streamed` and `utilisation` are the figures to look at.
`--arithmetic` names what to sweep in; left out, it is fp32 and, where this machine's rates say that
a search would take them (on a CPU: one with VNNI), int8 products. `cold` takes the last of them.

    python tools/make_shape_checkpoint.py llama-3.2-1b M
    python tools/bench_streaming.py M [--figures streamed,masked,int8,offload,cold] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from frugal_bonsai.hardware.measure import Timer, measure_products
from frugal_bonsai.hardware.profile import BF16, FP32
from frugal_bonsai.hardware.throughput import int8_wins
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.run.profile import quick_profile
from frugal_bonsai.stream.engine import FLOAT, INT8_PRODUCTS, Engine, compute_dtype
from frugal_bonsai.stream.int8_linear import Int8Weight
from frugal_bonsai.stream.layers import LayerStream, Parameters
from frugal_bonsai.stream.operations import count_operations
from frugal_bonsai.stream.scratch import Scratch
from frugal_bonsai.stream.source import LayerSource
from frugal_bonsai.stream.store import INT8, build_store

CPU = torch.device("cpu")
READ_BYTES = 64 * 2**20
FIGURES = ("streamed", "blocks", "masked", "int8", "offload", "offload-cold", "cold", "utilisation")


class HalfOff:
    """A masker: each window keeps a random half of every group's columns, as a search's does."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor:
        """Bool ``[B, C]``."""
        generator = torch.Generator().manual_seed(self._seed + group.layer)
        keep_U = torch.rand(group.count, generator=generator) > 0.5
        return keep_U.repeat_interleave(group.columns_per_unit).expand(items.stop - items.start, -1)

    def impute(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        """Zeros do."""


class Resident(LayerStream):
    """A stream whose layers were all read, and dequantised where they are, before."""

    def __init__(self, stream: LayerStream) -> None:
        self.source, self.device, self.dtype = stream.source, stream.device, stream.dtype
        self.tokens_at_once = stream.tokens_at_once
        self._layers = [_own(parameters) for _, parameters in stream.visit()]

    def start(self, then: LayerSource | None = None) -> None:
        """Nothing is left to read."""

    def visit(
        self, then: LayerSource | None = None, *, reverse: bool = False
    ) -> Iterator[tuple[int, Parameters]]:
        """As the stream did."""
        layers = list(enumerate(self._layers))
        yield from reversed(layers) if reverse else layers

    def close(self) -> None:
        """Let the layers go."""
        self._layers = []


def _own(parameters: Parameters) -> Parameters:
    device = next(iter(parameters.values())).device
    scratch, own = Scratch(device), Parameters()
    for name, value in parameters.items():
        if isinstance(value, Int8Weight):
            assert value.scales_O is not None
            own[name] = Int8Weight(value.stored().clone(), value.scales_O.clone(), scratch)
        else:
            own[name] = value.clone()
    return own


class Bench:
    """One model, its store, and sweeps of windows over it."""

    def __init__(self, model: Model, given: argparse.Namespace, work: Path) -> None:
        self.model, self.given, self.work = model, given, work
        self.store = build_store(work / "store", model.checkpoint, model.spec, weights=INT8)
        generator = torch.Generator().manual_seed(0)
        shape = (given.windows, given.window)
        self.tokens_NS = torch.randint(model.spec.vocabulary, shape, generator=generator)
        self.device = torch.device(given.device)
        dtype = compute_dtype(self.device)
        self.operations = count_operations(model.spec, given.window, dtype)
        if given.arithmetic is None:
            wins = int8_wins(self.operations, quick_profile(self.device))
            self.arithmetics = (FLOAT, INT8_PRODUCTS) if wins else (FLOAT,)
        else:
            self.arithmetics = tuple(given.arithmetic.split(","))
        self.engines = {name: self._engine(name) for name in (FLOAT, INT8_PRODUCTS)}
        self.heads = {
            name: engine.evaluation_head(work / "head") for name, engine in self.engines.items()
        }

    def _engine(self, arithmetic: str) -> Engine:
        spec, given = self.model.spec, self.given
        micro_batch = max(1, given.micro_batch_tokens // given.window)
        limits = SweepLimits(
            micro_batch=micro_batch,
            windows_in_flight=10**6,
            resident_windows=10**6,
            head_rows=max(1, 64 * 2**20 // (4 * spec.hidden)),
            head_tokens=given.head_tokens,
        )
        return Engine(
            self.model.checkpoint,
            spec,
            device=self.device,
            dtype=compute_dtype(self.device),
            limits=limits,
            arithmetic=arithmetic,
        )

    def sweep(self, arithmetic: str, stream: LayerStream, windows: int | None = None) -> None:
        """One masked sweep."""
        engine, tokens_NS = self.engines[arithmetic], self.tokens_NS[:windows]
        engine.sweep.losses(stream, self.heads[arithmetic], tokens_NS, masker=HalfOff())

    # -- figures --------------------------------------------------------------------------------
    def streamed(self) -> None:
        """Streamed against resident; that is dense where weights are not multiplied as codes."""
        for arithmetic in self.arithmetics:
            engine = self.engines[arithmetic]
            open_stream = engine.dense_stream if arithmetic == FLOAT else engine.evaluation_stream
            with open_stream(self.store) as stream:
                resident = Resident(stream)
            with engine.evaluation_stream(self.store) as stream:
                self._compare(
                    f"streamed, {arithmetic}",
                    partial(self.sweep, arithmetic, resident),
                    partial(self.sweep, arithmetic, stream),
                )
                resident.close()

    def blocks(self) -> None:
        """Layers made dense whole against rows of them; the head is the same."""
        engine = self.engines[FLOAT]
        with engine.dense_stream(self.store) as dense, engine.stream(self.store) as rows:
            self._compare(
                "blocks, float",
                partial(self.sweep, FLOAT, dense),
                partial(self.sweep, FLOAT, rows),
            )

    def masked(self) -> None:
        """Against Hugging Face's forward, fp32."""
        self._against_forward("masked", FLOAT)

    def int8(self) -> None:
        """The int8 products against the same forward."""
        self._against_forward("int8", INT8_PRODUCTS)

    def _against_forward(self, name: str, arithmetic: str) -> None:
        model = load_model(self.model.folder, torch.float32)
        batches = sorted({1, min(4, self.given.windows), self.given.windows})
        best = min(batches, key=lambda size: seconds(lambda: self._forward(model, size)))
        with self.engines[arithmetic].evaluation_stream(self.store) as stream:
            self._compare(
                f"{name}, its forward in batches of {best} (the fastest of {batches})",
                lambda: self._forward(model, best),
                lambda: self.sweep(arithmetic, stream),
            )

    def _forward(self, model: Any, batch: int) -> None:
        """Hugging Face's forward and the loss of every token."""
        with torch.inference_mode():
            for tokens_BS in self.tokens_NS.split(batch):
                logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits[:, :-1]
                torch.nn.functional.cross_entropy(
                    logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="none"
                )

    def offload(self) -> None:
        """Masks one at a time through accelerate.disk_offload, each on its window."""
        self._against_offload(cold=False)

    def offload_cold(self) -> None:
        """The same, where the page cache cannot hold the model from one pass to the next."""
        self._against_offload(cold=True)

    def _against_offload(self, *, cold: bool) -> None:
        from accelerate import disk_offload

        dtype = getattr(torch, self.given.offload_dtype)
        folder = self.work / f"offloaded-{self.given.offload_dtype}"
        model = load_model(self.model.folder, dtype)
        disk_offload(model, str(folder), execution_device=CPU)
        theirs = [Span(file) for file in folder.iterdir()]
        masks = min(self.given.offload_masks, len(self.tokens_NS))

        def one_at_a_time() -> None:
            for window in range(masks):
                if cold:
                    drop(theirs)
                with masked(model, self.model, window), torch.inference_mode():
                    tokens_1S = self.tokens_NS[window : window + 1]
                    model(input_ids=tokens_1S, labels=tokens_1S, use_cache=False)

        def sweep(arithmetic: str, stream: LayerStream) -> None:
            if cold:
                drop(self._read_by_sweeps(arithmetic))
            self.sweep(arithmetic, stream)

        for arithmetic in self.arithmetics:
            with self.engines[arithmetic].evaluation_stream(self.store) as stream:
                self._compare(
                    f"offload{' cold' * cold} ({self.given.offload_dtype}), {masks} masks, against "
                    f"{arithmetic} over {len(self.tokens_NS)}, seconds a mask",
                    one_at_a_time,
                    partial(sweep, arithmetic, stream),
                    shares=(masks, len(self.tokens_NS)),
                )

    def _read_by_sweeps(self, arithmetic: str) -> list[Span]:
        """The store, and the head: int8 rows of its own, or the checkpoint's tensor."""
        spans = [Span(file) for file in sorted((self.work / "store").iterdir())]
        if arithmetic == INT8_PRODUCTS:
            return spans + [Span(file) for file in sorted((self.work / "head").iterdir())]
        head = self.model.checkpoint.tensors[self.model.spec.head_tensor]
        return [*spans, Span(head.file, head.start, head.end)]

    def cold(self) -> None:
        """Few windows, nothing in the page cache."""
        arithmetic = self.arithmetics[-1]
        spans = self._read_by_sweeps(arithmetic)
        buffer = memoryview(bytearray(READ_BYTES))

        def plain() -> None:
            drop(spans)
            for span in spans:
                with span.file.open("rb", buffering=0) as source:
                    os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    for start in range(span.start, span.stop, READ_BYTES):
                        os.preadv(source.fileno(), [buffer[: span.stop - start]], start)

        with self.engines[arithmetic].evaluation_stream(self.store) as stream:

            def sweep() -> None:
                drop(spans)
                self.sweep(arithmetic, stream, self.given.cold_windows)

            self._compare(
                f"cold, {arithmetic}, {self.given.cold_windows} windows, "
                f"{sum(span.stop - span.start for span in spans) / 2**30:.2f} GiB",
                plain,
                sweep,
            )

    def utilisation(self) -> None:
        """The sweep's arithmetic at the measured rate of matrix products, against the sweep."""
        spec, tokens = self.model.spec, self.tokens_NS.numel()
        timer = Timer(device=self.device, seconds=2.0)
        rate = measure_products(timer)[FP32 if self.device.type == "cpu" else BF16]
        layer = self.operations.projections + self.operations.attention * self.given.window
        operations = spec.layers * layer + 2 * spec.vocabulary * spec.hidden
        ideal = tokens * operations / rate
        with self.engines[FLOAT].evaluation_stream(self.store) as stream:
            self.sweep(FLOAT, stream)
            times = [seconds(lambda: self.sweep(FLOAT, stream)) for _ in range(self.given.repeat)]
        self._print(f"utilisation of {rate / 1e12:.3g} Tflop/s", [ideal], times)

    def _compare(
        self,
        name: str,
        yardstick: Callable[[], None],
        ours: Callable[[], None],
        shares: tuple[int, int] = (1, 1),
    ) -> None:
        ours()  # buffers are there, lazily imported code is loaded
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.given.repeat):
            for run, found, share in zip((yardstick, ours), times, shares, strict=True):
                found.append(seconds(run) / share)
        self._print(name, *times)

    def _print(self, name: str, theirs_s: list[float], mine_s: list[float]) -> None:
        theirs, mine = (statistics.median(found) for found in (theirs_s, mine_s))
        spread = max(max(found) / min(found) for found in (theirs_s, mine_s))
        print(
            f"| {name} | {theirs:.2f} s | {mine:.2f} s | **{theirs / mine:.2f}** | {spread:.2f} |",
            flush=True,
        )


@contextmanager
def masked(model: Any, opened: Model, window: int) -> Iterator[None]:
    """The mask of one window as hooks on a Hugging Face model."""
    handles, masker = [], HalfOff()
    for group in opened.spec.table.groups:
        keep_C = masker.columns(group, slice(window, window + 1))[0]
        module = model.model.layers[group.layer].get_submodule(group.output)

        def hook(_: Any, args: tuple[torch.Tensor], keep_C: torch.Tensor = keep_C) -> Any:
            return (args[0] * keep_C.to(args[0].device),)

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model as anyone loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def seconds(run: Callable[[], None]) -> float:
    """Of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class Span:
    """A part of a file; all of it, if nothing else is said."""

    def __init__(self, file: Path, start: int = 0, stop: int | None = None) -> None:
        self.file, self.start = file, start
        self.stop = file.stat().st_size if stop is None else stop


def drop(spans: list[Span]) -> None:
    """Out of the page cache with the files that these are parts of."""
    for span in spans:
        with span.file.open("rb") as source, suppress(OSError):
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--figures", default=",".join(FIGURES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", help="float, int8 or float,int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--cold-windows", type=int, default=1)
    parser.add_argument("--offload-masks", type=int, default=2)
    parser.add_argument("--offload-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--micro-batch-tokens", type=int, default=1280)
    parser.add_argument("--head-tokens", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the working store is written")
    given = parser.parse_args()
    chosen = given.figures.split(",")
    if unknown := set(chosen) - set(FIGURES):
        parser.error(f"unknown figures {sorted(unknown)}, known are {', '.join(FIGURES)}")
    known = {FLOAT, INT8_PRODUCTS}
    if given.arithmetic is not None and not set(given.arithmetic.split(",")) <= known:
        parser.error(f"--arithmetic {given.arithmetic}: choose of {', '.join(sorted(known))}")
    torch.set_num_threads(given.threads)
    print("| figure | yardstick | ours | ratio | largest / smallest of the runs |")
    print("|---|---|---|---|---|", flush=True)
    with open_model(given.model) as model, tempfile.TemporaryDirectory(dir=given.work) as work:
        bench = Bench(model, given, Path(work))
        for figure in chosen:
            getattr(bench, figure.replace("-", "_"))()


if __name__ == "__main__":
    main()

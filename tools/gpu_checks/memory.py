"""Memory that runs out in the middle of a layer: the losses must stay what they are."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from frugal_bonsai.run.open import Model
from frugal_bonsai.stream.call import call_layer
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import LayerStore
from gpu_checks.check import Check
from gpu_checks.machine import reserved_peak_bytes, reset_peaks
from gpu_checks.models import int8_store, large, make_engine, opened, random_tokens

# Losses of other micro-batches may differ by this much: a product of other rows rounds elsewhere,
# and a bf16 logit of 4 and more is a multiple of 1/32.
_NEAR = 0.1


def memory(check: Check, variant: str | None = None) -> None:
    """An error that is raised by hand, then one of the allocator itself."""
    windows, window = (8, 32) if check.dry else (8, 2048)
    with opened(check, large(check)) as model, int8_store(check, model) as store:
        run = _Runs(check, model, store, random_tokens(model.spec, windows, window))
        expected = run.losses(run.engine())
        with check.part("raised by hand"):
            engine = run.engine()
            with mock.patch("frugal_bonsai.stream.forward.call_layer", _Fails(3)):
                run.compare("raised by hand in the second layer", engine, expected)
        with check.part("raised by the allocator"):
            if check.dry or check.device.type != "cuda":
                check.skip("raised by the allocator", "only a GPU's allocator has a limit")
            else:
                run.within_limit(expected)


class _Fails:
    """Calls layers; one of the calls finds no memory."""

    def __init__(self, call: int) -> None:
        self._left = call

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Raised by gpu_check.")
        return call_layer(*arguments, **named)


class _Runs:
    """Sweeps of the same windows by engines of their own."""

    def __init__(
        self, check: Check, model: Model, store: LayerStore, tokens_NS: torch.Tensor
    ) -> None:
        self._check, self._model, self._store, self._tokens_NS = check, model, store, tokens_NS

    def engine(self, micro_batch: int = 4) -> Engine:
        """A fresh engine; two micro-batches make up the windows."""
        return make_engine(self._check, self._model, micro_batch=micro_batch)

    def losses(self, engine: Engine) -> torch.Tensor:
        """Of all windows."""
        with engine.stream(self._store) as stream:
            return engine.losses(stream, self._tokens_NS, "losses")

    def compare(self, how: str, engine: Engine, expected: torch.Tensor) -> None:
        """Sweep, and say how far the losses are from those without a lack of memory."""
        found, planned = self.losses(engine), engine.sweep.batches.planned
        difference = float((found - expected).abs().max())
        self._check.figure(
            "losses after memory ran out",
            how=how,
            micro_batch=f"{planned} to {engine.sweep.batches.size}",
            halved=engine.sweep.batches.size < planned,
            equal_to_the_bit=torch.equal(found, expected),
            largest_difference=difference,
            mean_difference=float((found - expected).abs().mean()),
            largest_loss=float(expected.max()),
        )
        if engine.sweep.batches.size == planned:
            raise AssertionError("the micro-batch was not halved, so memory did not run out")
        if not difference < _NEAR:
            raise AssertionError(f"losses differ by {difference}")

    def within_limit(self, expected: torch.Tensor) -> None:
        """Give the allocator half of what eight windows need beyond what one needs."""
        device, peaks = self._check.device, []
        for micro_batch in (1, 8):
            reset_peaks(device)
            self.losses(self.engine(micro_batch))
            peaks.append(reserved_peak_bytes(device) or 0)
        total = torch.cuda.get_device_properties(device).total_memory
        reset_peaks(device)
        engine = self.engine(8)
        torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total, device)
        try:
            self.compare("raised by the allocator", engine, expected)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

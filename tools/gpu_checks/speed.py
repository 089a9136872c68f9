"""Speed of a masked sweep: against a product, a model in memory, and masks one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench_streaming import HalfOff, load_model, masked

from frugal_bonsai.run.open import Model
from frugal_bonsai.stream.engine import compute_dtype
from frugal_bonsai.stream.store import LayerStore
from gpu_checks.check import Check
from gpu_checks.machine import best_seconds, once
from gpu_checks.models import Shape, int8_store, large, make_engine, opened, random_tokens


def speed(check: Check, variant: str | None = None) -> None:
    """Measure all of it in one process, so that the ratios are of one machine in one state."""
    windows, window, micro_batch = (4, 32, 2) if check.dry else (16, 2048, 4)
    shape = large(check)
    with opened(check, shape) as model, int8_store(check, model) as store:
        tokens_NS = random_tokens(model.spec, windows, window)
        rate = _product_rate(check, shape)
        sweeps = _Sweeps(check, model, store, tokens_NS, micro_batch)
        seconds = best_seconds(check.device, sweeps.masked)
        operations = tokens_NS.numel() * _operations_a_token(shape, window)
        check.figure(
            "the masked sweep",
            sweep=f"{shape.layers} layers of {shape.name}, {windows} windows of {window}",
            seconds=seconds,
            tokens_per_second=tokens_NS.numel() / seconds,
            teraflops=operations / seconds / 1e12,
            product_teraflops=rate / 1e12,
            utilisation=operations / seconds / rate,
        )
        with check.part("resident"):
            _against_resident(check, model, sweeps)
        with check.part("one mask at a time"):
            _against_offload(check, model, tokens_NS, seconds / windows)


class _Sweeps:
    """The same windows swept with and without masks."""

    def __init__(
        self,
        check: Check,
        model: Model,
        store: LayerStore,
        tokens_NS: torch.Tensor,
        micro_batch: int,
    ) -> None:
        self.engine = make_engine(check, model, micro_batch=micro_batch)
        self.store, self.tokens_NS, self.micro_batch = store, tokens_NS, micro_batch

    def masked(self) -> torch.Tensor:
        """Evaluate each window under another kind of mask."""
        with self.engine.evaluation_stream(self.store) as stream:
            return self.engine.sweep.losses(
                stream, self.engine.head, self.tokens_NS, masker=HalfOff()
            )

    def dense(self) -> torch.Tensor:
        """Without masks."""
        with self.engine.evaluation_stream(self.store) as stream:
            return self.engine.losses(stream, self.tokens_NS, "dense")


def _operations_a_token(shape: Shape, window: int) -> int:
    """Two for each weight of the layers and of the head, and causal attention."""
    weights = sum(
        size[0] * size[1]
        for name, size in shape.tensors().items()
        if len(size) == 2  # the tied embedding is the head's
    )
    return 2 * weights + shape.layers * 2 * window * shape.heads * shape.head_dim


def _product_rate(check: Check, shape: Shape) -> float:
    """Operations a second of a product in the compute dtype, at the FFN's shape."""
    tokens = 256 if check.dry else 8192
    dtype = compute_dtype(check.device)
    input_TH = torch.randn(tokens, shape.hidden).to(check.device, dtype)
    weight_IH = torch.randn(shape.ffn, shape.hidden).to(check.device, dtype)
    repeat = 10

    def run() -> None:
        for _ in range(repeat):
            torch.nn.functional.linear(input_TH, weight_IH)

    return repeat * 2 * tokens * shape.hidden * shape.ffn / best_seconds(check.device, run)


def _against_resident(check: Check, model: Model, sweeps: _Sweeps) -> None:
    """Hugging Face's own forward of the model in memory, over the same micro-batches."""
    resident = load_model(model.folder, compute_dtype(check.full_device)).to(check.full_device)

    def forward() -> None:
        with torch.inference_mode():
            for tokens_BS in sweeps.tokens_NS.split(sweeps.micro_batch):
                _losses_of(resident, tokens_BS.to(check.full_device))

    theirs = best_seconds(check.full_device, forward)
    ours = best_seconds(check.device, sweeps.dense)
    check.figure(
        "streamed against a model in memory",
        resident_seconds=theirs,
        streamed_seconds=ours,
        ratio=theirs / ours,
        streamed_bytes=sum(map(sweeps.store.layer_bytes, range(sweeps.store.layers))),
    )


def _losses_of(model: Any, tokens_BS: torch.Tensor) -> list[torch.Tensor]:
    """Losses of a micro-batch, its logits a window at a time as the engine's head has them."""
    hidden_BSH = model.model(input_ids=tokens_BS, use_cache=False).last_hidden_state
    return [
        torch.nn.functional.cross_entropy(
            model.lm_head(hidden_SH[:-1]).float(), tokens_S[1:], reduction="none"
        )
        for hidden_SH, tokens_S in zip(hidden_BSH, tokens_BS, strict=True)
    ]


def _against_offload(
    check: Check, model: Model, tokens_NS: torch.Tensor, our_seconds: float
) -> None:
    """Masks as hooks on a model that accelerate reads from disk for each of them."""
    from accelerate import disk_offload

    theirs = load_model(model.folder, compute_dtype(check.full_device))
    disk_offload(theirs, str(check.work / "offloaded"), execution_device=check.full_device)

    def one(window: int) -> Callable[[], None]:
        def run() -> None:
            tokens_1S = tokens_NS[window : window + 1].to(check.full_device)
            with masked(theirs, model, window), torch.inference_mode():
                theirs(input_ids=tokens_1S, labels=tokens_1S, use_cache=False)

        return run

    one(0)()  # its files are in the page cache, as ours are
    masks = 2
    both_seconds, _ = once(check.full_device, lambda: [one(window)() for window in range(masks)])
    each = both_seconds / masks
    check.figure(
        "masks one at a time",
        masks=masks,
        offload_seconds_a_mask=each,
        ours_seconds_a_mask=our_seconds,
        ratio=each / our_seconds,
    )

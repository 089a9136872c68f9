"""The steps of the check in the order in which they run: the most valuable first."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_checks.check import Check


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        name: as ``--only`` takes it.
        home: module and function.
        about: what its tables show, for the page.
        limit_seconds: after which it is ended.
        needs_seconds: it does not start with less.
    """

    name: str
    home: str
    about: str
    limit_seconds: float
    needs_seconds: float

    def run(self, check: Check, variant: str | None = None) -> None:
        """Do it here; what fails becomes a line."""
        with check.part(self.name):
            module, _, function = self.home.partition(":")
            getattr(import_module(f"gpu_checks.{module}"), function)(check, variant)


STEPS = (
    Step(
        name="example",
        home="prunes:example",
        about=(
            "The built-in model is pruned with the same options on the device and on the CPU, in "
            "two layouts. The device computes in bf16 and the CPU in fp32, so units of nearly the "
            "same relevance may differ. `verified within` is the largest difference between the "
            "logits of the rewritten model and of the masked parent, relative to the largest."
        ),
        limit_seconds=90,
        needs_seconds=25,
    ),
    Step(
        name="tests",
        home="suite:tests",
        about="`python -m pytest -m gpu tests/stream` runs the tests that need a GPU.",
        limit_seconds=120,
        needs_seconds=30,
    ),
    Step(
        name="caps",
        home="suite:caps",
        about=(
            "Statistics, a masked sweep and recovery run over an 8B shape under three caps. `gpu "
            "peak` is what torch's allocator reserved plus the CUDA context. `nvidia smi` is the "
            "largest reading of the whole card less `idle`, the reading before this process used "
            "it. `host peak` is VmHWM."
        ),
        limit_seconds=75,
        needs_seconds=25,
    ),
    Step(
        name="race",
        home="race:race",
        about=(
            "The same masked sweep runs again and again with a fresh engine, stream and head. "
            "Every loss must equal, to the bit, that of a process under CUDA_LAUNCH_BLOCKING=1. "
            "In some sweeps a sleeping kernel keeps the device behind the host, which makes an "
            "unordered access of two streams likely to show. A small model then runs under "
            "TORCH_CUDA_SANITIZER=1, which raises at the first such access."
        ),
        limit_seconds=75,
        needs_seconds=25,
    ),
    Step(
        name="profile",
        home="prunes:predicted",
        about=(
            "The machine is profiled, then an 8B shape of few layers is pruned in two layouts with "
            "that profile. A phase's measured seconds run from the beginning of its sweeps to the "
            "beginning of the next phase's, so what follows a sweep counts to it. A command's "
            "start (imports) is measured nowhere here and is left out of the predicted whole."
        ),
        limit_seconds=120,
        needs_seconds=40,
    ),
    Step(
        name="speed",
        home="speed:speed",
        about=(
            "Utilisation is the operations of the masked sweep (two for each weight and token, and "
            "causal attention) over its seconds, divided by the rate of one product in the compute "
            "dtype. A ratio above 1 means that the streamed sweep is the faster one. All figures "
            "are the best of several runs in one process."
        ),
        limit_seconds=75,
        needs_seconds=25,
    ),
    Step(
        name="gram",
        home="gram:gram",
        about=(
            "Gram products are compared with fp64 over a block of 256 columns (Frobenius norm of "
            "the difference over that of the exact block). The residual of a solve is relative to "
            "the right-hand side."
        ),
        limit_seconds=45,
        needs_seconds=15,
    ),
    Step(
        name="memory",
        home="memory:memory",
        about=(
            "Memory runs out in the middle of a layer. The micro-batch halves, and the losses must "
            "be those of a run with enough memory, up to the rounding of products with fewer rows."
        ),
        limit_seconds=45,
        needs_seconds=15,
    ),
    Step(
        name="adapt",
        home="adapt:adapt",
        about="The student is trained for five steps in each way that `adapt` can hold it.",
        limit_seconds=75,
        needs_seconds=20,
    ),
)

"""Verify that the rewritten model computes the same logits as the masked parent.

In: the engines of the parent (with mask and refits) and of the rewritten model. Out: the largest
difference of their logits. Both models are streamed under the same memory caps. Holds the hidden
states of all windows and the logits of one window, for both models.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

import torch

from frugal_bonsai.errors import VerifyError
from frugal_bonsai.memory.work import VERIFY_TOKENS
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.source import CheckpointSource

# Largest difference relative to the largest logit. The models differ only by rounding: the parent's
# sums contain zeros.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def compare_logits(
    parent: Engine, masked: CheckpointSource, rewritten: Engine, windows_NS: torch.Tensor
) -> float:
    """Return the largest difference of logits, relative to the parent's largest logit.

    Args:
        parent: the dense model's engine.
        masked: the dense model's layers with the final mask and the refits.
        rewritten: the rewritten model's engine.
        windows_NS: int64 ``[N, S]``, a few windows. Their first tokens are used.

    Raises:
        VerifyError: the difference is larger than rounding in the compute dtype explains, or only
            one of two logits is NaN or infinite.
    """
    tokens_NS = windows_NS[:, :VERIFY_TOKENS]
    with parent.stream(masked) as stream:
        expected = parent.sweep.run(stream, tokens_NS, name="verify: masked parent")
    with rewritten.native() as stream:
        found = rewritten.sweep.run(stream, tokens_NS, name="verify: rewritten model")
    # Tensors, because Python's max drops a NaN.
    largest = scale = torch.zeros((), device=parent.device)
    with torch.inference_mode():
        for window in range(len(tokens_NS)):
            one = slice(window, window + 1)
            expected_SV = parent.head.logits(expected.read(one))
            found_SV = rewritten.head.logits(found.read(one))
            scale = torch.maximum(scale, expected_SV.abs().nan_to_num_(0, posinf=0).max())
            largest = torch.maximum(largest, _difference(expected_SV, found_SV).abs().max())
    what = "the rewritten model's logits differ from the masked parent's"
    return _require_small(largest, scale, parent.dtype, what)


def _difference(expected_SV: torch.Tensor, found_SV: torch.Tensor) -> torch.Tensor:
    """Return the differences of logits; 0 where both overflowed to the same infinity or to NaN."""
    difference_SV = expected_SV - found_SV
    if bool(difference_SV.isfinite().all()):
        return difference_SV
    same_SV = expected_SV == found_SV
    same_SV |= expected_SV.isnan() & found_SV.isnan()
    return difference_SV.masked_fill_(same_SV, 0)


def compare_student(
    engine: Engine, merged: CheckpointSource, windows_NS: torch.Tensor, student_NSV: torch.Tensor
) -> float:
    """Return the largest difference of a student's logits, relative to its largest logit.

    Args:
        engine: the pruned model's engine, in fp32.
        merged: the pruned model's layers with the merged weights, in fp32.
        windows_NS: int64 ``[N, S]``, a few windows.
        student_NSV: the student's fp32 logits for their first tokens, on the CPU.

    Raises:
        VerifyError: the difference is NaN or larger than rounding in fp32 explains.
    """
    tokens_NS, largest = windows_NS[:, : student_NSV.shape[1]], torch.zeros(())
    # One buffer in fp32 is as large as the two in 16 bits that the plan has.
    with LayerStream(merged, device=engine.device, dtype=engine.dtype, buffers=1) as stream:
        hidden = engine.sweep.run(stream, tokens_NS, name="verify: student")
    with torch.inference_mode():
        for window, student_SV in enumerate(student_NSV):
            found_SV = engine.head.logits(hidden.read(slice(window, window + 1)))[0].cpu()
            largest = torch.maximum(largest, (found_SV - student_SV).abs().max())
    what = "the merged weights' logits differ from the student's"
    return _require_small(largest, student_NSV.abs().max(), engine.dtype, what)


def _require_small(
    largest: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, what: str
) -> float:
    """Return the largest difference relative to the largest logit, if rounding explains it."""
    relative = float(largest) / max(float(scale), 1e-30)
    if not relative <= TOLERANCE[dtype]:
        raise VerifyError(
            f"{what} by {relative:.2e} of the largest logit, allowed are {TOLERANCE[dtype]:.0e}; "
            f"nothing was written. This is a defect: please report it with the model's config.json"
        )
    return relative

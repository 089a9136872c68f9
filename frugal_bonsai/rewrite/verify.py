"""Verify: the rewritten model computes what the masked parent computes.

In: two engines, the parent's with masks and refits, the rewritten model's own. Out: the largest
difference of their logits. Both are streamed under the same caps. Holds two windows' hidden states
and one window's logits of each.

Shape suffixes: N windows, S tokens.
"""

from __future__ import annotations

import torch

from frugal_bonsai.errors import VerifyError
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.source import CheckpointSource

# Relative to the largest logit. The two differ only in the order of sums over zeros.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
# Enough tokens to pass through every weight, few enough that their logits are small.
VERIFY_TOKENS = 64


def compare_logits(
    parent: Engine, masked: CheckpointSource, rewritten: Engine, windows_NS: torch.Tensor
) -> float:
    """Largest difference of logits, relative to the parent's largest logit.

    Args:
        parent: the dense model's engine.
        masked: the dense model's layers through the final mask, with the refits.
        rewritten: the rewritten model's engine.
        windows_NS: a few windows; their first tokens are used.

    Raises:
        VerifyError: the difference is larger than the compute dtype explains, or is no number.
    """
    tokens_NS = windows_NS[:, :VERIFY_TOKENS]
    with parent.stream(masked) as stream:
        expected = parent.sweep.run(stream, tokens_NS, name="verify: masked parent")
    with rewritten.native() as stream:
        found = rewritten.sweep.run(stream, tokens_NS, name="verify: rewritten model")
    # Tensors: Python's max would drop a NaN.
    largest = scale = torch.zeros((), device=parent.device)
    with torch.inference_mode():
        for window in range(len(tokens_NS)):
            one = slice(window, window + 1)
            wanted_SV = parent.head.logits(expected.read(one))
            difference_SV = wanted_SV - rewritten.head.logits(found.read(one))
            scale = torch.maximum(scale, wanted_SV.abs().max())
            largest = torch.maximum(largest, difference_SV.abs().max())
    relative = float(largest) / max(float(scale), 1e-30)
    if not relative <= TOLERANCE[parent.dtype]:
        raise VerifyError(
            f"the rewritten model's logits differ from the masked parent's by {relative:.2e} of "
            f"the largest logit, allowed are {TOLERANCE[parent.dtype]:.0e}; nothing was written. "
            f"This is a defect: please report it with the model's config.json"
        )
    return relative

"""The least-squares problem of one block of channels: a linearised change of its input weights.

In: a block of an FFN's channels, the FFN's inputs and what its target lacks. Out: the block's new
input weights. The gradient sums over all windows of the step. The curvature J^T J is measured on a
part of them, because it needs fewer tokens: about 64 for each row of the block's weights
(memory/work.py). Conjugate gradients solve the problem in coordinates in which the inputs are white
and all channels have the same weight.

Memory: the block's weights about eight times, one micro-batch's activations, and where the plan
allows it the slopes of the windows of the curvature.

Shape suffixes: B windows of a micro-batch, S tokens, T tokens of a micro-batch, N windows of the
curvature, H hidden, R channels of the block, K input projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.reconstruction.least_squares import conjugate_gradients
from frugal_bonsai.bonsai.reconstruction.sublayer import Sublayer
from frugal_bonsai.stream.hidden import HiddenStates

# mu as a share of the curvature of a channel of mean weight on white inputs.
DAMPING = 1e-2


@dataclass(frozen=True, kw_only=True)
class UpdateStep:
    """Values that the blocks of one channel update share.

    Attributes:
        sublayer: the FFN with its present weights.
        inputs: the FFN's inputs.
        factor: of the inputs' mean square.
        windows: windows that this step learns from.
        keep: hold the slopes of a block while its problem is solved.
        iterations: conjugate-gradient iterations on one block.
        run: calls a function with micro-batches of some windows.
        residual: the target of a micro-batch ``[T, H]`` less the FFN's present output, given the
            micro-batch and the FFN's inputs ``[T, H]``, fp32.
    """

    sublayer: Sublayer
    inputs: HiddenStates
    factor: DampedFactor
    windows: slice
    keep: bool
    iterations: int
    run: Callable[[slice, Callable[[slice], None]], None]
    residual: Callable[[slice, torch.Tensor], torch.Tensor]


class BlockProblem:
    """The linearised problem of one block of channels on some windows.

    J is the derivative of the FFN's output with respect to the block's input weights.

    Args:
        step: the channel update.
        block: the channels.
        output_HR: their columns of the output projection, fp32.
        curved: windows that the curvature is measured on, the first of the step's.
    """

    def __init__(
        self, step: UpdateStep, block: slice, output_HR: torch.Tensor, curved: slice
    ) -> None:
        self._step, self._block, self._curved = step, block, curved
        self._output_HR = output_HR
        self._weight_KRH = torch.stack(step.sublayer.weights(block))
        self._slopes_KNSR: torch.Tensor | None = None
        hidden, channels = output_HR.shape
        # One product with the Gram matrix of few channels replaces two with the projection.
        self._gram_RR = output_HR.T @ output_HR if channels < 2 * hidden else None

    def solve(self) -> torch.Tensor:
        """Return the block's new weights ``[K, R, H]``."""
        factor, windows = self._step.factor, self._step.windows
        tokens = (windows.stop - windows.start) * self._step.inputs.window
        gradient_KRH, square_KR = self._linearise()
        scale_KR = (self._output_HR.square().sum(0) * square_KR / tokens).sqrt()
        # A channel that is never active has no scale and no gradient: it does not change.
        least = max(1e-6 * float(scale_KR.max()), 1e-30)
        scale_KR1: torch.Tensor = scale_KR.clamp_min(least)[..., None]

        def from_white(step_KRH: torch.Tensor) -> torch.Tensor:
            return factor.times_inverse(step_KRH / scale_KR1)

        def to_white(gradient_KRH: torch.Tensor) -> torch.Tensor:
            return factor.times_inverse_transposed(gradient_KRH).div_(scale_KR1)

        def operator(step_KRH: torch.Tensor) -> torch.Tensor:
            """J^T J + mu in white coordinates."""
            image_KRH = to_white(self._times_jtj(from_white(step_KRH)))
            return image_KRH.add_(step_KRH, alpha=DAMPING * tokens)

        right_KRH = to_white(gradient_KRH)
        del gradient_KRH
        step_KRH = conjugate_gradients(operator, right_KRH, self._step.iterations)
        self._slopes_KNSR = None
        return self._weight_KRH + from_white(step_KRH)

    def _linearise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return J^T times the residual ``[K, R, H]``, and the sum of phi'^2 ``[K, R]``."""
        step, curved = self._step, self._curved
        gradient_KRH = torch.zeros_like(self._weight_KRH)
        square_KR = torch.zeros_like(gradient_KRH[..., 0])
        inputs, channels = gradient_KRH.shape[:2]
        window = step.inputs.window
        if step.keep:
            windows = curved.stop - curved.start
            self._slopes_KNSR = gradient_KRH.new_empty(inputs, windows, window, channels)

        def add(items: slice) -> None:
            input_TH = step.inputs.read(items).flatten(0, 1).float()
            left_TH = step.residual(items, input_TH)
            slope_KTR = self._compute_slopes(input_TH)
            pull_KTR = slope_KTR * (left_TH @ self._output_HR)
            own_KR = slope_KTR.square().sum(1)
            gradient_KRH.baddbmm_(pull_KTR.transpose(1, 2), input_TH.expand(inputs, -1, -1))
            square_KR.add_(own_KR)
            if self._slopes_KNSR is not None and items.start < curved.stop:
                held = slice(items.start, min(items.stop, curved.stop))
                slope_KBSR = slope_KTR.unflatten(1, (-1, window))[:, : held.stop - held.start]
                self._held_slopes(self._slopes_KNSR, held).copy_(slope_KBSR)

        step.run(step.windows, add)
        return gradient_KRH, square_KR

    def _times_jtj(self, step_KRH: torch.Tensor) -> torch.Tensor:
        """Return J^T J times a change of the block's weights, scaled to all windows."""
        image_KRH = torch.zeros_like(self._weight_KRH)

        def add(items: slice) -> None:
            input_TH = self._step.inputs.read(items).flatten(0, 1).float()
            if self._slopes_KNSR is None:
                slope_KTR = self._compute_slopes(input_TH)
            else:
                slope_KTR = self._held_slopes(self._slopes_KNSR, items).flatten(1, 2)
            moved_TR = (slope_KTR * (input_TH @ step_KRH.transpose(1, 2))).sum(0)
            if self._gram_RR is not None:
                back_TR = moved_TR @ self._gram_RR
            else:
                back_TR = moved_TR @ self._output_HR.T @ self._output_HR
            back_KTR = slope_KTR * back_TR
            image_KRH.baddbmm_(back_KTR.transpose(1, 2), input_TH.expand(len(step_KRH), -1, -1))

        self._step.run(self._curved, add)
        windows, curved = self._step.windows, self._curved
        return image_KRH.mul_((windows.stop - windows.start) / (curved.stop - curved.start))

    def _compute_slopes(self, input_TH: torch.Tensor) -> torch.Tensor:
        sublayer = self._step.sublayer
        before = sublayer.pre_activations(self._weight_KRH, input_TH, self._block)
        return sublayer.slopes(before)

    def _held_slopes(self, slopes_KNSR: torch.Tensor, items: slice) -> torch.Tensor:
        """Return the held slopes of some windows, a view ``[K, B, S, R]``."""
        first = self._curved.start
        return slopes_KNSR[:, items.start - first : items.stop - first]

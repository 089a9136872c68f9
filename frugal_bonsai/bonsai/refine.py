"""Refining a sublayer's own inputs: gate and up, so that fewer channels do the work of all.

In: a layer of both models whose FFN has been refitted. Out: better weights for the projections into
it. A refit of down_proj can only mix the channels that are left; this moves the channels
themselves. With p = x W^T the channels' pre-activations, phi(p) their activations and D down_proj,

    argmin over dW of || T - (phi(p) + phi'(p) * x dW^T) D^T ||^2 + mu ||dW||^2 ,

a linear least-squares problem (exactly linear in up alone, which phi is linear in; linearised in
gate). It is far too large for a Cholesky factor and is solved by a few conjugate-gradient steps,
in coordinates in which the inputs are white and every channel weighs the same. All of it happens
inside one sublayer: no backward pass through the model, no optimiser. phi is Hugging Face's own
module and phi' a difference of two of its values, so the activation function is written nowhere.
Holds two sets of hidden states (inputs and targets), one micro-batch's activations, and (if the
plan allows) phi' of one layer, else it is computed again.

Shape suffixes: B windows of a micro-batch, S tokens, T tokens of a micro-batch, H hidden, R
channels (rows of the input projections, columns of the output projection), K input projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import nn

from frugal_bonsai.bonsai.gram import damped_factor
from frugal_bonsai.bonsai.layer_pass import LayerPass
from frugal_bonsai.bonsai.settings import REFINE_ITERATIONS
from frugal_bonsai.memory.items import LEAST_CHANNELS, MOST_BLOCKS
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.hidden import HiddenStates

# mu as a share of what a channel of mean weight gives on white inputs.
DAMPING = 1e-2
# Shares of the pre-activations' root mean square between which phi' is the difference.
_DIFFERENCE = 1e-2
_WHITENING = 1e-4


class Refinement:
    """One sublayer's problem.

    Args:
        work: the layer of both models; everything before the sublayer is refitted.
        group: the sublayer's units, one channel each.
        projections: modules inside the layer that the group's rows belong to.
        windows: how many are in flight.
        inputs: room for the projections' inputs.
        targets: room for what the sublayer should give.
        keep: hold phi' for all windows while a problem is solved.
        iterations: conjugate-gradient steps on one problem.
    """

    def __init__(
        self,
        work: LayerPass,
        group: UnitGroup,
        projections: Sequence[str],
        windows: int,
        *,
        inputs: HiddenStates,
        targets: HiddenStates,
        keep: bool,
        iterations: int = REFINE_ITERATIONS,
    ) -> None:
        self._work, self._group, self._windows = work, group, windows
        self._projections = tuple(projections)
        self._inputs, self._targets, self._keep = inputs, targets, keep
        self._iterations = iterations
        self._slopes: dict[int, torch.Tensor] = {}
        owner = group.output.rpartition(".")[0]
        self._sublayer = work.module.get_submodule(owner)
        hidden = work.pruned[f"{self._projections[0]}.weight"].shape[1]
        gram_HH = torch.zeros(hidden, hidden, device=work.sweep.skeleton.device)
        self._now, self._window, tokens = slice(0, windows), 0, 0
        for items in work.sweep.micro_batches(windows):
            input_BSH = work.inputs(self._projections[0], items)
            inputs.write(items, input_BSH)
            targets.write(items, work.hidden_dense.read(items) - work.residual(items))
            input_TH = input_BSH.flatten(0, 1).float()
            gram_HH.addmm_(input_TH.T, input_TH)
            tokens += len(input_TH)
            self._window = input_BSH.shape[1]
        where = f"refinement of {group.name}"
        self._factor_HH = damped_factor(gram_HH / tokens, _WHITENING, where=where)

    @property
    def passes(self) -> int:
        """How often one :meth:`improve` takes its tokens through the sublayer, there or back."""
        return len(self._blocks()) + 1 + 2 * self._iterations

    def parts(self, count: int) -> list[slice]:
        """The windows in ``count`` parts of like size, fewer where there are fewer windows."""
        return _split(self._windows, min(count, self._windows))

    def pairs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """For each micro-batch, what the sublayer should give, its bias included."""
        for items in self._work.sweep.micro_batches(self._windows):
            yield items, self._targets.read(items)

    def improve(self, weight_HR: torch.Tensor, windows: slice) -> dict[str, torch.Tensor]:
        """New weights of the input projections, given the output projection: name -> ``[R, H]``.

        Blocks of channels are moved in turn. The layer pass computes with what is returned.

        Args:
            weight_HR: the output projection's weight.
            windows: those that the problem is about.
        """
        self._now = windows
        names = [f"{projection}.weight" for projection in self._projections]
        pruned, dtype = self._work.pruned, self._work.sweep.skeleton.dtype
        moved_by_name = {name: pruned[name].float() for name in names}
        # The stream's own buffers stay as they are: the caller may go back to them.
        pruned.update({name: weight.to(dtype) for name, weight in moved_by_name.items()})
        for rows in self._blocks():
            moved_KRH = self._improve_rows(weight_HR, rows)
            for name, moved_RH in zip(names, moved_KRH, strict=True):
                moved_by_name[name] = moved_by_name[name].index_copy(
                    0, torch.arange(rows.start, rows.stop, device=moved_RH.device), moved_RH
                )
                pruned[name] = moved_by_name[name].to(dtype)
        return moved_by_name

    def _blocks(self) -> list[slice]:
        channels = len(self._work.pruned[f"{self._projections[0]}.weight"])
        return _split(channels, min(MOST_BLOCKS, -(-channels // LEAST_CHANNELS)))

    def _improve_rows(self, weight_HR: torch.Tensor, rows: slice) -> torch.Tensor:
        """New weights ``[K, R, H]`` of a block of channels."""
        tokens = (self._now.stop - self._now.start) * self._window
        weight_KRH = torch.stack(
            [self._work.pruned[f"{projection}.weight"][rows] for projection in self._projections]
        ).float()
        pull_KRH, square_KR = self._start(weight_HR, rows)
        weight_HR = weight_HR[:, rows]
        scale_KR = (weight_HR.square().sum(0) * square_KR / tokens).sqrt()
        # A channel that is never on has no scale and no pull: it stays as it is.
        least = max(1e-6 * float(scale_KR.max()), 1e-30)
        scale_KR1: torch.Tensor = scale_KR.clamp_min(least)[..., None]

        def outward(step_KRH: torch.Tensor) -> torch.Tensor:
            moved_KRH: torch.Tensor = torch.linalg.solve_triangular(
                self._factor_HH, step_KRH / scale_KR1, upper=False, left=False
            )
            return moved_KRH

        def inward(pull_KRH: torch.Tensor) -> torch.Tensor:
            white_KRH: torch.Tensor = torch.linalg.solve_triangular(
                self._factor_HH.T, pull_KRH, upper=True, left=False
            )
            return white_KRH.div_(scale_KR1)

        def normal(step_KRH: torch.Tensor) -> torch.Tensor:
            """J^T J + mu of the linearised problem, in white coordinates."""
            pushed_KRH = self._there_and_back(weight_KRH, weight_HR, outward(step_KRH), rows)
            image_KRH: torch.Tensor = inward(pushed_KRH).add_(step_KRH, alpha=DAMPING * tokens)
            return image_KRH

        step_KRH = conjugate_gradients(normal, inward(pull_KRH), self._iterations)
        self._slopes.clear()
        return weight_KRH + outward(step_KRH)

    def _micro_batches(self) -> Iterator[tuple[slice, torch.Tensor]]:
        step = self._work.sweep.micro_batch
        for start in range(self._now.start, self._now.stop, step):
            items = slice(start, min(start + step, self._now.stop))
            yield items, self._inputs.read(items).flatten(0, 1).float()

    def _start(self, weight_HR: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """J^T residual ``[K, R, H]`` and the sum of phi'^2 ``[K, R]`` of a block."""
        weights = [self._work.pruned[f"{name}.weight"].float() for name in self._projections]
        pull_KRH = torch.zeros_like(torch.stack([weight[rows] for weight in weights]))
        square_KR = torch.zeros_like(pull_KRH[..., 0])
        bias_H = self._work.pruned.get(f"{self._group.output}.bias")
        for items, input_TH in self._micro_batches():
            before = self._before(weights, input_TH, slice(None))
            left_TH = self._targets.read(items).flatten(0, 1).float()
            left_TH = left_TH - self._activation(before) @ weight_HR.T
            if bias_H is not None:
                left_TH -= bias_H.float()
            slope_KTR = self._slope([one_TR[:, rows] for one_TR in before])
            if self._keep:
                self._slopes[items.start] = slope_KTR
            square_KR += slope_KTR.square().sum(1)
            pull_KRH += (slope_KTR * (left_TH @ weight_HR[:, rows])).transpose(1, 2) @ input_TH
        return pull_KRH, square_KR

    def _there_and_back(
        self,
        weight_KRH: torch.Tensor,
        weight_HR: torch.Tensor,
        step_KRH: torch.Tensor,
        rows: slice,
    ) -> torch.Tensor:
        """J^T J of a change of the input projections' weights, all of one block."""
        pull_KRH = torch.zeros_like(weight_KRH)
        for items, input_TH in self._micro_batches():
            slope_KTR = self._slopes.get(items.start)
            if slope_KTR is None:
                slope_KTR = self._slope(self._before(weight_KRH, input_TH, rows))
            moved_TR = (slope_KTR * (input_TH @ step_KRH.transpose(1, 2))).sum(0)
            back_TR = moved_TR @ weight_HR.T @ weight_HR
            pull_KRH += (slope_KTR * back_TR).transpose(1, 2) @ input_TH
        return pull_KRH

    def _before(
        self, weights: Sequence[torch.Tensor] | torch.Tensor, input_TH: torch.Tensor, rows: slice
    ) -> list[torch.Tensor]:
        """Pre-activations of a block, ``[T, R]`` for each projection."""
        before = []
        for projection, weight_RH in zip(self._projections, weights, strict=True):
            before.append(input_TH @ weight_RH.T)
            bias_R = self._work.pruned.get(f"{projection}.bias")
            if bias_R is not None:
                before[-1] += bias_R[rows].float()
        return before

    def _activation(self, before: Sequence[torch.Tensor]) -> torch.Tensor:
        """phi: what the sublayer makes of its channels' pre-activations, ``[T, R]``."""
        given = dict(zip(self._projections, before, strict=True))
        with _given(self._work.module, given, self._group.output):
            activation_TR: torch.Tensor = self._sublayer(before[0])
        return activation_TR

    def _slope(self, before: Sequence[torch.Tensor]) -> torch.Tensor:
        """Phi' with respect to each projection ``[K, T, R]``, from central differences."""
        slope_KTR = before[0].new_empty(len(before), *before[0].shape)
        for at, one_TR in enumerate(before):
            reach = _DIFFERENCE * float(one_TR.square().mean().sqrt()) + 1e-12
            moved = list(before)
            moved[at] = one_TR + reach
            slope_KTR[at] = self._activation(moved)
            moved[at] = one_TR - reach
            slope_KTR[at] -= self._activation(moved)
            slope_KTR[at] /= 2 * reach
        return slope_KTR


def _split(count: int, parts: int) -> list[slice]:
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def conjugate_gradients(
    normal: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Solve ``normal(x) = right`` for a symmetric positive definite operator, from zero.

    Args:
        normal: the operator (Hestenes and Stiefel 1952).
        right: right side, any shape.
        iterations: at most this many; fewer when the residual is zero.
    """
    solution = torch.zeros_like(right)
    left, direction = right.clone(), right.clone()
    size = float(left.double().square().sum())
    for _ in range(iterations):
        if size == 0.0:
            break
        image = normal(direction)
        length = size / float((direction.double() * image.double()).sum())
        solution += length * direction
        left -= length * image
        before, size = size, float(left.double().square().sum())
        direction = left + (size / before) * direction
    return solution


@contextmanager
def _given(module: nn.Module, outputs: dict[str, torch.Tensor], last: str) -> Iterator[None]:
    """Within the context these projections return what is given, the last one its own input."""
    with ExitStack() as stack:
        for name, output in outputs.items():
            _shadow(stack, module.get_submodule(name), lambda _, output=output: output)
        _shadow(stack, module.get_submodule(last), lambda value: value)
        yield


def _shadow(stack: ExitStack, module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    module.forward = forward  # shadows the class's forward
    stack.callback(delattr, module, "forward")

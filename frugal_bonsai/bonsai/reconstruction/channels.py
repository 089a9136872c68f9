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
Channels are moved block by block: all but the weights is of one block. Holds the inputs of all
windows, one micro-batch's activations, the new weights (in fp32 where the dense layer's lay), and,
if the plan allows, what the sublayer should give and phi' of a block, else they are computed again.

Shape suffixes: B windows of a micro-batch, S tokens, T tokens of a micro-batch, H hidden, R
channels (rows of the input projections, columns of the output projection), K input projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import nn

from frugal_bonsai.accelerator import sum_dtype, tensor_cores
from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.importance.gram import add_product_
from frugal_bonsai.bonsai.reconstruction.inputs import Rows
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.memory.work import REFINE_ITERATIONS, refined_blocks, refining_passes
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.hidden import HiddenStates

# mu as a share of what a channel of mean weight gives on white inputs.
DAMPING = 1e-2
# Shares of the pre-activations' root mean square between which phi' is the difference.
_DIFFERENCE = 1e-2
_WHITENING = 1e-4


class ChannelUpdate:
    """One sublayer's problem.

    Args:
        work: the layer of both models; everything before the sublayer is refitted.
        group: the sublayer's units, one channel each.
        projections: the rows that the group owns, see :func:`input_rows`.
        windows: how many are in flight.
        inputs: room for the projections' inputs.
        targets: room for what the sublayer should give; None computes it whenever it is needed.
        keep: hold phi' of a block for all windows while a problem is solved.
        iterations: conjugate-gradient steps on one problem.
    """

    def __init__(
        self,
        work: LayerPass,
        group: UnitGroup,
        projections: Sequence[Rows],
        windows: int,
        *,
        inputs: HiddenStates,
        targets: HiddenStates | None,
        keep: bool,
        iterations: int = REFINE_ITERATIONS,
    ) -> None:
        self._work, self._group, self._windows = work, group, windows
        self._rows = tuple(projections)
        self._first = self._rows[0].projection
        self._inputs, self._targets, self._keep = inputs, targets, keep
        self._iterations = iterations
        self._slopes_KNSR: torch.Tensor | None = None
        self._batches = work.sweep.batches
        # All of it is fp32: as many windows as take what a layer's activations take.
        self._weight = torch.float32.itemsize // work.sweep.skeleton.dtype.itemsize
        family = work.sweep.skeleton.spec.family
        owner = family.ffn_activation or group.output.rpartition(".")[0]
        self._sublayer = work.module.get_submodule(owner)
        hidden = work.pruned[f"{self._first}.weight"].shape[1]
        gram_HH = torch.zeros(hidden, hidden, device=work.sweep.skeleton.device)
        self._window = work.hidden_pruned.window
        self._now = slice(0, windows)

        def add(items: slice) -> None:
            input_BSH = work.inputs(self._first, items)
            inputs.write(items, input_BSH)
            if targets is not None:
                targets.write(items, work.last_target(group.output, items))
            input_TH = input_BSH.flatten(0, 1)
            add_product_(gram_HH, input_TH, input_TH)

        self._batches.run(windows, add, weight=self._weight)
        gram_HH.div_(windows * self._window)
        self._factor = DampedFactor(gram_HH, _WHITENING, where=f"refinement of {group.name}")

    @property
    def passes(self) -> int:
        """How often one :meth:`improve` takes its tokens through the sublayer, there or back."""
        blocks = len(self._blocks())
        return refining_passes(blocks, keep=self._keep, iterations=self._iterations)

    def parts(self, count: int) -> list[slice]:
        """The windows in ``count`` parts of like size, fewer where there are fewer windows."""
        return _split(self._windows, min(count, self._windows))

    def target(self, items: slice) -> tuple[torch.Tensor, Callable[[], None]]:
        """What the sublayer should give, its bias included; nothing is to be kept."""
        if self._targets is not None:
            return self._targets.read(items), _nothing
        return self._work.last_target(self._group.output, items), _nothing

    def improve(self, weight_HR: torch.Tensor, windows: slice) -> dict[str, torch.Tensor]:
        """New weights of the input projections, given the output projection: name -> ``[R, H]``.

        Blocks of channels are moved in turn. The layer pass computes with what is returned, in the
        memory of the dense layer's own, which are not needed any more.

        Args:
            weight_HR: the output projection's weight.
            windows: those that the problem is about.
        """
        self._now = windows
        names = list(dict.fromkeys(f"{rows.projection}.weight" for rows in self._rows))
        pruned, dtype = self._work.pruned, self._work.sweep.skeleton.dtype
        # The stream's own buffers stay as they are: the caller may go back to them.
        pruned.update({name: self._work.borrow(name, pruned[name]) for name in names})
        moved_by_name = {name: pruned[name].float() for name in names}
        for block in self._blocks():
            with tensor_cores(weight_HR.device):
                moved_KRH = self._improve_rows(weight_HR, block)
            for rows, moved_RH in zip(self._rows, moved_KRH, strict=True):
                name = f"{rows.projection}.weight"
                rows.take(moved_by_name[name])[block] = moved_RH
                rows.take(pruned[name])[block] = moved_RH.to(dtype)  # the same memory in fp32
        return moved_by_name

    def _blocks(self) -> list[slice]:
        channels = len(self._rows[0].take(self._work.pruned[f"{self._first}.weight"]))
        return _split(channels, refined_blocks(channels))

    def _improve_rows(self, weight_HR: torch.Tensor, rows: slice) -> torch.Tensor:
        """New weights ``[K, R, H]`` of a block of channels."""
        tokens = (self._now.stop - self._now.start) * self._window
        weight_KRH = torch.stack(self._weights(rows))
        pull_KRH, square_KR = self._start(weight_HR, rows)
        weight_HR = weight_HR[:, rows]
        scale_KR = (weight_HR.square().sum(0) * square_KR / tokens).sqrt()
        # A channel that is never on has no scale and no pull: it stays as it is.
        least = max(1e-6 * float(scale_KR.max()), 1e-30)
        scale_KR1: torch.Tensor = scale_KR.clamp_min(least)[..., None]

        def outward(step_KRH: torch.Tensor) -> torch.Tensor:
            return self._factor.times_inverse(step_KRH / scale_KR1)

        def inward(pull_KRH: torch.Tensor) -> torch.Tensor:
            return self._factor.times_inverse_transposed(pull_KRH).div_(scale_KR1)

        def normal(step_KRH: torch.Tensor) -> torch.Tensor:
            """J^T J + mu of the linearised problem, in white coordinates."""
            pushed_KRH = self._there_and_back(weight_KRH, weight_HR, outward(step_KRH), rows)
            image_KRH: torch.Tensor = inward(pushed_KRH).add_(step_KRH, alpha=DAMPING * tokens)
            return image_KRH

        right_KRH = inward(pull_KRH)
        del pull_KRH
        step_KRH = conjugate_gradients(normal, right_KRH, self._iterations)
        self._slopes_KNSR = None
        return weight_KRH + outward(step_KRH)

    def _weights(self, rows: slice) -> list[torch.Tensor]:
        """A block of each input projection's weight, fp32."""
        pruned = self._work.pruned
        return [own.take(pruned[f"{own.projection}.weight"])[rows].float() for own in self._rows]

    def _run(self, body: Callable[[slice], None]) -> None:
        """Micro-batches of the windows that the problem is about."""
        first = self._now.start

        def shifted(items: slice) -> None:
            body(slice(items.start + first, items.stop + first))

        self._batches.run(self._now.stop - first, shifted, weight=self._weight)

    def _own(self, items: slice) -> slice:
        """Where these windows' slopes lie."""
        return slice(items.start - self._now.start, items.stop - self._now.start)

    def _start(self, weight_HR: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """J^T residual ``[K, R, H]`` and the sum of phi'^2 ``[K, R]`` of a block."""
        pull_KRH = torch.zeros_like(torch.stack(self._weights(rows)))
        square_KR = torch.zeros_like(pull_KRH[..., 0])
        bias_H = self._work.pruned.get(f"{self._group.output}.bias")
        inputs, channels = len(pull_KRH), rows.stop - rows.start
        if self._keep:
            windows = self._now.stop - self._now.start
            self._slopes_KNSR = pull_KRH.new_empty(inputs, windows, self._window, channels)

        def add(items: slice) -> None:
            left_TH = self.target(items)[0].flatten(0, 1).float()
            if bias_H is not None:
                left_TH = left_TH - bias_H.float()
            input_TH = self._inputs.read(items).flatten(0, 1).float()
            for block in self._blocks():
                before = self._before(self._weights(block), input_TH, block)
                left_TH = left_TH - self._activation(before) @ weight_HR[:, block].T
            slope_KTR = self._slope(self._before(self._weights(rows), input_TH, rows))
            pull_KTR = slope_KTR * (left_TH @ weight_HR[:, rows])
            own_KR = slope_KTR.square().sum(1)
            pull_KRH.baddbmm_(pull_KTR.transpose(1, 2), input_TH.expand(inputs, -1, -1))
            square_KR.add_(own_KR)
            if self._slopes_KNSR is not None:
                own_KBSR = self._slopes_KNSR[:, self._own(items)]
                own_KBSR.copy_(slope_KTR.view_as(own_KBSR))

        self._run(add)
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

        def add(items: slice) -> None:
            input_TH = self._inputs.read(items).flatten(0, 1).float()
            if self._slopes_KNSR is None:
                slope_KTR = self._slope(self._before(weight_KRH, input_TH, rows))
            else:
                slope_KTR = self._slopes_KNSR[:, self._own(items)].flatten(1, 2)
            moved_TR = (slope_KTR * (input_TH @ step_KRH.transpose(1, 2))).sum(0)
            back_TR = moved_TR @ weight_HR.T @ weight_HR
            back_KTR = slope_KTR * back_TR
            pull_KRH.baddbmm_(back_KTR.transpose(1, 2), input_TH.expand(len(weight_KRH), -1, -1))

        self._run(add)
        return pull_KRH

    def _before(
        self, weights: Sequence[torch.Tensor] | torch.Tensor, input_TH: torch.Tensor, rows: slice
    ) -> list[torch.Tensor]:
        """Pre-activations of a block, ``[T, R]`` for each projection."""
        before = []
        for own, weight_RH in zip(self._rows, weights, strict=True):
            before.append(input_TH @ weight_RH.T)
            bias = self._work.pruned.get(f"{own.projection}.bias")
            if bias is not None:
                before[-1] += own.take(bias)[rows].float()
        return before

    def _activation(self, before: Sequence[torch.Tensor]) -> torch.Tensor:
        """phi: what the sublayer makes of its channels' pre-activations, ``[T, R]``."""
        given: dict[str, torch.Tensor] = {}
        for own, one_TR in zip(self._rows, before, strict=True):
            earlier_TR = given.get(own.projection)
            whole = one_TR if earlier_TR is None else torch.cat([earlier_TR, one_TR], dim=-1)
            given[own.projection] = whole
        with _given(self._work.module, given, self._group.output):
            activation_TR: torch.Tensor = self._sublayer(before[0])
        return activation_TR

    def _slope(self, before: Sequence[torch.Tensor]) -> torch.Tensor:
        """Phi' with respect to each projection ``[K, T, R]``, from central differences."""
        slope_KTR = before[0].new_empty(len(before), *before[0].shape)
        for at, one_TR in enumerate(before):
            size = one_TR.square().mean().sqrt().to(sum_dtype(one_TR.device))
            reach = size.mul_(_DIFFERENCE).add_(1e-12)  # stays on the device: nothing waits for it
            moved = list(before)
            moved[at] = one_TR + reach
            slope_KTR[at] = self._activation(moved)
            moved[at] = one_TR - reach
            slope_KTR[at] -= self._activation(moved)
            slope_KTR[at] /= 2 * reach
        return slope_KTR


def _nothing() -> None:
    """Nothing is to be kept."""


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
    size = _square(left)
    for _ in range(iterations):
        if size == 0.0:
            break
        image = normal(direction)
        length = size / float((direction * image).sum(dtype=sum_dtype(right.device)))
        solution.add_(direction, alpha=length)
        left.sub_(image, alpha=length)
        before, size = size, _square(left)
        direction.mul_(size / before).add_(left)
    return solution


def _square(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=sum_dtype(value.device))) ** 2


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

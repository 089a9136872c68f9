"""Channel updates: change the FFN's gate and up projections so that fewer channels do all the work.

In: a layer of both models whose FFN is refitted. Out: better weights of the projections into and
out of it. A refit of down_proj can only mix the remaining channels; an update changes the channels
themselves. With p = x W^T the channels' pre-activations, phi(p) their activations, D down_proj and
T the sublayer's target,

    argmin over dW of || T - (phi(p) + phi'(p) * x dW^T) D^T ||^2 + mu ||dW||^2 .

This is a linear least-squares problem: exact in up, in which phi is linear, and linearised in gate.
It is far too large for a Cholesky factor. A few conjugate-gradient iterations solve it
(channel_block.py). There is no backward pass through the model and no optimiser. Blocks of channels
are updated in sequence, so that all values except the weights are those of one block.

Memory: the inputs of all windows, one micro-batch's activations, the new weights (in fp32 where the
dense layer's were), and where the plan allows it the targets and a block's slopes phi'; otherwise
these are computed again.

Shape suffixes: B windows of a micro-batch, S tokens, T tokens of a micro-batch, N windows of a
step, H hidden, R channels (rows of the input projections, columns of the output projection), K
input projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

from frugal_bonsai.bonsai.importance.factor import DampedFactor
from frugal_bonsai.bonsai.importance.gram import add_product_
from frugal_bonsai.bonsai.reconstruction.channel_block import BlockProblem, UpdateStep
from frugal_bonsai.bonsai.reconstruction.layer_pass import LayerPass
from frugal_bonsai.bonsai.reconstruction.outputs import OutputRefit, refit_output
from frugal_bonsai.bonsai.reconstruction.sublayer import Sublayer
from frugal_bonsai.memory.work import (
    UPDATE_ITERATIONS,
    curvature_windows,
    update_blocks,
    update_passes,
)
from frugal_bonsai.model.units import UnitGroup
from frugal_bonsai.stream.micro_batch import memory_for

_WHITENING = 1e-4


def update_channels(
    work: LayerPass, group: UnitGroup, refit: OutputRefit, *, steps: int, keep: bool
) -> OutputRefit:
    """Update the channels and refit the output projection in turn, while the residual decreases.

    The layer computes with the new input projections from then on. Returns the best refit of the
    output projection.

    Args:
        work: the layer of both models.
        group: the FFN's units.
        refit: present refit of the output projection.
        steps: maximum number of updates. Each learns from other windows, so that more steps cost no
            more tokens.
        keep: hold the slopes of a block while its problem is solved.
    """
    refit = _set_aside(work, group, refit)
    with memory_for(f"channel update of {group.name}"):
        update = ChannelUpdate(work, group, keep=keep)
        names = update.sublayer.names
        sizes = sum(work.pruned[name].numel() for name in (*names, f"{group.output}.weight"))
        passes = float(keep)  # the layer's end computes the inputs once more
        for part in _split(work.pair.fitted, min(steps, work.pair.fitted)):
            before = {name: work.pruned[name] for name in names}
            moved = update.improve(refit.weight_HC, part)
            tried = refit_output(work, group, update.target, keep=False, score_below=refit.residual)
            passes += 1 + update.passes(part) / work.pair.fitted
            work.pruned.update(before)
            if tried.residual >= refit.residual:
                break
            refit = _set_aside(work, group, tried)
            del tried
            for name in names:
                work.adopt(name, moved.pop(name))
    work.extra_passes += passes * sizes / work.spec.block_parameters
    return refit


def _set_aside(work: LayerPass, group: UnitGroup, refit: OutputRefit) -> OutputRefit:
    """Move the refit weight into the memory of the dense layer's weight, if it fits there."""
    weight_HC = work.borrow(f"{group.output}.weight", refit.weight_HC)
    return replace(refit, weight_HC=weight_HC)


class ChannelUpdate:
    """The least-squares problems of one FFN's channels.

    Args:
        work: the layer of both models; all that precedes the FFN is refitted.
        group: the FFN's units.
        keep: hold the slopes of a block while its problem is solved.
        iterations: conjugate-gradient iterations on one block.
    """

    def __init__(
        self,
        work: LayerPass,
        group: UnitGroup,
        *,
        keep: bool,
        iterations: int = UPDATE_ITERATIONS,
    ) -> None:
        assert work.pair.dense_inputs is not None
        self.work, self.group, self.keep, self.iterations = work, group, keep, iterations
        self.sublayer = Sublayer(work, group)
        # The refit of the input projections has read the dense inputs for the last time.
        self.inputs = work.pair.dense_inputs
        self.window = work.pair.hidden_pruned.window
        self.factor = self._whiten()

    def _whiten(self) -> DampedFactor:
        """Store the FFN's inputs and targets; return the factor of the inputs' mean square."""
        work, pair, projection = self.work, self.work.pair, self.sublayer.projection
        hidden = work.pruned[f"{projection}.weight"].shape[1]
        gram_HH = torch.zeros(hidden, hidden, device=work.device)

        def add(items: slice) -> None:
            input_BSH = work.inputs(projection, items)
            self.inputs.write(items, input_BSH)
            if pair.targets is not None:
                pair.targets.write(items, work.last_target(self.group, items))
            input_TH = input_BSH.flatten(0, 1)
            add_product_(gram_HH, input_TH, input_TH)

        self.run(slice(0, pair.fitted), add)
        gram_HH.div_(pair.fitted * self.window)
        return DampedFactor(gram_HH, _WHITENING, where=f"channel update of {self.group.name}")

    @property
    def blocks(self) -> list[slice]:
        """Channels that are updated together, one block after the other."""
        channels = self.sublayer.channels
        return _split(channels, update_blocks(channels))

    def passes(self, windows: slice) -> float:
        """Return the windows that :meth:`improve` passes through the FFN, in any direction."""
        count, blocks = windows.stop - windows.start, self.blocks
        curved = self._curved(blocks[-1], windows)
        share = (curved.stop - curved.start) / count
        each = update_passes(len(blocks), share, keep=self.keep, iterations=self.iterations)
        return float(count * each)

    def _curved(self, block: slice, windows: slice) -> slice:
        """Return the windows that the curvature of a block is measured on."""
        rows = len(self.sublayer.rows) * (block.stop - block.start)
        count = curvature_windows(windows.stop - windows.start, self.window, rows)
        return slice(windows.start, windows.start + count)

    def target(self, items: slice) -> tuple[torch.Tensor, Callable[[], None]]:
        """Return the FFN's target, bias included, and a function that stores nothing."""
        targets = self.work.pair.targets
        if targets is not None:
            return targets.read(items), _nothing
        return self.work.last_target(self.group, items), _nothing

    def improve(self, output_HC: torch.Tensor, windows: slice) -> dict[str, torch.Tensor]:
        """Update the input projections, given the output projection.

        The layer computes with the new weights afterwards, in the memory of the dense layer's
        weights, which nothing reads any more. Returns them by name inside the layer, fp32.
        """
        names, pruned = self.sublayer.names, self.work.pruned
        dtype = self.work.pair.sweep.skeleton.dtype
        # The stream's own buffers stay as they are: the caller may return to them.
        pruned.update({name: self.work.borrow(name, pruned[name]) for name in names})
        moved_by_name = {name: pruned[name].float() for name in names}
        step = self._step(output_HC, windows)
        for block in self.blocks:
            curved = self._curved(block, windows)
            moved_KRH = BlockProblem(step, block, output_HC[:, block], curved).solve()
            for rows, moved_RH in zip(self.sublayer.rows, moved_KRH, strict=True):
                name = f"{rows.projection}.weight"
                rows.take(moved_by_name[name])[block] = moved_RH
                rows.take(pruned[name])[block] = moved_RH.to(dtype)  # the same memory in fp32
        return moved_by_name

    def _step(self, output_HC: torch.Tensor, windows: slice) -> UpdateStep:
        sublayer, bias_H = self.sublayer, self.work.pruned.get(f"{self.group.output}.bias")

        def residual(items: slice, input_TH: torch.Tensor) -> torch.Tensor:
            left_TH = self.target(items)[0].flatten(0, 1).float()
            if bias_H is not None:
                left_TH = left_TH - bias_H.float()
            for block in self.blocks:
                before = sublayer.pre_activations(sublayer.weights(block), input_TH, block)
                left_TH = left_TH - sublayer.activation(before) @ output_HC[:, block].T
            return left_TH

        return UpdateStep(
            sublayer=sublayer,
            inputs=self.inputs,
            factor=self.factor,
            windows=windows,
            keep=self.keep,
            iterations=self.iterations,
            run=self.run,
            residual=residual,
        )

    def run(self, windows: slice, body: Callable[[slice], None]) -> None:
        """Call ``body`` with micro-batches of some windows.

        All values are fp32: a micro-batch has as many windows as fill a layer's activations.
        """
        first = windows.start
        weight = torch.float32.itemsize // self.work.pair.sweep.skeleton.dtype.itemsize

        def shifted(items: slice) -> None:
            body(slice(items.start + first, items.stop + first))

        self.work.run(windows.stop - first, shifted, weight=weight)


def _nothing() -> None:
    """Store nothing."""


def _split(count: int, parts: int) -> list[slice]:
    """Split a range into parts of nearly equal length."""
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]

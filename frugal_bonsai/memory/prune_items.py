"""The items of a prune: statistics, masked evaluation, recovery, refinement, files.

In: as items.py, whose sweeps these build on. Out: itemised bytes. Pure. The formulas are explained
and compared with measurements in docs/memory.md; the legend is that of items.py.
"""

from __future__ import annotations

import math

from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import CommandItems
from frugal_bonsai.memory.items import pinned_bytes
from frugal_bonsai.memory.work import (
    HOST,
    Choice,
    PlanItem,
    PruneWorkload,
    refined_blocks,
    refit_rows,
)
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import FFN, UnitGroup

# Columns of a block of a factor (bonsai/importance/factor.py).
_FACTOR_BLOCK = 256


class PruneItems(CommandItems):
    """The items of a prune of one model on one device."""

    work: PruneWorkload

    def __init__(self, spec: ModelSpec, budget: Budget, work: PruneWorkload) -> None:
        super().__init__(spec, budget, work)
        self._ffn_inputs = max(
            _input_projections(spec, group) for group in spec.table.groups if group.kind == FFN
        )
        self._block = -(-self._ffn // refined_blocks(self._ffn))

    def masked_activations(self, choice: Choice, windows: int) -> PlanItem:
        """With what stands in: the core's inputs (1 - p) C, guesses, a choice of both: 3 p C.

        At an output projection the layer holds 2H + C, or half of what attention had: of the
        channels that the layer holds at its peak (three times C with a gate, twice without) all
        others are room for C (1 + 2 p), up to p = 1/2 with a gate, and for the stand-ins as they
        were stored, which are there only while they are converted.
        """
        held = max(peak.ffn for peak in self._peaks)
        extra = max(0, math.ceil((2 * self.work.imputed_share + 2 - held) * self._ffn))
        item = self.activations(choice, windows, extra=extra, why=f" + (2p+2-{held})*C_down")
        tokens = min(choice.micro_batch, windows) * self.work.window
        loading = tokens * (2 * self.spec.hidden + self._ffn) * self._compute
        loading += 2 * self._stand_in_widths()
        if loading <= item.size_bytes:
            return item
        return self._near(item.name, loading, "m*S*(2H+C_down)*c + 2*p*C*(1-p)*C")

    def stand_ins(self) -> list[PlanItem]:
        """The stand-ins of one group as computed with; on the host of a GPU the next one's."""
        name, widths = "stand-ins of a group", self._stand_in_widths()
        items = [self._near(name, widths * self._compute, "p*C*(1-p)*C*c")]
        if self.near != HOST:
            size, formula = 3 * pinned_bytes(2 * widths), "3 x p*C*(1-p)*C*2: as read, pinned"
            items.append(PlanItem(name=name, where=HOST, size_bytes=size, formula=formula))
        return items

    def _stand_in_widths(self) -> int:
        """Elements of a group's stand-ins."""
        share, columns = self.work.imputed_share, max(self._attention, self._ffn)
        if share >= 0.5:
            return math.ceil(columns**2 / 4)  # the largest product that a pool can have
        return math.ceil(share * columns) * math.ceil((1 - share) * columns)

    def tapped_activations(self, choice: Choice) -> PlanItem:
        """With o_proj's input kept for the statistics; and every expert's down_proj's."""
        if not self.spec.experts:
            return self.activations(choice, self.work.windows, extra=self._attention, why=" + C_o")
        extra = self._attention + self._ffns * self._ffn
        return self.activations(choice, self.work.windows, extra=extra, why=" + C_o + E*C_down")

    def paired_activations(self, choice: Choice) -> PlanItem:
        """With target, residual and the refitted sublayer's output beside the layer's own."""
        windows, hidden = self.work.windows, self.spec.hidden
        if not self.spec.experts:
            return self.activations(choice, windows, extra=2 * hidden, why=" + 2H")
        # What the layer gave and misses, its experts' inputs and aims, one's in fp32.
        extra = (3 + self._chosen) * hidden + self._chosen * self._ffn
        extra += 4 // self._compute * (hidden + self._ffn)
        return self.activations(choice, windows, extra=extra, why=" + (3+k)*H + k*C_down + fp32")

    def gram(self) -> PlanItem:
        """Gram matrices of all of a layer's groups."""
        size = 4 * (self._attention**2 + self._ffns * self._ffn**2)
        experts = "E*" if self.spec.experts else ""
        return self._near("Gram matrices", size, f"4*(C_o^2 + {experts}C_down^2)")

    def gram_of_recovery(self) -> PlanItem:
        """One group's Gram matrix and cross moments at a time; all experts' together."""
        hidden = self.spec.hidden
        counts = ((1, self._attention), (self._ffns, self._ffn))
        size = max(
            *(count * (columns**2 + columns * hidden) for count, columns in counts),
            2 * hidden**2 + self._input_rows * hidden if self.work.refit_inputs else 0,
        )
        formula = "4*max(C^2 + C*H)" + (" of E experts" if self.spec.experts else "")
        formula += ", 2*H^2 + R*H" if self.work.refit_inputs else ""
        return self._near("Gram matrix and cross moments", 4 * size, formula)

    def solve(self, *, stand_ins: float = 0.0) -> PlanItem:
        """What a factorisation, an inverse and a refit hold beside the Gram matrix.

        Args:
            stand_ins: share of a group whose stand-ins are made from the inverse: twice the
                products of their columns with each other, the fp16 result, a block of their columns
                and one of the others', three of what these give.
        """
        widest = max(self._attention, self._ffn)
        rows = refit_rows(self._device)
        size = 4 * widest * max(3 * _FACTOR_BLOCK, _FACTOR_BLOCK + 6 * rows)
        pool = math.ceil(stand_ins * widest)
        made = 4 * 2 * pool**2 + 2 * pool * (widest - pool)
        made += 4 * _FACTOR_BLOCK * (2 * widest + 3 * pool)
        if not pool or made <= size:
            return self._near("blocks of a solve", size, f"4*C*(256 + 6*{rows})")
        return self._near(
            "making stand-ins", made, "8*(p*C)^2 + 2*p*C*(1-p)*C + 4*256*(2*C + 3*p*C)"
        )

    def kept_inputs(self, windows: int, *, ffn: bool = True) -> PlanItem:
        """Recovery's inputs of the projections of a layer; refinement's of attention's alone."""
        ffn = ffn and not self.spec.experts  # experts' inputs are seen in a pass of their own
        tokens, columns = windows * self.work.window, self._attention + int(ffn) * self._ffn
        size, widths = tokens * columns * self._compute, "(C_o+C_down)" if ffn else "C_o"
        return self._near("recovery's inputs of a layer", size, f"n*S*{widths}*c")

    def refined_weights(self) -> list[PlanItem]:
        """New weights of the FFN in fp32, and down_proj's refit.

        Those that are computed with lie where the dense layer's were.
        """
        if self._compute == 4:
            return []
        size = 4 * (self._ffn_inputs + 1) * self._ffn * self.spec.hidden
        return [self._near("refined weights of a layer", size, "4*(J+1)*C_down*H")]

    def refined_block(self) -> PlanItem:
        """A block's weights, step, and what conjugate gradients keep; the inputs' factor."""
        hidden = self.spec.hidden
        size = 4 * (8 * self._ffn_inputs * self._block * hidden + hidden**2)
        return self._near("refinement of a block of channels", size, "4*(8*J*R*H + H^2)")

    def refined_activations(self, choice: Choice) -> PlanItem:
        """A block's pre-activations, slopes and products of both, in fp32; or a layer's own.

        In bf16 half as many windows are taken at a time.
        """
        windows, window = self.work.windows, self.work.window
        block = 3 * self.spec.hidden + (3 * self._ffn_inputs + 4) * self._block
        batch = min(choice.micro_batch, windows)
        own = batch * window * (self._per_token() + 2 * self.spec.hidden) * self._compute
        size = max(own, max(1, batch * self._compute // 4) * window * block * 4)
        formula = "max(a layer's, m*S*c/4*(3H + (3J+4)*R)*4)"
        return self._near("activations of a micro-batch", size, formula)

    def slopes(self, windows: int) -> PlanItem:
        """Refinement's slopes of a block of channels for a step's windows, fp32."""
        steps = min(self.work.channel_updates, windows)
        part = -(-windows // steps)
        size = 4 * part * self.work.window * self._ffn_inputs * self._block
        return self._near("refinement's slopes", size, "n/r*S*J*R*4")

    def refits(self) -> PlanItem:
        """Refit weights that are saved more precisely than computed with; others lie in place.

        The one that is being written is converted to the source's dtype.
        """
        columns = self._attention + self._ffns * self._ffn
        whole, formula = columns * self.spec.hidden, "H*(C_o+C_down)*source"
        if self.work.refit_inputs:
            whole, formula = self.layer_parameters, "P*source"
        if self._compute == 4 or self._source == self._compute:
            converted = self._source != self._compute
            whole, formula = int(converted) * self._largest, "largest projection * source"
        return PlanItem(
            name="refit weights", where=HOST, size_bytes=whole * self._source, formula=formula
        )


def _input_projections(spec: ModelSpec, group: UnitGroup) -> int:
    """Projections whose output rows the group's units own."""
    prefix, shapes = spec.prefix(group.layer), spec.layer_tensors[group.layer]
    return sum(
        piece.axis == 0 and not piece.joint and len(shapes[piece.tensor.removeprefix(prefix)]) == 2
        for piece in group.slices
    )

"""The items of a prune: statistics, masked evaluation, reconstruction, channel updates.

In: shapes, the device, a workload, a choice of sizes. Out: itemised bytes. Pure. docs/memory.md
explains the formulas and compares them with measurements; items.py has the legend.
"""

from __future__ import annotations

import math

from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import CommandItems, cache_bytes
from frugal_bonsai.memory.items import pinned_bytes
from frugal_bonsai.memory.work import (
    HOST,
    Choice,
    PlanItem,
    PruneWorkload,
    curvature_windows,
    refit_rows,
    text_tokens,
    update_blocks,
)
from frugal_bonsai.model.family import ModelSpec

# Columns of a block of a factor (bonsai/importance/factor.py).
_FACTOR_BLOCK = 256


class PruneItems(CommandItems):
    """The items of a prune of one model on one device."""

    work: PruneWorkload

    def __init__(self, spec: ModelSpec, budget: Budget, work: PruneWorkload) -> None:
        super().__init__(spec, budget, work)
        self._block = -(-self._ffn // update_blocks(self._ffn))

    def writing(self) -> PlanItem:
        """Keys, values and logits of the texts that the dense model writes together."""
        each = cache_bytes(self.spec, text_tokens(self.work.window), self._compute)
        size = self.work.written_together * each
        formula = "texts*(2*t*(K*(L+1) + C_o)*c + 12*V)"
        return self._near("KV cache of the text that is written", size, formula)

    def masked_activations(self, choice: Choice, windows: int) -> PlanItem:
        """Activations with imputation: core inputs (1 - p) C, guesses and the choice 3 p C.

        At an output projection a layer holds 2H + C, fewer than at its peak (3 C with a gate, 2 C
        without). The difference has room for C (1 + 2 p) up to p = 1/2 with a gate, and for the
        imputation weights as stored, which are held only while they are converted.
        """
        held = max(peak.ffn for peak in self._peaks)
        extra = max(0, math.ceil((2 * self.work.imputed_share + 2 - held) * self._ffn))
        item = self.activations(choice, windows, extra=extra, why=f" + (2p+2-{held})*C_down")
        tokens = min(choice.micro_batch, windows) * self.work.window
        loading = tokens * (2 * self.spec.hidden + self._ffn) * self._compute
        loading += 2 * self._imputation_elements()
        if loading <= item.size_bytes:
            return item
        return self._near(item.name, loading, "m*S*(2H+C_down)*c + 2*p*C*(1-p)*C")

    def imputation(self) -> list[PlanItem]:
        """Imputation weights of one group as used; for a GPU the next group's on the host too."""
        name, widths = "imputation of a group", self._imputation_elements()
        items = [self._near(name, widths * self._compute, "p*C*(1-p)*C*c")]
        if self.near != HOST:
            size, formula = 3 * pinned_bytes(2 * widths), "3 x p*C*(1-p)*C*2: as read, pinned"
            items.append(self._host(name, size, formula))
        return items

    def _imputation_elements(self) -> int:
        """Return the number of elements of a group's imputation weights."""
        share, columns = self.work.imputed_share, max(self._attention, self._ffn)
        if share >= 0.5:
            return math.ceil(columns**2 / 4)  # the largest product that a pool can have
        return math.ceil(share * columns) * math.ceil((1 - share) * columns)

    def tapped_activations(self, choice: Choice) -> PlanItem:
        """Activations with the inputs of o_proj, and of each expert's down_proj, for statistics."""
        if not self.spec.experts:
            return self.activations(choice, self.work.windows, extra=self._attention, why=" + C_o")
        extra = self._attention + self._ffns * self._ffn
        return self.activations(choice, self.work.windows, extra=extra, why=" + C_o + E*C_down")

    def paired_activations(self, choice: Choice) -> PlanItem:
        """Activations with the target, the residual and the output of the refitted sublayer."""
        windows, hidden = self.work.windows, self.spec.hidden
        if not self.spec.experts:
            return self.activations(choice, windows, extra=2 * hidden, why=" + 2H")
        # Output and residual of the layer, inputs and targets of its experts, one expert in fp32.
        extra = (3 + self._chosen) * hidden + self._chosen * self._ffn
        extra += 4 // self._compute * (hidden + self._ffn)
        return self.activations(choice, windows, extra=extra, why=" + (3+k)*H + k*C_down + fp32")

    def gram(self) -> PlanItem:
        """Gram matrices of all groups of a layer."""
        size = 4 * (self._attention**2 + self._ffns * self._ffn**2)
        experts = "E*" if self.spec.experts else ""
        return self._near("Gram matrices", size, f"4*(C_o^2 + {experts}C_down^2)")

    def gram_of_reconstruction(self) -> PlanItem:
        """Gram matrix and cross moments of one group at a time, or of all experts together."""
        hidden = self.spec.hidden
        counts = ((1, self._attention), (self._ffns, self._ffn))
        size = max(
            *(count * (columns**2 + columns * hidden) for count, columns in counts),
            2 * hidden**2 + self._input_rows * hidden if self.work.refit_inputs else 0,
        )
        formula = "4*max(C^2 + C*H)" + (" of E experts" if self.spec.experts else "")
        formula += ", 2*H^2 + R*H" if self.work.refit_inputs else ""
        return self._near("Gram matrix and cross moments", 4 * size, formula)

    def solve(self, *, share: float = 0.0) -> PlanItem:
        """Blocks of a factor, an inverse and a refit beside the Gram matrix.

        Args:
            share: Share of a group whose imputation weights are computed from the inverse. They
                take two products of their columns, the fp16 result, a block of their columns, a
                block of the others, and three products of these.
        """
        widest = max(self._attention, self._ffn)
        rows = refit_rows(self._device)
        size = 4 * widest * max(3 * _FACTOR_BLOCK, _FACTOR_BLOCK + 6 * rows)
        pool = math.ceil(share * widest)
        made = 4 * 2 * pool**2 + 2 * pool * (widest - pool)
        made += 4 * _FACTOR_BLOCK * (2 * widest + 3 * pool)
        if not pool or made <= size:
            return self._near("blocks of a solve", size, f"4*C*(256 + 6*{rows})")
        return self._near(
            "computing imputation", made, "8*(p*C)^2 + 2*p*C*(1-p)*C + 4*256*(2*C + 3*p*C)"
        )

    def kept_inputs(self, windows: int, *, ffn: bool = True) -> PlanItem:
        """Inputs of a layer's projections that are kept; channel updates keep attention's alone."""
        ffn = ffn and not self.spec.experts  # experts' inputs are not kept
        tokens, columns = windows * self.work.window, self._attention + int(ffn) * self._ffn
        size, widths = tokens * columns * self._compute, "(C_o+C_down)" if ffn else "C_o"
        return self._near("recovery's inputs of a layer", size, f"n*S*{widths}*c")

    def updated_weights(self) -> list[PlanItem]:
        """New weights of the FFN in fp32, and the refit of down_proj.

        The weights that compute lie in the memory of the dense layer.
        """
        if self._compute == 4:
            return []
        size = 4 * (self.spec.ffn_inputs + 1) * self._ffn * self.spec.hidden
        return [self._near("refined weights of a layer", size, "4*(J+1)*C_down*H")]

    def updated_block(self) -> PlanItem:
        """Weights, step and conjugate-gradient vectors of a block; factor, Gram matrix."""
        hidden, block = self.spec.hidden, self._block
        gram = block**2 if block < 2 * hidden else 0
        size = 4 * (8 * self.spec.ffn_inputs * block * hidden + hidden**2 + gram)
        return self._near("refinement of a block of channels", size, "4*(8*J*R*H + H^2 + R^2)")

    def update_activations(self, choice: Choice) -> PlanItem:
        """Pre-activations, slopes and their products of a block in fp32, or a layer's activations.

        In bf16 half as many windows are taken at a time.
        """
        windows, window = self.work.windows, self.work.window
        block = 3 * self.spec.hidden + (3 * self.spec.ffn_inputs + 4) * self._block
        batch = min(choice.micro_batch, windows)
        own = batch * window * (self._per_token() + 2 * self.spec.hidden) * self._compute
        size = max(own, max(1, batch * self._compute // 4) * window * block * 4)
        formula = "max(a layer's, m*S*c/4*(3H + (3J+4)*R)*4)"
        return self._near("activations of a micro-batch", size, formula)

    def slopes(self, windows: int) -> PlanItem:
        """Slopes of a block of channels for the windows of an update's curvature, fp32."""
        work, rows = self.work, self.spec.ffn_inputs * self._block
        curved = curvature_windows(work.windows_of_update(windows), work.window, rows)
        size = 4 * curved * work.window * rows
        return self._near("refinement's slopes", size, "min(n/r*S, 64*J*R)*J*R*4")

    def refits(self) -> PlanItem:
        """Refitted weights that are stored more precisely than they compute; others stay in place.

        The weight that is written is converted to the source's dtype.
        """
        columns = self._attention + self._ffns * self._ffn
        whole, formula = columns * self.spec.hidden, "H*(C_o+C_down)*source"
        if self.work.refit_inputs:
            whole, formula = self.layer_parameters, "P*source"
        if self._compute == 4 or self._source == self._compute:
            converted = self._source != self._compute
            whole, formula = int(converted) * self._largest, "largest projection * source"
        return self._host("refit weights", whole * self._source, formula)

"""The items of a memory plan: each with its formula, from shapes and a choice of sizes.

In: shapes, the device, the work, a choice of micro-batch and windows in flight. Out: itemised bytes
of everything that is ever held; phases.py says which of them are held together. Pure. The formulas
are explained and compared with measurements in docs/memory.md.

Legend: P parameters of the largest layer, H hidden, I FFN channels, C_o and C_down input columns of
o_proj and down_proj, V vocabulary (v rows of it in a chunk), S tokens of a window, m windows of a
micro-batch, n windows in flight, c bytes of a compute element, K columns of a key, L
layers; of refinement: J projections into the FFN, R channels of a block, r steps; of stand-ins: p
their share of a group.
"""

from __future__ import annotations

import math

from frugal_bonsai.int8 import PRODUCT_TOKENS, product_scratch_bytes
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.work import (
    DISK,
    GPU,
    HOST,
    Choice,
    PlanItem,
    Work,
    refined_blocks,
)
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup
from frugal_bonsai.sizes import DTYPE_BYTES, MIB, format_bytes

HEAD_CHUNKS = "head chunks"
# A head chunk, or a block of logits, of this many bytes is as good as a larger one.
HEAD_CHUNK_BYTES = 32 * MIB
# Columns of a block of a factor (bonsai/factor.py), rows of a block of a refit (bonsai/gram.py).
_FACTOR_BLOCK, _REFIT_ROWS = 256, 128
# Four pieces of a tensor, see rewrite/cut_stream.py: two that are read, a cut along each dimension.
_REWRITE_PIECES_BYTES = 4 * 2**23
# Tokens of a window that the verification looks at, see rewrite/verify.py.
_VERIFY_TOKENS, _VERIFY_WINDOWS = 64, 2


class Items:
    """The items for one model, device and work."""

    def __init__(self, spec: ModelSpec, budget: Budget, work: Work) -> None:
        self._spec, self._work = spec, work
        self._cuda = budget.device == "cuda"
        self.near = GPU if self._cuda else HOST
        self._compute = 2 if self._cuda else 4
        self._source = _source_element_bytes(spec)
        shapes = max((list(t.values()) for t in spec.layer_tensors), key=_elements)
        self.layer_parameters = _elements(shapes)
        self._layer_rows = sum(shape[0] for shape in shapes if len(shape) == 2)
        self._input_rows = max(shape[0] for shape in shapes if len(shape) == 2)
        self._small = sum(math.prod(shape) for shape in shapes if len(shape) == 1)
        self._largest = max(math.prod(shape) for shape in shapes)
        columns = {
            kind: max(g.columns for g in spec.table.groups if g.kind == kind)
            for kind in (ATTENTION, FFN)
        }
        self._attention, self._ffn = columns[ATTENTION], columns[FFN]
        self._ffn_inputs = max(
            _input_projections(spec, group) for group in spec.table.groups if group.kind == FFN
        )
        copies = spec.activation_copies
        self._peaks = tuple(peak.with_copies(copies) for peak in spec.family.peaks)
        self._block = -(-self._ffn // refined_blocks(self._ffn))

    def stored_bytes(self, weights: str | None) -> int:
        """One layer as stored; None is the checkpoint itself."""
        if weights == "int8":
            return self.layer_parameters + 4 * self._layer_rows + self._source * self._small
        return self.layer_parameters * self._source

    def stream(
        self, choice: Choice, weights: str | None, *, models: int = 1, products: bool = False
    ) -> list[PlanItem]:
        """The buffers of a stream of layers, and of two streams when two models are walked."""
        stored = self.stored_bytes(weights)
        items = self._buffers("layer buffers", choice.buffers * models, stored, "layer as stored")
        compute = self.layer_parameters * self._compute
        if products:
            widest = max(self._attention, self._ffn, self._spec.hidden)
            items.append(self._products(choice, self._input_rows, widest))
        elif weights == "int8" or self._source != self._compute:
            items.append(self._near("dequantised layer", models * compute, f"{models} x P*c"))
        if weights is None and self._spec.family.transposed:
            items.append(
                PlanItem(
                    name="a tensor that is turned",
                    where=HOST,
                    size_bytes=self._largest * self._source,
                    formula="largest tensor of a layer * source",
                )
            )
        return items

    def outer(self) -> PlanItem:
        """What stands outside the layers: final norm, learned positions; not embedding and head."""
        family, others = self._spec.family, self._spec.other_tensors
        own = [n for n in others if n not in (family.embedding, family.head)]
        size = sum(math.prod(others[name]) for name in own) * self._compute
        return self._near("norms and positions", size, "outside the layers * c")

    def _products(self, choice: Choice, rows: int, columns: int) -> PlanItem:
        """Digits and sums of a block of tokens; a GPU multiplies a micro-batch at once."""
        tokens = choice.micro_batch * self._work.window if self._cuda else PRODUCT_TOKENS
        size = product_scratch_bytes(tokens, rows, columns)
        return self._near("int8 products", size, f"{tokens} tokens * (8*rows + 10*columns)")

    def _buffers(self, name: str, count: int, size: int, what: str) -> list[PlanItem]:
        """Buffers of a stream: on the host, pinned for a GPU and there once more."""
        formula = f"{count} x {what} ({format_bytes(size)})"
        if not self._cuda:
            return [PlanItem(name=name, where=HOST, size_bytes=count * size, formula=formula)]
        pinned = count * pinned_bytes(size)
        return [
            PlanItem(name=name, where=HOST, size_bytes=pinned, formula=f"{formula}, pinned: 2^k"),
            PlanItem(name=name, where=GPU, size_bytes=count * size, formula=formula),
        ]

    def _near(self, name: str, size: int, formula: str) -> PlanItem:
        return PlanItem(name=name, where=self.near, size_bytes=size, formula=formula)

    def hidden(self, choice: Choice, windows: int, *, states: int = 1) -> list[PlanItem]:
        """Hidden states of windows in flight: on the host, but for resident ones on a GPU."""
        each = self._work.window * self._spec.hidden * self._compute
        if not self._cuda:
            size = states * windows * each
            return [self._near("hidden states", size, f"{states} x n*S*H*c")]
        resident = min(choice.resident, windows)
        formula = f"{states} x resident*S*H*c"
        items = [self._near("hidden states on the device", states * resident * each, formula)]
        if resident < windows:
            batch = min(choice.micro_batch, windows)
            size = 3 * states * batch * each
            items.append(self._near("micro-batches on their way", size, f"{3 * states} x m*S*H*c"))
            items.append(
                PlanItem(
                    name="hidden states",
                    where=HOST,
                    size_bytes=states * (windows - resident) * pinned_bytes(each),
                    formula=f"{states} x (n-resident)*S*H*c, pinned: 2^k",
                )
            )
        return items

    def activations(
        self, choice: Choice, windows: int, *, extra: int = 0, why: str = ""
    ) -> PlanItem:
        """What one of Hugging Face's layers holds at its peak, and what is kept beside it.

        Args:
            choice: gives m.
            windows: of the sweep, where they are fewer than m.
            extra: elements a token beside the layer's own.
            why: their names, for the formula.
        """
        peaks = ", ".join(str(peak) for peak in self._peaks)
        formula = f"m*S*(max({peaks}){why})*c"
        batch = min(choice.micro_batch, windows)
        size = batch * self._work.window * (self._per_token() + extra) * self._compute
        return self._near("activations of a micro-batch", size, formula)

    def _per_token(self) -> int:
        """Elements a token of one of Hugging Face's layers at its peak, traced in the tests."""
        spec = self._spec
        keys = spec.kv_heads * spec.head_dim
        return max(
            peak.hidden * spec.hidden
            + peak.ffn * self._ffn
            + peak.attention * self._attention
            + peak.key * keys
            for peak in self._peaks
        )

    def masked_activations(self, choice: Choice, windows: int) -> PlanItem:
        """With what stands in: the core's inputs (1 - p) C, guesses, a choice of both: 3 p C.

        At an output projection the layer holds 2H + C, or half of what attention had: of the
        channels that the layer holds at its peak (three times C with a gate, twice without) all
        others are room for C (1 + 2 p), up to p = 1/2 with a gate, and for the stand-ins as they
        were stored, which are there only while they are converted.
        """
        held = max(peak.ffn for peak in self._peaks)
        extra = max(0, math.ceil((2 * self._work.stand_ins + 2 - held) * self._ffn))
        item = self.activations(choice, windows, extra=extra, why=f" + (2p+2-{held})*C_down")
        tokens = min(choice.micro_batch, windows) * self._work.window
        loading = tokens * (2 * self._spec.hidden + self._ffn) * self._compute
        loading += 2 * self._stand_in_widths()
        if loading <= item.size_bytes:
            return item
        return self._near(item.name, loading, "m*S*(2H+C_down)*c + 2*p*C*(1-p)*C")

    def stand_ins(self) -> PlanItem:
        """The stand-ins of one group as computed with."""
        size = self._stand_in_widths() * self._compute
        return self._near("stand-ins of a group", size, "p*C*(1-p)*C*c")

    def _stand_in_widths(self) -> int:
        """Elements of a group's stand-ins."""
        share, columns = self._work.stand_ins, max(self._attention, self._ffn)
        if share >= 0.5:
            return math.ceil(columns**2 / 4)  # the largest product that a pool can have
        return math.ceil(share * columns) * math.ceil((1 - share) * columns)

    def tapped_activations(self, choice: Choice) -> PlanItem:
        """With o_proj's input kept for the statistics."""
        return self.activations(choice, self._work.windows, extra=self._attention, why=" + C_o")

    def paired_activations(self, choice: Choice) -> PlanItem:
        """With target, residual and the refitted sublayer's output beside the layer's own."""
        windows, hidden = self._work.windows, self._spec.hidden
        return self.activations(choice, windows, extra=2 * hidden, why=" + 2H")

    def head_sizes(self, choice: Choice) -> tuple[int, int]:
        """Rows and tokens of a head chunk."""
        spec, window = self._spec, self._work.window
        if self._work.full_logits:
            return spec.vocabulary, window
        rows = min(spec.vocabulary, max(1, HEAD_CHUNK_BYTES // (spec.hidden * self._compute)))
        tokens = max(1, HEAD_CHUNK_BYTES // (rows * 4))
        if tokens >= window:
            tokens = min(tokens // window, choice.micro_batch) * window
        return rows, tokens

    def head_rows(self, choice: Choice, *, products: bool = False) -> list[PlanItem]:
        """The head's rows, streamed as layers are."""
        rows, _ = self.head_sizes(choice)
        hidden = self._spec.hidden
        slots = 1 if rows >= self._spec.vocabulary else choice.buffers
        stored = rows * (hidden + 4) if products else rows * hidden * self._source
        items = self._buffers(HEAD_CHUNKS, slots, stored, "v rows as stored")
        if products:
            items.append(self._products(choice, rows, hidden))
        elif self._source != self._compute:
            size = rows * hidden * self._compute
            items.append(self._near("head chunk in the compute dtype", size, "v*H*c"))
        return items

    def kept_head(self, choice: Choice) -> PlanItem | None:
        """A head that is one chunk stays once it has been read."""
        rows, _ = self.head_sizes(choice)
        if rows < self._spec.vocabulary:
            return None
        return self._near("head", rows * self._spec.hidden * self._compute, "V*H*c")

    def logits(self, choice: Choice) -> PlanItem:
        """A block of tokens' logits over a chunk of rows, and the tokens' hidden states."""
        rows, tokens = self.head_sizes(choice)
        wide = 4 if self._compute == 4 else 4 + self._compute
        normed = max(tokens, self._work.window) * self._spec.hidden * self._compute
        formula = f"tokens*v*{wide} + tokens*H*c"
        return self._near("logits", tokens * rows * wide + normed, formula)

    def all_logits(self) -> PlanItem:
        """A whole window's logits for a custom utility, in parts and joined."""
        size = 2 * self._work.window * self._spec.vocabulary * 4
        return self._near("all logits of a window", size, "2 x S*V*4")

    def verified_activations(self) -> PlanItem:
        """A layer's activations of the verification's tokens, and both models' hidden states."""
        per_token = self._per_token() + 3 * self._spec.hidden
        size = _VERIFY_WINDOWS * _VERIFY_TOKENS * per_token * self._compute
        return self._near("activations of a micro-batch", size, "2*64 tokens * (2H+3I + 3H)*c")

    def verified_logits(self) -> PlanItem:
        """Logits of some tokens of both models, in parts and joined, and their difference."""
        size = 3 * _VERIFY_TOKENS * self._spec.vocabulary * 4
        return self._near("logits that are compared", size, f"3 x {_VERIFY_TOKENS}*V*4")

    def sampling(self) -> PlanItem:
        """Keys and values of what is sampled.

        A cache grows by concatenation: while a layer's does, its old one is held too.
        """
        spec, windows = self._spec, self._work.sampled
        cache = 2 * self._work.window * spec.kv_heads * spec.head_dim * (spec.layers + 1)
        size = windows * (cache * self._compute + 12 * spec.vocabulary)
        formula = "windows*(2*S*K*(L+1)*c + 12*V)"
        return self._near("KV cache of the text that is sampled", size, formula)

    def gram(self) -> PlanItem:
        """Gram matrices of both of a layer's groups."""
        size = 4 * (self._attention**2 + self._ffn**2)
        return self._near("Gram matrices", size, "4*(C_o^2 + C_down^2)")

    def gram_of_recovery(self) -> PlanItem:
        """One group's Gram matrix and cross moments at a time."""
        hidden = self._spec.hidden
        size = max(
            *(columns**2 + columns * hidden for columns in (self._attention, self._ffn)),
            2 * hidden**2 + self._input_rows * hidden if self._work.refit_inputs else 0,
        )
        formula = "4*max(C^2 + C*H)" + (", 2*H^2 + R*H" if self._work.refit_inputs else "")
        return self._near("Gram matrix and cross moments", 4 * size, formula)

    def solve(self, *, stand_ins: float = 0.0) -> PlanItem:
        """What a factorisation, an inverse and a refit hold beside the Gram matrix.

        Args:
            stand_ins: share of a group whose stand-ins are made from the inverse: twice the
                products of their columns with each other, the fp16 result, a block of their columns
                and one of the others', three of what these give.
        """
        widest = max(self._attention, self._ffn)
        size = 4 * widest * max(3 * _FACTOR_BLOCK, _FACTOR_BLOCK + 6 * _REFIT_ROWS)
        pool = math.ceil(stand_ins * widest)
        made = 4 * 2 * pool**2 + 2 * pool * (widest - pool)
        made += 4 * _FACTOR_BLOCK * (2 * widest + 3 * pool)
        if not pool or made <= size:
            return self._near("blocks of a solve", size, "4*C*(256 + 6*128)")
        return self._near(
            "making stand-ins", made, "8*(p*C)^2 + 2*p*C*(1-p)*C + 4*256*(2*C + 3*p*C)"
        )

    def kept_inputs(self, windows: int, *, ffn: bool = True) -> PlanItem:
        """Recovery's inputs of the projections of a layer; refinement's of attention's alone."""
        tokens, columns = windows * self._work.window, self._attention + int(ffn) * self._ffn
        size, widths = tokens * columns * self._compute, "(C_o+C_down)" if ffn else "C_o"
        return self._near("recovery's inputs of a layer", size, f"n*S*{widths}*c")

    def refined_weights(self) -> list[PlanItem]:
        """New weights of the FFN in fp32, and down_proj's refit.

        Those that are computed with lie where the dense layer's were.
        """
        if self._compute == 4:
            return []
        size = 4 * (self._ffn_inputs + 1) * self._ffn * self._spec.hidden
        return [self._near("refined weights of a layer", size, "4*(J+1)*C_down*H")]

    def refined_block(self) -> PlanItem:
        """A block's weights, step, and what conjugate gradients keep; the inputs' factor."""
        hidden = self._spec.hidden
        size = 4 * (8 * self._ffn_inputs * self._block * hidden + hidden**2)
        return self._near("refinement of a block of channels", size, "4*(8*J*R*H + H^2)")

    def refined_activations(self, choice: Choice) -> PlanItem:
        """A block's pre-activations, slopes and products of both, in fp32; or a layer's own.

        In bf16 half as many windows are taken at a time.
        """
        windows, window = self._work.windows, self._work.window
        block = 3 * self._spec.hidden + (3 * self._ffn_inputs + 4) * self._block
        batch = min(choice.micro_batch, windows)
        own = batch * window * (self._per_token() + 2 * self._spec.hidden) * self._compute
        size = max(own, max(1, batch * self._compute // 4) * window * block * 4)
        formula = "max(a layer's, m*S*c/4*(3H + (3J+4)*R)*4)"
        return self._near("activations of a micro-batch", size, formula)

    def slopes(self, windows: int) -> PlanItem:
        """Refinement's slopes of a block of channels for a step's windows, fp32."""
        steps = min(self._work.refine, windows)
        part = -(-windows // steps)
        size = 4 * part * self._work.window * self._ffn_inputs * self._block
        return self._near("refinement's slopes", size, "n/r*S*J*R*4")

    def refits(self) -> PlanItem:
        """Refit weights that are saved more precisely than computed with; others lie in place.

        The one that is being written is converted to the source's dtype.
        """
        columns = self._attention + self._ffn
        whole, formula = columns * self._spec.hidden, "H*(C_o+C_down)*source"
        if self._work.refit_inputs:
            whole, formula = self.layer_parameters, "P*source"
        if self._compute == 4 or self._source == self._compute:
            converted = self._source != self._compute
            whole, formula = int(converted) * self._largest, "largest projection * source"
        return PlanItem(
            name="refit weights", where=HOST, size_bytes=whole * self._source, formula=formula
        )

    def building(self) -> PlanItem:
        """A layer's store file is collected; a tensor is read, cut and quantised at a time."""
        stored = self.stored_bytes(self._work.weights)
        element = 1 if self._work.weights == "int8" else self._source
        return PlanItem(
            name="building the store",
            where=HOST,
            size_bytes=stored + self._largest * (2 * self._source - element),
            formula="layer as stored, its largest tensor twice as in the source instead",
        )

    def rewriting(self) -> PlanItem:
        """Pieces of the tensor that is read, cut and written; a refit one is held whole."""
        refit = 2 * self._largest * self._source if self._work.recovery else 0
        return PlanItem(
            name="rewriting the model",
            where=HOST,
            size_bytes=max(refit, _REWRITE_PIECES_BYTES),
            formula="max(2 x largest of a layer * source, 32 MiB)" if refit else "32 MiB",
        )

    def stores(self) -> PlanItem:
        """The stores on disk."""
        layers = self._work.store_copies * self._spec.layers
        return PlanItem(
            name="working stores",
            where=DISK,
            size_bytes=layers * self.stored_bytes(self._work.weights),
            formula="copies * layers * layer as stored",
        )


def pinned_bytes(size: int) -> int:
    """What torch's allocator of pinned host memory takes for a block: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _input_projections(spec: ModelSpec, group: UnitGroup) -> int:
    """Projections whose output rows the group's units own."""
    prefix, shapes = spec.prefix(group.layer), spec.layer_tensors[group.layer]
    return sum(
        piece.axis == 0 and len(shapes[piece.tensor.removeprefix(prefix)]) == 2
        for piece in group.slices
    )


def _elements(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _source_element_bytes(spec: ModelSpec) -> int:
    name = str(spec.config.get("dtype") or spec.config.get("torch_dtype") or "float32")
    by_name = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    return DTYPE_BYTES[by_name.get(name.removeprefix("torch."), "F32")]

"""The items of a sweep over layers in a memory plan, each with its formula.

In: shapes, the device, a workload, a choice of sizes. Out: itemised bytes. Pure. docs/memory.md
explains the formulas and compares them with measurements.

Legend: P parameters of the largest layer, H hidden, I FFN channels, C_o and C_down input columns of
o_proj and down_proj, V vocabulary (v rows of it in a chunk), S tokens of a window, m windows of a
micro-batch, n windows in flight, c bytes of a compute element, K columns of a key, A query heads
times S, L layers, p share of a group's units that imputation covers. Channel updates: J projections
into the FFN, R channels of a block, r updates. Experts: I and C_down belong to one expert, E is
their number, k the number of experts of a token.
"""

from __future__ import annotations

import math
from dataclasses import replace

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.dtypes import DTYPE_BYTES, FLOATING, TORCH_NAMES
from frugal_bonsai.int8 import PRODUCT_TOKENS, product_scratch_bytes, product_tokens
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.work import GPU, HOST, Choice, PlanItem, SweepWorkload
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.family_schema import GATED_PEAKS
from frugal_bonsai.model.units import ATTENTION, FFN
from frugal_bonsai.row_blocks import block_bytes, block_rows, multiplied_in_blocks
from frugal_bonsai.sizes import format_bytes

# Tokens that a block of rows is multiplied with at a time, into a buffer.
_BLOCK_TOKENS = 256


class SweepItems:
    """Items of the memory plan, in predicted bytes, of sweeps over one model on one device."""

    def __init__(self, spec: ModelSpec, budget: Budget, work: SweepWorkload) -> None:
        self.spec, self.budget, self.work = spec, budget, work
        self._device, self._gpu = budget.device, is_accelerator(budget.device)
        self.near = HOST if budget.gpu_bytes is None else GPU
        self._compute = 2 if self._gpu else 4
        self._chunk_element = self._compute
        self._source = source_element_bytes(spec)
        shapes = max((list(t.values()) for t in spec.layer_tensors), key=_elements)
        self.layer_parameters = _elements(shapes)
        self._layer_rows = sum(shape[0] for shape in shapes if len(shape) == 2)
        self._input_rows = max(shape[0] for shape in shapes if len(shape) == 2)
        self._small = sum(math.prod(shape) for shape in shapes if len(shape) == 1)
        self._largest = max(math.prod(shape) for shape in shapes)
        self._shapes = shapes
        self._attention, self._ffn = (
            max(group.columns for group in spec.table.groups if group.kind == kind)
            for kind in (ATTENTION, FFN)
        )
        # FFNs of a layer, and how many of them a token is sent to.
        self._ffns = max(1, spec.experts)
        self._chosen = max(1, spec.experts_chosen)
        copies = spec.activation_copies
        self._peaks = tuple(peak.with_copies(copies) for peak in spec.family.peaks)
        self._dense = GATED_PEAKS[0].elements(
            hidden=spec.hidden, ffn=spec.dense_channels, attention=0, key=0, scores=0
        )

    def stored_bytes(self, weights: str | None) -> int:
        """Return the bytes of one layer as stored; None is the checkpoint itself."""
        if weights == "int8":
            router = 0 if not self.spec.experts else self.spec.experts * self.spec.hidden
            native = self._source * (self._small + router) - router
            return self.layer_parameters + 4 * self._layer_rows + native
        return self.layer_parameters * self._source

    def stream(
        self, choice: Choice, weights: str | None, *, products: bool = False
    ) -> list[PlanItem]:
        """Buffers of a stream of layers that are called.

        Args:
            choice: Gives the number of buffers.
            weights: Working store. None streams the checkpoint.
            products: Stored codes are multiplied as they are.
        """
        items = self._stream(choice, weights)
        if products:
            widest = max(self._attention, self._ffn, self.spec.hidden)
            items.append(self._products(choice, self._input_rows, widest, self._largest))
        elif weights == "int8" or self._source != self._compute:
            items.append(self._dense_rows() or self._dense_layers(1))
        return items

    def paired_streams(self, choice: Choice, weights: str | None) -> list[PlanItem]:
        """Buffers of the streams of two models whose weights are read, changed and solved for."""
        items = self._stream(choice, weights, models=2)
        if weights == "int8" or self._source != self._compute:
            items.append(self._dense_layers(2))
        return items

    def _dense_layers(self, models: int) -> PlanItem:
        size = models * self.layer_parameters * self._compute
        return self._near("dequantised layer", size, f"{models} x P*c")

    def _dense_rows(self) -> PlanItem | None:
        """Dense rows on a CPU, which multiplies large weights in blocks; None without any."""
        large = [shape for shape in self._shapes if self._in_blocks(shape)]
        if not large:
            return None
        small = self.layer_parameters - _elements(large)
        block = max(self._block_bytes(shape) for shape in large)
        formula = "rows of a weight: 4 MiB, 256 at least, their products; small tensors * c"
        return self._near("dequantised rows", block + small * self._compute, formula)

    def _in_blocks(self, shape: tuple[int, ...]) -> bool:
        return not self._gpu and multiplied_in_blocks(shape, self._compute)

    def _block_bytes(self, shape: tuple[int, ...]) -> int:
        products = block_rows(shape[1], self._compute) * _BLOCK_TOKENS * self._compute
        return block_bytes(shape, self._compute) + products

    def scored_weight(self) -> PlanItem:
        """The output projection whose columns are scored; 0 bytes if the layer is dense anyway."""
        shapes = [(self.spec.hidden, columns) for columns in (self._attention, self._ffn)]
        sizes = [math.prod(shape) * 4 for shape in shapes if self._in_blocks(shape)]
        return self._near("weight that is scored", max(sizes, default=0), "H*C*4")

    def _stream(self, choice: Choice, weights: str | None, *, models: int = 1) -> list[PlanItem]:
        """Buffers of layers as stored, for the streams of one or two models."""
        stored = self.stored_bytes(weights)
        items = self._buffers("layer buffers", choice.buffers * models, stored, "layer as stored")
        family = self.spec.family
        stacks = () if family.experts is None else family.experts.stacks
        if weights is None and (family.transposed or any(stack.transposed for stack in stacks)):
            size, formula = self._largest * self._source, "largest tensor of a layer * source"
            items.append(self._host("a tensor that is transposed", size, formula))
        return items

    def masks(self) -> PlanItem:
        """Attention masks of a window, if the architecture needs any."""
        size = self.spec.family.masks * self.work.window**2 * self._compute
        return self._near("attention masks", size, "masks*S*S*c")

    def outer(self) -> PlanItem:
        """Weights outside the layers, such as the final norm, without embedding and head."""
        family, others = self.spec.family, self.spec.other_tensors
        own = [n for n in others if n not in (family.embedding, family.head)]
        size = sum(math.prod(others[name]) for name in own) * self._compute
        return self._near("norms and positions", size, "outside the layers * c")

    def _products(self, choice: Choice, rows: int, columns: int, packed: int) -> PlanItem:
        """Digits and sums of int8 products; a GPU multiplies a micro-batch at once.

        On a CPU the kernel packs a weight of ``packed`` elements in every call.
        """
        tokens = choice.micro_batch * self.work.window if self._gpu else PRODUCT_TOKENS
        size = product_scratch_bytes(tokens, rows, columns)
        if self._gpu:
            return self._near("int8 products", size, f"{tokens} tokens * (8*rows + 10*columns)")
        formula = f"{tokens} tokens * (8*rows + 10*columns) + largest tensor, packed"
        return self._near("int8 products", size + packed, formula)

    def with_products(self, choice: Choice) -> Choice:
        """Return the choice with the micro-batch of int8 products: few tokens on a CPU."""
        if self._gpu:
            return choice
        widest = max(self._attention, self._ffn, self.spec.hidden, self._input_rows)
        windows = max(1, product_tokens(widest) // self.work.window)
        return replace(choice, micro_batch=min(choice.micro_batch, windows))

    def _buffers(self, name: str, count: int, size: int, what: str) -> list[PlanItem]:
        """Buffers of a stream: on the host, and for a GPU pinned there and on the device."""
        formula = f"{count} x {what} ({format_bytes(size)})"
        if self.near == HOST:
            return [self._host(name, count * size, formula)]
        pinned = count * pinned_bytes(size)
        return [
            self._host(name, pinned, f"{formula}, pinned: 2^k"),
            self._near(name, count * size, formula),
        ]

    def _near(self, name: str, size: int, formula: str) -> PlanItem:
        """Item where layers are computed: on the GPU if it has memory of its own."""
        return PlanItem(name=name, where=self.near, size_bytes=size, formula=formula)

    def _host(self, name: str, size: int, formula: str) -> PlanItem:
        return PlanItem(name=name, where=HOST, size_bytes=size, formula=formula)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a window's hidden states."""
        return self.work.window * self.spec.hidden * self._compute

    def hidden(self, choice: Choice, windows: int, *, states: int = 1) -> list[PlanItem]:
        """Hidden states of windows in flight: resident ones on the device, the others on the host.

        Args:
            choice: Gives resident windows, the place of the others and the micro-batch.
            windows: Number of windows in flight.
            states: Number of hidden states of each window.
        """
        each = self.hidden_bytes
        if self.near == HOST and not choice.on_disk:
            size = states * windows * each
            return [self._near("hidden states", size, f"{states} x n*S*H*c")]
        if self.near == HOST:
            batch, resident = min(choice.micro_batch, windows), min(choice.resident, windows)
            size = states * (resident + 2 * batch) * each
            formula = f"{states} x (resident + 2*m)*S*H*c, the others on disk"
            return [self._near("hidden states", size, formula)]
        resident = min(choice.resident, windows)
        formula = f"{states} x resident*S*H*c"
        items = [self._near("hidden states on the device", states * resident * each, formula)]
        if resident < windows:
            batch = min(choice.micro_batch, windows)
            size = 3 * states * batch * each
            items.append(self._near("micro-batches on their way", size, f"{3 * states} x m*S*H*c"))
            size = states * (windows - resident) * pinned_bytes(each)
            formula = f"{states} x (n-resident)*S*H*c, pinned: 2^k"
            items.append(self._host("hidden states", size, formula))
        return items

    def activations(
        self, choice: Choice, windows: int, *, extra: int = 0, why: str = ""
    ) -> PlanItem:
        """Peak of one Hugging Face layer, and the tensors held beside it.

        Args:
            choice: Gives the micro-batch (m).
            windows: Number of windows of the sweep; caps m.
            extra: Elements per token beside the layer's own.
            why: Names of the extra elements, for the formula.
        """
        peaks = ", ".join(str(peak) for peak in self._peaks)
        formula = f"m*S*(max({peaks}){why})*c"
        batch = min(choice.micro_batch, windows)
        size = batch * self.work.window * (self._per_token() + extra) * self._compute
        return self._near("activations of a micro-batch", size, formula)

    def _per_token(self) -> int:
        """Return the peak number of elements per token of a Hugging Face layer, traced in tests."""
        spec = self.spec
        most = max(
            peak.elements(
                hidden=spec.hidden,
                ffn=self._ffn,
                attention=self._attention,
                key=spec.kv_heads * spec.head_dim,
                scores=spec.heads * self.work.window,
            )
            for peak in self._peaks
        )
        return max(most, self._dense)


def pinned_bytes(size: int) -> int:
    """Return the bytes of a pinned host block: torch's allocator takes the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def _elements(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def source_element_bytes(spec: ModelSpec) -> int:
    """Return the bytes of an element of the checkpoint, by its config."""
    name = str(spec.config.get("dtype") or spec.config.get("torch_dtype") or "float32")
    sizes = {TORCH_NAMES[stored]: DTYPE_BYTES[stored] for stored in FLOATING}
    return sizes.get(name.removeprefix("torch."), DTYPE_BYTES["F32"])

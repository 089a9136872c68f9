"""The items of a training's memory plan, each with its formula.

In: shapes, caps, a training, a choice of sizes. Out: itemised bytes. Pure. docs/memory.md explains
the formulas and compares them with measurements; training.py chooses the sizes.

Legend: P parameters of a layer, L layers, H hidden, I FFN channels, C_o input columns of o_proj, K
columns of a key, A query heads times S, V vocabulary, S tokens of a window, m windows of a
micro-batch, t tokens whose logits are held, c bytes of a compute element, R rank, O and I a
projection's sides, k most likely next tokens in the teacher's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import HEAD_CHUNK_BYTES, CommandItems
from frugal_bonsai.memory.items import pinned_bytes
from frugal_bonsai.memory.work import DENSE_BLOCK_BYTES, HOST, PlanItem, SweepWorkload
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN
from frugal_bonsai.sizes import MIB

INT8, NATIVE, STREAMED = "int8", "native", "streamed"
ADAMW, ADAMW_8BIT = "adamw", "adamw8bit"
# bitsandbytes keeps the moments of smaller parameters in fp32. Of larger ones it keeps a byte each,
# and two fp32 scales for every block of 256.
EIGHT_BIT_LEAST = 4096
_EIGHT_BIT_BLOCK = 256
# Elements per element of a parameter that an optimiser step holds beside the moments on a CPU, for
# one parameter at a time. AdamW: root and quotient. 8-bit AdamW: both moments, the gradient, root,
# quotient and two block-wise copies.
_STEP_COPIES = {ADAMW: 2, ADAMW_8BIT: 7}
# Copies of a block's logits: as multiplied, in fp32, probabilities, gradients of both terms.
_LOGIT_COPIES = 6
# On a GPU a head that is not dense is dequantised for every block of tokens. Blocks of this many
# times HEAD_CHUNK_BYTES are faster, if they fit.
GPU_HEAD_CHUNKS = (4, 2)
# Largest number of elements per token that a layer holds between its forward and backward pass,
# traced in tests/memory/test_training.py: multiples of H, I, C_o, K, with a gated FFN and without.
_GATED, _PLAIN = (5, 6, 2, 3), (10, 5, 2, 3)
# Added to them: multiples of I for each copy of a composed activation; of H for each norm beside a
# layer's two; of C_o and K if attention has norms.
_COPIES, _NORM, _OWN_NORMS = 2, 4, 4
# Multiples of A: of the scores that a forward pass holds, and with a single KV head, which torch's
# fused kernels do not support.
_SCORES, _BROADCAST = 4, 2


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """A training, as far as its memory depends on it.

    Attributes:
        window: Tokens of a window (S).
        batch: Windows of a step.
        lora: Adapters are trained, else the block projections themselves.
        rank: Rank of the adapters. None lets the plan choose.
        weights: Form of the frozen weights: ``"int8"``, ``"native"`` or ``"streamed"`` from disk.
            None lets the plan choose.
        optimisers: Optimisers that are allowed, ``"adamw"`` or ``"adamw8bit"``, in order of
            preference.
        top: Number of most likely next tokens in the teacher's cache (k). 0 without a teacher.
        hidden_layers: Number of layers whose hidden states the loss compares.
    """

    window: int
    batch: int
    lora: bool
    rank: int | None = None
    weights: str | None = None
    optimisers: tuple[str, ...] = (ADAMW,)
    top: int = 0
    hidden_layers: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingChoice:
    """Sizes that the planner chooses.

    Attributes:
        weights: Form of the frozen weights.
        rank: Rank of the adapters. 0 without.
        optimiser: The optimiser.
        micro_batch: Windows computed together (m).
        head_chunks: Size of a block of logits, as a multiple of ``HEAD_CHUNK_BYTES``.
    """

    weights: str
    rank: int
    optimiser: str
    micro_batch: int
    head_chunks: int = 1


def training_elements(spec: ModelSpec, window: int) -> int:
    """Return the peak number of elements per token of a layer's forward and backward pass."""
    ffn = max(spec.table.groups, key=lambda g: g.columns if g.kind == FFN else 0)
    attention = max((g for g in spec.table.groups if g.kind == ATTENTION), key=lambda g: g.columns)
    of_hidden, of_ffn, of_attention, of_key = _GATED if spec.ffn_inputs > 1 else _PLAIN
    owner = attention.output.rpartition(".")[0] + "."
    shapes = spec.layer_tensors[0].items()
    norms = [
        name
        for name, shape in shapes
        if (len(shape) == 1 and name.endswith(".weight")) or name.endswith(spec.family.unquantised)
    ]
    own = sum(name.startswith(owner) for name in norms)
    of_hidden += _NORM * max(0, len(norms) - own - 2)
    of_attention, of_key = (n + _OWN_NORMS * (own > 0) for n in (of_attention, of_key))
    size = of_hidden * spec.hidden + (of_ffn + _COPIES * spec.activation_copies) * ffn.columns
    size += of_attention * attention.columns + of_key * spec.kv_heads * spec.head_dim
    scores = _SCORES * max(peak.scores for peak in spec.family.peaks)
    if spec.family.one_kv_head and spec.kv_heads == 1:
        scores = max(scores, _BROADCAST)
    return size + math.ceil(scores * spec.heads * window)


class TrainingItems(CommandItems):
    """The items of one training of one model on one device."""

    def __init__(self, spec: ModelSpec, budget: Budget, training: TrainingWork) -> None:
        super().__init__(spec, budget, SweepWorkload(window=training.window))
        self.training = training
        self._state_bytes = training.window * spec.hidden * self._compute

    def held(self, choice: TrainingChoice) -> list[PlanItem]:
        """Return the items of a whole step."""
        return [
            *self._weights(choice),
            self._head(choice),
            *self._trained(choice),
            self._states(choice),
            *self._targets(choice),
        ]

    def layers(self, choice: TrainingChoice) -> list[PlanItem]:
        """Return the items of a layer that is computed again and differentiated."""
        lora, items = self.training.lora, [self._activations(choice)]
        if choice.weights == INT8 or (lora and self._source != self._compute):
            items.append(self._dense_rows_of(self._largest_of_model(), "largest of a layer"))
        if not lora and self._compute != 4:
            size = 2 * self._compute * self._largest_of_model()
            formula = "2 x largest of a layer * c"
            items.append(self._near("a weight in the compute dtype", size, formula))
        return items

    def head(self, choice: TrainingChoice) -> list[PlanItem]:
        """Return the items of the head and of the loss."""
        items = [self._logits(choice)]
        if self._head_element_bytes(choice) != self._compute:
            items.append(self._dense_rows_of(self.spec.vocabulary * self.spec.hidden, "head"))
        return items

    def _largest_of_model(self) -> int:
        return max(map(math.prod, self.spec.matrices.values()))

    def _weights(self, choice: TrainingChoice) -> list[PlanItem]:
        shapes = self.spec.matrices.values()
        matrices = sum(map(math.prod, shapes))
        beside = self._compute * (self.spec.block_parameters - matrices)
        if not self.training.lora:
            return [self._near("weights", 4 * matrices + beside, "4*P*L")]
        if choice.weights == INT8:
            size = matrices + 4 * sum(rows for rows, _ in shapes) + beside
            return [self._near("frozen weights", size, "(P + 4*rows)*L")]
        if choice.weights == STREAMED:
            size = self.layer_parameters * self._source
            if self.near == HOST:
                return [self._near("frozen weights", size + beside, "a layer as stored")]
            pinned = 2 * pinned_bytes(size)
            return [
                self._near("frozen weights", 2 * size + beside, "2 x a layer as stored"),
                self._host("frozen weights", pinned, "2 x a layer as stored, pinned: 2^k"),
            ]
        size = matrices * self._source + beside
        return [self._near("frozen weights", size, "P*source*L")]

    def _head_element_bytes(self, choice: TrainingChoice) -> int:
        """Bytes of an element of the head: dense unless the weights are int8 or streamed."""
        if choice.weights == INT8:
            return 1
        return self._source if choice.weights == STREAMED else self._compute

    def _head(self, choice: TrainingChoice) -> PlanItem:
        vocabulary, each = self.spec.vocabulary, self._head_element_bytes(choice)
        size = vocabulary * self.spec.hidden * each
        if choice.weights == INT8:
            return self._near("head", size + 4 * vocabulary, "V*H + 4*V")
        return self._near("head", size, f"V*H*{'source' if choice.weights == STREAMED else 'c'}")

    def _trained(self, choice: TrainingChoice) -> list[PlanItem]:
        """Parameters in fp32, their gradients, AdamW's two moments."""
        sizes, items = trained_sizes(self.spec, choice.rank), list[PlanItem]()
        if self.training.lora:
            items = [self._near("adapters", 4 * sum(sizes), "4*R*(O+I)")]
        count, what = sum(sizes), "R*(O+I)" if self.training.lora else "P*L"
        moments = moment_bytes(sizes, choice.optimiser)
        each = "2" if choice.optimiser == ADAMW_8BIT else "2 x 4"
        return [
            *items,
            self._near("gradients", 4 * count, f"4*{what}"),
            self._near("optimiser", moments, f"{each}*{what}"),
            self._step(choice, sizes),
        ]

    def _step(self, choice: TrainingChoice, sizes: list[int]) -> PlanItem:
        """Temporaries of an optimiser step.

        On a GPU torch's AdamW updates all parameters together; bitsandbytes' kernel needs one copy.
        """
        name, largest = "a step of the optimiser", max(sizes, default=0)
        if self._gpu and choice.optimiser == ADAMW:
            return self._near(name, 4 * sum(sizes), "all parameters in fp32")
        copies = 1 if self._gpu else _STEP_COPIES[choice.optimiser]
        return self._near(name, 4 * copies * largest, f"{copies} x largest parameter in fp32")

    def _states(self, choice: TrainingChoice) -> PlanItem:
        """Hidden states at layer boundaries, and their gradients."""
        count, windows = self.spec.layers + 4, self._together(choice)
        size = count * windows * self._state_bytes
        return self._near("layer boundaries", size, f"(L+4)*{windows}*S*H*c")

    def _together(self, choice: TrainingChoice) -> int:
        """Number of windows whose layer boundaries are held together.

        Streamed layers are read once a step, so all windows of the step are held.
        """
        return self.training.batch if choice.weights == STREAMED else choice.micro_batch

    def _targets(self, choice: TrainingChoice) -> list[PlanItem]:
        """The teacher's next tokens and hidden states of a micro-batch, as read and as used."""
        work, tokens = self.training, self._together(choice) * self.training.window
        if not work.top:
            return []
        size = tokens * (work.top * (4 + 8 + 4) + 4)
        size += work.hidden_layers * tokens * self.spec.hidden * 6
        formula = "m*S*(16*k + 4 + 6*H*layers), of streamed layers a step's"
        return [self._host("teacher's answers", size, formula)]

    def _activations(self, choice: TrainingChoice) -> PlanItem:
        elements = training_elements(self.spec, self.training.window)
        elements += 2 * self.spec.hidden if self.training.hidden_layers else 0
        size = choice.micro_batch * self.training.window * elements * self._compute
        formula = f"m*S*{elements:,}*c"
        return self._near("activations of a layer, there and back", size, formula)

    def _dense_rows_of(self, elements: int, what: str) -> PlanItem:
        """Rows of a frozen weight in the compute dtype."""
        size = min(elements * self._compute, DENSE_BLOCK_BYTES)
        limit = f"{DENSE_BLOCK_BYTES // MIB} MiB"
        return self._near("rows of a weight, dense", size, f"{what} * c, at most {limit}")

    def head_tokens(self, choice: TrainingChoice) -> int:
        """Return the number of tokens of a block of logits."""
        chunk = choice.head_chunks * HEAD_CHUNK_BYTES // (self.spec.vocabulary * 4)
        return max(16, min(chunk, self.training.window))

    def _logits(self, choice: TrainingChoice) -> PlanItem:
        top = self.training.top * 8 * 4
        size = self.head_tokens(choice) * (self.spec.vocabulary * 4 * _LOGIT_COPIES + top)
        size += 2 * self._state_bytes
        return self._near("logits and their gradients", size, f"t*(V*4*{_LOGIT_COPIES} + 32*k)")


def trained_sizes(spec: ModelSpec, rank: int) -> list[int]:
    """Return the number of elements of each trained parameter.

    Args:
        spec: Shapes of the model.
        rank: Rank of the adapters. 0 trains the block projections themselves.
    """
    shapes = spec.matrices.values()
    if rank:
        return [rank * side for shape in shapes for side in shape]
    return [math.prod(shape) for shape in shapes]


def moment_bytes(sizes: Sequence[int], optimiser: str) -> int:
    """Return the bytes of an optimiser's moments of parameters of these sizes."""
    if optimiser == ADAMW_8BIT:
        return sum(map(_eight_bit_bytes, sizes))
    return 8 * sum(sizes)


def _eight_bit_bytes(elements: int) -> int:
    """Return the bytes of both moments of a parameter in bitsandbytes."""
    if elements < EIGHT_BIT_LEAST:
        return 8 * elements
    return 2 * elements + 2 * 4 * math.ceil(elements / _EIGHT_BIT_BLOCK)

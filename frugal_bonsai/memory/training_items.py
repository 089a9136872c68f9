"""The items of a training's memory plan, and which of them are held together.

In: shapes, caps, what is to be trained, a choice. Out: itemised bytes, phases. Pure. The formulas
are explained and compared with measurements in docs/memory.md; training.py chooses.

Legend: P parameters of a layer, L layers, H hidden, I FFN channels, C_o input columns of o_proj, K
columns of a key, A query heads times S, V vocabulary, S tokens of a window, m windows of a
micro-batch, t tokens whose logits are held, c bytes of a compute element, R rank, O and I a
projection's sides, k followers that the teacher's cache keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.command_items import CommandItems
from frugal_bonsai.memory.items import HEAD_CHUNK_BYTES, pinned_bytes
from frugal_bonsai.memory.phases import Phase, with_slack
from frugal_bonsai.memory.work import BASE, DENSE_BLOCK_BYTES, GPU, HOST, PlanItem, SweepWorkload
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN
from frugal_bonsai.sizes import MIB

INT8, NATIVE, STREAMED = "int8", "native", "streamed"
ADAMW, ADAMW_8BIT = "adamw", "adamw8bit"
RANKS = (64, 32, 16, 8, 4)
# An adapter's rank is at most this share of the hidden size: beyond it, full training is smaller.
_RANK_SHARE = 4
# bitsandbytes keeps moments of smaller parameters in fp32, of larger ones a byte each and two fp32
# scales for every block of 256.
EIGHT_BIT_LEAST = 4096
_EIGHT_BIT_BLOCK = 256
# Elements a parameter's that a step of the optimiser holds beside the moments on a CPU, one
# parameter at a time: AdamW's root and quotient; both moments, the gradient, root, quotient and a
# block-wise copy of 8-bit ones.
_STEP_COPIES = {ADAMW: 2, ADAMW_8BIT: 7}
# Copies of a block's logits: as multiplied, in fp32, probabilities, gradients of both terms.
_LOGIT_COPIES = 6
# On a GPU a head that is not dense is made so for every block of tokens: blocks of so many times
# HEAD_CHUNK_BYTES pay, where they fit.
GPU_HEAD_CHUNKS = (4, 2)
# Elements a token that a layer keeps for the way back and holds on it at most, traced in
# tests/memory/test_training.py: of H, I, C_o, K, with a gated FFN and without.
_GATED, _PLAIN = (5, 6, 2, 3), (10, 5, 2, 3)
# More of the channels for a composed activation's copies; of H for each norm beside a layer's two;
# of C_o and K where attention has norms of its own.
_COPIES, _NORM, _OWN_NORMS = 2, 4, 4
# Of A, a multiple of what a forward pass holds of it, where attention holds scores; and where a
# single KV head is read by all, which torch's fused kernels do not take.
_SCORES, _BROADCAST = 4, 2


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """What is to be trained.

    Attributes:
        window: S.
        batch: windows of a step.
        lora: adapters are trained, else the block projections themselves.
        rank: of the adapters; None chooses.
        weights: ``"int8"``, ``"native"`` or ``"streamed"`` from disk; None chooses.
        optimisers: ``"adamw"``, ``"adamw8bit"``: those that may be taken, the first preferred.
        top: k; 0 without a teacher.
        hidden_layers: layers whose hidden states the loss compares.
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
    """What the planner is free to choose."""

    weights: str
    rank: int
    optimiser: str
    micro_batch: int
    head_chunks: int = 1


def training_elements(spec: ModelSpec, window: int) -> int:
    """Elements a token that a layer holds at most when it is computed again and gone back."""
    ffn = max(spec.table.groups, key=lambda g: g.columns if g.kind == FFN else 0)
    attention = max((g for g in spec.table.groups if g.kind == ATTENTION), key=lambda g: g.columns)
    gated = sum(piece.axis == 0 for piece in ffn.slices if "bias" not in piece.tensor) > 1
    of_hidden, of_ffn, of_attention, of_key = _GATED if gated else _PLAIN
    owner = attention.output.rpartition(".")[0] + "."
    shapes = spec.layer_tensors[0].items()
    norms = [name for name, shape in shapes if len(shape) == 1 and name.endswith(".weight")]
    own = sum(name.startswith(owner) for name in norms)
    of_hidden += _NORM * max(0, len(norms) - own - 2)
    of_attention, of_key = (n + _OWN_NORMS * (own > 0) for n in (of_attention, of_key))
    size = of_hidden * spec.hidden + (of_ffn + _COPIES * spec.activation_copies) * ffn.columns
    size += of_attention * attention.columns + of_key * spec.kv_heads * spec.head_dim
    scores = _SCORES * max(peak.scores for peak in spec.family.peaks)
    if spec.family.one_kv_head and spec.kv_heads == 1:
        scores = max(scores, _BROADCAST)
    return size + math.ceil(scores * spec.heads * window)


class TrainingItems:
    """Items and phases of one training."""

    def __init__(
        self, spec: ModelSpec, budget: Budget, work: TrainingWork, base_bytes: int
    ) -> None:
        self._spec, self._budget, self._work = spec, budget, work
        self._items = CommandItems(spec, budget, SweepWorkload(window=work.window))
        self._gpu = is_accelerator(budget.device)
        self._near = HOST if budget.gpu_bytes is None else GPU
        self._compute = 2 if self._gpu else 4
        one = work.window * spec.hidden * self._compute
        self._state_bytes = one
        self._always = [
            PlanItem(name=BASE, where=HOST, size_bytes=base_bytes, formula="measured"),
            self._items.outer(),
            self._items.masks(),
        ]
        if budget.gpu_bytes is not None:
            context = budget.context_bytes
            self._always.append(
                PlanItem(name="device context", where=GPU, size_bytes=context, formula="measured")
            )

    def weights(self) -> Sequence[str]:
        """How frozen weights may be held, the first one preferred."""
        if not self._work.lora:
            return (NATIVE,)
        return (NATIVE, INT8, STREAMED) if self._work.weights is None else (self._work.weights,)

    def ranks(self) -> Sequence[int]:
        """Ranks that may be taken, the first one preferred."""
        if not self._work.lora:
            return (0,)
        if self._work.rank is not None:
            return (self._work.rank,)
        most = max(RANKS[-1], self._spec.hidden // _RANK_SHARE)
        return [rank for rank in RANKS if rank <= most]

    def fits(self, choice: TrainingChoice) -> bool:
        """Whether all caps hold in all phases."""
        return all(
            phase.total_bytes(where) <= cap
            for phase in self.phases(choice)
            for where, cap, _ in self.caps()
        )

    def caps(self) -> list[tuple[str, int, str]]:
        """(place, cap, option), device first."""
        caps = [(HOST, self._budget.host_bytes, "--max-cpu-mem")]
        if self._budget.gpu_bytes is not None:
            caps.insert(0, (GPU, self._budget.gpu_bytes, "--max-gpu-mem"))
        return caps

    def phases(self, choice: TrainingChoice) -> list[Phase]:
        """Layers on the way back, and the head."""
        held = [
            *self._weights(choice),
            self._head(choice),
            *self._trained(choice),
            self._states(choice),
        ]
        held += self._targets(choice)
        layers, head = [self._activations(choice)], [self._logits(choice)]
        if choice.weights == INT8 or self._source_differs():
            layers.append(self._dense())
        if not self._work.lora and self._compute != 4:
            layers.append(self._cast())
        if self._head_element_bytes(choice) != self._compute:
            head.append(self._dense_head())
        return [
            with_slack("training: layers", self._always, [*held, *layers]),
            with_slack("training: head", self._always, [*held, *head]),
        ]

    def _source_differs(self) -> bool:
        return self._work.lora and self._items.source_element_bytes != self._compute

    def _item(self, name: str, size: float, formula: str) -> PlanItem:
        return PlanItem(name=name, where=self._near, size_bytes=int(size), formula=formula)

    def _weights(self, choice: TrainingChoice) -> list[PlanItem]:
        spec, small, matrices, rows = self._spec, 0, 0, 0
        for tensors in spec.layer_tensors:
            for shape in tensors.values():
                size = math.prod(shape)
                matrices += size if len(shape) == 2 else 0
                rows += shape[0] if len(shape) == 2 else 0
                small += size if len(shape) != 2 else 0
        if not self._work.lora:
            return [self._item("weights", 4 * matrices + self._compute * small, "4*P*L")]
        beside = self._compute * small
        if choice.weights == INT8:
            return [self._item("frozen weights", matrices + 4 * rows + beside, "(P + 4*rows)*L")]
        if choice.weights == STREAMED:
            size = self._items.layer_parameters * self._items.source_element_bytes
            if self._near == HOST:
                return [self._item("frozen weights", size + beside, "a layer as stored")]
            pinned = 2 * pinned_bytes(size)
            return [
                self._item("frozen weights", 2 * size + beside, "2 x a layer as stored"),
                PlanItem(
                    name="frozen weights",
                    where=HOST,
                    size_bytes=pinned,
                    formula="2 x a layer as stored, pinned: 2^k",
                ),
            ]
        size = matrices * self._items.source_element_bytes + beside
        return [self._item("frozen weights", size, "P*source*L")]

    def _head_element_bytes(self, choice: TrainingChoice) -> int:
        """Dense, but where the weights are int8 or do not fit even so."""
        if choice.weights == INT8:
            return 1
        return self._items.source_element_bytes if choice.weights == STREAMED else self._compute

    def _head(self, choice: TrainingChoice) -> PlanItem:
        vocabulary, each = self._spec.vocabulary, self._head_element_bytes(choice)
        size = vocabulary * self._spec.hidden * each
        if choice.weights == INT8:
            return self._item("head", size + 4 * vocabulary, "V*H + 4*V")
        return self._item("head", size, f"V*H*{'source' if choice.weights == STREAMED else 'c'}")

    def _trained(self, choice: TrainingChoice) -> list[PlanItem]:
        """Parameters in fp32, their gradients, AdamW's two moments."""
        shapes = [s for tensors in self._spec.layer_tensors for s in tensors.values()]
        matrices = [shape for shape in shapes if len(shape) == 2]
        if self._work.lora:
            sizes = [choice.rank * side for shape in matrices for side in shape]
            items = [self._item("adapters", 4 * sum(sizes), "4*R*(O+I)")]
        else:
            sizes, items = [math.prod(shape) for shape in matrices], []
        count, what = sum(sizes), "R*(O+I)" if self._work.lora else "P*L"
        eight_bit = choice.optimiser == ADAMW_8BIT
        moments = sum(map(_eight_bit_bytes, sizes)) if eight_bit else 8 * count
        return [
            *items,
            self._item("gradients", 4 * count, f"4*{what}"),
            self._item("optimiser", moments, f"{'2' if eight_bit else '2 x 4'}*{what}"),
            self._step(choice, sizes),
        ]

    def _step(self, choice: TrainingChoice, sizes: list[int]) -> PlanItem:
        """On a GPU torch's AdamW takes all parameters together, bitsandbytes' kernel none twice."""
        name, largest = "a step of the optimiser", max(sizes, default=0)
        if self._gpu and choice.optimiser == ADAMW:
            return self._item(name, 4 * sum(sizes), "all parameters in fp32")
        copies = 1 if self._gpu else _STEP_COPIES[choice.optimiser]
        return self._item(name, 4 * copies * largest, f"{copies} x largest parameter in fp32")

    def _states(self, choice: TrainingChoice) -> PlanItem:
        """Layer boundaries, the gradient and the next one."""
        count, windows = self._spec.layers + 4, self._together(choice)
        size = count * windows * self._state_bytes
        return self._item("layer boundaries", size, f"(L+4)*{windows}*S*H*c")

    def _together(self, choice: TrainingChoice) -> int:
        """Windows whose layer boundaries are held together: of streamed layers, a step's."""
        return self._work.batch if choice.weights == STREAMED else choice.micro_batch

    def _targets(self, choice: TrainingChoice) -> list[PlanItem]:
        """What the teacher says of a micro-batch: as read, and as computed with."""
        work, tokens = self._work, self._together(choice) * self._work.window
        if not work.top:
            return []
        size = tokens * (work.top * (4 + 8 + 4) + 4)
        size += work.hidden_layers * tokens * self._spec.hidden * 6
        formula = "m*S*(16*k + 4 + 6*H*layers), of streamed layers a step's"
        return [PlanItem(name="teacher's answers", where=HOST, size_bytes=size, formula=formula)]

    def _activations(self, choice: TrainingChoice) -> PlanItem:
        elements = training_elements(self._spec, self._work.window)
        elements += 2 * self._spec.hidden if self._work.hidden_layers else 0
        size = choice.micro_batch * self._work.window * elements * self._compute
        formula = f"m*S*{elements:,}*c"
        return self._item("activations of a layer, there and back", size, formula)

    def _dense(self) -> PlanItem:
        """A projection's rows in the compute dtype, 32 MiB of them or all."""
        largest = max(
            math.prod(s) for tensors in self._spec.layer_tensors for s in tensors.values()
        )
        return self._dense_rows(largest, "largest of a layer")

    def _cast(self) -> PlanItem:
        """A trained projection in the compute dtype, and its gradient there."""
        shapes = [s for tensors in self._spec.layer_tensors for s in tensors.values()]
        size = 2 * self._compute * max(math.prod(shape) for shape in shapes)
        return self._item("a weight in the compute dtype", size, "2 x largest of a layer * c")

    def _dense_head(self) -> PlanItem:
        return self._dense_rows(self._spec.vocabulary * self._spec.hidden, "head")

    def _dense_rows(self, elements: int, what: str) -> PlanItem:
        size = min(elements * self._compute, DENSE_BLOCK_BYTES)
        limit = f"{DENSE_BLOCK_BYTES // MIB} MiB"
        return self._item("rows of a weight, dense", size, f"{what} * c, at most {limit}")

    def head_tokens(self, choice: TrainingChoice) -> int:
        """Tokens of a block of logits."""
        chunk = choice.head_chunks * HEAD_CHUNK_BYTES // (self._spec.vocabulary * 4)
        return max(16, min(chunk, self._work.window))

    def _logits(self, choice: TrainingChoice) -> PlanItem:
        followers = self._work.top * 8 * 4
        size = self.head_tokens(choice) * (self._spec.vocabulary * 4 * _LOGIT_COPIES + followers)
        size += 2 * self._state_bytes
        return self._item("logits and their gradients", size, f"t*(V*4*{_LOGIT_COPIES} + 32*k)")


def _eight_bit_bytes(elements: int) -> int:
    """Both moments of a parameter as bitsandbytes keeps them."""
    if elements < EIGHT_BIT_LEAST:
        return 8 * elements
    return 2 * elements + 2 * 4 * math.ceil(elements / _EIGHT_BIT_BLOCK)

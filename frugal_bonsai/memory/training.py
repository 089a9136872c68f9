"""The memory of a training: its items, and the largest micro-batch and best weights that fit.

In: shapes, caps, what is to be trained. Out: a frozen, itemised :class:`TrainingPlan`, or a refusal
that names the largest item and the smallest cap that would work. Pure, as plan.py. Explained and
compared with measurements in docs/memory.md.

Legend: P parameters of a layer, L layers, H hidden, I FFN channels, C_o input columns of o_proj, K
columns of a key, A query heads times S, V vocabulary, S tokens of a window, m windows of a
micro-batch, t tokens whose logits are held, c bytes of a compute element, R rank, k followers that
the teacher's cache keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.items import HEAD_CHUNK_BYTES
from frugal_bonsai.memory.phases import Phase, with_slack
from frugal_bonsai.memory.plan import step_tokens
from frugal_bonsai.memory.prune_items import Items
from frugal_bonsai.memory.work import BASE, GPU, HOST, PlanItem, Work
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN
from frugal_bonsai.sizes import MIB, format_bytes

INT8, NATIVE, STREAMED = "int8", "native", "streamed"
RANKS = (64, 32, 16, 8, 4)
# An adapter's rank is at most this share of the hidden size: beyond it, full training is smaller.
_RANK_SHARE = 4
# Copies of a block's logits: as multiplied, in fp32, probabilities, gradients of both terms.
_LOGIT_COPIES = 6
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
        top: k; 0 without a teacher.
        hidden_layers: layers whose hidden states the loss compares.
    """

    window: int
    batch: int
    lora: bool
    rank: int | None = None
    weights: str | None = None
    top: int = 0
    hidden_layers: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training will hold.

    Attributes:
        phases: what is held together.
        budget: the caps.
        weights: how the frozen weights are held.
        rank: of the adapters; 0 without.
        micro_batch: windows computed together.
        head_tokens: tokens whose logits are held.
    """

    phases: tuple[Phase, ...]
    budget: Budget
    weights: str
    rank: int
    micro_batch: int
    head_tokens: int

    def peak_phase(self, where: str) -> Phase:
        """The phase that holds most on ``host`` or ``gpu``."""
        return max(self.phases, key=lambda phase: phase.total_bytes(where))

    @property
    def items(self) -> tuple[PlanItem, ...]:
        """Of each place the items of the phase that holds most there."""
        return tuple(
            item
            for where in (GPU, HOST)
            for item in self.peak_phase(where).items
            if item.where == where
        )

    def total_bytes(self, where: str) -> int:
        """Predicted peak on ``host`` or ``gpu``."""
        return self.peak_phase(where).total_bytes(where)


@dataclass(frozen=True, kw_only=True)
class _TrainingChoice:
    weights: str
    rank: int
    micro_batch: int


def plan_training(
    spec: ModelSpec, budget: Budget, work: TrainingWork, *, base_bytes: int
) -> TrainingPlan:
    """Fit a training into the caps: native, int8, streamed weights; then rank, then micro-batch.

    Args:
        spec: the pruned model's shapes.
        budget: caps.
        work: what is to be trained.
        base_bytes: what the process holds before the model (measured or nominal).

    Raises:
        BudgetError: nothing fits; names the largest item and the smallest cap that works.
    """
    build = _Training(spec, budget, work, base_bytes)
    choices = [
        _TrainingChoice(weights=weights, rank=rank, micro_batch=1)
        for weights in build.weights()
        for rank in build.ranks()
    ]
    fitting = [choice for choice in choices if build.fits(choice)]
    if not fitting:
        raise build.refusal(choices[-1])
    choice = fitting[0]
    for micro_batch in _divisors(work.batch, max(1, step_tokens(spec, budget) // work.window)):
        larger = replace(choice, micro_batch=micro_batch)
        if build.fits(larger):
            choice = larger
            break
    return TrainingPlan(
        phases=tuple(build.phases(choice)),
        budget=budget,
        weights=choice.weights,
        rank=choice.rank,
        micro_batch=choice.micro_batch,
        head_tokens=build.head_tokens,
    )


def _divisors(batch: int, most: int) -> list[int]:
    """Micro-batches that make up a batch, the largest first."""
    return [n for n in range(min(batch, most), 0, -1) if batch % n == 0]


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


class _Training:
    """Items and phases of one training."""

    def __init__(
        self, spec: ModelSpec, budget: Budget, work: TrainingWork, base_bytes: int
    ) -> None:
        self._spec, self._budget, self._work = spec, budget, work
        sweep = Work(window=work.window, windows=1)
        self._items = Items(spec, budget, sweep)
        self._cuda = budget.device == "cuda"
        self._near, self._compute = (GPU, 2) if self._cuda else (HOST, 4)
        one = work.window * spec.hidden * self._compute
        self._state_bytes = one
        chunk = HEAD_CHUNK_BYTES // (spec.vocabulary * 4)
        self.head_tokens = max(16, min(chunk, work.window))
        self._always = [
            PlanItem(name=BASE, where=HOST, size_bytes=base_bytes, formula="measured"),
            self._items.outer(),
            self._items.masks(),
        ]
        if budget.gpu_bytes is not None:
            context = budget.context_bytes
            self._always.append(
                PlanItem(name="CUDA context", where=GPU, size_bytes=context, formula="measured")
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

    def fits(self, choice: _TrainingChoice) -> bool:
        """Whether all caps hold in all phases."""
        return all(
            phase.total_bytes(where) <= cap
            for phase in self.phases(choice)
            for where, cap, _ in self._caps()
        )

    def _caps(self) -> list[tuple[str, int, str]]:
        caps = [(HOST, self._budget.host_bytes, "--max-cpu-mem")]
        if self._budget.gpu_bytes is not None:
            caps.insert(0, (GPU, self._budget.gpu_bytes, "--max-gpu-mem"))
        return caps

    def phases(self, choice: _TrainingChoice) -> list[Phase]:
        """Layers on the way back, and the head."""
        held = [self._weights(choice), self._head(), *self._trained(choice), self._states(choice)]
        held += self._targets(choice)
        layers = [*held, self._activations(choice)]
        if choice.weights == INT8 or self._source_differs():
            layers.append(self._dense())
        return [
            with_slack("training: layers", self._always, layers),
            with_slack("training: head", self._always, [*held, self._logits()]),
        ]

    def _source_differs(self) -> bool:
        return self._work.lora and self._items.source_element_bytes != self._compute

    def _item(self, name: str, size: float, formula: str) -> PlanItem:
        return PlanItem(name=name, where=self._near, size_bytes=int(size), formula=formula)

    def _weights(self, choice: _TrainingChoice) -> PlanItem:
        spec, small, matrices, rows = self._spec, 0, 0, 0
        for tensors in spec.layer_tensors:
            for shape in tensors.values():
                size = math.prod(shape)
                matrices += size if len(shape) == 2 else 0
                rows += shape[0] if len(shape) == 2 else 0
                small += size if len(shape) != 2 else 0
        if not self._work.lora:
            return self._item("weights", 4 * matrices + self._compute * small, "4*P*L")
        if choice.weights == INT8:
            size, formula = matrices + 4 * rows, "(P + 4*rows)*L"
        elif choice.weights == STREAMED:
            size = self._items.layer_parameters * self._items.source_element_bytes
            size, formula = size * (1 + self._cuda), "a layer as stored"
        else:
            size, formula = matrices * self._items.source_element_bytes, "P*source*L"
        return self._item("frozen weights", size + self._compute * small, formula)

    def _head(self) -> PlanItem:
        size = self._spec.vocabulary * self._spec.hidden * self._compute
        return self._item("head", size, "V*H*c")

    def _trained(self, choice: _TrainingChoice) -> list[PlanItem]:
        """Parameters in fp32, their gradients, AdamW's two moments."""
        shapes = [s for tensors in self._spec.layer_tensors for s in tensors.values()]
        matrices = [shape for shape in shapes if len(shape) == 2]
        if self._work.lora:
            count, what = sum(choice.rank * sum(shape) for shape in matrices), "R*(O+I)"
            items = [self._item("adapters", 4 * count, f"4*{what}")]
        else:
            count, what, items = sum(math.prod(shape) for shape in matrices), "P*L", []
        # clip_grad_norm_ and AdamW take the parameters together on a GPU, a copy of them held.
        step = 4 * count if self._cuda else 4 * max(map(math.prod, matrices), default=0)
        return [
            *items,
            self._item("gradients", 4 * count, f"4*{what}"),
            self._item("optimiser", 8 * count, f"2 x 4*{what}"),
            self._item("a step of the optimiser", step, "largest parameter in fp32"),
        ]

    def _states(self, choice: _TrainingChoice) -> PlanItem:
        """Layer boundaries, the gradient and the next one."""
        count, windows = self._spec.layers + 4, self._together(choice)
        size = count * windows * self._state_bytes
        return self._item("layer boundaries", size, f"(L+4)*{windows}*S*H*c")

    def _together(self, choice: _TrainingChoice) -> int:
        """Windows whose layer boundaries are held together: of streamed layers, a step's."""
        return self._work.batch if choice.weights == STREAMED else choice.micro_batch

    def _targets(self, choice: _TrainingChoice) -> list[PlanItem]:
        """What the teacher says of a micro-batch: as read, and as computed with."""
        work, tokens = self._work, self._together(choice) * self._work.window
        if not work.top:
            return []
        size = tokens * (work.top * (4 + 8 + 4) + 4)
        size += work.hidden_layers * tokens * self._spec.hidden * 6
        formula = "m*S*(16*k + 4 + 6*H*layers), of streamed layers a step's"
        return [PlanItem(name="teacher's answers", where=HOST, size_bytes=size, formula=formula)]

    def _activations(self, choice: _TrainingChoice) -> PlanItem:
        elements = training_elements(self._spec, self._work.window)
        elements += 2 * self._spec.hidden if self._work.hidden_layers else 0
        size = choice.micro_batch * self._work.window * elements * self._compute
        formula = f"m*S*{elements:,}*c"
        return self._item("activations of a layer, there and back", size, formula)

    def _dense(self) -> PlanItem:
        """A projection's weight in the compute dtype, and its product's int8 copy."""
        largest = max(
            math.prod(s) for tensors in self._spec.layer_tensors for s in tensors.values()
        )
        return self._item("dequantised weight", largest * self._compute, "largest of a layer * c")

    def _logits(self) -> PlanItem:
        followers = self._work.top * 8 * 4
        size = self.head_tokens * (self._spec.vocabulary * 4 * _LOGIT_COPIES + followers)
        size += 2 * self._state_bytes
        return self._item("logits and their gradients", size, f"t*(V*4*{_LOGIT_COPIES} + 32*k)")

    def refusal(self, choice: _TrainingChoice) -> BudgetError:
        """Why even the smallest choice does not fit."""
        for where, cap, option in self._caps():
            phase = max(self.phases(choice), key=lambda phase: phase.total_bytes(where))
            needed = phase.total_bytes(where)
            if needed <= cap:
                continue
            items = [item for item in phase.items if item.where == where]
            largest = max(items, key=lambda item: item.size_bytes)
            return BudgetError(
                f"{option} {format_bytes(cap)} is too small: at least {format_bytes(needed)} are "
                f"needed ({phase.name}), of which {largest.name} is the largest item "
                f"({format_bytes(largest.size_bytes)}: {largest.formula}). The smallest {option} "
                f"that works is {math.ceil(needed / MIB)}MiB"
            )
        raise AssertionError("refused a choice that fits")

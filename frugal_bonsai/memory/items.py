"""The items of a memory plan: each with its formula, from shapes and a choice of sizes.

In: shapes, caps, the work, a choice of micro-batch and windows in flight. Out: itemised bytes.
Pure. The formulas are explained and compared with measurements in docs/memory.md.

Legend: P parameters of the largest layer, H hidden, I FFN channels, V vocabulary, S tokens of a
window, m windows of a micro-batch, n windows in flight, c bytes of a compute element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from frugal_bonsai.memory.budget import NOMINAL_CONTEXT_BYTES, Budget
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION, FFN, UnitGroup, UnitSlice
from frugal_bonsai.sizes import DTYPE_BYTES, MIB, format_bytes

HOST, GPU, DISK = "host", "gpu", "disk"

# A head chunk of this many bytes is as good as a larger one.
_HEAD_CHUNK_BYTES = 64 * MIB
# Recovery's refinement moves the FFN's channels in blocks of at least so many, at most so many
# blocks; a block's weights are held about seven times.
LEAST_CHANNELS, MOST_BLOCKS = 512, 4
# Allocator rounding, fragmentation and small tensors, as a share of all other items but the base.
_SLACK = 0.08


@dataclass(frozen=True, kw_only=True)
class SweepLimits:
    """What the plan lets a sweep hold.

    Attributes:
        micro_batch: windows computed together.
        windows_in_flight: windows whose hidden states are held; more are run in waves.
        resident_windows: of these, windows kept on the device.
        head_rows: vocabulary rows of the head held at a time.
        head_tokens: tokens whose logits are held at a time.
    """

    micro_batch: int
    windows_in_flight: int
    resident_windows: int
    head_rows: int
    head_tokens: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a command is going to do.

    Attributes:
        window: S.
        windows: windows that one phase needs in flight together (calibration), at least 1.
        pairs: (mask, window) pairs of a round, the unmasked windows included; 0 for no masks.
        windows_per_mask: windows that one mask is evaluated on.
        gram: Gram matrices are collected.
        recovery: dense and pruned model side by side.
        refit_inputs: recovery also holds the dense model's inputs of one sublayer.
        refine: recovery also moves the FFN's channels, and holds what it aims at.
        stand_ins: share of a group's units that a masked evaluation has stand-ins for.
        weights: ``"int8"`` or ``"native"`` working store; None streams the checkpoint itself.
        full_logits: a custom utility needs all logits of a window.
        store_copies: stores on disk (dense and working).
    """

    window: int
    windows: int
    pairs: int = 0
    windows_per_mask: int = 1
    gram: bool = False
    recovery: bool = False
    refit_inputs: bool = False
    refine: bool = False
    stand_ins: float = 0.0
    weights: str | None = None
    full_logits: bool = False
    store_copies: int = 0


@dataclass(frozen=True, kw_only=True)
class PlanItem:
    """One line of the plan."""

    name: str
    where: str
    size_bytes: int
    formula: str


BASE = "Python and libraries"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the planner is free to choose."""

    micro_batch: int
    in_flight: int
    resident: int
    keep_inputs: bool


class PlanItems:
    """Builds the items for a choice."""

    def __init__(self, spec: ModelSpec, budget: Budget, work: Work, base_bytes: int) -> None:
        self._spec, self._budget, self._work, self._base = spec, budget, work, base_bytes
        self._cuda = budget.device == "cuda"
        self._compute = 2 if self._cuda else 4
        shapes = max(
            (list(t.values()) for t in spec.layer_tensors),
            key=lambda s: sum(math.prod(x) for x in s),
        )
        self._layer_parameters = sum(math.prod(shape) for shape in shapes)
        self._layer_rows = sum(shape[0] for shape in shapes if len(shape) == 2)
        self._small = sum(math.prod(shape) for shape in shapes if len(shape) == 1)
        columns = {
            kind: max(g.columns for g in spec.table.groups if g.kind == kind)
            for kind in (ATTENTION, FFN)
        }
        self._columns = columns
        # Projections into the FFN: each row of a channel.
        self._ffn_inputs = max(
            sum(
                piece.axis == 0 and len(spec.layer_tensors[g.layer][_inside(spec, g, piece)]) == 2
                for piece in g.slices
            )
            for g in spec.table.groups
            if g.kind == FFN
        )
        self._source_bytes = _source_element_bytes(spec)

    def caps(self) -> list[tuple[str, int, str]]:
        """(place, cap, option), device first."""
        caps = [(HOST, self._budget.host_bytes, "--max-cpu-mem")]
        if self._budget.gpu_bytes is not None:
            caps.insert(0, (GPU, self._budget.gpu_bytes, "--max-gpu-mem"))
        return caps

    def fits(self, choice: Choice) -> bool:
        """Whether all caps hold."""
        items = self.items(choice)
        return all(
            sum(item.size_bytes for item in items if item.where == where) <= cap
            for where, cap, _ in self.caps()
        )

    def limits(self, choice: Choice) -> SweepLimits:
        """The sweep's limits for a choice."""
        rows, tokens = self._head(choice)
        return SweepLimits(
            micro_batch=choice.micro_batch,
            windows_in_flight=choice.in_flight,
            resident_windows=choice.resident,
            head_rows=rows,
            head_tokens=tokens,
        )

    @property
    def layer_store_bytes(self) -> int:
        """One layer as stored."""
        if self._work.weights == "int8":
            return self._layer_parameters + 4 * self._layer_rows + 4 * self._small
        return self._layer_parameters * self._source_bytes

    def _head(self, choice: Choice) -> tuple[int, int]:
        """Rows and tokens of a head chunk."""
        spec, window = self._spec, self._work.window
        if self._work.full_logits:
            return spec.vocabulary, window
        rows = min(spec.vocabulary, max(1, _HEAD_CHUNK_BYTES // (spec.hidden * self._compute)))
        windows = max(1, min(choice.micro_batch, _HEAD_CHUNK_BYTES // (rows * 4 * window)))
        return rows, windows * window

    def items(self, choice: Choice) -> list[PlanItem]:
        """All items for a choice, slack last."""
        near, window = GPU if self._cuda else HOST, self._work.window
        items = [PlanItem(name=BASE, where=HOST, size_bytes=self._base, formula="measured")]
        if self._cuda:
            items.append(
                PlanItem(
                    name="CUDA context",
                    where=GPU,
                    size_bytes=NOMINAL_CONTEXT_BYTES,
                    formula="nominal",
                )
            )
        items += self._weights(near)
        items += self._activations(choice, near)
        items += self._head_items(choice, near)
        if self._work.gram:
            items += self._gram(near)
        if choice.keep_inputs:
            tokens = choice.in_flight * window
            slopes = self._ffn_inputs if self._work.refine else 0
            columns = self._columns[ATTENTION] + (1 + slopes) * self._columns[FFN]
            items.append(
                PlanItem(
                    name="recovery's inputs of a layer",
                    where=near,
                    size_bytes=tokens * columns * self._compute,
                    formula=f"n*S*(C_o+{1 + slopes}*C_down)*c",
                )
            )
        if self._work.refine:
            block = max(LEAST_CHANNELS, -(-self._columns[FFN] // MOST_BLOCKS))
            items.append(
                PlanItem(
                    name="refinement of a block of channels",
                    where=near,
                    size_bytes=28
                    * self._ffn_inputs
                    * min(block, self._columns[FFN])
                    * self._spec.hidden,
                    formula="7*4*K*R*H",
                )
            )
        if self._work.stand_ins:
            widest = max(self._columns.values())
            items.append(
                PlanItem(
                    name="stand-ins of a group",
                    where=near,
                    size_bytes=int(
                        self._work.stand_ins
                        * widest
                        * (6 * widest + 2 * choice.micro_batch * window * self._compute)
                    ),
                    formula="share*C*(6*C + 2*m*S*c)",
                )
            )
        for where in (GPU, HOST):
            own = [
                i for i in items if i.where == where and i.formula not in ("measured", "nominal")
            ]
            if own:
                items.append(
                    PlanItem(
                        name="allocator slack",
                        where=where,
                        size_bytes=int(_SLACK * sum(i.size_bytes for i in own)) + 16 * MIB,
                        formula=f"{_SLACK:g} of the rest + 16 MiB",
                    )
                )
        if self._work.store_copies:
            items.append(
                PlanItem(
                    name="working stores",
                    where=DISK,
                    size_bytes=self._work.store_copies * self._spec.layers * self.layer_store_bytes,
                    formula="copies * layers * layer as stored",
                )
            )
        return items

    def _weights(self, near: str) -> list[PlanItem]:
        models = 2 if self._work.recovery else 1
        stored, compute = self.layer_store_bytes, self._layer_parameters * self._compute
        items = [
            PlanItem(
                name="layer buffers",
                where=HOST,
                size_bytes=2 * models * stored,
                formula=f"{2 * models} x layer as stored ({format_bytes(stored)})",
            )
        ]
        if self._cuda:
            items.append(replace(items[0], where=GPU))
        if not (self._work.weights != "int8" and self._source_bytes == self._compute):
            items.append(
                PlanItem(
                    name="dequantised layer",
                    where=near,
                    size_bytes=models * compute,
                    formula=f"{models} x P*c",
                )
            )
        if self._work.weights is not None:
            largest = max(
                math.prod(shape)
                for tensors in self._spec.layer_tensors
                for shape in tensors.values()
            )
            items.append(
                PlanItem(
                    name="building the store",
                    where=HOST,
                    size_bytes=largest * (2 * self._source_bytes + 1) + self._layer_parameters,
                    formula="largest tensor * (2 * source + 1) + layer in int8",
                )
            )
        return items

    def _activations(self, choice: Choice, near: str) -> list[PlanItem]:
        spec, window = self._spec, self._work.window
        # Elements a token that one of Hugging Face's layers holds at its peak; see MEMORY in docs.
        per_token = 6 * spec.hidden + 3 * self._columns[FFN] + 2 * self._columns[ATTENTION]
        if self._work.refine:  # in fp32: pre-activations, slopes, products of both
            refined = 3 * spec.hidden + (3 * self._ffn_inputs + 4) * self._columns[FFN]
            per_token = max(per_token, refined * 4 // self._compute)
        refits = self._work.refit_inputs or self._work.refine
        states = 1 + int(self._work.recovery) + int(refits) + int(self._work.refine)
        hidden = choice.in_flight * window * spec.hidden * self._compute * states
        resident = choice.resident * window * spec.hidden * self._compute * states
        items = [
            PlanItem(
                name="activations of a micro-batch",
                where=near,
                size_bytes=choice.micro_batch * window * per_token * self._compute,
                formula="m*S*(6H+3I+2C_o)*c",
            )
        ]
        if self._cuda:
            items.append(
                PlanItem(
                    name="hidden states on the device",
                    where=GPU,
                    size_bytes=resident,
                    formula=f"{states} x resident*S*H*c",
                )
            )
            hidden -= resident
        items.append(
            PlanItem(
                name="hidden states", where=HOST, size_bytes=hidden, formula=f"{states} x n*S*H*c"
            )
        )
        return items

    def _head_items(self, choice: Choice, near: str) -> list[PlanItem]:
        rows, tokens = self._head(choice)
        spec = self._spec
        chunk = rows * spec.hidden * (self._compute + self._source_bytes)
        return [
            PlanItem(name="head chunk", where=near, size_bytes=chunk, formula="v*H*(c+source)"),
            PlanItem(
                name="logits",
                where=near,
                size_bytes=tokens * rows * 8,
                formula="tokens * v * 8 (logits and their exponentials)",
            ),
        ]

    def _gram(self, near: str) -> list[PlanItem]:
        widest = max(self._columns.values())
        both = sum(c * c for c in self._columns.values())
        held = both if not self._work.recovery else max(both, 2 * widest * widest)
        size = 4 * (held + 2 * widest * widest + 2 * widest * self._spec.hidden)
        return [
            PlanItem(
                name="Gram matrices and their solve",
                where=near,
                size_bytes=size,
                formula="4*(G + factor + inverse + 2*C*H), G = C_o^2 + C_down^2",
            )
        ]


def _inside(spec: ModelSpec, group: UnitGroup, piece: UnitSlice) -> str:
    """A tensor's name inside its layer."""
    return piece.tensor.removeprefix(spec.prefix(group.layer))


def _source_element_bytes(spec: ModelSpec) -> int:
    name = str(spec.config.get("dtype") or spec.config.get("torch_dtype") or "float32")
    by_name = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    return DTYPE_BYTES[by_name.get(name.removeprefix("torch."), "F32")]

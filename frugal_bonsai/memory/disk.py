"""The bytes on disk of each phase of a command: stores, the state of a run, the output.

In: shapes and a workload, or the sizes of a training. Out: a :class:`DiskPlan`. Pure. prune_disk.py
has the phases of a prune. docs/memory.md compares the plans with measurements.

Legend: P parameters of a layer, L layers, H hidden, V vocabulary, r share of the blocks that is
left, C columns of a group that are left, p share of them that imputation covers, N units.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from frugal_bonsai.memory.items import source_element_bytes
from frugal_bonsai.memory.training_items import moment_bytes
from frugal_bonsai.memory.work import DISK, PlanItem
from frugal_bonsai.model.family import ModelSpec

# Folder that a file lies in. Each may be on a disk of its own.
RUN, OUT, CACHE = "run folder", "output", "cache"
# Bytes of a file's entry of one tensor in its header: names, dtype, shape and place.
_HEADER_BYTES = 120
# Blocks of the file systems that people use.
_BLOCK_BYTES = 4096
# Card, report, mask, config and the model's code beside the weights, and each unit in the mask.
_PAPERS_BYTES, _UNIT_BYTES = 36 * 1024, 6
_INT8 = "int8"


@dataclass(frozen=True, kw_only=True)
class DiskItem(PlanItem):
    """Files on disk.

    Attributes:
        folder: Folder that they lie in: ``"run folder"``, ``"output"`` or ``"cache"``.
    """

    where: str = DISK
    folder: str = RUN


@dataclass(frozen=True, kw_only=True)
class DiskPhase:
    """Files that lie on disk at the same time.

    Attributes:
        round: Number of the round that it belongs to. 0 is before the first, the number after the
            last is the output.
    """

    name: str
    items: tuple[DiskItem, ...]
    round: int = 0

    def total_bytes(self, folders: Collection[str] | None = None) -> int:
        """Return the bytes in these folders; None counts all."""
        return sum(i.size_bytes for i in self.items if folders is None or i.folder in folders)


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Predicted bytes on disk of a command.

    Attributes:
        phases: Phases in order. Empty if nothing is written.
    """

    phases: tuple[DiskPhase, ...] = ()

    def peak(self, folders: Collection[str] | None = None) -> DiskPhase:
        """Return the phase with most bytes in these folders; None counts all."""
        empty = DiskPhase(name="nothing is written", items=())
        return max((empty, *self.phases), key=lambda phase: phase.total_bytes(folders))

    def after(self, rounds: int) -> DiskPlan:
        """Return the plan of a run that continues after so many finished rounds; 0 is a new run."""
        left = (phase for phase in self.phases if not rounds or phase.round > rounds)
        return DiskPlan(phases=tuple(left))

    @property
    def total_bytes(self) -> int:
        """Largest number of bytes in all folders together."""
        return self.peak().total_bytes()


def phase(name: str, items: Iterable[DiskItem], number: int = 0) -> DiskPhase:
    """Return a phase of a round, with those items that have bytes."""
    held = tuple(item for item in items if item.size_bytes > 0)
    return DiskPhase(name=name, items=held, round=number)


def file_bytes(data_bytes: float, tensors: int, *, files: int = 1) -> int:
    """Return the bytes on disk of some safetensors files of about the same size.

    Args:
        data_bytes: Bytes of all tensors.
        tensors: Number of tensors in all files.
        files: Number of files.
    """
    each = math.ceil((data_bytes + _HEADER_BYTES * tensors) / files)
    return files * -(-each // _BLOCK_BYTES) * _BLOCK_BYTES


def tensor_files(
    name: str, data_bytes: float, tensors: int, formula: str, *, files: int = 1, folder: str = RUN
) -> DiskItem:
    """Return the item of the files of :func:`file_bytes`; it has 0 bytes if there is no data."""
    size = file_bytes(data_bytes, tensors, files=files) if data_bytes else 0
    return DiskItem(name=name, size_bytes=size, formula=formula, folder=folder)


class ModelFiles:
    """Sizes of files that hold a part of a model.

    Args:
        spec: Shapes of the dense model.
        source_bytes: Bytes of an element of the checkpoint.
    """

    def __init__(self, spec: ModelSpec, source_bytes: int) -> None:
        self._spec, self._source = spec, source_bytes
        self._tensors = sum(len(tensors) for tensors in spec.layer_tensors)

    def store(self, weights: str, left: float = 1.0, *, name: str = "dense store") -> DiskItem:
        """Layers as stored, one file each.

        Args:
            weights: ``"int8"`` or ``"native"``.
            left: Share of the blocks' parameters that is left.
            name: Name of the store.
        """
        blocks, layers = self._spec.block_parameters, self._spec.layers
        removed = (1 - left) * blocks
        size, tensors = self._source * (blocks - removed), self._tensors
        formula = "r*P*L*source"
        if weights == _INT8:
            matrices = self._spec.matrices
            small = (self._source - 1) * (blocks - sum(map(math.prod, matrices.values())))
            cut = sum(matrices[name][0] for name in self._cut_rows() if name in matrices)
            rows = sum(shape[0] for shape in matrices.values()) - cut * self.cut_share(left)
            size, tensors = blocks - removed + small + 4 * rows, tensors + len(matrices)
            formula = "(r*P + 4*rows)*L"
        return tensor_files(name, size, tensors, formula, files=layers)

    def layer(self, weights: str, left: float) -> DiskItem:
        """A layer that is written beside the file that it replaces."""
        size = self.store(weights, left).size_bytes // self._spec.layers
        return DiskItem(name="a layer that is replaced", size_bytes=size, formula="a store / L")

    def head(self) -> DiskItem:
        """The head as int8."""
        size = self._spec.vocabulary * (self._spec.hidden + 4)
        return tensor_files("int8 head", size, 2, "V*(H+4)")

    def refits(self, left: float, inputs: Collection[str], *, name: str) -> DiskItem:
        """Refitted projections of a round, one file a layer.

        Args:
            left: Share of the blocks' parameters that is left.
            inputs: Kinds of groups whose input projections are refitted, too.
            name: Name of the files.
        """
        elements = self._refitted(inputs)
        size = self._source * sum(elements) * (1 - self.cut_share(left))
        formula = "r*(refitted of P)*L*source"
        return tensor_files(name, size, len(elements), formula, files=self._spec.layers)

    def _refitted(self, inputs: Collection[str]) -> list[int]:
        """Return the number of elements of each projection that a round refits."""
        names = set[str]()
        for group in self._spec.table.groups:
            names.add(group.output_weight)
            if group.kind in inputs and group.expert is None:
                names.update(piece.tensor for piece in group.slices)
        return [math.prod(shape) for name, shape in self._spec.matrices.items() if name in names]

    def biases(self, name: str) -> DiskItem:
        """Biases of the output projections, one file a layer."""
        count = len(self._spec.table.groups)
        size = self._source * self._spec.hidden * count
        return tensor_files(name, size, count, "2*H*L*source", files=self._spec.layers)

    def cut_share(self, left: float) -> float:
        """Return the removed share of the tensors that pruning cuts."""
        return (1 - left) * self._spec.block_parameters / self._spec.table.parameters

    def _cut_rows(self) -> set[str]:
        """Return the names of the tensors whose rows pruning cuts."""
        groups = self._spec.table.groups
        return {p.tensor for group in groups for p in group.slices if p.axis == 0 and not p.joint}

    def imputations(self, left: float, share: float, name: str) -> DiskItem:
        """Imputations of all groups, one file each.

        Args:
            left: Share of the blocks' parameters that is left.
            share: Share of a group's units that they cover; 0 for none.
            name: Name of the files.
        """
        size = 0
        for group in self._spec.table.groups if share else ():
            alive = round(group.count * (1 - self.cut_share(left)))
            pool = max(0, min(max(1, round(share * alive)), alive - 1))
            width = group.columns_per_unit
            if pool and group.removable:
                data = 2 * pool * (alive - pool) * width**2 + 8 * pool * width
                size += file_bytes(data, 2)
        return DiskItem(name=name, size_bytes=size, formula="(2*p*C*(1-p)*C + 8*p*C) a group")

    def state(self) -> DiskItem:
        """The state of a round without its tensors, and the units' scores."""
        units = self._spec.table.units
        size = file_bytes(8 * units, 1) + file_bytes(_UNIT_BYTES * units + 4096, 0)
        return DiskItem(name="state and scores", size_bytes=size, formula="14*N + 4 KiB")

    def output(self, left: float, *, companion_bytes: int) -> list[DiskItem]:
        """The model that is written, and the files beside its weights.

        Args:
            left: Share of the blocks' parameters in the files; 1 with a layout that keeps zeros.
            companion_bytes: Bytes of tokenizer files and the like, and of carried tensors.
        """
        outer = self._spec.other_tensors.values()
        size = sum(map(math.prod, outer)) + left * self._spec.block_parameters
        tensors, formula = self._tensors + len(outer), "(outside the layers + r*P*L)*source"
        papers = companion_bytes + _PAPERS_BYTES + _UNIT_BYTES * self._spec.table.units
        carried = "" if self._spec.multimodal is None else "parts carried along, "
        what = f"{carried}tokenizer, card, report, mask"
        return [
            tensor_files("pruned model", self._source * size, tensors, formula, folder=OUT),
            DiskItem(name="its other files", size_bytes=papers, formula=what, folder=OUT),
        ]


def plan_training_disk(
    spec: ModelSpec,
    sizes: Sequence[int],
    *,
    optimiser: str,
    cache_bytes: int,
    sampled_tokens: int,
    companion_bytes: int,
) -> DiskPlan:
    """Predict the files of an adaptation.

    Args:
        spec: Shapes of the pruned model.
        sizes: Number of elements of each trained parameter.
        optimiser: The optimiser.
        cache_bytes: Bytes of the teacher's answers. 0 without.
        sampled_tokens: Number of tokens that are sampled from the teacher.
        companion_bytes: Bytes of the files that are copied beside the weights.
    """
    files = ModelFiles(spec, source_element_bytes(spec))
    best, count = 4 * sum(sizes), len(sizes)
    state = best + moment_bytes(sizes, optimiser)
    answers, formula = "tokens*(6*k + 4 + 2*H*layers)", "4 bytes a trained parameter"
    moments = f"{formula}, moments of {optimiser}"
    held = [
        tensor_files("teacher's answers", cache_bytes, 4, answers, folder=CACHE),
        tensor_files("sampled text", 8 * sampled_tokens, 1, "8*tokens", folder=CACHE),
        tensor_files("best parameters", best, count, formula),
        tensor_files("training state", state, 3 * count, moments),
    ]
    # The state is written beside the one that it replaces.
    name, formula = "training state that is replaced", "as the training state"
    replaced = tensor_files(name, state, 3 * count, formula)
    output = files.output(1.0, companion_bytes=companion_bytes)
    return DiskPlan(
        phases=(phase("training", [*held, replaced]), phase("writing the output", [*held, *output]))
    )

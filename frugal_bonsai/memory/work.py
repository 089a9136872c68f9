"""What the planner is asked, what it may choose, and what it answers with.

Plain values: the work of a command, a choice of sizes, one item of a plan, the limits of a sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.sizes import MIB

HOST, GPU, DISK = "host", "gpu", "disk"
BASE = "Python and libraries"
# Recovery's refinement moves the FFN's channels in blocks of at least so many, at most so many
# blocks.
_LEAST_CHANNELS, _MOST_BLOCKS = 512, 4
# Conjugate-gradient steps of one update of the FFN's channels.
REFINE_ITERATIONS = 4
_CPU_REFIT_ROWS, _GPU_REFIT_ROWS = 128, 1024
# Bytes of the windows of a teacher's cache that are computed and written together.
SHARD_BYTES = 64 * MIB
# Number of held-out windows, and of their first tokens, whose logits a verification compares: few,
# so that the logits are small.
VERIFY_WINDOWS, VERIFY_TOKENS = 2, 64
# Bytes of a stored weight that are dense at the same time (adapt/stored_linear.py): an int8 head of
# 128,256 tokens would take a gigabyte in fp32.
DENSE_BLOCK_BYTES = 32 * MIB


def refit_rows(device: str) -> int:
    """Rows of a projection that are refitted together: half a dozen of them are held.

    More of them cost memory and save calls: of a GPU a hundred rows are a small part.

    Args:
        device: kind of device.
    """
    return _GPU_REFIT_ROWS if is_accelerator(device) else _CPU_REFIT_ROWS


def refined_blocks(channels: int) -> int:
    """In how many blocks so many channels are moved."""
    return min(_MOST_BLOCKS, -(-channels // _LEAST_CHANNELS))


def refining_passes(blocks: int, *, keep: bool, iterations: int) -> int:
    """How often one step of refinement takes its tokens through the sublayer, there or back.

    Once for the slopes of all blocks, once for each block's residual, and there and back in every
    iteration; where the slopes are not held they are made anew, another pass there.
    """
    return blocks + 1 + (2 if keep else 3) * iterations


@dataclass(frozen=True, kw_only=True)
class SweepLimits:
    """What the plan lets a sweep hold.

    Attributes:
        micro_batch: windows computed together.
        windows_in_flight: windows whose hidden states are held; more are run in waves.
        resident_windows: of these, windows kept on the device.
        head_rows: vocabulary rows of the head held at a time.
        head_tokens: tokens whose logits are held at a time.
        layer_buffers: layers held as stored: two, or one where two do not fit.
    """

    micro_batch: int
    windows_in_flight: int
    resident_windows: int
    head_rows: int
    head_tokens: int
    layer_buffers: int = 2


@dataclass(frozen=True, kw_only=True)
class SweepWorkload:
    """Sweeps over a model: an evaluation, the answers of a teacher; the base of a prune.

    Attributes:
        window: Tokens of a window (S).
        windows: Number of windows that one phase holds together, at least 1.
        measured: Number of windows of each text whose losses are measured.
        weights: Working store, ``"int8"`` or ``"native"``. None streams the checkpoint itself.
        sampled: Number of windows sampled from the model first, together. 0 for none.
        top: Number of followers per token that a teacher's cache keeps. 0 for no cache.
        full_logits: A custom utility needs all logits of a window.
        rewrite: A model is written and verified at the end.
    """

    window: int
    windows: int = 1
    measured: tuple[int, ...] = ()
    weights: str | None = None
    sampled: int = 0
    top: int = 0
    full_logits: bool = False
    rewrite: bool = False

    @property
    def most_windows(self) -> int:
        """Number of windows of the largest sweep."""
        return max(self.windows, *self.measured, 1)


@dataclass(frozen=True, kw_only=True)
class PruneWorkload(SweepWorkload):
    """Work of a prune, described once for its memory, its time and its tokens.

    ``windows`` are those of the calibration; ``measured`` those whose perplexity is reported
    before and after.

    Attributes:
        source_bytes: Bytes of an element of the checkpoint.
        goals: Sparsity at the end of each round, in (0, 1).
        part_windows: Number of windows of the statistics and of every reconstruction but the last.
        mask_windows: Number of windows that masks are evaluated on.
        mask_batches: Number of masks evaluated on each of them after each batch of a round, at
            most. Each batch reads the layers. Empty without masks.
        shared_masks: Each mask is evaluated on all mask windows, else on one.
        int8_arithmetic: Masked evaluation multiplies the stored codes.
        exact_importance: The importance score needs Gram matrices.
        imputation_pool: Units that imputation covers, as a multiple of what a round removes. 0
            without imputation.
        reconstruction: Projections are refitted after each round.
        refit_inputs: Reconstruction also refits q, k, v, gate and up.
        trial_windows: Number of windows that each candidate cut is reconstructed and judged on. 0
            without candidates.
        candidates: Number of candidate cuts in a round, at most.
        scale_windows: Number of windows that the scale of the logits is found on. 0 for no scale.
        channel_updates: Steps in which the last reconstruction updates the FFN's channels.
    """

    source_bytes: int
    goals: tuple[float, ...]
    part_windows: int
    mask_windows: int = 0
    mask_batches: tuple[int, ...] = ()
    shared_masks: bool = False
    int8_arithmetic: bool = False
    exact_importance: bool = False
    imputation_pool: float = 0.0
    reconstruction: bool = False
    refit_inputs: bool = False
    trial_windows: int = 0
    candidates: int = 0
    scale_windows: int = 0
    channel_updates: int = 0
    rewrite: bool = True

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.goals)

    @property
    def remaining(self) -> tuple[float, ...]:
        """Share of the block parameters that is left before each round, and after the last."""
        return (1.0, *(1 - goal for goal in self.goals))

    @property
    def pair_batches(self) -> tuple[int, ...]:
        """Number of (mask, window) pairs in each batch; the first has the unmasked windows too."""
        if not self.mask_batches:
            return ()
        ends = (-1, *self.mask_batches)
        return tuple(self.mask_windows * (end - start) for start, end in pairwise(ends))

    @property
    def pairs(self) -> int:
        """Number of (mask, window) pairs of a round, unmasked windows included; 0 without masks."""
        return sum(self.pair_batches)

    @property
    def windows_per_mask(self) -> int:
        """Number of windows that one mask is evaluated on."""
        return self.mask_windows if self.shared_masks else 1

    def concurrent_masks(self, windows_in_flight: int) -> int:
        """Return the number of masks evaluated in one wave of a sweep."""
        return min(max(1, windows_in_flight // self.windows_per_mask), max(1, self.pairs))

    @property
    def gram(self) -> bool:
        """Whether statistics collect Gram matrices."""
        return self.reconstruction or self.exact_importance or self.imputation_pool > 0

    @property
    def imputed_share(self) -> float:
        """Largest share of a group's alive units that imputation covers in any round."""
        # A round may begin a channel short of where the one before it should have ended.
        steps = pairwise((0.0, *self.goals))
        share = max((goal - done + 0.01) / (1 - done) for done, goal in steps)
        return min(1.0, self.imputation_pool * share)

    def round_imputed_share(self, number: int) -> float:
        """Return the share of the alive units that imputation covers in a round (from 0)."""
        before, after = self.remaining[number : number + 2]
        return min(1.0, self.imputation_pool * (before - after) / before)

    @property
    def most_windows(self) -> int:
        """Number of windows of the largest sweep."""
        return max(super().most_windows, self.pairs)


@dataclass(frozen=True, kw_only=True)
class PlanItem:
    """One line of the plan."""

    name: str
    where: str
    size_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the planner is free to choose."""

    micro_batch: int
    in_flight: int
    resident: int
    keep_inputs: bool
    keep_updates: bool = False
    buffers: int = 2

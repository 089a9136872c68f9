"""The plain values of the planner: workloads, items of a plan, a choice of sizes, sweep limits.

Holds nothing and computes what several folders must agree on: rows refitted together, blocks of
channels updated together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.sizes import MIB

HOST, GPU, DISK = "host", "gpu", "disk"
BASE = "Python and libraries"
# The FFN's channels are updated in blocks of at least this many, and in at most this many blocks.
_LEAST_CHANNELS, _MOST_BLOCKS = 512, 4
# Conjugate-gradient steps of one update of the FFN's channels.
UPDATE_ITERATIONS = 4
# Tokens of their curvature for each row of the weights updated together. Fewer are learnt by heart.
_CURVATURE_TOKENS = 64
# Longest text that the dense model writes at once. A longer window holds several.
_WRITTEN_TOKENS = 256
_CPU_TEXTS = 128
_CPU_REFIT_ROWS, _GPU_REFIT_ROWS = 128, 1024
# Bytes of the windows of a teacher's cache that are computed and written together.
SHARD_BYTES = 64 * MIB
# Held-out windows, and tokens of each, whose logits a verification compares; logits are large.
VERIFY_WINDOWS, VERIFY_TOKENS = 2, 64
# Bytes of a stored weight that are dense at the same time (adaptation/stored_linear.py).
DENSE_BLOCK_BYTES = 32 * MIB


def refit_rows(device: str) -> int:
    """Return the number of rows of a projection that are refitted together.

    More rows take more memory (six copies are held) and fewer calls.
    """
    return _GPU_REFIT_ROWS if is_accelerator(device) else _CPU_REFIT_ROWS


def update_blocks(channels: int) -> int:
    """Return the number of blocks that an FFN's channels are updated in, one after another."""
    return min(_MOST_BLOCKS, -(-channels // _LEAST_CHANNELS))


def curvature_windows(windows: int, window: int, rows: int) -> int:
    """Return the number of windows that the curvature of a channel update is measured on.

    Args:
        windows: Number of windows that the update learns from.
        window: Tokens of a window.
        rows: Rows of the weights that are updated together.
    """
    return min(windows, -(-_CURVATURE_TOKENS * rows // window))


def update_passes(blocks: int, curved: float, *, keep: bool, iterations: int) -> float:
    """Return the number of passes of all tokens through the FFN in one channel update.

    One pass computes the slopes of all blocks, one the residual of each block, and every iteration
    takes one pass forward and one back. Slopes that are not held take another pass each time.

    Args:
        blocks: Number of blocks of channels.
        curved: Share of the windows that the curvature is measured on.
        keep: The slopes are held.
        iterations: Conjugate-gradient iterations.
    """
    return blocks + 1 + (2 if keep else 3) * iterations * curved


def text_tokens(window: int) -> int:
    """Return the number of tokens of a text that the dense model writes for windows of a length."""
    return min(window, _WRITTEN_TOKENS)


def texts_at_once(device: str, together: int) -> int:
    """Return the number of the texts written together that a device computes at once.

    On a CPU more gain little. Ranks share them in such groups, so that the bits stay the same.
    """
    return together if is_accelerator(device) else min(together, _CPU_TEXTS)


@dataclass(frozen=True, kw_only=True)
class SweepLimits:
    """Limits of a sweep, from the memory plan.

    Attributes:
        micro_batch: Windows computed together.
        windows_in_flight: Windows whose hidden states are held. More windows run in waves.
        resident_windows: Windows in flight whose hidden states stay on the device.
        head_rows: Vocabulary rows of the head held at a time.
        head_tokens: Tokens whose logits are held at a time.
        layer_buffers: Layers held as stored: two, or one if two do not fit.
        on_disk: On a CPU, hidden states of the other windows in flight lie on disk.
    """

    micro_batch: int
    windows_in_flight: int
    resident_windows: int
    head_rows: int
    head_tokens: int
    layer_buffers: int = 2
    on_disk: bool = False


@dataclass(frozen=True, kw_only=True)
class SweepWorkload:
    """Sweeps over a model: an evaluation, the answers of a teacher; the base of a prune.

    Attributes:
        window: Tokens of a window (S).
        windows: Number of windows that one phase holds together, at least 1.
        measured: Number of windows of each text whose losses are measured.
        weights: Working store, ``"int8"`` or ``"native"``. None streams the checkpoint itself.
        sampled: Number of windows sampled from the model first, together. 0 for none.
        top: Number of most likely next tokens that a teacher's cache keeps. 0 for no cache.
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
        written: Number of windows that the dense model writes for the last reconstruction.
        written_together: Number of texts that it writes at a time.
        channel_updates: Steps in which the last reconstruction updates the FFN's channels.
        mean_biases: Biases of output projections stand for the removed units.
        padded: The output keeps the dense shapes, filled with zeros.
        companion_bytes: Bytes of the files that are copied beside the weights.
        ranks: Number of processes that share masks and candidates.
        local_ranks: Number of them on this host.
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
    written: int = 0
    written_together: int = 1
    channel_updates: int = 0
    mean_biases: bool = False
    padded: bool = False
    companion_bytes: int = 0
    ranks: int = 1
    local_ranks: int = 1
    rewrite: bool = True

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.goals)

    @property
    def candidate_turns(self) -> int:
        """Number of candidates in a round that one rank reconstructs, at most."""
        return -(-self.candidates // self.ranks)

    @property
    def remaining(self) -> tuple[float, ...]:
        """Share of the block parameters that is left before each round, and after the last."""
        return (1.0, *(1 - goal for goal in self.goals))

    @property
    def last_windows(self) -> int:
        """Number of windows of the last reconstruction."""
        return self.windows + self.written

    def windows_of_update(self, windows: int) -> int:
        """Return the number of windows of one channel update: each takes its share of them."""
        return -(-windows // min(self.channel_updates, windows))

    def update_passes(self, channels: int, inputs: int, *, keep: bool) -> float:
        """Return the passes of the last windows through the FFN in all channel updates.

        Args:
            channels: Channels of the FFN.
            inputs: Projections into it.
            keep: The slopes are held.
        """
        blocks, windows = update_blocks(channels), self.windows_of_update(self.last_windows)
        rows = inputs * -(-channels // blocks)
        curved = curvature_windows(windows, self.window, rows) / windows
        return update_passes(blocks, curved, keep=keep, iterations=UPDATE_ITERATIONS)

    @property
    def written_texts(self) -> int:
        """Number of texts that the dense model writes: a long window holds several."""
        return self.written * -(-self.window // text_tokens(self.window))

    @property
    def pair_batches(self) -> tuple[int, ...]:
        """Number of (mask, window) pairs in each batch; the first has the unmasked windows too."""
        ends = (-1, *self.mask_batches)
        return tuple(self.mask_windows * (end - start) for start, end in pairwise(ends))

    @property
    def pairs(self) -> int:
        """Number of (mask, window) pairs of a round, unmasked windows included; 0 without masks."""
        return sum(self.pair_batches)

    def concurrent_masks(self, windows_in_flight: int) -> int:
        """Return the number of masks evaluated in one wave of a sweep."""
        windows_per_mask = self.mask_windows if self.shared_masks else 1
        return min(max(1, windows_in_flight // windows_per_mask), max(1, self.pairs))

    @property
    def gram(self) -> bool:
        """True if statistics collect Gram matrices."""
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
        return max(super().most_windows, self.pairs, self.last_windows)


@dataclass(frozen=True, kw_only=True)
class PlanItem:
    """One item of a plan.

    Attributes:
        name: Name of the item.
        where: ``"host"``, ``"gpu"`` or ``"disk"``.
        size_bytes: Predicted size.
        formula: Formula of the size, for the user.
    """

    name: str
    where: str
    size_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Sizes that the planner chooses.

    Attributes:
        micro_batch: Windows computed together (m).
        in_flight: Windows whose hidden states are held (n).
        resident: Windows in flight whose hidden states stay on the device.
        keep_inputs: Reconstruction holds the inputs of a layer's projections.
        keep_updates: Channel updates hold their targets and slopes.
        buffers: Layers held as stored.
        on_disk: On a CPU, hidden states of the windows that are not resident lie on disk.
    """

    micro_batch: int
    in_flight: int
    resident: int
    keep_inputs: bool
    keep_updates: bool = False
    buffers: int = 2
    on_disk: bool = False

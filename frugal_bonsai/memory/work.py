"""What the planner is asked, what it may choose, and what it answers with.

Plain values: the work of a command, a choice of sizes, one item of a plan, the limits of a sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

from frugal_bonsai.accelerator import is_accelerator
from frugal_bonsai.sizes import MIB

HOST, GPU, DISK = "host", "gpu", "disk"
BASE = "Python and libraries"
# Recovery's refinement moves the FFN's channels in blocks of at least so many, at most so many
# blocks.
_LEAST_CHANNELS, _MOST_BLOCKS = 512, 4
_CPU_REFIT_ROWS, _GPU_REFIT_ROWS = 128, 1024
# Of a teacher's cache, windows of at most so much are asked for and written together.
SHARD_BYTES = 64 * MIB
# Of a frozen weight, rows of at most so much are dense at the same time (adapt/frozen.py): an int8
# head of 128,256 tokens is a gigabyte in fp32.
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
class Work:
    """What a command is going to do.

    Attributes:
        window: S.
        windows: windows that one phase needs in flight together (calibration), at least 1.
        pairs: (mask, window) pairs of a round, the unmasked windows included; 0 for no masks.
        native_windows: windows whose perplexity the checkpoint itself is measured on; 0 for none.
        windows_per_mask: windows that one mask is evaluated on.
        scored: a prior scores the units, from statistics of all windows.
        gram: Gram matrices are collected for it.
        recovery: dense and pruned model side by side.
        refit_inputs: recovery also refits the projections into a sublayer.
        refine: in how many steps the last recovery also moves the FFN's channels; 0 never.
        stand_ins: largest share of a group's units that a masked evaluation has stand-ins for.
        weights: ``"int8"`` or ``"native"`` working store; None streams the checkpoint itself.
        int8_products: masked evaluation multiplies the stored codes.
        full_logits: a custom utility needs all logits of a window.
        rewrite: the pruned model is written and verified.
        store_copies: stores on disk (dense and working).
        sampled: windows that are sampled from the model first, together; 0 for none.
        top: followers of each token that a teacher's cache keeps; 0 for no cache.
    """

    window: int
    windows: int
    pairs: int = 0
    native_windows: int = 0
    windows_per_mask: int = 1
    scored: bool = False
    gram: bool = False
    recovery: bool = False
    refit_inputs: bool = False
    refine: int = 0
    stand_ins: float = 0.0
    weights: str | None = None
    int8_products: bool = False
    full_logits: bool = False
    rewrite: bool = False
    store_copies: int = 0
    sampled: int = 0
    top: int = 0


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
    keep_refinement: bool = False
    buffers: int = 2

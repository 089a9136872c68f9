"""The engine of a command, within the limits of a memory plan.

In: a model, a plan, a device. Out: an engine; the caps are enforced in the allocators. Also
measures what this process holds before the model.
"""

from __future__ import annotations

from pathlib import Path

import torch

from frugal_bonsai.int8 import has_bitsandbytes
from frugal_bonsai.memory.budget import enforce_gpu_cap, enforce_host_cap, return_freed_memory
from frugal_bonsai.memory.meter import peak_resident_bytes, resident_bytes
from frugal_bonsai.memory.plan import MemoryPlan
from frugal_bonsai.memory.training import TrainingPlan
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.progress import Progress
from frugal_bonsai.run.open import Model
from frugal_bonsai.sizes import MIB
from frugal_bonsai.stream.empty_model import build_empty_model
from frugal_bonsai.stream.engine import FLOAT, Engine, compute_dtype

# What is imported after a process's size is measured: scipy.stats (22 MiB), torch's lazy imports,
# the pool's threads.
LATE_BYTES = 28 * MIB


def make_engine(
    model: Model,
    plan: MemoryPlan,
    device: torch.device,
    progress: Progress | None,
    *,
    arithmetic: str = FLOAT,
    dtype: torch.dtype | None = None,
    disk: Path | None = None,
) -> Engine:
    """Return a model's engine within the limits of its plan.

    ``arithmetic`` is that of masked evaluation, ``"float"`` or ``"int8"``. A compute dtype of None
    is the device's default. ``disk`` is the folder for hidden states that spill to disk.
    """
    enforce_caps(plan, device)
    return Engine(
        model.checkpoint,
        model.spec,
        device=device,
        dtype=dtype or compute_dtype(device),
        limits=plan.limits,
        arithmetic=arithmetic,
        progress=progress,
        disk=disk,
    )


def enforce_caps(plan: MemoryPlan | TrainingPlan, device: torch.device) -> None:
    """Set a plan's caps in the allocators."""
    enforce_host_cap(plan.budget.host_bytes, plan.total_bytes("host"))
    if plan.budget.gpu_bytes is not None:
        enforce_gpu_cap(device, plan.budget)


def in_fp32(engine: Engine, plan: MemoryPlan) -> Engine:
    """Return an engine of the same model that computes in fp32: itself, or another one."""
    if engine.dtype == torch.float32:
        return engine
    return Engine(
        engine.checkpoint,
        engine.spec,
        device=engine.device,
        dtype=torch.float32,
        limits=plan.limits,
        progress=engine.progress,
        disk=engine.disk,
    )


def measured_base_bytes(spec: ModelSpec, *, training: bool = False, first: bool = True) -> int:
    """Return the bytes that this process holds before the model, with everything imported.

    What is resident now stays, and the late imports are added to it. The peak so far counts too,
    because a cap on resident memory counts it; reading the config and the headers takes some
    memory that is free again.

    Args:
        spec: The model.
        training: bitsandbytes is used, or imported by peft.
        first: The command has planned nothing before. Later, the peak so far is that of other work
            under the same caps, and does not count.
    """
    build_empty_model(spec)
    if training:
        has_bitsandbytes()
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    if not first:
        return_freed_memory()
        return resident_bytes() + LATE_BYTES
    return max(resident_bytes() + LATE_BYTES, peak_resident_bytes())

"""A stand-in for an accelerator: the package's device code, run in full on a machine without one.

Tensors compute on the CPU and claim to be on ``cuda:0`` (or ``xpu:0``, ``mps:0``). What a device
would refuse, or do wrong in silence, is found: tensors of two devices that meet, two streams that
touch the same bytes without an order, copies and reads that the host waits for, memory that is
reserved beyond a cap. Nothing is said about speed.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from stand_in_device.allocator import DeviceAllocator
from stand_in_device.streams import RaceError, default_stream, make_classes
from stand_in_device.tensor import Machine, MixedDevicesError, StandInTensor, modes, subclass_maker

__all__ = ["Machine", "MixedDevicesError", "RaceError", "StandInTensor", "installed"]

GIB = 2**30
CONTEXT_BYTES = 400 * 2**20
# They ask for a device, or its libraries, as they are loaded, and keep the answer.
_LOADED_BEFORE = (
    "bitsandbytes",
    "peft",
    "accelerate",
    "transformers.masking_utils",
    "transformers.integrations.sdpa_attention",
    "transformers.models.llama.modeling_llama",
)


@contextlib.contextmanager
def installed(kind: str = "cuda", total_bytes: int = 16 * GIB) -> Iterator[Machine]:
    """Within it torch has an accelerator of this kind.

    No model may be loaded with ``from_pretrained`` for the first time within it: Hugging Face then
    leaves the rotary frequencies of all models that the process loads later uninitialised.

    Args:
        kind: ``cuda``, ``xpu`` or ``mps`` (no streams, no fp64, memory shared with the host).
        total_bytes: of its memory.
    """
    for module in _LOADED_BEFORE:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    machine = Machine(torch.device(kind, 0), DeviceAllocator(total_bytes), doubles=kind != "mps")
    with contextlib.ExitStack() as stack:
        _forget_devices()
        stack.callback(_forget_devices)
        for target, name, value in _patches(machine, kind):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(_in_all_threads(machine))
        yield machine


def _forget_devices() -> None:
    """Clear the libraries' caches of the devices that they have found."""
    for name in ("transformers.utils.import_utils", "accelerate.utils.imports"):
        for value in vars(importlib.import_module(name)).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextlib.contextmanager
def _in_all_threads(machine: Machine) -> Iterator[None]:
    """Threads that begin meanwhile reach the machine too."""
    run = threading.Thread.run

    def run_within(thread: threading.Thread) -> None:
        with modes(machine):
            run(thread)

    with mock.patch.object(threading.Thread, "run", run_within), modes(machine):
        yield


def _patches(machine: Machine, kind: str) -> list[tuple[Any, str, Any]]:
    """(object, attribute, what stands in for it)."""
    memory, total = machine.memory, machine.memory.total_bytes

    def limit(fraction: float, *_: Any) -> None:
        memory.limit_bytes = int(fraction * total)

    def free_and_total(*_: Any) -> tuple[int, int]:
        return total - CONTEXT_BYTES - memory.reserved, total

    def reset_peak(*_: Any) -> None:
        memory.max_reserved = memory.reserved

    def synchronize(*_: Any) -> None:
        machine.order.wait_for_all()

    def empty_cache(*_: Any) -> None:
        machine.order.wait_for_all()
        memory.empty_cache()

    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **given: Any) -> torch.Tensor:
        made = make(data, **given)
        return made if device is None else made.to(device)

    common = {
        "is_available": lambda *_: True,
        "device_count": lambda *_: 1,
        "synchronize": synchronize,
        "empty_cache": empty_cache,
        "memory_reserved": lambda *_: memory.reserved,
        "max_memory_reserved": lambda *_: memory.max_reserved,
        "memory_allocated": lambda *_: memory.allocated,
        "reset_peak_memory_stats": reset_peak,
    }
    accelerator = {
        **common,
        "current_accelerator": lambda *_, **__: torch.device(kind),
        "current_device_index": lambda *_: 0,
        "set_device_index": lambda *_: None,
        "get_memory_info": free_and_total,
        "empty_host_cache": machine.pinned.empty_cache,
    }
    module = {
        **common,
        "is_initialized": lambda *_: True,
        "_lazy_init": lambda *_: None,
        "current_device": lambda *_: 0,
        "get_device_name": lambda *_: f"stand-in {kind}",
        "get_device_properties": lambda *_: types.SimpleNamespace(
            total_memory=total, name=f"stand-in {kind}", is_integrated=False
        ),
        "mem_get_info": free_and_total,
    }
    # Made in C++ on the device itself, past every dispatch.
    patches: list[tuple[Any, str, Any]] = [(torch, "tensor", tensor)]
    patches += [(torch.Tensor, "_make_subclass", subclass_maker(torch.Tensor._make_subclass))]
    if kind == "mps":
        module |= {
            "driver_allocated_memory": lambda *_: memory.reserved,
            "recommended_max_memory": lambda *_: total,
            "set_per_process_memory_fraction": limit,
        }
    else:
        stream, event = make_classes(machine.order)
        nobody = default_stream(stream)

        def current(*_: Any) -> Any:
            return machine.order.current[-1] if machine.order.current else nobody

        accelerator["current_stream"] = module["current_stream"] = current
        module |= {"Stream": stream, "Event": event, "stream": lambda given: given}
        patches += [(torch, "Stream", stream), (torch, "Event", event)]
        # The real function stays: it refuses a device without an index.
        patches += [
            (torch._C, "_cuda_setMemoryFraction", limit),
            (torch._C, "_xpu_setMemoryFraction", limit),
        ]
    own = torch.get_device_module(kind)
    patches += [(torch.accelerator, name, value) for name, value in accelerator.items()]
    patches += [(own, name, value) for name, value in module.items()]
    if kind == "cuda":
        patches.append((torch.cuda.memory, "_lazy_init", lambda: None))
    return patches

"""Made-up machines with round rates."""

from __future__ import annotations

from typing import Any

from frugal_bonsai.hardware.profile import HardwareProfile


def cpu_values(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "a CPU",
        "device": "cpu",
        "source": "made up",
        "host_bytes": 16 * 2**30,
        "disk_cold_bytes_per_second": 1e9,
        "disk_warm_bytes_per_second": 4e9,
        "disk_write_bytes_per_second": 5e8,
        "memory_bytes_per_second": 2e10,
        "fresh_bytes_per_second": 2e9,
        "attention_flops_per_second": 5e10,
        "solve_flops_per_second": 4e10,
        "call_seconds": 1e-3,
        "start_seconds": 6.0,
        "products": {"fp32": 1e11, "int8": 8e11},
    }
    return {**values, **changes}


def cpu(**changes: Any) -> HardwareProfile:
    return HardwareProfile(**cpu_values(**changes))


def cuda(**changes: Any) -> HardwareProfile:
    values = {
        "name": "a GPU",
        "device": "cuda",
        "host_bytes": 64 * 2**30,
        "gpu_bytes": 24 * 2**30,
        "copy_bytes_per_second": 2e10,
        "memory_bytes_per_second": 8e11,
        "fresh_bytes_per_second": None,
        "attention_flops_per_second": 6e13,
        "products": {"fp32": 4e13, "bf16": 1e14},
    }
    return cpu(**{**values, **changes})

"""A plan and a profile as plain values."""

from __future__ import annotations

from typing import Any

PLAN: dict[str, Any] = {
    "model": "org/base-7b",
    "family": "llama",
    "parameters": 6_738_415_616,
    "device": "cuda",
    "device_name": "Some GPU 48GB",
    "window": 2048,
    "windows": 32,
    "arithmetic": "int8",
    "micro_batch": 8,
    "ranks": 1,
    "windows_in_flight": 208,
    "concurrent_masks": 13,
    "rounds": 10,
    "forward_tokens": 98_765_432,
    "phases": [
        {
            "name": "building stores",
            "seconds": 120.0,
            "compute": 0.0,
            "elementwise": 20.0,
            "disk": 100.0,
            "copy": 0.0,
            "binds": "disk",
        },
        {
            "name": "masked evaluation",
            "seconds": 7140.0,
            "compute": 5000.0,
            "elementwise": 0.4,
            "disk": 7140.0,
            "copy": 30.0,
            "binds": "disk",
        },
    ],
    "seconds": 7260.0,
    "binds": "disk",
    "items": [
        {
            "name": "layer buffers",
            "where": "host",
            "size_bytes": 3 * 2**28,
            "formula": "4 x layer as stored [int8] (a formula that needs more than a line)",
        },
        {"name": "logits", "where": "gpu", "size_bytes": 5 * 2**30, "formula": "tokens * v * 8"},
    ],
    "totals": {"host": 3 * 2**28, "gpu": 5 * 2**30, "disk": 13 * 2**30},
    "caps": {"host": 8 * 2**30, "gpu": 24 * 2**30},
    "peak_phases": {"host": "recovery: layers", "gpu": "masked evaluation: layers"},
    "binding": "logits",
    "notes": ["the text is sampled first"],
    "profile": "measured now",
}
PROFILE: dict[str, Any] = {
    "name": "Some GPU 48GB",
    "device": "cuda",
    "source": "measured 2026-11-24; a file of 1.00 GiB",
    "host_bytes": 64 * 2**30,
    "gpu_bytes": 48 * 2**30,
    "disk_cold_bytes_per_second": 3.456e9,
    "disk_warm_bytes_per_second": 8.1e9,
    "disk_write_bytes_per_second": 1.2e9,
    "copy_bytes_per_second": 2.54e10,
    "memory_bytes_per_second": 6.1e11,
    "fresh_bytes_per_second": None,
    "attention_flops_per_second": 6.2e13,
    "solve_flops_per_second": 3.9e12,
    "call_seconds": 9.6e-4,
    "start_seconds": 14.6,
    "products": {"fp32": 2.71e13, "bf16": 1.084e14},
    "out": None,
}

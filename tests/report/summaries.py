"""A prune's summary as plain values, of any depth."""

from __future__ import annotations

from typing import Any


def make_summary(layers: int = 3, **changes: Any) -> dict[str, Any]:
    kept = {"attention": [2] * layers, "ffn": [286] * (layers - 1) + [11008]}
    summary: dict[str, Any] = {
        "version": "0.1.0",
        "model": "org/base-7b",
        "out": "/home/someone/out dir/small",
        "family": "llama",
        "layout": "uniform",
        "written_as": "llama",
        "tile": 8,
        "method": "default",
        "latency": None,
        "settings": {"sparsity": 0.5, "level": "group", "recovery": True, "seed": 17},
        "calibration": {
            "source": "wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, train)",
            "window": 2048,
            "written_windows": 64,
            "windows": 32,
            "held_out_windows": 8,
        },
        "before": {
            "parameters": 6_738_415_616,
            "block_parameters": 6_476_005_376,
            "weight_bytes": 13_476_831_232,
            "perplexity": 5.4721,
            "eval_perplexity": 6.25,
        },
        "after": {
            "parameters": 3_500_412_928,
            "block_parameters": 3_238_002_688,
            "weight_bytes": 7_000_825_856,
            "perplexity": 12.3456,
            "eval_perplexity": 12.5,
        },
        "eval_text": {"name": "file notes.txt", "window": 256, "windows": 40},
        "sparsity": 0.5,
        "kept": kept,
        "dense": {"attention": [4] * layers, "ffn": [11008] * layers},
        "layer_sparsity": [0.612] * (layers - 1) + [0.0],
        "rounds": [
            make_round(1, 0.25, penalty="non-negative ridge 0.1", forward_tokens=81_234_567),
            make_round(2, 0.5, penalty="non-negative ridge 0.01", forward_tokens=162_469_134),
        ],
        "forward_tokens": 162_469_134,
        "seconds": 5400.0,
        "memory": {
            "host_cap_bytes": 8 * 2**30,
            "host_predicted_bytes": 3 * 2**30,
            "host_peak_bytes": 3 * 2**30,
            "gpu_cap_bytes": 24 * 2**30,
            "gpu_predicted_bytes": 20 * 2**30,
            "gpu_peak_bytes": 21 * 2**30,
            "planned_micro_batch": 8,
            "final_micro_batch": 8,
            "plan": [],
        },
        "verify": {"max_relative_difference": 5.8e-7, "windows": 1},
        "notes": ["--max-gpu-mem has no effect"],
        "load": "AutoModelForCausalLM.from_pretrained('/home/someone/out dir/small')",
    }
    return summary | changes


def make_round(number: int, sparsity: float, **changes: Any) -> dict[str, Any]:
    return {
        "round": number,
        "sparsity": sparsity,
        "observations": 192,
        "r2": 0.7654,
        "tau": 0.6543,
        "penalty": "ridge 0.1",
        "coverage": 0.9,
        "certainty": 0.81,
        "stopped": "settled",
        "mask_tokens": 600,
        "mask_budget_tokens": 1000,
        "kept": {},
        "perplexity": 34.567,
        "dense_perplexity": 5.123,
        "recovery_residual": 0.1,
        "seconds": 750.0,
        "forward_tokens": 1000,
        **changes,
    }

"""The models of the check: random Llamas of real layer shapes, made on the spot.

A model and its working store are made once a run, in the folder that all steps share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_shape_checkpoint import write_tokenizer

from frugal_bonsai.checkpoint.commit import staged_directory
from frugal_bonsai.checkpoint.writer import ShardedWriter
from frugal_bonsai.memory.plan import SweepLimits
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.run.open import Model, open_model
from frugal_bonsai.stream.engine import Engine, compute_dtype
from frugal_bonsai.stream.store import INT8, LayerStore, build_store
from gpu_checks.check import Check


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 4
    vocabulary: int = 8192

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": True,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inside: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        names: dict[str, tuple[int, ...]] = {"embed_tokens": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            names |= {f"layers.{layer}.{name}": shape for name, shape in inside.items()}
        names["norm"] = (self.hidden,)
        return {f"model.{name}.weight": shape for name, shape in names.items()}


_8B = Shape(name="8b", hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128)
_SMALL = Shape(
    name="small", hidden=256, ffn=1024, heads=4, kv_heads=2, head_dim=64, vocabulary=1024
)
_TINY = Shape(name="tiny", hidden=64, ffn=512, heads=4, kv_heads=2, head_dim=16, vocabulary=512)


def large(check: Check) -> Shape:
    """Four layers of Llama-3-8B with a small vocabulary; tiny in a dry run."""
    return _TINY if check.dry else _8B


def small(check: Check) -> Shape:
    """A model that even the slowest checker gets through."""
    return _TINY if check.dry else _SMALL


@contextmanager
def opened(check: Check, shape: Shape) -> Iterator[Model]:
    """The model of a shape, made if it is not there."""
    folder = check.work / f"llama-{shape.name}"
    if not folder.exists():
        _make(folder, shape, check.full_device)
    with open_model(str(folder)) as model:
        yield model


def _make(folder: Path, shape: Shape, device: torch.device) -> None:
    """Random weights, drawn on the device: a CPU takes ten times as long."""
    generator = torch.Generator(device).manual_seed(0)
    announced = [(name, "BF16", size) for name, size in shape.tensors().items()]
    with staged_directory(folder) as staging:
        (staging / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
        write_tokenizer(staging)
        with ShardedWriter(staging, announced, max_shard_bytes=10**9) as writer:
            for name, _, size in announced:
                weight = torch.ones(size, dtype=torch.bfloat16, device=device)
                if len(size) == 2:
                    into_the_sum = name.endswith(("o_proj.weight", "down_proj.weight"))
                    std = 0.02 / (math.sqrt(2 * shape.layers) if into_the_sum else 1.0)
                    weight.normal_(std=std, generator=generator)
                writer.write(name, weight.cpu())
            writer.finish()


@contextmanager
def int8_store(check: Check, model: Model) -> Iterator[LayerStore]:
    """The working store of a model, built if it is not there."""
    folder = check.work / f"store-{model.folder.name}"
    if not folder.exists():
        with staged_directory(folder) as staging:
            build_store(staging, model.checkpoint, model.spec, weights=INT8).close()
    store = LayerStore(folder, model.spec.layers)
    try:
        yield store
    finally:
        store.close()


def make_engine(check: Check, model: Model, **limits: int) -> Engine:
    """An engine with a fresh head; the head's rows come in four chunks."""
    values = {
        "micro_batch": 2,
        "windows_in_flight": 10**6,
        "resident_windows": 10**6,
        "head_rows": model.spec.vocabulary // 4,
        "head_tokens": 2048,
    }
    return Engine(
        model.checkpoint,
        model.spec,
        device=check.device,
        dtype=compute_dtype(check.device),
        limits=SweepLimits(**{**values, **limits}),  # type: ignore[arg-type]
    )


def random_tokens(spec: ModelSpec, windows: int, window: int) -> torch.Tensor:
    """Windows of random tokens, int64 ``[N, S]``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(spec.vocabulary, (windows, window), generator=generator)

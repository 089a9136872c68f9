"""Llama-3-8B's layers under small GPU caps: what is reserved, and that spilling changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny_models import random_mask

from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
from frugal_bonsai.checkpoint.reader import Checkpoint
from frugal_bonsai.checkpoint.writer import ShardedWriter
from frugal_bonsai.memory.budget import (
    Budget,
    enforce_gpu_cap,
    find_device,
    make_budget,
    parse_caps,
)
from frugal_bonsai.memory.plan import MemoryPlan, PruneWorkload, plan_memory
from frugal_bonsai.model.family import ModelSpec, describe_model
from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.sizes import MIB
from frugal_bonsai.stream.engine import Engine
from frugal_bonsai.stream.store import INT8, LayerStore, build_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 4096, 14336, 32, 8, 128, 2, 8192
WINDOW, WINDOWS = 2048, 16
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}
WORK = PruneWorkload(
    window=WINDOW,
    windows=WINDOWS,
    measured=(2,),
    weights=INT8,
    source_bytes=2,
    goals=(0.5,),
    part_windows=WINDOWS,
    mask_windows=WINDOWS,
    mask_batches=(1,),
    reconstruction=True,
    refit_inputs=True,
)


def _shapes() -> dict[str, tuple[int, ...]]:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        inside = {
            "self_attn.q_proj": (queries, HIDDEN),
            "self_attn.k_proj": (keys, HIDDEN),
            "self_attn.v_proj": (keys, HIDDEN),
            "self_attn.o_proj": (HIDDEN, queries),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in inside.items()}
    return shapes | {"model.norm.weight": (HIDDEN,)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoint, ModelSpec]]:
    folder = tmp_path_factory.mktemp("8b")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    announced = [(name, "BF16", shape) for name, shape in _shapes().items()]
    with ShardedWriter(folder, announced, max_shard_bytes=10**10) as writer:
        for name, _, shape in announced:
            weight = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 2:
                weight.normal_(std=0.02, generator=generator)
            writer.write(name, weight)
        writer.finish()
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint, describe_model(checkpoint.config, checkpoint.shapes)


@pytest.fixture(scope="module")
def store(
    model: tuple[Checkpoint, ModelSpec], tmp_path_factory: pytest.TempPathFactory
) -> LayerStore:
    return build_store(tmp_path_factory.mktemp("store"), *model, weights=INT8)


class OneMask:
    """The same mask for every window."""

    def __init__(self, mask: KeepMask) -> None:
        self.mask = mask

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor:
        return self.mask.columns(group).expand(items.stop - items.start, -1)

    def impute(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        return None


def _tokens(windows: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (windows, WINDOW), generator=torch.Generator().manual_seed(1))


def _engine(model: tuple[Checkpoint, ModelSpec], plan: MemoryPlan, **limits: int) -> Engine:
    checkpoint, spec = model
    return Engine(
        checkpoint,
        spec,
        device=find_device("cuda"),
        dtype=torch.bfloat16,
        limits=replace(plan.limits, **limits),
    )


def _plan(spec: ModelSpec, cap: str) -> tuple[Budget, MemoryPlan]:
    budget = make_budget(find_device("cuda"), parse_caps(cap, None))
    return budget, plan_memory(spec, budget, WORK, base_bytes=1000 * MIB)


@pytest.mark.parametrize("cap", ["8GB", "12GB", "24GB"])
def test_peak_stays_under_the_cap(
    cap: str, model: tuple[Checkpoint, ModelSpec], store: LayerStore
) -> None:
    spec, device = model[1], find_device("cuda")
    torch.cuda.empty_cache()
    budget, plan = _plan(spec, cap)
    assert budget.gpu_bytes is not None
    enforce_gpu_cap(device, budget)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        engine, mask = _engine(model, plan), KeepMask(spec.table)
        prior = ImportanceBuilder("exact", mask, damping=1e-3, generator=torch.Generator())
        masker = OneMask(random_mask(spec))
        with engine.stream(store) as stream:
            engine.sweep.run(stream, _tokens(WINDOWS), tap=prior)
            engine.sweep.losses(stream, engine.head, _tokens(2 * WINDOWS), masker=masker)
        options = ReconstructionOptions(
            ridge=1e-3,
            mask=mask,
            keep_inputs=plan.keep_inputs,
            saved_dtype=lambda name: torch.bfloat16,
        )
        reconstruction = Reconstruction(engine.sweep, options, save=lambda layer, weights: None)
        with engine.dense_stream(store) as dense, engine.dense_stream(store) as pruned:
            result = reconstruction.run(dense, pruned, _tokens(WINDOWS), prior)
        with torch.inference_mode():
            engine.head.nll(result.hidden_pruned, _tokens(WINDOWS))
        peak = torch.cuda.max_memory_reserved(device) + budget.context_bytes
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert peak <= budget.gpu_bytes
    assert engine.sweep.batches.size == plan.limits.micro_batch, "the plan held without a halving"


def test_spilled_and_resident_windows_give_the_same(
    model: tuple[Checkpoint, ModelSpec], store: LayerStore
) -> None:
    _, plan = _plan(model[1], "24GB")
    losses = []
    for resident in (8, 3, 0):
        engine = _engine(model, plan, resident_windows=resident, micro_batch=2)
        with engine.stream(store) as stream:
            losses.append(engine.losses(stream, _tokens(8), "spill"))
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])

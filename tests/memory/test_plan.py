"""The planner is pure: shapes and caps in, items or a refusal out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from frugal_bonsai.errors import BudgetError
from frugal_bonsai.memory.budget import Budget
from frugal_bonsai.memory.plan import MemoryPlan, Work, plan_memory
from frugal_bonsai.model.family import ModelSpec, describe_model
from frugal_bonsai.sizes import GIB, MIB

WORK = Work(
    window=2048, windows=32, pairs=208, gram=True, recovery=True, weights="int8", store_copies=2
)


def shapes(layers: int, hidden: int, ffn: int, vocabulary: int, kv: int) -> ModelSpec:
    """A Llama of these shapes, no weights."""
    head_dim = 128
    heads = hidden // head_dim
    tensors = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv * head_dim, hidden),
            "self_attn.v_proj": (kv * head_dim, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            tensors[f"{prefix}{name}.weight"] = shape
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    return describe_model(config, tensors)


LLAMA_8B = shapes(32, 4096, 14336, 128256, 8)
LLAMA_70B = shapes(80, 8192, 28672, 128256, 8)


def cuda(gib: float, host_gib: float = 64) -> Budget:
    return Budget(device="cuda", host_bytes=int(host_gib * GIB), gpu_bytes=int(gib * GIB))


def item(plan: MemoryPlan, name: str, where: str) -> int:
    return next(i.size_bytes for i in plan.items if i.name == name and i.where == where)


def test_parameters_of_the_shapes() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248
    assert LLAMA_70B.parameters == 70_553_706_496


def test_the_cache_of_sampled_windows_is_planned_and_refused_by_its_name() -> None:
    work = replace(WORK, sampled=36)
    name = "KV cache of the text that is sampled"
    plan = plan_memory(LLAMA_8B, cuda(24), work, base_bytes=500 * MIB)
    cache_of_a_layer = 2 * 36 * 2048 * 8 * 128 * 2  # keys and values in bf16
    assert item(plan, name, "gpu") == 33 * cache_of_a_layer + 36 * 128256 * 12
    without = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    assert name not in {i.name for i in without.items}
    with pytest.raises(BudgetError, match=name):
        plan_memory(LLAMA_8B, cuda(8), work, base_bytes=500 * MIB)


def test_items_follow_their_formulas() -> None:
    plan = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    layer = 218_112_000  # parameters of one layer, norms included
    rows = 4096 * 2 + 1024 * 2 + 14336 * 2 + 4096
    stored = layer + 4 * rows + 4 * 2 * 4096
    assert item(plan, "layer buffers", "host") == 4 * stored
    assert item(plan, "dequantised layer", "gpu") == 2 * 2 * layer
    m, n = plan.limits.micro_batch, plan.limits.windows_in_flight
    near, far = plan.limits.resident_windows, n - plan.limits.resident_windows
    state = 2 * 2048 * 4096 * 2
    assert item(plan, "hidden states on the device", "gpu") == near * state
    assert item(plan, "hidden states", "host") == far * state
    per_token = 6 * 4096 + 3 * 14336 + 2 * 4096
    assert item(plan, "activations of a micro-batch", "gpu") == m * 2048 * per_token * 2
    assert item(plan, "working stores", "disk") == 2 * 32 * stored
    assert plan.limits.head_tokens % 2048 == 0


@pytest.mark.parametrize("gib", [8, 12, 24, 48])
def test_totals_never_pass_the_caps(gib: int) -> None:
    plan = plan_memory(LLAMA_8B, cuda(gib), WORK, base_bytes=500 * MIB)
    assert plan.total_bytes("gpu") <= gib * GIB
    assert plan.total_bytes("host") <= 64 * GIB


def test_a_larger_cap_never_gives_less() -> None:
    work = replace(WORK, recovery=False, gram=False, windows=1)
    plans = [
        plan_memory(LLAMA_70B, cuda(gib), work, base_bytes=500 * MIB)
        for gib in (12, 16, 24, 48, 80)
    ]
    for smaller, larger in pairwise(plans):
        assert smaller.limits.micro_batch <= larger.limits.micro_batch
        assert smaller.limits.resident_windows <= larger.limits.resident_windows
    assert plans[0].limits.resident_windows < plans[-1].limits.resident_windows


def test_a_cpu_holds_everything_on_the_host() -> None:
    plan = plan_memory(
        LLAMA_8B, Budget(device="cpu", host_bytes=32 * GIB), WORK, base_bytes=500 * MIB
    )
    assert plan.total_bytes("gpu") == 0
    assert plan.total_bytes("host") <= 32 * GIB
    assert item(plan, "dequantised layer", "host") == 2 * 4 * 218_112_000


def test_recovery_needs_all_its_windows_in_flight() -> None:
    plan = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    assert plan.limits.windows_in_flight >= WORK.windows


def test_masks_share_a_wave() -> None:
    work = replace(WORK, pairs=200 * 32, windows_per_mask=32, recovery=False, gram=False)
    plan = plan_memory(LLAMA_8B, cuda(24, host_gib=8), work, base_bytes=500 * MIB)
    assert plan.concurrent_masks == plan.limits.windows_in_flight // 32
    assert 1 <= plan.concurrent_masks < 200


@pytest.mark.parametrize(("gib", "host"), [(2, 64), (24, 1)])
def test_a_refusal_names_the_item_and_a_cap_that_works(gib: float, host: float) -> None:
    with pytest.raises(BudgetError) as refusal:
        plan_memory(LLAMA_8B, cuda(gib, host), WORK, base_bytes=500 * MIB)
    text = str(refusal.value)
    option = "--max-gpu-mem" if gib == 2 else "--max-cpu-mem"
    assert f"smallest {option} that works is" in text and "largest item" in text
    smallest = int(text.split("that works is ")[1].split("MiB")[0])
    enough = smallest * MIB / GIB
    budget = cuda(enough, host) if gib == 2 else cuda(gib, enough)
    plan_memory(LLAMA_8B, budget, WORK, base_bytes=500 * MIB)
    less = (smallest - 1) * MIB / GIB
    budget = cuda(less, host) if gib == 2 else cuda(gib, less)
    with pytest.raises(BudgetError):
        plan_memory(LLAMA_8B, budget, WORK, base_bytes=500 * MIB)


def test_the_binding_item_is_the_largest_that_can_change() -> None:
    plan = plan_memory(LLAMA_8B, cuda(24), WORK, base_bytes=500 * MIB)
    largest = max(i.size_bytes for i in plan.items if i.where == "gpu")
    assert plan.binding.size_bytes == largest

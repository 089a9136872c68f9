"""Operations counted on Hugging Face's layers, against the shapes of their weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILY_CONFIGS, tiny_family

from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.run.open import open_model
from frugal_bonsai.stream.operations import count_operations

# In hybrids, where heads differ in width, and where the first layers have no experts, layer 0 does
# not stand for all layers, and convolutions are products, too. Latent attention has keys and values
# of different widths.
ALIKE = [
    name
    for name, (kind, _) in FAMILY_CONFIGS.items()
    if not FAMILIES[kind].other_mixers
    and not FAMILIES[kind].full_attention_keys
    and kind != "youtu"
    and (FAMILIES[kind].experts is None or FAMILIES[kind].experts.dense_key is None)
]


@pytest.mark.parametrize("name", ALIKE)
def test_every_family_is_counted_by_its_weights(name: str, tmp_path: Path) -> None:
    spec = tiny_family(tmp_path / "m", name).spec
    found = count_operations(spec, 32, torch.float32)
    weights = {
        tensor: math.prod(shape)
        for tensor, shape in spec.layer_tensors[0].items()
        if len(shape) == 2 and not tensor.endswith(spec.family.unquantised)
    }
    experts = sum(size for tensor, size in weights.items() if ".experts." in tensor)
    dense = sum(weights.values()) - experts
    chosen = experts * spec.experts_chosen / spec.experts if experts else 0
    assert found.projections == pytest.approx(2 * (dense + chosen))
    # Each of S tokens sees S / 2 others, in two products.
    assert found.attention == pytest.approx(2 * spec.heads * spec.head_dim)
    assert spec.ffn_inputs == 1 + any("gate" in tensor for tensor in weights)
    assert found.query == spec.heads * spec.head_dim
    assert found.ffn == spec.intermediate * max(1, spec.experts_chosen)


def test_traffic_of_a_llama() -> None:
    """Elementwise operations and the operands of projections, counted by hand."""
    with open_model("example") as model:
        found = count_operations(model.spec, 256, torch.float32)
    hidden, query, key, ffn = 192, 256, 128, 512
    inputs, outputs = 5 * hidden + query + ffn, query + 2 * key + 2 * hidden + 2 * ffn
    assert (found.inputs, found.outputs) == (inputs, outputs)
    # Two norms and residual sums; rotary embeddings; attention's output copied; the activation.
    elements = 2 * (7 + 3) * hidden + 10 * (query + key) + 2 * query + 5 * ffn + inputs + outputs
    assert found.traffic_bytes == pytest.approx(4 * elements, rel=0.02)
    # Gate, up, the activation and the product with it.
    assert sorted(found.array_bytes)[-4:] == [4 * ffn] * 4

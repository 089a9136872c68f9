"""Checkpoints that hold the experts of a layer in one tensor: read and written expert by expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_CONFIGS, open_tiny, relative, save_tiny
from transformers import AutoModelForCausalLM

from families.contract import legal_mask, logits_of, masked_parent, random_refit, streamed_logits
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import UNIFORM, layout_rules
from frugal_bonsai.rewrite.shrink import shrink

TOKENS_NS = torch.arange(3, 29).reshape(2, 13)
FILE = "model.safetensors"


def save(folder: Path, name: str) -> dict[str, torch.Tensor]:
    model_type, config = FAMILY_CONFIGS[name]
    save_tiny(folder, model_type, **config)
    return load_file(folder / FILE)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5-MoE as the hub has it: transformers itself writes one tensor for each matrix."""
    folder = tmp_path_factory.mktemp("stacked")
    tensors = save(folder, "qwen3_5-moe")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        own = {
            name: torch.stack([tensors.pop(f"{prefix}.{e}.{name}.weight") for e in range(4)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([own["gate_proj"], own["up_proj"]], dim=1)
        tensors[f"{prefix}.down_proj"] = own["down_proj"]
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def test_an_expert_is_read_alone(stacked: Path) -> None:
    whole = load_file(stacked / FILE)["model.layers.1.mlp.experts.gate_up_proj"]
    tiny = open_tiny(stacked)
    prefix = "model.layers.1.mlp.experts.2."
    for name, expected in (("gate_proj", whole[2, :20]), ("up_proj", whole[2, 20:])):
        entry = tiny.checkpoint.tensors[f"{prefix}{name}.weight"]
        assert entry.size_bytes == 4 * 20 * 24 and entry.stacked == 2
        assert torch.equal(tiny.checkpoint.read(f"{prefix}{name}.weight"), expected)
    # The planner's largest tensor is an expert's matrix, not all of them.
    assert max(max(shape) for shape in tiny.spec.layer_tensors[0].values()) < 4 * 40
    assert all(len(shape) < 3 or "conv" in n for n, shape in tiny.spec.layer_tensors[0].items())
    tiny.checkpoint.close()


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000], ids=["one file", "shards"])
def test_an_output_has_the_form_of_its_source(
    stacked: Path, tmp_path: Path, shard_bytes: int
) -> None:
    """Refits of some experts are written into the tensor of all."""
    tiny = open_tiny(stacked)
    mask = legal_mask(tiny, UNIFORM)
    mask.of(tiny.spec.table.groups[2])[:] = False  # expert 1 of layer 0
    mask.of(tiny.spec.table.groups[9])[:] = False  # expert 3 of layer 1
    refit = random_refit(tiny, mask)
    refit = {name: read for at, (name, read) in enumerate(refit.items()) if at % 2}
    refit = {name: read for name, read in refit.items() if read().numel()}
    expected = logits_of(masked_parent(tiny, mask, refit), TOKENS_NS)
    assert relative(streamed_logits(tiny, TOKENS_NS, mask=mask, refit=refit), expected) < 1e-5
    rules = layout_rules(tiny.spec, UNIFORM, tile=1)
    shrink(
        *(tiny.checkpoint, tiny.spec, mask, tmp_path),
        rules=rules,
        refit=refit,
        max_shard_bytes=shard_bytes,
    )
    tiny.checkpoint.close()
    written = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    assert written.keys() == load_file(stacked / FILE).keys()
    kept = int(mask.of(tiny.spec.table.groups[1]).sum())
    assert written["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 2 * kept, 24)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative(logits_of(model, TOKENS_NS), expected) < 1e-5


def test_interleaved_rows_and_biases_keep_their_form(tmp_path: Path) -> None:
    """gpt-oss: ``[in, out]``, gate and up in turn, biases in tensors of their own."""
    source = save(tmp_path / "dense", "gpt-oss")
    tiny = open_tiny(tmp_path / "dense")
    mask = legal_mask(tiny, UNIFORM)
    (tmp_path / "out").mkdir()
    shrink(
        *(tiny.checkpoint, tiny.spec, mask, tmp_path / "out"),
        rules=layout_rules(tiny.spec, UNIFORM, tile=1),
    )
    tiny.checkpoint.close()
    written, prefix = load_file(tmp_path / "out" / FILE), "model.layers.0.mlp.experts."
    kept = mask.of(tiny.spec.table.groups[2]).nonzero().flatten()  # of expert 1
    pairs = torch.stack([2 * kept, 2 * kept + 1], dim=1).flatten()
    for name, axis, rows in (
        ("gate_up_proj", 1, pairs),
        ("gate_up_proj_bias", 0, pairs),
        ("down_proj", 0, kept),
        ("down_proj_bias", 0, torch.arange(24)),
    ):
        assert torch.equal(
            written[prefix + name][1], source[prefix + name][1].index_select(axis, rows)
        )


def test_experts_of_a_tensor_stay_equally_wide(stacked: Path, tmp_path: Path) -> None:
    tiny = open_tiny(stacked)
    mask = legal_mask(tiny, UNIFORM)
    mask.of(tiny.spec.table.groups[1])[:] = True
    with pytest.raises(OptionError, match=r"layer 0 expert 0 ffn keeps 20 .* must be equally wide"):
        shrink(
            *(tiny.checkpoint, tiny.spec, mask, tmp_path),
            rules=layout_rules(tiny.spec, "per-layer", tile=1),
        )
    tiny.checkpoint.close()

"""Loading in fresh processes with plain transformers, and the refusals of ``load_pruned``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_process import FreshProcesses
from safetensors.torch import load_file, save_file

import frugal_bonsai
from frugal_bonsai import load_pruned
from frugal_bonsai.errors import CheckpointError, UnsupportedModelError
from frugal_bonsai.model.layout import LAYOUTS, PER_LAYER
from rewrite.models import (
    greedy,
    keep_counts,
    logits_of,
    masked_parent,
    random_mask,
    relative_difference,
    save_llama,
    tiny_parent,
    tokens,
)

# Runs without this package on its path: what a user of the output has.
PLAIN_LOADER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, again, answer, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
input_ids = torch.load(answer + ".tokens")
model = AutoModelForCausalLM.from_pretrained(folder, **options)
how = dict(attention_mask=torch.ones_like(input_ids), max_new_tokens=20, min_new_tokens=20,
           do_sample=False, pad_token_id=0)
with torch.no_grad():
    found = {
        "logits": model(input_ids).logits,
        "dynamic": model.generate(input_ids, **how),
        "static": model.generate(input_ids, cache_implementation="static", **how),
    }
    model.save_pretrained(again)
    model = AutoModelForCausalLM.from_pretrained(again, **options)
    found["again"] = model(input_ids).logits
found["module"] = type(model).__module__
found["foreign"] = sorted(name for name in sys.modules if name.startswith("frugal"))
torch.save(found, answer)
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_transformers_in_a_fresh_process(
    tmp_path: Path, layout: str, fresh: FreshProcesses
) -> None:
    with tiny_parent(tmp_path / "dense", attention_bias=True) as parent:
        mask = random_mask(parent.spec, layout)
        parent.shrink(mask, tmp_path / "out", layout, max_shard_bytes=30_000)
        expected = masked_parent(parent, mask)
    answer = tmp_path / "answer"
    torch.save(tokens(), f"{answer}.tokens")
    options = {"trust_remote_code": True} if layout == PER_LAYER else {}
    folders = (tmp_path / "out", tmp_path / "again")
    fresh.run(PLAIN_LOADER, *folders, answer, json.dumps(options), folder=tmp_path)
    found = torch.load(answer)
    assert found["foreign"] == []
    assert found["module"].startswith(
        "transformers_modules." if layout == PER_LAYER else "transformers.models.llama"
    )
    assert relative_difference(found["logits"], logits_of(expected, tokens())) <= 1e-4
    assert torch.equal(found["again"], found["logits"])
    assert torch.equal(found["dynamic"], greedy(expected, tokens()))
    assert torch.equal(found["static"], found["dynamic"])
    # What plain transformers saved is ours to load too.
    assert torch.equal(logits_of(load_pruned(tmp_path / "again"), tokens()), found["logits"])


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import frugal_bonsai, sys; assert 'load_pruned' in dir(frugal_bonsai); "
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    root = Path(frugal_bonsai.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_prunned'"):
        _ = frugal_bonsai.load_prunned


# -- refusals -----------------------------------------------------------------------------------
def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; check the path"):
        load_pruned(tmp_path / "nowhere")


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_pruned(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        load_pruned(tmp_path / "dense")


def test_missing_tensor_is_no_random_tensor(tmp_path: Path) -> None:
    """transformers initialises missing weights at random and only logs it."""
    save_llama(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors.*'model.layers.1.mlp.up_proj"):
        load_pruned(tmp_path / "dense")


def test_layers_of_different_widths_in_an_unknown_architecture(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [1, 2, 3], "ffn": [9, 8, 7]})
        parent.shrink(mask, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "t5"}))
    with pytest.raises(UnsupportedModelError, match=r"config.json: .* none for model_type 't5'"):
        load_pruned(tmp_path / "out")


def test_transformers_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [1, 2, 3], "ffn": [9, 8, 7]})
        parent.shrink(mask, tmp_path / "out")
    module = "frugal_bonsai.rewrite.layouts.modeling_pruned"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("transformers.PreTrainedConfig", type("PreTrainedConfig", (), {}))
    with pytest.raises(UnsupportedModelError, match=r"config\.json: .*install transformers 5\.14"):
        load_pruned(tmp_path / "out")
    assert module not in sys.modules

"""Per-layer outputs of every family in plain transformers with the bundled file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (
    FAMILY_CONFIGS,
    random_windows,
    relative,
    tiny_family,
)

from families.contract import legal_mask, logits_of, masked_parent
from frugal_bonsai.model.families import FAMILIES
from frugal_bonsai.model.layout import PER_LAYER, layout_rules
from frugal_bonsai.rewrite.shrink import shrink

# Runs without this package on its path.
LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
tokens, found = torch.load(sys.argv[1]), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        found[folder] = model(tokens).logits
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, found[folder]), folder
assert not [name for name in sys.modules if name.startswith("frugal")]
torch.save(found, sys.argv[1] + ".found")
"""


LAYERS = "num_hidden_layers"
# Of families whose experts only go whole, and not from layer 0: two layers have experts.
THREE_LAYERS = {
    LAYERS: 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "no_rope_layers": [1, 0, 1],
    "moe_layers": [1, 2],
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return folder of the rewritten model -> logits of the masked parent."""
    root, tokens_NS, expected = tmp_path_factory.mktemp("remote"), random_windows(2, 13), {}
    for name in FAMILY_CONFIGS:
        rule = FAMILIES[FAMILY_CONFIGS[name][0]].experts
        changes = THREE_LAYERS if rule is not None and rule.whole_channels is not None else {}
        own = {key: changes[key] for key in changes if key in {*FAMILY_CONFIGS[name][1], LAYERS}}
        tiny = tiny_family(root / f"{name}-dense", name, **own)
        mask = legal_mask(tiny, PER_LAYER)
        if changes:
            own = tiny.spec.experts // tiny.spec.expert_groups
            for group in tiny.spec.table.of_layer(2):
                if group.expert is not None and group.expert % own == 0:
                    mask.of(group)[:] = False
        (root / name).mkdir()
        rules = layout_rules(tiny.spec, PER_LAYER, tile=1)
        shrink(tiny.checkpoint, tiny.spec, mask, root / name, rules=rules)
        tiny.checkpoint.close()
        expected[str(root / name)] = logits_of(masked_parent(tiny, mask, {}), tokens_NS)
    return expected


@pytest.fixture(scope="module")
def found(
    expected: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("answers")
    torch.save(random_windows(2, 13), root / "tokens")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "home"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", LOADER, str(root / "tokens"), *expected]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, torch.Tensor] = torch.load(root / "tokens.found")
    return answers


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_plain_transformers_loads_layers_of_different_widths(
    name: str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> None:
    [folder] = [folder for folder in expected if Path(folder).name == name]
    assert relative(found[folder], expected[folder]) < 1e-5
    config = json.loads((Path(folder) / "config.json").read_text())
    # The only layer with experts of LFM2 MoE has a width that grouped products refuse.
    assert config["auto_map"] and ("per_layer_config" in config or name == "lfm2-moe")

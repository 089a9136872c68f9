"""What a resume needs: saved, read back, and refused where it does not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, random_mask, tiny_llama

from frugal_bonsai.bonsai.fingerprint import fingerprint, model_fingerprint
from frugal_bonsai.bonsai.importance.scores import ImportanceScores
from frugal_bonsai.bonsai.state import (
    PruneState,
    StateFolder,
)
from frugal_bonsai.errors import StateError
from frugal_bonsai.model.units import KeepMask

IDENTITY = {"sparsity": 0.5, "seed": 3, "model": "abc"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("state") / "m")


def _scores(tiny: Tiny) -> ImportanceScores:
    generator = torch.Generator().manual_seed(0)
    score_N = torch.rand(tiny.spec.table.units, generator=generator).double() / 3
    return ImportanceScores("exact", score_N)


def _state(tiny: Tiny, rounds: int = 2, **changes: Any) -> PruneState:
    values = {
        "mask": random_mask(tiny.spec),
        "rounds": [{"round": i + 1, "r2": 0.25, "tau": None} for i in range(rounds)],
        "forward_tokens": 12345,
        "importance": _scores(tiny),
    }
    return PruneState(**{**values, **changes})


def _refit(tiny: Tiny, mask: KeepMask) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        g.output_weight: torch.randn(24, int(mask.columns(g).sum()), generator=generator)
        for g in tiny.spec.table.groups
    }


def test_round_trip(tiny: Tiny, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, IDENTITY)
    assert not folder.exists
    saved = _state(tiny)
    folder.save(saved)
    assert folder.exists
    found = StateFolder(tmp_path, dict(IDENTITY)).load(tiny.spec.table)
    assert found.mask == saved.mask and found.mask != KeepMask(tiny.spec.table)
    assert found.rounds == saved.rounds and found.forward_tokens == 12345
    assert found.importance is not None and saved.importance is not None
    assert found.importance.name == "exact"
    assert torch.equal(found.importance.score_N, saved.importance.score_N), (
        "bit for bit, in float64"
    )
    assert found.refit_mask is None


def test_state_without_importance_scores(tiny: Tiny, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, IDENTITY)
    folder.save(_state(tiny, importance=None))
    assert folder.load(tiny.spec.table).importance is None


def test_report_that_is_not_a_number_survives(tiny: Tiny, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, IDENTITY)
    folder.save(_state(tiny, rounds=0, mask=random_mask(tiny.spec)))
    state = folder.load(tiny.spec.table)
    state.rounds.append({"round": 1, "r2": float("nan")})
    folder.save(state)
    found = folder.load(tiny.spec.table).rounds[0]["r2"]
    assert found is None or found != found


def test_refits_are_those_of_the_round_cut_to_the_mask_of_now(tiny: Tiny, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, IDENTITY)
    then = random_mask(tiny.spec, off=0.3)
    weights = _refit(tiny, then)
    for layer in range(3):
        mine = {g.output_weight: weights[g.output_weight] for g in tiny.spec.table.of_layer(layer)}
        folder.save_refit(2, layer, mine)
    now = KeepMask(tiny.spec.table, then.keep_N & random_mask(tiny.spec, seed=5).keep_N)
    readers = folder.refits(2, tiny.spec, then, now)
    assert set(readers) == set(weights)
    for group in tiny.spec.table.groups:
        wide = torch.full((24, group.columns), float("nan"))
        wide[:, then.columns(group)] = weights[group.output_weight]
        assert torch.equal(readers[group.output_weight](), wide[:, now.columns(group)])


def test_loaded_state_knows_its_refits(tiny: Tiny, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, IDENTITY)
    mask = random_mask(tiny.spec)
    folder.save(_state(tiny, mask=mask, refit_mask=mask))
    assert folder.load(tiny.spec.table).refit_mask == mask


def test_only_the_last_rounds_folder_stays(tiny: Tiny, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, IDENTITY)
    for rounds in (1, 2):
        mask = random_mask(tiny.spec, seed=rounds)
        for layer in range(3):
            folder.save_refit(rounds, layer, _refit(tiny, mask))
            # Until the state names the new round, the old one must be whole.
            assert rounds == 1 or (tmp_path / "round_001" / "prior.safetensors").exists()
        folder.save(_state(tiny, rounds=rounds, mask=mask, refit_mask=mask))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["round_002", "state.json"]


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        ({**IDENTITY, "seed": 4}, "was made with seed = 3, now it is 4"),
        ({"sparsity": 0.5, "model": "abc"}, "was made with seed = 3, now it is None"),
        ({**IDENTITY, "text": "x"}, "was made with text = None, now it is 'x'"),
    ],
)
def test_state_of_other_options_is_refused(
    identity: dict[str, Any], text: str, tiny: Tiny, tmp_path: Path
) -> None:
    StateFolder(tmp_path, IDENTITY).save(_state(tiny))
    with pytest.raises(StateError, match=text) as caught:
        StateFolder(tmp_path, identity).load(tiny.spec.table)
    assert str(tmp_path / "state.json") in str(caught.value)
    assert "use the same options to resume" in str(caught.value)


def test_setting_in_a_group_is_named_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Also where a key outside the group has the same name."""
    then, now = ({"settings": {"masks": m, "seed": 0}, "masks": None} for m in (4, 6))
    StateFolder(tmp_path, then).save(_state(tiny))
    with pytest.raises(StateError, match=r": was made with settings\.masks = 4, now it is 6; use"):
        StateFolder(tmp_path, now).load(tiny.spec.table)


@pytest.mark.parametrize("content", [None, "", "{", "\xff"])
def test_damaged_state(content: str | None, tiny: Tiny, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "state.json").write_bytes(content.encode("latin1"))
    with pytest.raises(StateError, match=r"state\.json: cannot be read .* delete"):
        StateFolder(tmp_path, IDENTITY).load(tiny.spec.table)


@pytest.mark.parametrize("keys", [{}, {"ahead": None}])
def test_state_of_another_version(keys: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    """The version is what is wrong, also where it has other keys."""
    folder = StateFolder(tmp_path, IDENTITY)
    folder.save(_state(tiny))
    file = tmp_path / "state.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "version": 2, **keys}))
    with pytest.raises(StateError, match="version 2, expected 3; resume with the frugal-bonsai"):
        folder.load(tiny.spec.table)


def test_fingerprints_tell_inputs_apart(tiny: Tiny, tmp_path: Path) -> None:
    assert fingerprint(b"ab", b"c") != fingerprint(b"a", b"bc")
    assert fingerprint(b"x") == fingerprint(b"x") and len(fingerprint()) == 16
    same = tiny_llama(tmp_path / "same", seed=1)
    other = tiny_llama(tmp_path / "other", intermediate_size=24)
    assert model_fingerprint(tiny.checkpoint) == model_fingerprint(same.checkpoint)
    assert model_fingerprint(tiny.checkpoint) != model_fingerprint(other.checkpoint)

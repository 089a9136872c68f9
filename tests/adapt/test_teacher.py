"""The teacher's cache: what it holds, what it is of, and that it is used for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import TIED, Tiny, random_windows, tiny_llama

from frugal_bonsai.adaptation.teacher import TeacherSettings, build_teacher, identify
from frugal_bonsai.adaptation.teacher_cache import (
    CACHE_FILE,
    TeacherCache,
    cache_folder,
    hash_weights,
)
from frugal_bonsai.errors import OptionError, StateError


def cached(
    tiny: Tiny, folder: Path, windows: torch.Tensor, settings: TeacherSettings, **limits: int
) -> TeacherCache:
    identity = identify(tiny.checkpoint, windows, settings, torch.float32)
    return build_teacher(folder, tiny.engine(**limits), windows, settings, identity)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1000, 7, 3])
def test_the_cache_holds_what_hugging_face_computes(
    rows: int, temperature: float, tmp_path: Path
) -> None:
    tiny, windows = tiny_llama(tmp_path / "m", **TIED), random_windows(5, 9)
    settings = TeacherSettings(top=6, temperature=temperature, layers=(0, 2))
    limits = {"head_rows": rows, "head_tokens": 4, "windows_in_flight": 2}
    cache = cached(tiny, tmp_path / "cache", windows, settings, **limits)
    assert cache.windows == 5 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    with torch.no_grad():
        made = tiny.hugging_face()(windows, output_hidden_states=True)
    logp = (made.logits[:, :-1] / temperature).log_softmax(-1)
    values, ids = logp.topk(6, dim=-1)
    order = [3, 0, 4]
    found = cache.read(order)
    assert torch.equal(found.top.ids_TK, ids[order])
    assert (found.top.values_TK - values[order]).abs().max() < 5e-3  # fp16 of numbers up to 8
    rest = 1.0 - values.exp().sum(-1)
    assert (found.top.rest_T - rest[order]).abs().max() < 1e-5
    assert cache.rest_mass() == pytest.approx(float(rest.mean()), abs=1e-5)
    # transformers gives the first layer's input, then what stands behind each but the last layer.
    assert set(found.hidden) == {0, 2}
    behind_first = made.hidden_states[1][order]
    assert (found.hidden[0] - behind_first).abs().max() < 2e-3 * behind_first.abs().max()


def test_all_of_the_vocabulary_leaves_no_rest(tmp_path: Path) -> None:
    tiny, windows = tiny_llama(tmp_path / "m"), random_windows(2, 9)
    cache = cached(tiny, tmp_path / "cache", windows, TeacherSettings(top=53))
    found = cache.read([0, 1])
    assert float(found.top.rest_T.max()) < 1e-5
    assert torch.equal(found.top.ids_TK.sort(-1).values[0, 0], torch.arange(53))


def test_a_cache_that_was_begun_is_finished_and_a_whole_one_is_read(tmp_path: Path) -> None:
    tiny, windows = tiny_llama(tmp_path / "m"), random_windows(5, 9)
    settings, folder = TeacherSettings(top=4), tmp_path / "cache"
    whole = cached(tiny, folder, windows, settings, windows_in_flight=2)
    expected = whole.read(range(5))
    described = json.loads((folder / CACHE_FILE).read_text())
    first = folder / described["shards"][0]["file"]
    kept = first.stat().st_mtime_ns
    described["shards"] = described["shards"][:1]
    (folder / CACHE_FILE).write_text(json.dumps(described))
    again = cached(tiny, folder, windows, settings, windows_in_flight=2)
    assert torch.equal(again.read(range(5)).top.values_TK, expected.top.values_TK)
    assert first.stat().st_mtime_ns == kept

    engine = tiny.engine()
    identity = identify(tiny.checkpoint, windows, settings, torch.float32)
    build_teacher(folder, engine, windows, settings, identity)
    assert engine.sweep.forward_tokens == 0


def test_a_cache_is_used_for_no_other_model_text_or_setting(tmp_path: Path) -> None:
    tiny, windows = tiny_llama(tmp_path / "m"), random_windows(3, 9)
    other = tiny_llama(tmp_path / "other", seed=1)
    settings, folder = TeacherSettings(top=4), tmp_path / "cache"
    cached(tiny, folder, windows, settings)
    assert hash_weights(tiny.checkpoint) != hash_weights(other.checkpoint)
    with pytest.raises(StateError, match=r"teacher\.json.*differs in model"):
        cached(other, folder, windows, settings)
    with pytest.raises(StateError, match="differs in windows"):
        cached(tiny, folder, windows.flip(0), settings)
    with pytest.raises(StateError, match="differs in temperature"):
        cached(tiny, folder, windows, TeacherSettings(top=4, temperature=2.0))
    names = {
        cache_folder(folder, identify(one.checkpoint, windows, settings, torch.float32))
        for one in (tiny, other)
    }
    assert len(names) == 2


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    tiny, windows = tiny_llama(tmp_path / "m"), random_windows(2, 9)
    with pytest.raises(OptionError, match="--top: 54 is more than the vocabulary's 53"):
        cached(tiny, tmp_path / "c", windows, TeacherSettings(top=54))
    with pytest.raises(OptionError, match=r"--hidden-layers: 3 is outside 0\.\.2"):
        cached(tiny, tmp_path / "c", windows, TeacherSettings(top=5, layers=(3,)))
    loud = tiny_llama(tmp_path / "loud", std=300.0)
    with pytest.raises(OptionError, match="behind layer 0 are beyond the range of fp16"):
        cached(loud, tmp_path / "d", windows, TeacherSettings(top=5, layers=(0,)))
    with pytest.raises(OptionError, match="--temperature: 0"):
        TeacherSettings(temperature=0.0)
    (tmp_path / "c").mkdir(exist_ok=True)
    (tmp_path / "c" / CACHE_FILE).write_text("{")
    with pytest.raises(StateError, match="is no teacher's cache"):
        cached(tiny, tmp_path / "c", windows, TeacherSettings(top=5))

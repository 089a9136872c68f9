"""Mask files: round trips, and refusals of files with errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import PER_LAYER
from frugal_bonsai.rewrite.mask_file import geometry, read_mask, write_mask
from rewrite.models import (
    MHA,
    keep_counts,
    open_parent,
    random_mask,
    save_llama,
    tiny_parent,
)


def test_a_mask_is_read_back(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = random_mask(parent.spec, PER_LAYER)
        write_mask(tmp_path / "mask.json", "org/dense", parent.spec, mask)
        assert read_mask(tmp_path / "mask.json", parent.spec) == mask


def test_the_file_says_what_is_removed(tmp_path: Path) -> None:
    with tiny_parent(tmp_path / "dense") as parent:
        mask = keep_counts(parent.spec, {"attention": [3, 2, 1], "ffn": [20, 18, 19]})
        write_mask(tmp_path / "mask.json", "org/dense", parent.spec, mask)
        assert json.loads((tmp_path / "mask.json").read_text(encoding="utf-8")) == {
            "format": 2,
            "model": {"name": "org/dense", "family": "llama", "geometry": geometry(parent.spec)},
            "removed": {"attention": [[], [2], [1, 2]], "ffn": [[], [18, 19], [19]]},
        }


def test_models_of_equal_geometry_share_masks(tmp_path: Path) -> None:
    """Weights, dtype, order of the config, version and a head stored twice do not matter."""
    save_llama(tmp_path / "one", tie_word_embeddings=True)
    save_llama(tmp_path / "two", tie_word_embeddings=True, seed=1, dtype=torch.bfloat16)
    path = tmp_path / "two" / "config.json"
    config = json.loads(path.read_text()) | {"transformers_version": "4.0.0", "rope_theta": 5e5}
    path.write_text(json.dumps(dict(reversed(config.items()))))
    with open_parent(tmp_path / "one") as one, open_parent(tmp_path / "two") as two:
        assert geometry(one.spec) == geometry(two.spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4},
        {"intermediate_size": 21},
        {"vocab_size": 62},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        # The same shapes of every tensor, cut into other heads.
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 30},
    ],
)
def test_models_of_another_geometry_do_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    with (
        tiny_parent(tmp_path / "one") as one,
        tiny_parent(tmp_path / "two", **changes) as two,
    ):
        assert geometry(one.spec) != geometry(two.spec)
        mask = random_mask(one.spec, PER_LAYER)
        write_mask(tmp_path / "mask.json", "org/dense", one.spec, mask)
        text = r"mask\.json: belongs to another model: 'org/dense'.*name the dense model"
        with pytest.raises(OptionError, match=text):
            read_mask(tmp_path / "mask.json", two.spec)


def _set(*keys: Any, to: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        at = values
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to
        return values

    return change


def _without(*keys: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        at = values
        for key in keys[:-1]:
            at = at[key]
        del at[keys[-1]]
        return values

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set("format", to=1), "format is 1, expected 2"),
        (_set("format", to=True), "format is True, expected 2"),
        (_without("format"), "format is None, expected 2"),
        (lambda values: [values], "format is None, expected 2"),
        (_set("kept", to={}), r"the file has unknown keys \['kept'\]; expected exactly format"),
        (_without("removed"), r"the file has no \['removed'\]"),
        (_set("model", to="org/dense"), "'model' is text, expected an object"),
        (_without("model", "geometry"), r"'model' has no \['geometry'\]"),
        (_set("model", "layout", to="x"), r"'model' has unknown keys \['layout'\]"),
        (_set("model", "geometry", to="0" * 64), "geometry 000000000000.*belongs|belongs.*000000"),
        (_set("removed", to=[]), "'removed' is a list, expected an object"),
        (_set("removed", "experts", to=[]), r"unknown keys \['experts'\].*attention, ffn"),
        (_without("removed", "ffn"), r"'removed' has no \['ffn'\]"),
        (_set("removed", "ffn", to=[[], []]), r"\['ffn'\] lists 2 layers, the model has 3"),
        (_set("removed", "ffn", to=None), r"\['ffn'\] lists null, the model has 3"),
        (_set("removed", "ffn", 1, to=7), "'ffn'.*layer 1: is a number, expected a list"),
        (_set("removed", "ffn", 1, to=[3, 20]), r"layer 1: names unit 20, .* 0\.\.19"),
        (_set("removed", "ffn", 1, to=[-1]), r"layer 1: names unit -1, .* 0\.\.19"),
        (_set("removed", "attention", 2, to=[1.0]), "layer 2: names unit 1.0, expected whole"),
        (_set("removed", "attention", 2, to=["0"]), "layer 2: names unit '0', expected whole"),
        (_set("removed", "attention", 2, to=[True]), "layer 2: names unit True, expected whole"),
        (_set("removed", "attention", 2, to=[1, 0, 1]), "layer 2: names unit 1 twice"),
        (_set("removed", "attention", 0, to=[2, 0, 1]), "layer 0 keeps none of its 3"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, change: Callable[[Any], Any], text: str) -> None:
    path = tmp_path / "mask.json"
    with tiny_parent(tmp_path / "dense") as parent:
        write_mask(path, "org/dense", parent.spec, random_mask(parent.spec, PER_LAYER))
        path.write_text(json.dumps(change(json.loads(path.read_text()))), encoding="utf-8")
        with pytest.raises(OptionError, match=rf"--mask .*mask\.json: .*{text}|{text}") as error:
            read_mask(path, parent.spec)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "mask.json").write_bytes(data)
    with (
        tiny_parent(tmp_path / "dense") as parent,
        pytest.raises(OptionError, match=rf"mask\.json: .*{text}"),
    ):
        read_mask(tmp_path / "mask.json", parent.spec)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with (
        tiny_parent(tmp_path / "dense", **MHA) as parent,
        pytest.raises(OptionError, match=r"--mask .*none\.json: cannot be read"),
    ):
        read_mask(tmp_path / "none.json", parent.spec)

"""The working copy of the layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import BIASES, CPU, Tiny, random_mask, tiny_llama

from frugal_bonsai.errors import CheckpointError, OptionError
from frugal_bonsai.int8 import dequantise_into, quantise_rows
from frugal_bonsai.model.cut import cut_tensor, slices_by_tensor
from frugal_bonsai.stream.layers import LayerStream
from frugal_bonsai.stream.store import INT8, NATIVE, LayerStore, build_store


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llama(tmp_path_factory.mktemp("store") / "m", dtype=torch.bfloat16, **BIASES)


def _layers(store: LayerStore) -> list[dict[str, torch.Tensor]]:
    with LayerStream(store, device=CPU, dtype=torch.float32) as stream:
        return [{k: v.clone() for k, v in p.items()} for _, p in stream.visit()]


@pytest.mark.parametrize("weights", [INT8, NATIVE])
@pytest.mark.parametrize("masked", [False, True])
def test_store_holds_the_alive_units(
    weights: str, masked: bool, tiny: Tiny, tmp_path: Path
) -> None:
    mask = random_mask(tiny.spec) if masked else None
    store = build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=weights, mask=mask)
    cuts = slices_by_tensor(tiny.spec.table)
    for layer, parameters in enumerate(_layers(store)):
        assert set(parameters) == set(tiny.spec.layer_tensors[layer])
        for name, found in parameters.items():
            full = tiny.spec.prefix(layer) + name
            expected = tiny.checkpoint.read(full)
            if mask is not None:
                expected = cut_tensor(expected, cuts.get(full, []), mask)
            if weights == INT8 and expected.dim() == 2:
                codes, scales = quantise_rows(expected)
                expected = dequantise_into(torch.empty(expected.shape), codes, scales)
            assert torch.equal(found, expected.float()), full


def test_refits_replace_the_output_projections(tiny: Tiny, tmp_path: Path) -> None:
    mask = random_mask(tiny.spec)
    generator = torch.Generator().manual_seed(1)
    refit = {
        g.output_weight: torch.randn(24, int(mask.columns(g).sum()), generator=generator)
        for g in tiny.spec.table.groups
    }
    store = build_store(
        tmp_path,
        tiny.checkpoint,
        tiny.spec,
        weights=NATIVE,
        mask=mask,
        refit={name: (lambda value=value: value) for name, value in refit.items()},
    )
    for layer, parameters in enumerate(_layers(store)):
        for group in tiny.spec.table.of_layer(layer):
            expected = refit[group.output_weight].bfloat16().float()
            assert torch.equal(parameters[f"{group.output}.weight"], expected)


def test_int8_layer_is_about_half_of_bf16(tmp_path: Path) -> None:
    wide = {"hidden_size": 96, "intermediate_size": 256, "head_dim": 16}
    tiny = tiny_llama(tmp_path / "m", dtype=torch.bfloat16, **wide)
    sizes = {
        weights: build_store(
            tmp_path / weights, tiny.checkpoint, tiny.spec, weights=weights
        ).layer_bytes(0)
        for weights in (INT8, NATIVE)
    }
    assert 0.5 < sizes[INT8] / sizes[NATIVE] < 0.53


def test_dead_units_are_not_stored(tiny: Tiny, tmp_path: Path) -> None:
    mask = random_mask(tiny.spec, off=0.6)
    dense = build_store(tmp_path / "a", tiny.checkpoint, tiny.spec, weights=NATIVE)
    alive = build_store(tmp_path / "b", tiny.checkpoint, tiny.spec, weights=NATIVE, mask=mask)
    saved = sum(dense.layer_bytes(i) - alive.layer_bytes(i) for i in range(3))
    assert saved == 2 * mask.removed_parameters()


def test_rebuilding_does_not_disturb_an_open_store(tiny: Tiny, tmp_path: Path) -> None:
    """Files are replaced, not overwritten: the round before may still read its own."""
    first = build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=NATIVE)
    before = _layers(first)
    mask = random_mask(tiny.spec)
    second = build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=NATIVE, mask=mask)
    again = _layers(first)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, again, strict=True) for k in a)
    kept = mask.kept(tiny.spec.table.groups[1])
    assert _layers(second)[0]["mlp.down_proj.weight"].shape == (24, kept)
    first.close()
    second.close()


def test_unknown_weights(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--weights: 'int4' is not one of int8, native"):
        build_store(tmp_path / "s", tiny.checkpoint, tiny.spec, weights="int4")
    assert not (tmp_path / "s").exists()


def test_missing_and_truncated_layer_files(tiny: Tiny, tmp_path: Path) -> None:
    build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=INT8).close()
    file = tmp_path / "layer_00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="layer_00001"):
        LayerStore(tmp_path, 3)
    file.unlink()
    with pytest.raises(CheckpointError, match="layer_00001"):
        LayerStore(tmp_path, 3)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny = tiny_llama(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        build_store(tmp_path / "s", tiny.checkpoint, tiny.spec, weights=INT8, check_finite=True)


def test_progress_hears_of_every_layer(tiny: Tiny, tmp_path: Path) -> None:
    heard: list[object] = []

    class Listener:
        def round(self, number: int, rounds: int, sparsity: float) -> None: ...
        def note(self, text: str) -> None: ...

        def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
            heard.append((name, steps))

        def step(self, detail: str = "") -> None:
            heard.append(detail)

    build_store(tmp_path, tiny.checkpoint, tiny.spec, weights=INT8, progress=Listener())
    assert heard == [("writing the working store", 3), "layer 0", "layer 1", "layer 2"]


@pytest.mark.parametrize(("free", "drop"), [(0, True), (2**40, False)])
def test_a_store_that_does_not_fit_into_free_memory_is_dropped_behind_the_reader(
    free: int, drop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_llama(tmp_path / "m")
    monkeypatch.setattr("frugal_bonsai.stream.store.free_memory_bytes", lambda: free)
    store = build_store(tmp_path / "s", tiny.checkpoint, tiny.spec, weights=INT8)
    assert [file.drop_behind for file in store._files] == [drop] * 3
    store.close()

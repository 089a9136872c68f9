"""The masked sweep against Hugging Face's own forward."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BIASES,
    VARIANTS,
    Tiny,
    hugging_face_losses,
    random_mask,
    random_windows,
    relative,
    tiny_llama,
)

from frugal_bonsai.model.units import KeepMask, UnitGroup
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.hidden import HiddenStates
from frugal_bonsai.stream.layers import Parameters
from frugal_bonsai.stream.source import Record
from frugal_bonsai.stream.store import INT8, NATIVE, build_store

WINDOWS, WINDOW = 7, 12


class ManyMasks:
    """One keep mask for every window, over dense columns."""

    def __init__(self, masks: list[KeepMask]) -> None:
        self.masks = masks

    def columns(self, group: UnitGroup, items: slice) -> torch.Tensor | None:
        return torch.stack([mask.columns(group) for mask in self.masks[items]])

    def impute(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        return None


def _losses(tiny: Tiny, tokens: torch.Tensor, *, masker: Any = None, **limits: int) -> torch.Tensor:
    engine = tiny.engine(**limits)
    with engine.native() as stream:
        return engine.sweep.losses(stream, engine.head, tokens, masker=masker)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"micro_batch": 1, "head_rows": 10, "head_tokens": 1},
        {"micro_batch": 3, "windows_in_flight": 5, "head_rows": 52},
        {"micro_batch": 100, "windows_in_flight": 2, "head_tokens": 25},
    ],
    ids=["whole", "ones", "waves", "pairs"],
)
def test_losses_equal_hugging_faces(
    changes: dict[str, Any], limits: dict[str, int], tmp_path: Path
) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m", **changes), random_windows(WINDOWS, WINDOW)
    found = _losses(tiny, tokens, **limits)
    assert found.shape == (WINDOWS, WINDOW - 1)
    assert relative(found, hugging_face_losses(tiny.hugging_face(), tokens)) < 1e-5


def test_bf16_checkpoint_computed_in_fp32(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", dtype=torch.bfloat16, **BIASES)
    tokens = random_windows(WINDOWS, WINDOW)
    expected = hugging_face_losses(tiny.hugging_face(), tokens)
    assert relative(_losses(tiny, tokens), expected) < 1e-5


def test_bf16_compute_is_near(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "m", dtype=torch.bfloat16, std=0.1)
    tokens = random_windows(WINDOWS, WINDOW)
    engine = tiny.engine(dtype=torch.bfloat16)
    with engine.native() as stream:
        found = engine.losses(stream, tokens, "bf16")
    expected = hugging_face_losses(tiny.hugging_face(), tokens)
    assert 1e-6 < relative(found, expected) < 0.05
    assert found.dtype == torch.float32


def test_logits_equal_hugging_faces(tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m", **BIASES), random_windows(3, WINDOW)
    engine = tiny.engine(head_rows=20)
    with engine.native() as stream, torch.inference_mode():
        hidden = engine.sweep.run(stream, tokens)
        found = engine.head.logits(hidden.read(slice(0, 3)))
        expected = tiny.hugging_face()(tokens).logits
    assert relative(found, expected) < 1e-5


def test_windows_loss_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m"), random_windows(8, WINDOW)
    others = tokens.clone()
    others[[0, 1, 2, 4, 5, 6, 7]] = random_windows(7, WINDOW, seed=99)
    first, second = _losses(tiny, tokens), _losses(tiny, others)
    assert torch.equal(first[3], second[3])
    assert not torch.equal(first[2], second[2])


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8])
def test_windows_loss_does_not_depend_on_the_micro_batch(micro_batch: int, tmp_path: Path) -> None:
    """Up to the rounding of matrix products of other shapes."""
    tiny, tokens = tiny_llama(tmp_path / "m"), random_windows(8, WINDOW)
    whole = _losses(tiny, tokens, micro_batch=8)
    torch.testing.assert_close(
        _losses(tiny, tokens, micro_batch=micro_batch), whole, rtol=1e-5, atol=1e-5
    )
    alone = torch.cat([_losses(tiny, tokens[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("waves", [1000, 3])
def test_masked_sweep_equals_a_model_without_the_units(
    changes: dict[str, Any], waves: int, tmp_path: Path
) -> None:
    """Every window has a mask of its own, and no mask leaks into another micro-batch or wave."""
    tiny, tokens = tiny_llama(tmp_path / "m", **changes), random_windows(5, WINDOW)
    masks = [random_mask(tiny.spec, seed=i, off=0.15 * (i + 1)) for i in range(4)]
    masks.append(KeepMask(tiny.spec.table))
    found = _losses(tiny, tokens, masker=ManyMasks(masks), micro_batch=2, windows_in_flight=waves)
    for mask, window, loss in zip(masks, tokens, found, strict=True):
        expected = hugging_face_losses(tiny.hugging_face(mask), window[None])[0]
        assert relative(loss, expected) < 1e-5


@pytest.mark.parametrize("weights", [NATIVE, INT8])
def test_store_without_dead_units_equals_the_masked_parent(weights: str, tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m", **BIASES), random_windows(WINDOWS, WINDOW)
    mask = random_mask(tiny.spec, off=0.5)
    engine = tiny.engine()
    store = build_store(tmp_path / "s", tiny.checkpoint, tiny.spec, weights=weights, mask=mask)
    with engine.stream(store) as small, engine.stream(tiny.source(mask=mask)) as parent:
        found = engine.losses(small, tokens, "store")
        expected = engine.losses(parent, tokens, "masked parent")
    dense = _losses(tiny, tokens)
    if weights == NATIVE:
        assert relative(found, expected) < 1e-5
    else:
        assert 1e-6 < relative(found, expected) < 0.1
    assert relative(dense, expected) > 0.2, "the mask must matter"
    assert relative(expected, hugging_face_losses(tiny.hugging_face(mask), tokens)) < 1e-5


class CountingSource:
    def __init__(self, inner: Any) -> None:
        self.inner, self.reads = inner, Counter[int]()

    @property
    def layers(self) -> int:
        return int(self.inner.layers)

    def layer_bytes(self, layer: int) -> int:
        return int(self.inner.layer_bytes(layer))

    def records(self, layer: int) -> tuple[Record, ...]:
        return tuple(self.inner.records(layer))

    def announce(self, layer: int) -> None:
        self.inner.announce(layer)

    def read(self, layer: int, buffer: torch.Tensor) -> None:
        self.reads[layer] += 1
        self.inner.read(layer, buffer)


@pytest.mark.parametrize(("in_flight", "waves"), [(1000, 1), (7, 1), (3, 3)])
def test_each_layer_is_read_once_a_wave_whatever_the_masks(
    in_flight: int, waves: int, tmp_path: Path
) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m"), random_windows(WINDOWS, WINDOW)
    masker = ManyMasks([random_mask(tiny.spec, seed=i) for i in range(WINDOWS)])
    engine = tiny.engine(micro_batch=1, windows_in_flight=in_flight)
    source = CountingSource(tiny.source())
    with engine.stream(source) as stream:
        engine.sweep.losses(stream, engine.head, tokens, masker=masker)
    assert source.reads == {0: waves, 1: waves, 2: waves}
    assert engine.sweep.forward_tokens == WINDOWS * WINDOW


class RecordingTap:
    def __init__(self) -> None:
        self.seen: dict[UnitGroup, list[torch.Tensor]] = {}
        self.ends: list[tuple[int, set[str]]] = []

    def inputs(self, group: UnitGroup, input_BSC: torch.Tensor) -> None:
        self.seen.setdefault(group, []).append(input_BSC.clone())

    def end_layer(self, layer: int, parameters: Parameters) -> None:
        assert len(self.seen) == 2 * (layer + 1), "all windows must have passed"
        self.ends.append((layer, set(parameters)))


@pytest.mark.parametrize("masked", [False, True])
def test_tap_sees_the_inputs_of_the_output_projections(masked: bool, tmp_path: Path) -> None:
    tiny, tokens = tiny_llama(tmp_path / "m"), random_windows(WINDOWS, WINDOW)
    mask = random_mask(tiny.spec) if masked else None
    masker = ManyMasks([mask] * WINDOWS) if mask else None
    engine, tap = tiny.engine(micro_batch=2), RecordingTap()
    with engine.native() as stream:
        engine.sweep.run(stream, tokens, masker=masker, tap=tap)
    assert [layer for layer, _ in tap.ends] == [0, 1, 2]
    assert tap.ends[1][1] == set(tiny.spec.layer_tensors[1])
    model = tiny.hugging_face(mask)
    captured: dict[str, torch.Tensor] = {}
    for group in tiny.spec.table.groups:
        model.model.layers[group.layer].get_submodule(group.output).register_forward_pre_hook(
            lambda _, args, name=group.output_weight: captured.__setitem__(name, args[0])
        )
    with torch.no_grad():
        model(tokens)
    for group, parts in tap.seen.items():
        assert [len(p) for p in parts] == [2, 2, 2, 1]
        assert relative(torch.cat(parts), captured[group.output_weight]) < 1e-5


def test_progress_names_the_sweep_and_every_layer(tmp_path: Path) -> None:
    heard: list[object] = []

    class Listener:
        def round(self, number: int, rounds: int, sparsity: float) -> None: ...
        def note(self, text: str) -> None: ...

        def sweep(self, name: str, steps: int, tokens_per_step: int) -> None:
            heard.append((name, steps, tokens_per_step))

        def step(self, detail: str = "") -> None:
            heard.append(detail)

    tiny = tiny_llama(tmp_path / "m")
    engine = tiny.engine(progress=Listener(), windows_in_flight=4)
    with engine.native() as stream:
        engine.losses(stream, random_windows(6, 10), "held-out")
    layers = ["layer 0", "layer 1", "layer 2"]
    assert heard == [("held-out", 3, 40), *layers, ("held-out", 3, 20), *layers]


def test_a_wave_is_let_go_before_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts one wave's hidden states."""
    engine = tiny_llama(tmp_path / "m").engine(windows_in_flight=2)
    run, seen = Sweep.run, list[weakref.ref[HiddenStates]]()

    def watched(self: Sweep, *args: Any, **kwargs: Any) -> HiddenStates:
        assert [ref() for ref in seen] == [None] * len(seen)
        hidden = run(self, *args, **kwargs)
        seen.append(weakref.ref(hidden))
        return hidden

    monkeypatch.setattr(Sweep, "run", watched)
    with engine.native() as stream:
        engine.losses(stream, random_windows(6, 9), "test")
    assert len(seen) == 3

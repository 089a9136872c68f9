"""Whole layers: their influence as Hugging Face's model has it, and how many of them go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BIASES, Tiny, random_windows, tiny_llama

from frugal_bonsai.bonsai.importance.whole import measure_whole
from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.bonsai.search import Search, SearchResult
from frugal_bonsai.bonsai.selection.reach import can_go_nearer, check_reachable
from frugal_bonsai.bonsai.selection.whole import drop_layers
from frugal_bonsai.bonsai.state import StateFolder
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.drop import removed_parameters
from frugal_bonsai.model.layout import LAYOUTS, PER_LAYER, layout_rules
from frugal_bonsai.model.units import KeepMask
from frugal_bonsai.progress import Silent

LAYERS = 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("depth") / "m"
    return tiny_llama(folder, std=0.2, num_hidden_layers=LAYERS, **BIASES)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return random_windows(6, 12)


@pytest.fixture(scope="module")
def influence(tiny: Tiny, tokens: torch.Tensor) -> list[float]:
    """``1 - cos`` between each layer's input and output in Hugging Face's model."""
    model, found = tiny.hugging_face(), []
    for layer in model.model.layers:

        def keep(_: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(args[0].double(), after.double(), dim=-1)
            found.append(float(1 - cosine.mean()))

        layer.register_forward_hook(keep)
    with torch.no_grad():
        model(tokens)
    return found


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_influence_is_one_minus_the_cosine_of_input_and_output(
    micro_batch: int, tiny: Tiny, tokens: torch.Tensor, influence: list[float]
) -> None:
    engine, mask = tiny.engine(micro_batch=micro_batch), KeepMask(tiny.spec.table)
    with engine.stream(tiny.source()) as stream:
        importance = measure_whole("similarity", engine.sweep, stream, tokens, mask)
    assert importance.name == "similarity" and engine.sweep.forward_tokens == tokens.numel()
    for group in tiny.spec.table.groups:
        scores = importance.score_N[tiny.spec.table.span(group)]
        torch.testing.assert_close(
            scores, torch.full_like(scores, influence[group.layer]), rtol=1e-4, atol=1e-6
        )


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _search(
    tiny: Tiny, tokens: torch.Tensor, folder: Path, layout: str, progress: Any, sparsity: float
) -> SearchResult:
    settings = make_settings("depth", {"sparsity": sparsity, "weights": "native"})
    return Search(
        tiny.engine(progress=progress),
        settings,
        layout_rules(tiny.spec, layout),
        tokens,
        state=StateFolder(folder / "state", settings.to_json()),
        work=folder / "work",
        keep_inputs=True,
    ).run(resume=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sparsity", "count"), [(0.15, 1), (0.27, 1), (0.33, 2), (0.6, 3)])
def test_the_least_influential_layers_go_as_many_as_are_nearest(
    layout: str,
    sparsity: float,
    count: int,
    tiny: Tiny,
    tokens: torch.Tensor,
    influence: list[float],
    tmp_path: Path,
) -> None:
    progress = _Notes()
    found = _search(tiny, tokens, tmp_path, layout, progress, sparsity)
    ranked = sorted(range(LAYERS), key=lambda layer: influence[layer])
    assert found.mask.dropped_layers() == tuple(sorted(ranked[:count]))
    assert len(found.rounds) == 1 and found.refits == {}
    assert found.forward_tokens == tokens.numel()
    [report] = found.rounds
    for kind, dense in KeepMask(tiny.spec.table).counts().items():
        expected = [0 if at in ranked[:count] else n for at, n in enumerate(dense)]
        assert report["kept"][kind] == expected
    assert report["sparsity"] == pytest.approx(count / LAYERS, abs=0.02)
    [note] = progress.notes
    assert note == report["note"] and f"nearest to {sparsity:.1%}" in note
    assert f"layers {', '.join(map(str, sorted(ranked[:count])))} of 5" in note


def test_layers_that_have_been_cut_already_count_what_they_have(tiny: Tiny) -> None:
    """Layer 0 is small: with it gone the target is farther than with the next one too."""
    mask = KeepMask(tiny.spec.table)
    for group in tiny.spec.table.of_layer(0):
        mask.of(group)[1:] = False
    score_N = torch.zeros(tiny.spec.table.units, dtype=torch.float64)
    for group in tiny.spec.table.groups:
        score_N[tiny.spec.table.span(group)] = float(group.layer)
    layer = sum(g.count * g.unit_parameters for g in tiny.spec.table.of_layer(1))
    target = mask.removed_parameters() + layer
    assert drop_layers(mask, score_N, target).dropped_layers() == (0, 1)
    assert drop_layers(mask, score_N, mask.removed_parameters()).dropped_layers() == ()


def test_what_goes_with_a_layer_besides_its_units_is_counted(tiny: Tiny) -> None:
    mask = KeepMask(tiny.spec.table).without_layers([1, 3])
    per_layer = tiny.spec.block_parameters // LAYERS
    assert removed_parameters(tiny.spec, mask) == 2 * per_layer
    # Two norms of 24, and the biases of o_proj and down_proj.
    assert 2 * per_layer - mask.removed_parameters() == 2 * 4 * 24


def test_sparsity_below_half_a_layer_or_beyond_all_but_one_is_refused(tiny: Tiny) -> None:
    mask, blocks = KeepMask(tiny.spec.table), tiny.spec.block_parameters
    rules = layout_rules(tiny.spec, PER_LAYER)
    for sparsity in (0.11, 0.5, 0.77):
        check_reachable(mask, sparsity, rules, blocks, "layers")
    for sparsity in (0.05, 0.9):
        with pytest.raises(OptionError, match=r"cannot be had from whole layers: one of the 5 is"):
            check_reachable(mask, sparsity, rules, blocks, "layers")
    assert can_go_nearer(mask, round(0.2 * blocks), rules, "layers")
    assert not can_go_nearer(mask.without_layers([2]), round(0.2 * blocks), rules, "layers")

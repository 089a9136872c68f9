"""Bias compensation: what goes leaves its mean output behind, in the search and in the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BIASES,
    Tiny,
    random_windows,
    sampled_windows,
    tiny_family,
    tiny_llama,
    zero_units,
)

from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.bonsai.search import Search, SearchResult
from frugal_bonsai.bonsai.state import StateFolder
from frugal_bonsai.model.biases import output_bias
from frugal_bonsai.model.layout import PADDED, PER_LAYER, UNIFORM, layout_rules

WINDOWS, WINDOW = 24, 16


@pytest.fixture(scope="module", params=[False, True], ids=["no biases", "biases"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("bias") / "m"
    return tiny_llama(folder, std=0.35, **(BIASES if request.param else {}))


@pytest.fixture(scope="module")
def tokens(tiny: Tiny) -> torch.Tensor:
    return sampled_windows(tiny.hugging_face(), WINDOWS, WINDOW)


def _search(
    tiny: Tiny, tokens: torch.Tensor, folder: Path, layout: str = PER_LAYER, **options: Any
) -> SearchResult:
    settings = make_settings("fluctuation", {"sparsity": 0.3, "weights": "native", **options})
    return Search(
        tiny.engine(micro_batch=8),
        settings,
        layout_rules(tiny.spec, layout),
        tokens,
        state=StateFolder(folder / "state", settings.to_json()),
        work=folder / "work",
        keep_inputs=True,
    ).run(resume=False)


def _own_bias(tiny: Tiny, name: str) -> torch.Tensor:
    tensors = tiny.checkpoint.tensors
    return tiny.checkpoint.read(name) if name in tensors else torch.zeros(tiny.spec.hidden)


def _mean_inputs(tiny: Tiny, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every output projection in Hugging Face's dense model, by its weight's name."""
    model, means = tiny.hugging_face(), {}
    for group in tiny.spec.table.groups:

        def keep(_: Any, args: tuple[torch.Tensor, ...], name: str = group.output_weight) -> None:
            means[name] = args[0].flatten(0, 1).mean(0)

        projection = model.model.layers[group.layer].get_submodule(group.output)
        projection.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(tokens)
    return means


def test_weights_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2 keeps [input, output]; its output projections have biases of their own."""
    tiny = tiny_family(tmp_path / "m", "gpt2")
    tokens, means = random_windows(8, 12), {}
    found = _search(tiny, tokens, tmp_path, PADDED, sparsity=0.2)
    model = tiny.hugging_face()
    for group in tiny.spec.table.groups:

        def keep(_: Any, args: tuple[torch.Tensor, ...], name: str = group.output_weight) -> None:
            means[name] = args[0].flatten(0, 1).mean(0)

        module = model.transformer.h[group.layer].get_submodule(group.output)
        module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(tokens)
    gone_units = 0
    for group in tiny.spec.table.groups:
        gone = ~found.mask.columns(group)
        gone_units += int(gone.sum())
        weight = tiny.checkpoint.read(group.output_weight)
        left = weight[:, gone] @ means[group.output_weight][gone]
        expected = _own_bias(tiny, output_bias(group)) + left
        torch.testing.assert_close(
            found.refits[output_bias(group)](), expected, rtol=1e-3, atol=1e-4
        )
    assert gone_units


@pytest.mark.parametrize("layout", [PER_LAYER, UNIFORM])
def test_what_goes_leaves_its_mean_output(
    layout: str, tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    found = _search(tiny, tokens, tmp_path, layout)
    assert len(found.rounds) == 1 and found.forward_tokens == WINDOWS * WINDOW
    means, groups = _mean_inputs(tiny, tokens), tiny.spec.table.groups
    assert set(found.refits) == set(map(output_bias, groups))
    for group in groups:
        gone = ~found.mask.columns(group)
        weight = tiny.checkpoint.read(group.output_weight)
        left = weight[:, gone] @ means[group.output_weight][gone]
        expected = _own_bias(tiny, output_bias(group)) + left
        torch.testing.assert_close(
            found.refits[output_bias(group)](), expected, rtol=1e-3, atol=1e-4
        )
    assert any(bool((~found.mask.of(g)).any()) for g in groups)


def test_masked_parent_with_the_biases_is_hugging_faces(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The same in Hugging Face's model: its units zeroed, the mean outputs added by hooks."""
    found = _search(tiny, tokens, tmp_path)
    engine = tiny.engine()
    with engine.stream(tiny.source(mask=found.mask, refit=found.refits)) as stream:
        losses = engine.losses(stream, tokens, "masked parent")
    model = tiny.hugging_face()
    zero_units(model, tiny.spec, found.mask)
    for group in tiny.spec.table.groups:
        name = output_bias(group)
        more = found.refits[name]() - _own_bias(tiny, name)

        def add(_: Any, __: Any, output: torch.Tensor, more: torch.Tensor = more) -> torch.Tensor:
            return output + more

        model.model.layers[group.layer].get_submodule(group.output).register_forward_hook(add)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-3, atol=1e-3)


def test_rounds_add_up_and_each_is_measured_with_the_biases_before_it(
    tiny: Tiny, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The first layer's inputs do not change, so its biases are those of all that has gone."""
    found = _search(tiny, tokens, tmp_path, step=0.1)
    assert len(found.rounds) >= 3
    means = _mean_inputs(tiny, tokens)
    group = tiny.spec.table.groups[0]
    gone = ~found.mask.columns(group)
    weight = tiny.checkpoint.read(group.output_weight)
    expected = (
        _own_bias(tiny, output_bias(group)) + weight[:, gone] @ means[group.output_weight][gone]
    )
    torch.testing.assert_close(found.refits[output_bias(group)](), expected, rtol=1e-3, atol=1e-4)


def test_the_mean_brings_back_loss(tiny: Tiny, tokens: torch.Tensor, tmp_path: Path) -> None:
    """Inputs of down_proj have means that are not zero: without them the model is worse."""
    losses = []
    for bias in (True, False):
        found = _search(tiny, tokens, tmp_path / str(bias), bias=bias, step=0.1)
        engine = tiny.engine()
        with engine.stream(tiny.source(mask=found.mask, refit=found.refits)) as stream:
            losses.append(float(engine.losses(stream, tokens, "x").mean()))
    assert losses[0] < losses[1]

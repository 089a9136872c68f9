"""The scale of the logits: found by convexity, folded into the final norm, as dense asks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import Tiny, random_windows, sampled_windows, tiny_llama

from frugal_bonsai.bonsai.reconstruction.logit_scale import (
    convex_minimum,
    find_logit_scale,
    scaled_norm,
)
from frugal_bonsai.stream.forward import Sweep
from frugal_bonsai.stream.hidden import HiddenStates


@pytest.mark.parametrize("best", [0.37, 0.735, 0.9, 1.0, 1.04, 1.62])
def test_minimum_of_a_convex_function_is_found_in_few_values(best: float) -> None:
    seen: list[float] = []

    def value(scale: float) -> float:
        seen.append(scale)
        return (scale - best) ** 2 + 3

    assert convex_minimum(value) == pytest.approx(best, abs=1e-6)
    assert len(seen) == len(set(seen)) <= 3 + round(abs(best - 1) / 0.1)


def test_a_function_that_falls_for_ever_ends() -> None:
    assert 0.1 < convex_minimum(lambda scale: scale) < 0.4
    assert 1.9 < convex_minimum(lambda scale: -scale) < 2.2


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, torch.Tensor]:
    """A peaked model and text of its own: its logits are right as they are."""
    tiny = tiny_llama(tmp_path_factory.mktemp("scale") / "m", std=0.35)
    return tiny, sampled_windows(tiny.hugging_face(), 48, 16)


def _behind_the_layers(tiny: Tiny, tokens_NS: torch.Tensor) -> tuple[Sweep, HiddenStates]:
    engine = tiny.engine()
    with engine.stream(tiny.source()) as stream:
        return engine.sweep, engine.sweep.run(stream, tokens_NS)


def _noisy(hidden: HiddenStates, sweep: Sweep, tokens_NS: torch.Tensor) -> HiddenStates:
    """Hidden states that have lost half of what they knew."""
    generator, everything = torch.Generator().manual_seed(0), slice(0, len(tokens_NS))
    known_NSH = hidden.read(everything)
    noise_NSH = torch.randn(known_NSH.shape, generator=generator) * known_NSH.std()
    noisy = sweep.hidden_states(tokens_NS)
    noisy.write(everything, known_NSH + noise_NSH)
    return noisy


def test_a_model_that_knows_less_is_less_sure(sampled: tuple[Tiny, torch.Tensor]) -> None:
    tiny, tokens = sampled
    sweep, dense = _behind_the_layers(tiny, tokens)
    pruned, head = _noisy(dense, sweep, tokens), tiny.engine().head
    kept_NSH, before = dense.read(slice(0, len(tokens))).clone(), sweep.forward_tokens
    scale = find_logit_scale(sweep, head, dense, pruned, tokens)
    assert 0.3 < scale < 0.9
    assert torch.equal(dense.read(slice(0, len(tokens))), kept_NSH)
    assert sweep.forward_tokens > before
    plain = float(head.nll(pruned, tokens).mean())
    scaled = float(head.nll(pruned, tokens, scale=scale, normed=True).mean())
    assert scaled < plain - 0.05


def test_the_dense_model_is_right_as_it_is(sampled: tuple[Tiny, torch.Tensor]) -> None:
    """Also on text that it is far too sure of: that is not pruning's doing."""
    tiny, tokens = sampled
    foreign = random_windows(48, 16)
    for windows in (tokens, foreign):
        sweep, dense = _behind_the_layers(tiny, windows)
        found = find_logit_scale(sweep, tiny.engine().head, dense, dense, windows)
        assert found == pytest.approx(1.0, abs=1e-6)


def test_what_the_text_asks_of_the_dense_model_is_divided_out(
    sampled: tuple[Tiny, torch.Tensor],
) -> None:
    tiny, _ = sampled
    foreign = random_windows(48, 16)
    sweep, dense = _behind_the_layers(tiny, foreign)
    head, pruned = tiny.engine().head, _noisy(dense, sweep, foreign)
    scale = find_logit_scale(sweep, head, dense, pruned, foreign)
    head.nll(pruned, foreign)
    own = convex_minimum(
        lambda s: float(head.nll(pruned, foreign, scale=s, normed=True).double().mean())
    )
    assert own < scale <= 1


def test_folded_into_the_norm_it_scales_the_loss_of_the_head(
    sampled: tuple[Tiny, torch.Tensor],
) -> None:
    tiny, tokens = sampled
    hidden, again = (_behind_the_layers(tiny, tokens)[1] for _ in range(2))
    engine = tiny.engine()
    norm = scaled_norm(engine.checkpoint, engine.spec, 0.7)
    assert list(norm) == ["model.norm.weight"]
    plain_NS = engine.head.nll(hidden, tokens)
    wanted_NS = engine.head.nll(hidden, tokens, scale=0.7, normed=True)
    engine.skeleton.replace_norm(norm)
    assert torch.allclose(engine.head.nll(again, tokens), wanted_NS, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain_NS, wanted_NS, rtol=1e-2, atol=1e-2)

"""Experts: what masks ask of them, how the cut takes their channels, which go whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Tiny, open_tiny, random_windows, tiny_family
from torch.nn.functional import linear

from frugal_bonsai.bonsai.importance.scores import ImportanceBuilder
from frugal_bonsai.bonsai.importance.whole import measure_whole
from frugal_bonsai.bonsai.masks.design import draw_group_masks, draw_pools
from frugal_bonsai.bonsai.masks.estimators import CurveEstimator
from frugal_bonsai.bonsai.reconstruction.layer_pass import ReconstructionOptions
from frugal_bonsai.bonsai.reconstruction.reconstruct import Reconstruction
from frugal_bonsai.bonsai.selection.curves import Curve
from frugal_bonsai.bonsai.selection.cut import cut
from frugal_bonsai.bonsai.selection.whole import check_experts, drop_experts
from frugal_bonsai.errors import OptionError
from frugal_bonsai.model.layout import PADDED, PER_LAYER, LayoutRules, layout_rules
from frugal_bonsai.model.units import FFN, KeepMask


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_family(tmp_path_factory.mktemp("experts") / "dense", "olmoe")


def curves_of(mask: KeepMask, score_N: torch.Tensor) -> tuple[Curve, ...]:
    pools = draw_pools(mask, score_N, 1.0)
    zero = torch.zeros(1, dtype=torch.float64)
    return tuple(
        Curve(group=group, order=m, loss=torch.cat([zero, score_N[m].cumsum(0)]))
        for group, m in zip(mask.table.groups, pools.members, strict=True)
    )


def rules_of(tiny: Tiny, layout: str) -> LayoutRules:
    return layout_rules(tiny.spec, layout, tile=1)


def test_a_layers_experts_lose_equally_many_channels_each_its_own(tiny: Tiny) -> None:
    mask = KeepMask(tiny.spec.table)
    score_N = torch.rand(mask.table.units, generator=torch.Generator().manual_seed(1)).double()
    first = mask.table.groups[1]
    score_N[mask.table.span(first)] *= 0.01  # the cheapest expert by far
    target = 40 * first.unit_parameters
    together = cut(mask, curves_of(mask, score_N), target, rules_of(tiny, PER_LAYER))
    for layer in (0, 1):
        experts = [g for g in mask.table.of_layer(layer) if g.kind == FFN]
        assert len({together.kept(group) for group in experts}) == 1
        for group in experts:
            gone = score_N[mask.table.span(group)][~together.of(group)]
            kept = score_N[mask.table.span(group)][together.of(group)]
            assert not len(gone) or gone.max() <= kept.min()
    assert target - 4 * first.unit_parameters < together.removed_parameters() <= target
    alone = cut(mask, curves_of(mask, score_N), target, rules_of(tiny, PADDED))
    assert alone.removed_parameters() == target
    assert alone.kept(first) == 1 < min(alone.kept(group) for group in mask.table.groups[2:])


def test_masks_ask_about_a_layers_experts_together(tiny: Tiny) -> None:
    mask, table = KeepMask(tiny.spec.table), tiny.spec.table
    generator = torch.Generator().manual_seed(2)
    score_N = torch.rand(table.units, generator=generator).double()
    pools = draw_pools(mask, score_N, 0.5, rules_of(tiny, PER_LAYER))
    draw = partial(draw_group_masks, pools, expected_share=0.1, generator=generator)
    curve_G = torch.tensor([2 * group.layer + (group.kind == FFN) for group in table.groups])
    estimator = CurveEstimator(pools, curve_G, draw, generator)
    off_MG = estimator.draw(8).off_MG
    experts = [[table.position(g) for g in table.of_layer(at) if g.kind == FFN] for at in (0, 1)]
    for mine in experts:
        assert (off_MG[:, mine] == off_MG[:, mine[:1]]).all()
    assert (off_MG[:, experts[0][0]] != off_MG[:, experts[1][0]]).any()
    # Two curves a layer: attention's and its experts', of which each has its part.
    relevance_K = torch.tensor([0.0, 4.0, 0.0, 8.0, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    curves = estimator.curves(relevance_K)
    ends = [sum(float(curves[at].loss[-1]) for at in mine) for mine in experts]
    assert ends == pytest.approx([6.0, 9.0])
    cut_mask = mask.without(torch.cat([pools.members[at] for at in experts[1]]))
    assert estimator.loss(relevance_K, cut_mask) == pytest.approx(9.0)


@torch.no_grad()
def expected_saliency(tiny: Tiny, tokens_NS: torch.Tensor) -> dict[tuple[int, int], float]:
    """Mean of the router's weight times the norm of what an expert gives, from Hugging Face's."""
    model, found = tiny.hugging_face(), dict[tuple[int, int], float]()

    def hook(layer: int) -> Any:
        def see(experts: Any, args: Any) -> None:
            hidden_TH, chosen_TK, weight_TK = args
            for expert in range(4):
                tokens, at = (chosen_TK == expert).nonzero(as_tuple=True)
                gate, up = linear(hidden_TH[tokens], experts.gate_up_proj[expert]).chunk(2, -1)
                given = linear(experts.act_fn(gate) * up, experts.down_proj[expert])
                norms = weight_TK[tokens, at] * given.norm(dim=-1)
                found[layer, expert] = float(norms.mean()) if len(tokens) else 0.0

        return see

    for layer in (0, 1):
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(hook(layer))
    model(tokens_NS)
    return found


def test_an_experts_score_is_reaps(tiny: Tiny) -> None:
    tokens_NS = random_windows(6, 13)
    engine, mask = tiny.engine(micro_batch=2), KeepMask(tiny.spec.table)
    with engine.native() as stream:
        importance = measure_whole("reap", engine.sweep, stream, tokens_NS, mask)
    expected = expected_saliency(tiny, tokens_NS)
    for group in mask.table.groups:
        scores = importance.score_N[mask.table.span(group)]
        wanted = 0.0 if group.expert is None else expected[group.layer, group.expert]
        assert scores.tolist() == pytest.approx([wanted] * group.count, rel=1e-4)


def test_the_least_salient_experts_go_from_every_layer(tiny: Tiny) -> None:
    mask, table = KeepMask(tiny.spec.table), tiny.spec.table
    score_N = torch.ones(table.units, dtype=torch.float64)
    order = {0: [2, 0, 1, 3], 1: [1, 3, 2, 0]}
    for group in table.groups:
        if group.expert is not None:
            score_N[table.span(group)] = 1.0 + order[group.layer].index(group.expert)
    one = 2 * (20 * 3 * 24 + 24)
    for target, gone in ((0.4 * one, 0), (0.6 * one, 1), (2.1 * one, 2), (9 * one, 3)):
        dropped = drop_experts(mask, score_N, round(target), tiny.spec)
        for layer in (0, 1):
            assert set(dropped.dropped_experts(layer)) == set(order[layer][:gone])
        assert dropped.removed_parameters() == gone * one


def test_shares_that_whole_experts_cannot_give_are_refused(tiny: Tiny) -> None:
    mask, blocks = KeepMask(tiny.spec.table), tiny.spec.block_parameters
    one = 2 * (20 * 3 * 24 + 24) / blocks
    check_experts(mask, 0.51 * one, tiny.spec)
    check_experts(mask, 3 * one, tiny.spec)
    for sparsity in (0.49 * one, 3.01 * one):
        with pytest.raises(OptionError, match="cannot be had from whole experts"):
            check_experts(mask, sparsity, tiny.spec)


def test_an_expert_without_tokens_keeps_its_weights(tmp_path: Path) -> None:
    """Of two pairs of opposite router rows two are always positive: a row of zeros never wins."""
    folder = tmp_path / "dense"
    tiny_family(folder, "mixtral", num_local_experts=5).checkpoint.close()
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        rows = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        rows[1], rows[3], rows[4] = -rows[0], -rows[2], 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny, tokens_NS = open_tiny(folder), random_windows(16, 13)
    mask, engine = KeepMask(tiny.spec.table), tiny.engine()
    builder = ImportanceBuilder("exact", mask, damping=1e-3, generator=torch.Generator())
    with engine.native() as stream:
        engine.sweep.run(stream, tokens_NS, tap=builder)
    score_N = builder.build().score_N
    for group in tiny.spec.table.groups:
        assert bool((score_N[tiny.spec.table.span(group)] > 0).all()) == (group.expert != 4)

    saved: dict[str, torch.Tensor] = {}

    def save(_: int, refits: dict[str, torch.Tensor]) -> None:
        saved.update({name: weight.clone() for name, weight in refits.items()})

    reconstruction = Reconstruction(engine.sweep, ReconstructionOptions(ridge=1e-3), save=save)
    with engine.native() as dense, engine.native() as same:
        reconstruction.run(dense, same, tokens_NS)
    for group in tiny.spec.table.groups:
        if group.expert == 4:
            before = tiny.checkpoint.read(group.output_weight)
            assert torch.equal(saved[group.output_weight], before)
    tiny.checkpoint.close()

"""Every command on a model of images and text: its text model pruned, the rest carried along."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail
from fresh_process import FreshProcesses
from multimodal_models import KINDS, WHOLES, change_config, flatten_config, name_anew, save_whole
from safetensors.torch import load_file
from tiny_models import random_mask, random_windows, relative, zero_units
from transformers import AutoModelForImageTextToText, AutoTokenizer

import frugal_bonsai
from frugal_bonsai.checkpoint.writer import ShardedWriter
from frugal_bonsai.evaluation.latency import TransformersModel
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import PADDED, PER_LAYER, UNIFORM, layout_rules
from frugal_bonsai.model.units import ATTENTION, KeepMask
from frugal_bonsai.rewrite.load import load_pruned
from frugal_bonsai.rewrite.mask_file import write_mask
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.options import AdaptOptions, PruneOptions
from frugal_bonsai.run.shrink import shrink

# Loads each folder as its own card says, and answers text. In: tokens, a file for the logits.
ANSWER = """
import json, re, sys, torch, transformers
found = {}
for folder in sys.argv[3:]:
    card = open(folder + "/README.md", encoding="utf-8").read()
    name = re.search(r"(AutoModelFor\\w+)\\.from_pretrained", card)[1]
    remote = "trust_remote_code" in card
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=remote)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.load(sys.argv[1])).logits
        made = model.generate(torch.load(sys.argv[1])[:, :5], max_new_tokens=4, pad_token_id=0)
    found[folder] = {"class": type(model).__name__, "logits": logits, "made": made.shape[1]}
torch.save(found, sys.argv[2])
"""


def answers(fresh: FreshProcesses, tokens_NS: torch.Tensor, *folders: Path) -> dict[str, Any]:
    """What models of a fresh process answer, by the names of their folders."""
    tokens, out = folders[0].parent / "tokens.pt", folders[0].parent / "answers.pt"
    torch.save(tokens_NS, tokens)
    fresh.run(ANSWER, tokens, out, *folders, folder=out.parent)
    return {Path(name).name: values for name, values in torch.load(out).items()}


def uniform_mask(spec: ModelSpec) -> KeepMask:
    """The same number of units in every layer."""
    mask = KeepMask(spec.table)
    for group in spec.table.groups:
        mask.of(group)[1 : 2 if group.kind == ATTENTION else 8] = False
    return mask


def keep_attention(mask: KeepMask) -> KeepMask:
    for group in mask.table.groups:
        if group.kind == ATTENTION:
            mask.of(group)[:] = True
    return mask


def text_model(whole: Any) -> torch.nn.Module:
    """The text model's modules under the names of a causal language model."""
    text = torch.nn.Module()
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    return text


def masked_logits(
    dense: Path, spec: ModelSpec, mask: KeepMask, tokens_NS: torch.Tensor, **image: torch.Tensor
) -> torch.Tensor:
    """The logits of the whole whose removed units are zero, by transformers."""
    masked = AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32).eval()
    zero_units(text_model(masked), spec, mask)
    with torch.inference_mode():
        logits: torch.Tensor = masked(input_ids=tokens_NS, **image).logits
    return logits


def others(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that are not the text model's."""
    parts = ("vision_tower", "multi_modal_projector", "visual")
    return {name: t for name, t in tensors.items() if any(part in name for part in parts)}


# Name of an output -> name of its mask, layout, --text-only.
OUTPUTS = {
    "uniform": ("same", UNIFORM, False),
    "padded": ("any", PADDED, False),
    "text-uniform": ("same", UNIFORM, True),
    "text-per-layer": ("any", PER_LAYER, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masked_whole_equals_what_is_written(
    kind: str, tmp_path: Path, fresh: FreshProcesses
) -> None:
    """The keystone: logits of text, by plain transformers, in a process of its own."""
    dense, summaries, expected = tmp_path / "dense", {}, {}
    save_whole(dense, kind)
    if kind in ("mistral3", "qwen3_vl"):
        name_anew(dense)
    if kind == "qwen2_5_vl":
        flatten_config(dense)
    tokens_NS = random_windows(2, 13, vocabulary=280)
    with open_model(str(dense)) as opened:
        spec = opened.spec
    for name, mask in {"same": uniform_mask(spec), "any": random_mask(spec)}.items():
        kept = keep_attention(mask) if kind == "qwen2_5_vl" else mask
        write_mask(tmp_path / name, "dense", spec, kept)
        expected[name] = masked_logits(dense, spec, kept, tokens_NS)
    for out, (mask_name, layout, text_only) in OUTPUTS.items():
        summaries[out] = shrink(
            str(dense), tmp_path / mask_name, tmp_path / out, layout=layout, text_only=text_only
        )
    found = answers(fresh, tokens_NS, *(tmp_path / out for out in OUTPUTS))
    for out, (mask_name, _, text_only) in OUTPUTS.items():
        assert relative(found[out]["logits"], expected[mask_name]) < 1e-5, out
        assert ("ForCausalLM" in found[out]["class"]) is text_only
        assert found[out]["made"] == 9
        check_files(dense, tmp_path / out, summaries[out], text_only=text_only)


@pytest.mark.parametrize("copies", [True, False])
def test_shards_in_and_out(copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other parts are copied by the system, or streamed where it cannot."""
    if not copies:
        monkeypatch.setattr(ShardedWriter, "copy", lambda *_: False)
    save_whole(tmp_path / "dense", "llava", shard_size="20KB")
    with open_model(str(tmp_path / "dense")) as opened:
        write_mask(tmp_path / "mask", "dense", opened.spec, uniform_mask(opened.spec))
    words = (str(tmp_path / "dense"), tmp_path / "mask", tmp_path / "out")
    shrink(*words, max_shard_size="20KB")
    dense, out = (load_pruned(tmp_path / name).state_dict() for name in ("dense", "out"))
    assert dense.keys() == out.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in others(dense).items())
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3


def test_it_still_sees(tmp_path: Path) -> None:
    """With an image, too, the output answers as the masked parent."""
    dense, out = tmp_path / "dense", tmp_path / "out"
    save_whole(dense, "llava")
    with open_model(str(dense)) as opened:
        spec, mask = opened.spec, uniform_mask(opened.spec)
    write_mask(tmp_path / "mask", "dense", spec, mask)
    shrink(str(dense), tmp_path / "mask", out)
    tokens_NS = torch.tensor([[5, 290, 290, 290, 290, 9, 7]])  # an image has four patches
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = load_pruned(out)(input_ids=tokens_NS, pixel_values=image).logits
        blind = load_pruned(out)(input_ids=tokens_NS, pixel_values=-image).logits
    expected = masked_logits(dense, spec, mask, tokens_NS, pixel_values=image)
    assert relative(found, expected) < 1e-5 < relative(blind, expected)


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_dropped_layers_and_a_changed_architecture(
    kind: str, tmp_path: Path, fresh: FreshProcesses
) -> None:
    """The nested config lists what stays; a Llama with five heads of eight is a Mistral in it."""
    dense, tokens_NS = tmp_path / "dense", random_windows(2, 13, vocabulary=280)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    save_whole(dense, kind, text_config={**WHOLES[kind]["text_config"], **heads})
    with open_model(str(dense)) as opened:
        spec, mask, as_mistral = opened.spec, KeepMask(opened.spec.table), kind == "llava"
    for group in spec.table.groups:
        if group.layer == 0:
            mask.of(group)[:] = False
        elif group.kind == ATTENTION:
            mask.of(group)[5 if as_mistral else 4 :] = False
    write_mask(tmp_path / "mask.json", "dense", spec, mask)
    for out, text_only in (("whole", False), ("text", True)):
        shrink(
            *(str(dense), tmp_path / "mask.json", tmp_path / out),
            as_mistral=as_mistral,
            text_only=text_only,
        )
    expected = masked_logits(dense, spec, mask, tokens_NS)
    for found in answers(fresh, tokens_NS, tmp_path / "whole", tmp_path / "text").values():
        assert relative(found["logits"], expected) < 1e-5
    config = json.loads((tmp_path / "whole" / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    assert (config["model_type"], text["num_hidden_layers"]) == (kind, 1)
    assert text["model_type"] == ("mistral" if as_mistral else "gemma3_text")
    assert text.get("layer_types") == (None if as_mistral else ["full_attention"])


def check_files(dense: Path, out: Path, summary: dict[str, Any], *, text_only: bool) -> None:
    """Names, the other parts' bytes and the config, of an output and of its parent."""
    assert summary["multimodal"]["carried"] is not text_only
    assert (out / "preprocessor_config.json").exists() is not text_only
    stored, written = (load_file(folder / "model.safetensors") for folder in (dense, out))
    assert summary["after"]["weight_bytes"] == sum(tensor.nbytes for tensor in written.values())
    if text_only:
        assert not others(written)
        assert all(name.startswith(("model.", "lm_head.")) for name in written)
        return
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in others(stored).items())
    size = sum(tensor.nbytes for tensor in others(stored).values())
    assert summary["after"]["carried_bytes"] == summary["multimodal"]["bytes"] == size > 0
    config, source = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (out, dense)
    )
    key = "text_config" if "text_config" in source else "intermediate_size"
    assert config.pop(key) != source.pop(key)
    assert config == source


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = random.Random(0)
    path.write_text("".join(words.choice("abcdefgh ") for _ in range(3000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "gemma"
    save_whole(folder, "gemma3")
    card = "---\nlicense: gemma\nbase_model: someone/gemma\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


OPTIONS = PruneOptions(
    settings={"sparsity": 0.25, "step": 0.15, "masks": 4, "mask_windows": 4},
    tile=1,
    window=32,
    windows=24,
    device="cpu",
)


@pytest.fixture(scope="module")
def pruned(dense: Path, text: Path) -> dict[bool, tuple[Path, dict[str, Any]]]:
    """--text-only -> output and summary of a prune."""
    results = {}
    for text_only in (False, True):
        out = dense.parent / ("text-only" if text_only else "whole")
        options = replace(OPTIONS, calibration=str(text), eval_text=str(text), text_only=text_only)
        results[text_only] = (out, frugal_bonsai.prune(str(dense), out, options))
    return results


def test_pruned_both_ways(
    dense: Path,
    text: Path,
    pruned: dict[bool, tuple[Path, dict[str, Any]]],
    fresh: FreshProcesses,
) -> None:
    (whole, carried), (alone, left_out) = pruned[False], pruned[True]
    # What is carried along has no part in the search.
    for key in ("kept", "sparsity"):
        assert carried[key] == left_out[key]
    for key in ("parameters", "block_parameters", "perplexity", "eval_perplexity"):
        for when in ("before", "after"):
            assert carried[when][key] == left_out[when][key]
    plans = [
        {item["name"]: item["size_bytes"] for item in summary["memory"]["plan"]}
        for summary in (carried, left_out)
    ]
    processor = (dense / "preprocessor_config.json").stat().st_size
    carried_bytes = carried["multimodal"]["bytes"]
    files = [plan.pop("its other files") for plan in plans]
    assert files[0] - files[1] == carried_bytes + processor
    # The first item is what the process holds already.
    assert list(plans[0].items())[1:] == list(plans[1].items())[1:]
    ids = AutoTokenizer.from_pretrained(whole)(text.read_text(encoding="utf-8"))["input_ids"]
    tokens_NS = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    found = answers(fresh, tokens_NS, whole, alone)
    assert relative(found["whole"]["logits"], found["text-only"]["logits"]) < 1e-6
    logits = found["whole"]["logits"][:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens_NS[:, 1:].flatten())
    assert float(loss.exp()) == pytest.approx(carried["after"]["eval_perplexity"], rel=1e-3)
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in (whole, alone)]
    size = left_out["multimodal"]["parameters"]
    assert "pipeline_tag: image-text-to-text" in cards[0]
    rest = f"the rest (vision_tower, multi_modal_projector: {size:,} parameters) is"
    assert f"{rest} carried along bit for bit" in cards[0]
    assert "pipeline_tag: text-generation" in cards[1]
    assert f"{rest} left aside" in cards[1]
    assert all(card.count("a gemma3 of several modalities") == 1 for card in cards)
    assert all("base_model: someone/gemma" in card for card in cards)
    load = f"model = AutoModelForImageTextToText.from_pretrained({str(whole)!r}); tokenizer ="
    assert load in carried["load"]


def test_commands_take_the_whole_and_what_was_pruned(
    dense: Path, text: Path, pruned: dict[bool, tuple[Path, dict[str, Any]]]
) -> None:
    (whole, summary), (alone, _) = pruned[False], pruned[True]
    info = frugal_bonsai.inspect(str(dense))
    assert (info["kind"], info["family"]) == ("model", "gemma3_text")
    assert info["multimodal"]["parts"] == ["vision_tower", "multi_modal_projector"]
    assert info["multimodal"]["parameters"] == summary["multimodal"]["parameters"]
    assert info["weight_bytes"] + info["multimodal"]["bytes"] == summary["before"]["weight_bytes"]
    assert frugal_bonsai.plan(str(dense), OPTIONS)["parameters"] == info["parameters"]
    for folder in (whole, alone):
        options = frugal_bonsai.EvalOptions(text=str(text), window=32, device="cpu")
        result = frugal_bonsai.evaluate(str(folder), options)
        after = summary["after"]["eval_perplexity"]
        assert result["perplexity"] == pytest.approx(after, rel=1e-6)
    for folder in (dense, whole, alone):  # as bench does
        assert TransformersModel(load_pruned(folder)).run([5, 6, 7], 2).decode_seconds > 0


@pytest.mark.parametrize("text_only", [False, True])
def test_adapted_with_the_dense_whole_as_teacher(
    text_only: bool,
    dense: Path,
    text: Path,
    pruned: dict[bool, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    fresh: FreshProcesses,
) -> None:
    whole, _ = pruned[False]
    out = tmp_path / "adapted"
    options = AdaptOptions(
        teacher=str(dense),
        data=(str(text),),
        window=32,
        settings={"tokens": 1024, "rank": 2},
        device="cpu",
        text_only=text_only,
    )
    summary = frugal_bonsai.adapt(str(whole), out, options)
    assert summary["multimodal"]["carried"] is not text_only
    assert summary["verify"]["max_relative_difference"] < 1e-4
    answer = answers(fresh, random_windows(2, 13, vocabulary=250), out)["adapted"]
    name = "Gemma3ForCausalLM" if text_only else "Gemma3ForConditionalGeneration"
    assert answer["class"] == name
    stored, written = (load_file(folder / "model.safetensors") for folder in (dense, out))
    assert others(written).keys() == (set() if text_only else others(stored).keys())
    assert all(torch.equal(stored[name], tensor) for name, tensor in others(written).items())


def test_attention_stays_whole_where_the_whole_cannot_state_the_width_of_a_head(
    text: Path, tmp_path: Path
) -> None:
    save_whole(tmp_path / "dense", "qwen2_5_vl")
    options = replace(
        OPTIONS, method="local-only", settings={"sparsity": 0.1}, calibration=str(text)
    )
    summary = frugal_bonsai.prune(str(tmp_path / "dense"), tmp_path / "out", options)
    assert summary["kept"]["attention"] == [2, 2]
    assert "attention stays whole, because a qwen2_5_vl" in " ".join(summary["notes"])
    with open_model(str(tmp_path / "dense"), text_only=True) as opened:
        assert layout_rules(opened.spec, UNIFORM).attention_counts == (1, 2)
        assert "attention stays whole" not in " ".join(opened.notes)


def test_refused_early_and_what_to_do(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--out", out, "--layout", "per-layer", "--calibration", text)
    error = fail("prune", dense, *words)
    assert "--layout per-layer: no gemma3 can have" in error and "--text-only" in error
    assert "uniform or padded" in error and not out.exists()
    save_whole(tmp_path / "other", "llava")
    config = {**WHOLES["llava"]["text_config"], "model_type": "cwm"}
    change_config(tmp_path / "other", text_config=config)
    error = fail("prune", tmp_path / "other", "--out", out, "--calibration", text)
    assert "its text model is a 'cwm'" in error and "docs/families.md" in error
    change_config(
        tmp_path / "other", text_config={**config, "model_type": "llama"}, audio_config={}
    )
    assert "several modalities" in fail("eval", tmp_path / "other", "--text", text)

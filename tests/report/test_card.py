"""The model card: its head parses, its figures are there, no path of this machine is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from summaries import make_round, make_summary

from frugal_bonsai.report.card import model_card


def head(card: str) -> dict[str, Any]:
    empty, front, _ = card.split("---\n", 2)
    assert empty == ""
    values: dict[str, Any] = yaml.safe_load(front)
    return values


def test_head_of_a_hub_model() -> None:
    assert head(model_card(make_summary())) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base-7b",
        "tags": ["frugal-bonsai", "pruned"],
    }


def test_licence_and_ancestor_come_from_the_source() -> None:
    step = {"command": "prune", "model": "dense", "perplexity": [5.0, 7.5]}
    summary = make_summary(
        model="/data/pruned",
        warnings=["held-out perplexity rose from 5 to 50: train it with adapt"],
        provenance={
            "dense": "dense",
            "base_model": "org/dense",
            "license": {"license": "other", "license_name": 'a "quoted": name'},
            "steps": [step, {**step, "perplexity": [7.5, None], "model": "/data/pruned"}],
        },
    )
    card = model_card(summary)
    assert head(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/dense",
        "license": "other",
        "license_name": 'a "quoted": name',
        "tags": ["frugal-bonsai", "pruned"],
    }
    assert "## Warnings\n\n- held-out perplexity rose from 5 to 50: train it with adapt." in card
    assert "| 1 | prune | dense | - | 5.000 to 7.500 | - |" in card
    assert "| 2 | prune | pruned | - | - | - |" in card and "/data" not in card


@pytest.mark.parametrize(
    "model",
    ["/data/someone/base", "~/models/base", "./base", "../x/base", "C:\\models\\base", "base"],
)
def test_a_local_folder_is_named_and_no_base_model(model: str) -> None:
    card = model_card(make_summary(model=model))
    assert "base_model" not in head(card)
    assert "# base, 50.0% of its block weights removed" in card
    assert model == "base" or model not in card


def test_a_folder_that_reads_like_a_hub_id_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "base-7b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card(make_summary())
    assert "base_model" not in head(card) and "org/base-7b" not in card and "`base-7b`" in card


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = model_card(make_summary(model="."))
    assert f"# {tmp_path.name}, " in card and str(tmp_path) not in card


def test_the_parent_can_be_named() -> None:
    card = model_card(make_summary(model="/data/copy"), dense_card_name="org/original")
    assert head(card)["base_model"] == "org/original"
    assert "`org/original`" in card and "copy" not in card


def test_figures_have_their_window_beside_them() -> None:
    card = model_card(make_summary())
    lines = card.splitlines()
    assert "| parameters | 6,738,415,616 | 3,500,412,928 | 0.519 |" in lines
    assert "| block parameters | 6,476,005,376 | 3,238,002,688 | 0.500 |" in lines
    assert "| bytes of weights | 12.55 GiB | 6.52 GiB | 0.519 |" in lines
    assert (
        "| perplexity, held-out calibration windows, window 2048 | 5.472 | 12.346 | 2.256 |"
    ) in lines
    assert "| perplexity, file notes.txt, window 256 | 6.250 | 12.500 | 2.000 |" in lines
    assert "within 5.8e-07 of the largest logit (1 window)" in card


def test_no_evaluation_text() -> None:
    summary = make_summary(eval_text=None)
    summary["after"]["eval_perplexity"] = summary["before"]["eval_perplexity"] = None
    card = model_card(summary)
    assert "None" not in card and "notes.txt" not in card


def test_how_it_was_made() -> None:
    lines = model_card(make_summary()).splitlines()
    for line in (
        "| method | `default` |",
        "| calibration text | wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, train) |",
        "| window length | 2048 tokens |",
        "| calibration windows | 32 |",
        "| seed | 17 |",
        "| forward tokens | 162,469,134 |",
        "| peak | 3.00 GiB (predicted 3.00 GiB) of host memory and 21.00 GiB (predicted "
        "20.00 GiB) of GPU memory |",
        "| micro-batch | 8 windows |",
        "| `level` | `group` |",
        "| `recovery` | `True` |",
    ):
        assert line in lines


def test_kept_units_and_rounds() -> None:
    nan = make_round(2, 0.5, r2=float("nan"), tau=None, penalty=None, perplexity=float("inf"))
    lines = model_card(make_summary(rounds=[make_round(1, 0.25), nan])).splitlines()
    assert "| layer | KV groups | FFN channels | removed |" in lines
    assert "| 2 | 2 of 4 | 11,008 of 11,008 | 0.0% |" in lines
    assert "| 1 | 25.0% | 192 | 0.77 | 0.65 | 0.81 | settled | ridge 0.1 | 34.57 | 1,000 |" in lines
    assert "| 2 | 50.0% | 192 | - | - | 0.81 | settled | - | inf | 1,000 |" in lines
    assert any("search perplexity, window 2048" in line for line in lines)


def test_what_masks_cost_and_why_they_ended() -> None:
    spent = make_round(2, 0.5, mask_tokens=1000, stopped="budget spent", coverage=0.8)
    card = model_card(make_summary(rounds=[make_round(1, 0.25), spent]))
    assert (
        "masks: 1,600 of at most 2,000 forward tokens (80%); sampling ended with: settled (round "
        "1), budget spent (round 2)." in card
    )
    assert "85% of the held-out losses lie inside their 90% interval (mean of the rounds)." in card
    unasked = {"certainty": None, "stopped": None, "coverage": None, "r2": None, "tau": None}
    local = make_round(1, 0.25, observations=0, mask_tokens=0, mask_budget_tokens=0, **unasked)
    assert "masks:" not in model_card(make_summary(rounds=[local]))


def test_every_table_has_as_many_cells_as_its_head() -> None:
    summary = make_summary(settings={"a|b": "c\nd", "seed": 1})
    cells = 0
    for line in model_card(summary).splitlines():
        if not line.startswith("|"):
            cells = 0
            continue
        found = line.replace("\\|", "").count("|")
        assert cells in (0, found), line
        cells = found


def test_loading_of_either_layout() -> None:
    uniform, per_layer = (model_card(make_summary(layout=x)) for x in ("uniform", "per-layer"))
    assert 'AutoModelForCausalLM.from_pretrained("PATH")' in uniform
    assert "trust_remote_code" not in uniform
    assert 'frugal_bonsai.load_pruned("PATH")' in per_layer
    assert 'from_pretrained("PATH", trust_remote_code=True)' in per_layer


def test_citation_and_licence() -> None:
    card = model_card(make_summary())
    assert "arXiv 2402.05406" in card and "Everybody Prune Now" in card
    assert "The parent's licence applies" in card


@pytest.mark.parametrize("source", ["/home/someone/my text.txt", "file /home/someone/text.txt"])
def test_no_path_of_this_machine(source: str) -> None:
    summary = make_summary(model="/home/someone/base")
    summary["calibration"]["source"] = summary["eval_text"]["name"] = source
    card = model_card(summary)
    assert "someone" not in card and "/home" not in card and "text.txt" in card


def test_notes_are_printed_without_folders() -> None:
    note = "--max-cpu-mem 8.00 GiB is more than the 6.00 GiB that are free now"
    card = model_card(make_summary(notes=[note, "read from /data/models/base"]))
    assert f"Note: {note}.\n" in card and "Note: read from base.\n" in card

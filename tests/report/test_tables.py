"""What the commands print: every figure there, whole, at 80 columns, in any encoding."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from plans import PLAN, PROFILE
from rich.console import Console
from summaries import make_round, make_summary

from frugal_bonsai.report.eval_tables import render_eval
from frugal_bonsai.report.plan_tables import render_plan, render_profile
from frugal_bonsai.report.tables import render_inspect, render_prune

Render = Callable[[Mapping[str, Any], Console], None]

INSPECT: dict[str, Any] = {
    "kind": "model",
    "notes": ["config.json describes a quantisation"],
    "model": "/data/models/[red]base",
    "family": "llama",
    "layers": 2,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "intermediate": 14336,
    "vocabulary": 128_256,
    "positions": 131_072,
    "tied": False,
    "dtypes": {"BF16": 16 * 2**30, "F32": 2**20},
    "parameters": 8_030_261_248,
    "block_parameters": 6_979_321_856,
    "weight_bytes": 16 * 2**30 + 2**20,
    "groups": [
        {"kind": "attention", "units_per_layer": [8, 6], "parameters_per_unit": [5_242_880] * 2},
        {"kind": "ffn", "units_per_layer": [14336, 9000], "parameters_per_unit": [12_288] * 2},
    ],
    "layouts": {"uniform": {"tile": 64, "attention_counts": [1, 2, 4, 8]}},
}
EVAL: dict[str, Any] = {
    "model": "small",
    "text": "file notes.txt",
    "window": 256,
    "windows": 1234,
    "tokens": 314_670,
    "perplexity": 44.98765,
    "nll": 3.806388,
    "weights": "native",
    "seconds": 61.25,
    "tokens_per_second": 5157.4,
    "host_peak_bytes": 2**29,
    "host_predicted_bytes": 2**29,
    "host_cap_bytes": 2**30,
    "gpu_peak_bytes": None,
    "gpu_cap_bytes": None,
}
ALL: list[tuple[Render, Mapping[str, Any]]] = [
    (render_prune, make_summary()),
    (render_plan, PLAN),
    (render_profile, PROFILE),
    (render_inspect, INSPECT),
    (render_eval, EVAL),
]
# Their tables have no head, hence no rule below it.
NO_HEADS = (render_eval, render_profile)


def printed(render: Render, values: Mapping[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    render(values, Console(file=stream, width=width))
    return stream.getvalue()


def words(text: str) -> str:
    """The text with every run of blanks as one: figures whole, whatever the layout."""
    return " ".join(text.split())


def row(text: str, start: str) -> list[str]:
    """The cells of the row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return re.split(r"\s{2,}", line.strip())


@pytest.mark.parametrize(("render", "values"), ALL)
def test_a_pipe_of_80_columns_is_enough(render: Render, values: Mapping[str, Any]) -> None:
    text = printed(render, values)
    copied = ("saved:", "load:")
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith(copied))
    assert "\u2026" not in text and "\x1b" not in text


@pytest.mark.parametrize(("render", "values"), ALL)
def test_a_narrow_terminal_loses_no_figure(render: Render, values: Mapping[str, Any]) -> None:
    def figures(text: str) -> set[str]:
        return set(re.findall(r"(?<!\S)[\d.,%]*\d[\d.,%]*(?!\S)", text))

    assert figures(printed(render, values, 30)) == figures(printed(render, values, 200))


@pytest.mark.parametrize(("render", "values"), ALL)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_encoding_can_print_it(
    render: Render, values: Mapping[str, Any], encoding: str
) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    name = "caf\u00e9 \u6a21\u578b \x1b[2J"
    named = {**values, "model": name, "name": name, "device_name": "GPU\u2122"}
    render(named, Console(file=stream, width=80))
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert "\\x1b[2J" in text and "\x1b" not in text
    if encoding == "ascii":
        assert "caf\\xe9" in text and ("----" in text or render in NO_HEADS)
    if encoding == "utf-8":
        assert "\u6a21" in text and ("\u2500" in text or render in NO_HEADS)


@pytest.mark.parametrize(("render", "values"), ALL)
def test_nothing_is_taken_for_markup(render: Render, values: Mapping[str, Any]) -> None:
    name = "[bold]x[/] :smile:"
    assert name in printed(render, {**values, "model": name, "name": name})


def test_prune_before_and_after() -> None:
    text = printed(render_prune, make_summary())
    assert "org/base-7b: 50.0% of the block weights removed" in text
    assert row(text, "parameters")[1:] == ["6,738,415,616", "3,500,412,928", "0.519"]
    assert row(text, "block parameters")[1:] == ["6,476,005,376", "3,238,002,688", "0.500"]
    assert row(text, "bytes on disk")[1:] == ["12.55 GiB", "6.52 GiB", "0.519"]
    assert {"5.472", "12.346", "2.256"} <= set(text.split())
    assert row(text, "perplexity, file notes.txt, window 256")[1:] == ["6.250", "12.500", "2.000"]
    assert "8 windows of held-out calibration text and 40 windows of file notes.txt" in words(text)


def test_prune_without_an_evaluation_text() -> None:
    summary = make_summary(eval_text=None)
    for side in ("before", "after"):
        summary[side]["eval_perplexity"] = None
    text = printed(render_prune, summary)
    assert "notes.txt" not in text and "None" not in text


def test_prune_says_what_the_run_was() -> None:
    text = words(printed(render_prune, make_summary()))
    assert "peak 3.00 GiB (predicted 3.00 GiB) of 8.00 GiB of host memory" in text
    assert "peak 21.00 GiB (predicted 20.00 GiB) of 24.00 GiB of GPU memory" in text
    assert "memory ran out" not in text
    assert "162,469,134 forward tokens, 90 min (method default, seed 17)" in text
    assert "32 windows of 2048 tokens" in text
    assert "within 5.8e-07 on 1 window" in text
    assert "note: --max-gpu-mem has no effect" in text


def test_prune_says_that_memory_ran_out() -> None:
    summary = make_summary()
    summary["memory"] |= {"planned_micro_batch": 8, "final_micro_batch": 2}
    text = words(printed(render_prune, summary))
    assert "micro-batches were planned with 8 windows and ended with 2" in text


def test_prune_ends_with_lines_to_copy() -> None:
    lines = printed(render_prune, make_summary(out="/x" * 60)).splitlines()
    assert lines[-2] == f"saved: {'/x' * 60} (uniform layout)"
    assert lines[-1] == (
        "load:  AutoModelForCausalLM.from_pretrained('/home/someone/out dir/small')"
    )


def test_layers_a_row_each_up_to_40() -> None:
    text = printed(render_prune, make_summary(layers=40))
    assert row(text, "0 ") == ["0", "2 of 4", "286 of 11,008", "61.2%"]
    assert row(text, "39")[:3] == ["39", "2 of 4", "11,008 of 11,008"]
    assert text.count("286 of 11,008") == 39


def test_deep_models_have_equal_layers_merged() -> None:
    text = printed(render_prune, make_summary(layers=80))
    assert row(text, "0-78")[1:3] == ["2 of 4", "286 of 11,008"]
    assert row(text, "79") == ["79", "2 of 4", "11,008 of 11,008", "0.0%"]
    assert text.count("286 of 11,008") == 1


def test_rounds_are_a_trust_report() -> None:
    text = printed(render_prune, make_summary())
    cells = ["1", "25.0%", "192", "0.77", "0.65", "0.81", "34.57", "81,234,567", "12 min"]
    assert row(text.split("how far to trust")[1], "1 ") == cells
    assert "non-negative ridge 0.1 (round 1), non-negative ridge 0.01 (round 2)" in words(text)
    assert "window 2048; dense 5.12" in words(text)
    assert "of at most 2,000 forward tokens" in words(text)
    assert "sampling ended with: settled in every round" in words(text)


def test_rounds_with_what_is_no_number_or_was_not_measured() -> None:
    odd = make_round(1, 0.2, r2=float("nan"), tau=-0.5, perplexity=3.2e9)
    local = make_round(2, 0.4, r2=None, tau=None, penalty=None, observations=0, coverage=None)
    del local["perplexity"], local["dense_perplexity"]
    text = printed(render_prune, make_summary(rounds=[odd, local]))
    assert {"-0.50", "3.20e+09", "-"} <= set(text.split())
    assert "nan" not in text and "None" not in text
    text = printed(render_prune, make_summary(rounds=[local]))
    assert "R2, tau:" not in text and "penalty:" not in text


def test_inspect_names_units_and_says_module_once() -> None:
    text = printed(render_inspect, INSPECT)
    assert text.count("module") == 1
    assert row(text, "parameters")[-1] == "8,030,261,248"
    assert row(text, "their share")[-1] == "86.9%"
    assert row(text, "of these in F32")[-1] == "1.00 MiB"
    assert row(text, "KV groups") == ["KV groups", "6 to 8", "14", "5,242,880"]
    assert row(text, "FFN channels")[1:] == ["9,000 to 14,336", "23,336", "12,288"]
    assert "multiples of 64" in words(text) and "1, 2, 4, 8" in words(text)


def test_inspect_says_where_attention_stays_whole() -> None:
    layouts = {"uniform": {"tile": 64, "attention_counts": []}}
    whole = {**INSPECT, "layouts": layouts, "whole_attention": "its queries hold gates"}
    text = " ".join(printed(render_inspect, whole).split())
    assert "multiples of 64; per-layer and padded: any number; attention stays whole: its" in text
    text = " ".join(printed(render_inspect, {**whole, "whole_attention": None}).split())
    assert "per-layer alone removes attention heads, too" in text


def test_inspect_of_a_model_of_images_and_text() -> None:
    whole = {
        "model_type": "gemma3",
        "text_model": "gemma3_text",
        "parts": ["vision_tower", "projector"],
        "parameters": 416_866_032,
        "bytes": 2**29,
        "carried": False,
    }
    text = printed(render_inspect, {**INSPECT, "multimodal": whole})
    assert row(text, "parameters of vision_tower, projector")[-1] == "416,866,032"
    assert row(text, "their bytes")[-1] == "512.00 MiB"
    assert "the text model of a gemma3" in words(text) and "--text-only" in words(text)


def test_prune_states_the_scores_of_tasks() -> None:
    scores = {"acc": 0.5, "acc_stderr": 0.125, "items": 1838}
    summary = make_summary()
    for when, acc in (("before", 0.5), ("after", 0.25)):
        summary[when] = {**summary[when], "tasks": {"piqa": {**scores, "acc": acc}}}
    found = row(printed(render_prune, summary), "piqa, acc, 1,838 items")
    assert found[-3:] == ["0.5000", "0.2500", "0.500"]


def test_eval_states_each_metric_of_a_task() -> None:
    scores = {"acc": 0.5, "acc_stderr": 0.125, "acc_norm": 0.25, "acc_norm_stderr": None}
    tasks = {"piqa": {**scores, "items": 1838}}
    memory = {key: EVAL[key] for key in EVAL if "bytes" in key or key in ("model", "weights")}
    took = {"seconds": 1.0, "tokens_per_second": 10.0}
    text = printed(render_eval, {**memory, **took, "tasks": tasks})
    assert row(text, "piqa") == ["piqa", "acc", "0.5000", "0.1250", "1,838"]
    second = text[text.index("acc_norm") :].splitlines()[0]
    assert second.split() == ["acc_norm", "0.2500", "-", "1,838"]
    assert "perplexity" not in text


def test_eval_states_the_window_beside_the_perplexity() -> None:
    text = printed(render_eval, EVAL)
    assert row(text, "perplexity, window 256")[-1] == "44.9877"
    assert {"3.80639", "1,234", "314,670", "native", "5,157"} <= set(text.split())
    assert "peak 512.00 MiB (predicted 512.00 MiB) of 1.00 GiB" in text and "GPU" not in text
    gpu = {"gpu_peak_bytes": 2**30, "gpu_predicted_bytes": 2**29, "gpu_cap_bytes": 2**31}
    both = printed(render_eval, {**EVAL, **gpu, "stride": 64, "bits_per_byte": 0.91234})
    assert row(both, "stride")[-1] == "64"
    assert row(both, "bits per byte of the text")[-1] == "0.9123"
    assert "peak 1.00 GiB (predicted 512.00 MiB) of 2.00 GiB" in both

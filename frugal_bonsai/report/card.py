"""The model card: from what, how and with which numbers a pruned model was made.

In: a prune's summary as plain values. Out: Markdown with a YAML head. No local path goes into it:
of a folder or file only its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from frugal_bonsai.report.words import KIND_NAMES, duration, number, plural, printable, ratio
from frugal_bonsai.sizes import format_bytes

Values = Mapping[str, Any]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# An absolute, home or dotted path inside other text: its last part alone is kept.
_LOCAL_PATH = re.compile(r"(?<!\S)(?:[A-Za-z]:[\\/]|[\\/~]|\.{1,2}[\\/])\S*")

_LOAD = {
    "uniform": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Plain transformers, no custom code. PATH is the folder that holds this file, or its hub id.
""",
    "per-layer": """```python
import frugal_bonsai

model = frugal_bonsai.load_pruned("PATH")
tokenizer = frugal_bonsai.load_tokenizer("PATH")
```

PATH is the folder that holds this file. Without frugal-bonsai (widths differ between layers, which
transformers' own Llama classes cannot build, so the model file that lies beside the weights runs):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

Both need transformers 5.14 or newer.
""",
}
_CITATION = """The method is Bonsai's (arXiv 2402.05406); the settings above say where it differs:

```bibtex
@misc{dery2024everybody,
  title = {Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes},
  author = {Lucio Dery and Steven Kolawole and Jean-Fran{\\c{c}}ois Kagy and Virginia Smith and
            Graham Neubig and Ameet Talwalkar},
  year = {2024},
  eprint = {2402.05406},
  archivePrefix = {arXiv},
}
```
"""


def model_card(summary: Values, *, dense_card_name: str | None = None) -> str:
    """The text of the pruned model's README.md.

    Args:
        summary: what :func:`frugal_bonsai.prune` returns; "out" and "load" are not used.
        dense_card_name: how to name the dense parent, where the summary's "model" says less (a
            hub id, say, of which a local folder is a copy).

    Returns:
        Markdown.
    """
    model = summary["model"] if dense_card_name is None else dense_card_name
    parent = _parent(model)
    parts = [
        _head(model),
        f"# {parent}, {summary['sparsity']:.1%} of its block weights removed\n",
        f"Made from `{parent}` ({summary['family']}) with frugal-bonsai {summary['version']}: "
        f"whole KV groups and FFN channels are gone, found with forward passes only. "
        f"{summary['layout'].capitalize()} layout. The parent's licence applies.\n",
        "## Figures\n",
        _figures(summary),
        "## How to load it\n",
        _LOAD[summary["layout"]],
        "## How it was made\n",
        _how(summary),
        "## Kept units\n",
        _kept(summary),
        "## Rounds\n",
        _rounds(summary),
        "## Source of the method\n",
        _CITATION,
        "## Licence\n",
        f"The parent's licence applies: these are weights of `{parent}`.\n",
    ]
    return "\n".join(parts)


def _parent(model: str) -> str:
    """A hub id as it is; of a folder its name alone."""
    if is_hub_id(model):
        return model
    return printable(_name(Path(model).expanduser()) or _name(Path(model).resolve()) or "model")


def _name(path: Path) -> str:
    name = PureWindowsPath(str(path)).name
    return "" if name in (".", "..") else name


def is_hub_id(model: str) -> bool:
    """Whether it reads ``org/name`` and no such folder lies here."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def _source(source: str) -> str:
    """A text's name without the folders that it lies in."""
    if PureWindowsPath(source).is_absolute() or source.startswith("/"):
        return printable(PureWindowsPath(source).name)
    return printable(_LOCAL_PATH.sub(lambda found: PureWindowsPath(found[0]).name, source))


def _head(model: str) -> str:
    base = f"base_model: {model}\n" if is_hub_id(model) else ""
    return f"---\nlibrary_name: transformers\n{base}tags:\n- frugal-bonsai\n- pruned\n---\n"


def _figures(summary: Values) -> str:
    before, after, calibration = summary["before"], summary["after"], summary["calibration"]
    text = summary["eval_text"]
    rows = [
        (name, f"{before[key]:,}", f"{after[key]:,}", ratio(before[key], after[key]))
        for name, key in (("parameters", "parameters"), ("block parameters", "block_parameters"))
    ]
    dense, pruned = before["weight_bytes"], after["weight_bytes"]
    sizes = (format_bytes(dense), format_bytes(pruned))
    rows.append(("bytes of weights", sizes[0], sizes[1], ratio(dense, pruned)))
    names = {
        "perplexity": f"perplexity, held-out calibration windows, window {calibration['window']}"
    }
    if text is not None:
        names["eval_perplexity"] = f"perplexity, {_source(text['name'])}, window {text['window']}"
    for key, name in names.items():
        dense, pruned = before[key], after[key]
        rows.append((name, number(dense, 3), number(pruned, 3), ratio(dense, pruned)))
    lines = [
        _table(("", "before", "after", "ratio"), rows),
        f"Perplexity is exp(mean NLL of tokens 2..S) over windows of S tokens (S is the window "
        f"length beside each figure) without overlap and without special tokens: "
        f"{plural(calibration['held_out_windows'], 'window')} of calibration text that the search "
        f"did not see" + _and_text(text) + ".\n",
        f"Verified: the rewritten model's logits equal the masked parent's within "
        f"{summary['verify']['max_relative_difference']:.1e} of the largest logit "
        f"({plural(summary['verify']['windows'], 'window')}).\n",
    ]
    return "\n".join(lines)


def _and_text(text: Values | None) -> str:
    if text is None:
        return ""
    return f", {plural(text['windows'], 'window')} of {_source(text['name'])}"


def _how(summary: Values) -> str:
    calibration, memory, settings = (
        summary["calibration"],
        summary["memory"],
        summary["settings"],
    )
    peak = f"{_peak(memory, 'host')} of host memory"
    if memory["gpu_peak_bytes"] is not None:
        peak += f" and {_peak(memory, 'gpu')} of GPU memory"
    batch = plural(memory["final_micro_batch"], "window")
    if memory["final_micro_batch"] < memory["planned_micro_batch"]:
        batch += f" (planned {memory['planned_micro_batch']}; memory ran out)"
    facts = (
        ("method", f"`{summary['method']}`"),
        ("calibration text", _source(calibration["source"])),
        ("window length", f"{calibration['window']} tokens"),
        ("calibration windows", str(calibration["windows"])),
        ("seed", str(settings["seed"])),
        ("layout", f"{summary['layout']}, FFN channels in multiples of {summary['tile']}"),
        ("forward tokens", f"{summary['forward_tokens']:,}"),
        ("time", duration(summary["seconds"])),
        ("peak", peak),
        ("micro-batch", batch),
    )
    chosen = ((f"`{name}`", f"`{value}`") for name, value in settings.items())
    return "\n".join((_table(("", ""), facts), _table(("setting", "value"), chosen)))


def _peak(memory: Values, where: str) -> str:
    predicted = format_bytes(memory[f"{where}_predicted_bytes"])
    return f"{format_bytes(memory[f'{where}_peak_bytes'])} (predicted {predicted})"


def _kept(summary: Values) -> str:
    kinds = list(summary["kept"])
    rows = (
        (
            str(layer),
            *(f"{summary['kept'][k][layer]:,} of {summary['dense'][k][layer]:,}" for k in kinds),
            f"{share:.1%}",
        )
        for layer, share in enumerate(summary["layer_sparsity"])
    )
    return _table(("layer", *(KIND_NAMES.get(kind, kind) for kind in kinds), "removed"), rows)


def _rounds(summary: Values) -> str:
    head = (
        "round",
        "removed",
        "masks seen",
        "R2",
        "tau",
        "penalty",
        f"search perplexity, window {summary['calibration']['window']}",
        "forward tokens so far",
    )
    rows = (
        (
            str(row["round"]),
            f"{row['sparsity']:.1%}",
            f"{row['observations']:,}",
            number(row["r2"]),
            number(row["tau"]),
            row["penalty"] or "-",
            number(row.get("perplexity")),
            f"{row['forward_tokens']:,}",
        )
        for row in summary["rounds"]
    )
    explained = (
        "R2 and Kendall's tau are the regression's on masks that it has not seen; the search "
        "perplexity is of the calibration windows themselves, so it is too good.\n"
    )
    return "\n".join((_table(head, rows), explained))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(head), "|" + "---|" * len(head), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"

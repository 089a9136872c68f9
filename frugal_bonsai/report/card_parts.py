"""Parts that the cards of all commands share: names without local paths, head, loading, tables.

In: values of a summary. Out: pieces of Markdown. Holds nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from frugal_bonsai.report.words import NOTHING, number, printable

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# An absolute, home or dotted path inside other text, of which only the last part is kept.
_LOCAL_PATH = re.compile(r"(?<!\S)(?:[A-Za-z]:[\\/]|[\\/~]|\.{1,2}[\\/])\S*")

_PLAIN = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Plain transformers, no custom code. PATH is the folder that holds this file, or its hub id.
"""
LOAD = {
    "uniform": _PLAIN,
    "padded": _PLAIN,
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

_WHOLE = """```python
from transformers import AutoModelForImageTextToText, AutoTokenizer

model = AutoModelForImageTextToText.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")  # AutoProcessor for images
```

Plain transformers, no custom code. PATH is the folder that holds this file, or its hub id.
"""


def how_to_load(summary: Mapping[str, Any]) -> str:
    """Return how the output of a command is loaded."""
    return _WHOLE if _carries(summary) else LOAD[summary["layout"]]


def _carries(summary: Mapping[str, Any]) -> bool:
    """Return whether the output has the parts beside the text model."""
    whole = summary.get("multimodal")
    return whole is not None and bool(whole["carried"])


def parent_name(model: str) -> str:
    """Return a hub id as it is, and of a folder only its name."""
    if is_hub_id(model):
        return model
    return printable(_name(Path(model).expanduser()) or _name(Path(model).resolve()) or "model")


def _name(path: Path) -> str:
    name = PureWindowsPath(str(path)).name
    return "" if name in (".", "..") else name


def is_hub_id(model: str) -> bool:
    """Return True for ``org/name`` if there is no such folder here."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def source_name(source: str) -> str:
    """Return the name of a text without its folders."""
    if PureWindowsPath(source).is_absolute() or source.startswith("/"):
        return printable(PureWindowsPath(source).name)
    return without_paths(source)


def card_head(model: str, summary: Mapping[str, Any], *tags: str) -> str:
    """Return the YAML head.

    Args:
        model: Name of the model that this one was made from; a hub id is the base model.
        summary: Summary of the command. The ancestor on the hub and the licence are those of its
            provenance.
        tags: Further tags.
    """
    provenance = summary.get("provenance", {})
    base = model if is_hub_id(model) else provenance.get("base_model")
    task = "image-text-to-text" if _carries(summary) else "text-generation"
    lines = ["library_name: transformers", f"pipeline_tag: {task}"]
    lines += [f"base_model: {base}"] if base else []
    # JSON strings are YAML, whatever another card's licence contains.
    licence = provenance.get("license", {})
    lines += [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    lines += ["tags:", *(f"- {tag}" for tag in ("frugal-bonsai", "pruned", *tags))]
    return "\n".join(("---", *lines, "---", ""))


def warning_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the section of warnings; empty without any."""
    lines = [f"- {without_paths(text)}." for text in summary.get("warnings", ())]
    return ["## Warnings\n", "\n".join(lines) + "\n"] if lines else []


def note_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the command's notes, a paragraph each."""
    return [f"Note: {without_paths(text)}.\n" for text in summary["notes"]]


def provenance_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the section on the source's GGUF file and on earlier rewrites; empty without both."""
    provenance = summary.get("provenance", {})
    steps, source = provenance.get("steps", ()), _gguf_sentences(provenance.get("gguf"))
    if len(steps) < 2:
        return ["## Provenance\n", source] if source else []
    rows = (
        (
            str(at),
            step["command"],
            parent_name(step["model"]),
            *(_from_to(step.get(key)) for key in ("block_parameters", "perplexity")),
            _from_to(step.get("eval_perplexity")),
        )
        for at, step in enumerate(steps, 1)
    )
    names = ("", "command", "from", "block parameters", "held-out perplexity", "perplexity of text")
    return [
        "## Provenance\n",
        *([source] if source else []),
        f"The dense ancestor is `{parent_name(provenance['dense'])}`. What was done since, in "
        f"order (perplexities of different steps may be of different texts):\n",
        markdown_table(names, rows),
    ]


def _gguf_sentences(facts: Mapping[str, Any] | None) -> str | None:
    """Return what is known of the GGUF file from which the weights were dequantised."""
    if not facts:
        return None
    named = f", named {facts['name']!r}" if facts.get("name") else ""
    how = f"read as {facts['dtype']}"
    if facts["quantised"]:
        how = f"dequantised to {facts['dtype']}, so what quantisation took from them is lost"
    text = (
        f"The dense weights come from the GGUF file `{facts['file']}`{named} (llama.cpp's "
        f"architecture {facts['architecture']}, {facts['quantisation']}). They were {how}."
    )
    return printable(text) + "\n"


def _from_to(pair: Sequence[float | None] | None) -> str:
    if pair is None or pair[0] is None or pair[1] is None:
        return NOTHING
    digits = 0 if isinstance(pair[0], int) else 3
    return " to ".join(number(value, digits) for value in pair)


def without_paths(text: str) -> str:
    """Return a text with the last part of each local path in it."""
    return printable(_LOCAL_PATH.sub(lambda found: PureWindowsPath(found[0]).name, text))


def layout_notes(summary: Mapping[str, Any]) -> list[str]:
    """Return notes on parameters that a layout keeps as zeros, and on another family's format."""
    notes = []
    if summary["layout"] == "padded":
        before, after = summary["before"]["block_parameters"], summary["after"]["block_parameters"]
        notes.append(
            f"Padded layout: every layer is filled with zeros to the widest one, which changes "
            f"no result. {summary['sparsity']:.1%} of the block weights have no effect any more; "
            f"{1 - after / before:.1%} are gone from the files, memory and work."
        )
    if summary["written_as"] != summary["family"]:
        notes.append(
            f"Written as model_type {summary['written_as']!r}: it computes the same as this "
            f"{summary['family']} without biases and without a sliding window, and its config "
            f"takes a number of heads that {summary['family']}'s refuses."
        )
    return notes


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with escaped cells."""
    lines = [_row(head), "|" + "---|" * len(head), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"

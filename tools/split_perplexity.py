"""Perplexity of pruned models at line breaks and elsewhere.

In: a dense model, pruned ones and a text. Out: for each model the perplexity of all tokens, of
those that are no line break and do not follow one, and what pruning added to both kinds. Texts lay
out paragraphs differently; where a model has not seen a layout its loss at line breaks is large,
moves at random with any change of the model and hides what a method does to the language.

    python tools/split_perplexity.py DENSE PRUNED... --text FILE [--window 256] [--every 2]

`--scales 1,0.9,0.8` measures each model with its logits multiplied by each of these too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from frugal_bonsai import load_pruned
from frugal_bonsai.text.windows import cut_windows, load_tokenizer, tokenise

_BATCH = 8


def losses(model: Any, windows_NS: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Loss of tokens 2..S, fp32 ``[N, S-1]``."""
    found = []
    with torch.inference_mode():
        for batch_BS in windows_NS.split(_BATCH):
            logits_BSV = model(batch_BS).logits[:, :-1].float() * scale
            found.append(
                cross_entropy(logits_BSV.transpose(1, 2), batch_BS[:, 1:], reduction="none")
            )
    return torch.cat(found)


def near_breaks(tokenizer: Any, windows_NS: torch.Tensor) -> torch.Tensor:
    """Find the tokens 2..S that hold a line break or follow one, bool ``[N, S-1]``."""
    used = windows_NS.unique().tolist()
    breaks = [token for token in used if "\n" in tokenizer.decode([token])]
    is_break_NS = torch.isin(windows_NS, torch.tensor(breaks, dtype=windows_NS.dtype))
    return is_break_NS[:, 1:] | is_break_NS[:, :-1]


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("pruned", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--every", type=int, default=2, help="take every so manieth window")
    parser.add_argument("--scales", default="1", help="of the logits")
    parser.add_argument("--threads", type=int, default=1)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(words.dense)
    tokens_T = tokenise(words.text.read_text(encoding="utf-8"), tokenizer)
    windows_NS = cut_windows(tokens_T, words.window, what=words.text.name)[:: words.every]
    near = near_breaks(tokenizer, windows_NS)
    dense = AutoModelForCausalLM.from_pretrained(words.dense, dtype=torch.float32)
    before = losses(dense, windows_NS)
    print(f"{near.float().mean():.1%} of {near.numel()} tokens are line breaks or follow one")
    print("| model | perplexity | elsewhere | added elsewhere, nats | added at breaks, nats |")
    print("|---|---|---|---|---|")
    for name, model in ((words.dense, dense), *((p, load_pruned(p)) for p in words.pruned)):
        for scale in words.scales.split(","):
            after = losses(model, windows_NS, float(scale))
            added = after - before
            called = Path(name).name + (f" x {scale}" if words.scales != "1" else "")
            print(
                f"| {called} | {after.mean().exp():.3f} | {after[~near].mean().exp():.3f} "
                f"| {added[~near].mean():.4f} | {added[near].mean():.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

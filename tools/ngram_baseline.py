"""Judge the embedded example model against a 5-gram over the same tokens.

In: a model folder of `train_example_model.py`. Its tokenizer cuts the same training documents and
the same held-out text; an interpolated modified Kneser-Ney 5-gram (Chen and Goodman, "An empirical
study of smoothing techniques for language modeling", 1999, section 4.1.6) is counted on the former
and predicts the latter: tokens 2..256 of each window of 256, as the Llama does. Out: perplexities
on the terminal, one JSON object a line, over all windows and over every 8th (which the tests use).
Memory: about 1 GB.

    python tools/ngram_baseline.py frugal_bonsai/example
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from train_example_model import (
    VOCABULARY,
    WINDOW_TOKENS,
    encode_stream,
    evaluation_windows,
    held_out_stream,
    mean_nll,
    training_documents,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ORDER = 5
TOKEN_BITS = 12  # five tokens of a vocabulary of 4096 fit one 64-bit key
assert 1 << TOKEN_BITS == VOCABULARY


def find(sorted_keys: Ints, keys: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return the position of each key in `sorted_keys`, and whether it is there."""
    positions = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return positions, sorted_keys[positions] == keys


@dataclass(frozen=True)
class OrderTable:
    """The n-grams of one order with discounted counts, and what each context leaves over."""

    keys: Ints
    discounted: Floats
    contexts: Ints
    totals: Floats
    left_over: Floats

    @classmethod
    def from_counts(cls, keys: Ints, counts: Ints) -> "OrderTable":
        """Discount the counts of the sorted n-grams `keys` (Chen and Goodman, equation 26)."""
        of_count = [int((counts == count).sum()) for count in range(5)]
        y = of_count[1] / (of_count[1] + 2 * of_count[2])
        discount = [0.0]
        for count in (1, 2, 3):
            discount.append(count - (count + 1) * y * of_count[count + 1] / of_count[count])
        discounts = np.array(discount)[np.minimum(counts, 3)]
        contexts, starts = np.unique(keys >> TOKEN_BITS, return_index=True)
        totals = np.add.reduceat(counts, starts).astype(np.float64)
        left_over = np.add.reduceat(discounts, starts) / totals
        return cls(keys, counts - discounts, contexts, totals, left_over)

    def interpolate(self, keys: Ints, lower: Floats) -> Floats:
        """Return the probabilities of n-grams, given those of their suffixes one order below."""
        context, known = find(self.contexts, keys >> TOKEN_BITS)
        entry, seen = find(self.keys, keys)
        own = np.where(seen, self.discounted[entry], 0.0) / self.totals[context]
        return np.where(known, own + self.left_over[context] * lower, lower)


def ngram_keys(stream: Ints, order: int) -> Ints:
    """Pack the n-gram that ends at each position from `order - 1` on into one integer."""
    keys = np.zeros(len(stream) - order + 1, dtype=np.int64)
    for offset in range(order):
        keys = keys << TOKEN_BITS | stream[offset : offset + len(keys)]
    return keys


def count_tables(stream: Ints) -> list[OrderTable]:
    """Return the tables of orders 1 to 5; below 5, a count is of distinct tokens in front."""
    keys, counts = np.unique(ngram_keys(stream, ORDER), return_counts=True)
    tables = [OrderTable.from_counts(keys, counts)]
    for order in range(ORDER - 1, 0, -1):
        suffixes = keys & ((1 << TOKEN_BITS * order) - 1)
        keys, counts = np.unique(suffixes, return_counts=True)
        tables.append(OrderTable.from_counts(keys, counts))
    return tables[::-1]


def probabilities(tables: list[OrderTable], stream: Ints, histories: Ints) -> Floats:
    """Return the probability of each token of `stream` after `histories` tokens of it (0 to 4)."""
    result = np.full(len(stream), 1.0 / VOCABULARY)
    for order, table in enumerate(tables, start=1):
        positions = np.flatnonzero(histories >= order - 1)
        keys = ngram_keys(stream, order)[positions - order + 1]
        result[positions] = table.interpolate(keys, result[positions])
    return result


def ngram_perplexities(training: Ints, held_out_WT: Ints) -> dict[str, float]:
    """Return the 5-gram's perplexity with history inside the window only, and with all of it."""
    tables = count_tables(training)
    stream = held_out_WT.reshape(-1)
    inside = np.arange(len(stream)) % WINDOW_TOKENS
    result = {}
    for name, available in (("inside_window", inside), ("full_history", np.arange(len(stream)))):
        values = probabilities(tables, stream, np.minimum(available, ORDER - 1))
        nll_WT = -np.log(values).reshape(held_out_WT.shape)[:, 1:]
        result[name] = round(math.exp(nll_WT.mean()), 3)
        result[name + "_every_8th"] = round(math.exp(nll_WT[::8].mean()), 3)
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare the example model with a 5-gram.")
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documentation, sources = training_documents()
    windows_WT = evaluation_windows(held_out_stream(tokenizer))
    print(json.dumps({"windows": len(windows_WT), "predicted_tokens": windows_WT[:, 1:].numel()}))
    # Docstrings stand in both parts of the training text; sources alone have each but once.
    for name, documents in (
        ("documentation and sources", documentation + sources),
        ("sources", sources),
    ):
        training = encode_stream(tokenizer, documents).numpy()
        perplexities = ngram_perplexities(training, windows_WT.numpy())
        print(json.dumps({"5-gram of": name, "tokens": len(training), **perplexities}), flush=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    for name, windows in (("model", windows_WT), ("model_every_8th", windows_WT[::8])):
        print(json.dumps({name: round(math.exp(mean_nll(model, windows)), 3)}))


if __name__ == "__main__":
    main()

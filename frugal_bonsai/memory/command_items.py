"""The items of a command beside its layers: head, sampling, a teacher's cache, stores, rewriting.

In: shapes, the device, a workload, a choice of sizes. Out: itemised bytes. Pure. docs/memory.md
explains the formulas and compares them with measurements; items.py has the legend.
"""

from __future__ import annotations

import copy

from frugal_bonsai.int8 import QUANTISED_BLOCK_BYTES, QUANTISED_COPIES, product_tokens
from frugal_bonsai.memory.items import SweepItems
from frugal_bonsai.memory.work import SHARD_BYTES, VERIFY_TOKENS, VERIFY_WINDOWS, Choice, PlanItem
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.sizes import MIB

HEAD_CHUNKS = "head chunks"
# Larger head chunks, or blocks of logits, are not faster.
HEAD_CHUNK_BYTES = 32 * MIB
# Four pieces of a tensor, see rewrite/cut_stream.py: two that are read, a cut along each dimension.
_REWRITE_PIECES_BYTES = 4 * 2**21


def cache_bytes(spec: ModelSpec, tokens: int, element_bytes: int) -> int:
    """Return the bytes of the keys, values and logits of one text that is sampled.

    A cache grows by concatenation, so a layer's old cache is held beside its new one. Attention
    repeats the keys and values of a layer for all query heads.
    """
    cache = 2 * tokens * spec.head_dim * (spec.kv_heads * (spec.layers + 1) + spec.heads)
    return cache * element_bytes + 12 * spec.vocabulary


class CommandItems(SweepItems):
    """The items of a command for one model, device and workload."""

    def in_fp32(self) -> CommandItems:
        """Return the items of the same sweeps in fp32, with head chunks of the same rows."""
        exact = copy.copy(self)
        exact._compute = 4
        return exact

    def head_sizes(self, choice: Choice) -> tuple[int, int]:
        """Return the number of rows and of tokens of a head chunk."""
        spec, window = self.spec, self.work.window
        if self.work.full_logits:
            return spec.vocabulary, window
        rows = max(1, HEAD_CHUNK_BYTES // (spec.hidden * self._chunk_element))
        rows = min(spec.vocabulary, rows)
        tokens = max(1, HEAD_CHUNK_BYTES // (rows * 4))
        if tokens >= window:
            tokens = min(tokens // window, choice.micro_batch) * window
        return rows, tokens

    def head_rows(self, choice: Choice, *, products: bool = False) -> list[PlanItem]:
        """Buffers of the head's rows, which are streamed as layers are."""
        rows, _ = self.head_sizes(choice)
        hidden = self.spec.hidden
        slots = 1 if rows >= self.spec.vocabulary else choice.buffers
        stored = rows * (hidden + 4) if products else rows * hidden * self._source
        items = self._buffers(HEAD_CHUNKS, slots, stored, "v rows as stored")
        if products:
            items.append(self._products(choice, rows, hidden, rows * hidden))
        elif self._source != self._compute:
            size, formula = rows * hidden * self._compute, "v*H*c"
            if self._in_blocks((rows, hidden)):
                size, formula = self._block_bytes((rows, hidden)), "4 MiB of rows, their products"
            items.append(self._near("head chunk in the compute dtype", size, formula))
        return items

    def kept_head(self, choice: Choice) -> PlanItem | None:
        """The head, if it is one chunk: it stays once it has been read."""
        rows, _ = self.head_sizes(choice)
        if rows < self.spec.vocabulary:
            return None
        if self._in_blocks((rows, self.spec.hidden)):
            return self._near("head", rows * self.spec.hidden * self._source, "V*H*source")
        return self._near("head", rows * self.spec.hidden * self._compute, "V*H*c")

    def logits(self, choice: Choice, *, products: bool = False) -> PlanItem:
        """Logits of a block of tokens for a chunk of rows, and the tokens' hidden states."""
        rows, tokens = self.head_sizes(choice)
        wide = 4 if self._compute == 4 else 4 + self._compute
        normed = max(tokens, self.work.window) * self.spec.hidden * self._compute
        if products and not self._gpu:
            tokens = min(tokens, product_tokens(rows))
        formula = f"tokens*v*{wide} + tokens*H*c"
        return self._near("logits", tokens * rows * wide + normed, formula)

    def all_logits(self) -> PlanItem:
        """All logits of a window for a custom utility, in parts and joined."""
        size = 2 * self.work.window * self.spec.vocabulary * 4
        return self._near("all logits of a window", size, "2 x S*V*4")

    def sampling(self) -> PlanItem:
        """Keys, values and logits of the windows that are sampled."""
        work = self.work
        size = work.sampled * cache_bytes(self.spec, work.window, self._compute)
        formula = "windows*(2*S*(K*(L+1) + C_o)*c + 12*V)"
        return self._near("KV cache of the text that is sampled", size, formula)

    def teacher_shard(self) -> PlanItem:
        """A shard of a teacher's cache while it is computed: 64 MiB, or one larger window."""
        window, hidden = self.work.window, self.spec.hidden
        one = window * (10 * self.work.top + 4 + 2 * hidden)
        return self._near("a shard of the teacher's cache", max(SHARD_BYTES, one), "64 MiB")

    def top_tokens(self, choice: Choice) -> PlanItem:
        """Values and numbers of the most likely next tokens, so far and of a chunk of the head."""
        _, tokens = self.head_sizes(choice)
        size = tokens * self.work.top * 48
        return self._near("most likely tokens of a block", size, "tokens*k*48")

    def building(self) -> list[PlanItem]:
        """Buffers of a store that is built: a layer's file, and one tensor that is quantised."""
        stored, int8 = self.stored_bytes(self.work.weights), self.work.weights == "int8"
        element = 1 if int8 else self._source
        size = stored + self._largest * (2 * self._source - element)
        formula = "layer as stored, its largest tensor twice as in the source instead"
        items = [self._host("building the store", size, formula)]
        if self._gpu and int8:
            size, formula = self._largest * (self._source + 1), "largest tensor * (source + 1)"
            items.append(self._near("a tensor that is quantised", size, formula))
            blocks = QUANTISED_COPIES * QUANTISED_BLOCK_BYTES
            items.append(self._near("rows that are quantised", blocks, "rows in fp32, 4 x 8 MiB"))
        return items

    def verified_activations(self) -> PlanItem:
        """Activations of a layer and hidden states of both models, for the tokens compared."""
        per_token = self._per_token() + 3 * self.spec.hidden
        size = VERIFY_WINDOWS * VERIFY_TOKENS * per_token * self._compute
        return self._near("activations of a micro-batch", size, "2*64 tokens * (2H+3I + 3H)*c")

    def verified_logits(self) -> PlanItem:
        """Logits of both models, in parts and joined, and their difference."""
        size = 3 * VERIFY_TOKENS * self.spec.vocabulary * 4
        return self._near("logits that are compared", size, f"3 x {VERIFY_TOKENS}*V*4")

    def heads_in_fp32(self, choice: Choice) -> list[PlanItem]:
        """Heads of both models of a verification on a GPU, if a head is one chunk."""
        head = self.kept_head(choice)
        if head is None or not self._gpu:
            return []
        return [self._near("heads of the verification", 2 * head.size_bytes, "2 x V*H*4")]

    def rewriting(self, *, refitted: bool = False) -> PlanItem:
        """Pieces of the tensor that is read, cut and written; a refitted tensor is held whole."""
        size, formula = _REWRITE_PIECES_BYTES, "8 MiB"
        if refitted:
            size = max(2 * self._largest * self._source, size)
            formula = "max(2 x largest of a layer * source, 8 MiB)"
        return self._host("rewriting the model", size, formula)

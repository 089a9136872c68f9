"""What one step of a prune asks of a machine: operations and bytes, not yet seconds.

In: a layer's widths, tokens, sizes from the memory plan. Out: a :class:`Cost`. Pure. Each function
is one formula with its reason; time_model.py adds them up and divides by a machine's rates.

Legend: H hidden, C input columns of an output projection, I FFN channels, V vocabulary, S tokens of
a window, m windows of a micro-batch, c bytes of a compute element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.units import ATTENTION
from frugal_bonsai.sizes import MIB

# glibc gives blocks of at least this size back to the system when they are freed and gets them anew
# (its threshold adapts up to here and no further); their pages are then touched for a first time.
FRESH_BLOCK_BYTES = 32 * MIB


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work, by the resource that it needs.

    Attributes:
        products: operations of matrix products in the sweep's arithmetic.
        fp32_products: operations of matrix products that are always fp32 (refits).
        gram_products: of those of activations, summed in fp32 (Gram matrices, cross moments).
        tf32_products: of fp32 products that may round their factors to TF32 (refinement).
        attention: operations of causal attention.
        solves: operations of Cholesky factors, inverses and solves.
        traffic: bytes that elementwise operations read and write.
        fresh: bytes of freshly allocated blocks of at least 32 MiB.
        calls: calls of a layer.
        read: bytes from disk.
        write: bytes to disk.
        copy: bytes between host and device.
    """

    products: float = 0.0
    fp32_products: float = 0.0
    gram_products: float = 0.0
    tf32_products: float = 0.0
    attention: float = 0.0
    solves: float = 0.0
    traffic: float = 0.0
    fresh: float = 0.0
    calls: float = 0.0
    read: float = 0.0
    write: float = 0.0
    copy: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) * times for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """One layer, at the mean of the model's layers (they differ in a model that has been pruned).

    Attributes:
        hidden: H.
        query: C_o, input columns of o_proj.
        key: columns of k (and of v).
        ffn: I.
        attention_in: parameters of q, k and v.
        attention_out: of o_proj.
        ffn_in: of gate and up.
        ffn_out: of down_proj.
        parameters: all, norms and biases included.
        query_unit: columns of o_proj that one unit owns.
    """

    hidden: float
    query: float
    key: float
    ffn: float
    attention_in: float
    attention_out: float
    ffn_in: float
    ffn_out: float
    parameters: float
    query_unit: float

    @property
    def projections(self) -> float:
        """Parameters that multiply every token."""
        return self.attention_in + self.attention_out + self.ffn_in + self.ffn_out

    def kept(self, share: float) -> LayerWidths:
        """The layer with this share of its units left, both kinds alike."""
        same = {"hidden": self.hidden, "query_unit": self.query_unit}
        scaled = {f.name: getattr(self, f.name) * share for f in fields(self)}
        return LayerWidths(**{**scaled, **same})


def layer_widths(spec: ModelSpec) -> LayerWidths:
    """The mean layer of a model."""
    sums = dict.fromkeys(("query", "ffn", "attention_in", "attention_out", "ffn_in", "ffn_out"), 0)
    for group in spec.table.groups:
        kind = "attention" if group.kind == ATTENTION else "ffn"
        sums["query" if kind == "attention" else "ffn"] += group.columns
        shapes, prefix = spec.layer_tensors[group.layer], spec.prefix(group.layer)
        # A fused one has several pieces.
        for tensor in {piece.tensor for piece in group.slices if not piece.joint}:
            shape = shapes[tensor.removeprefix(prefix)]
            if len(shape) == 2:
                side = "out" if tensor == group.output_weight else "in"
                sums[f"{kind}_{side}"] += math.prod(shape)
    mean = {name: total / spec.layers for name, total in sums.items()}
    if spec.experts:  # a token goes through some of them
        share = spec.experts_chosen / spec.experts
        mean |= {name: mean[name] * share for name in ("ffn", "ffn_in", "ffn_out")}
    units = next(g.columns_per_unit for g in spec.table.groups if g.kind == ATTENTION)
    return LayerWidths(
        hidden=spec.hidden,
        key=(mean["attention_in"] / spec.hidden - mean["query"]) / 2,
        parameters=spec.block_parameters / spec.layers,
        query_unit=units,
        **mean,
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How tokens pass through a layer.

    Attributes:
        window: S.
        micro_batch: m.
        element_bytes: c.
    """

    window: int
    micro_batch: int
    element_bytes: int

    def is_fresh(self, width: float) -> bool:
        """Whether a micro-batch's activation of this width is a block that is allocated anew."""
        size = self.micro_batch * self.window * width * self.element_bytes
        return size >= FRESH_BLOCK_BYTES

    def fresh(self, tokens: float, **arrays: tuple[float, int]) -> float:
        """Bytes of new blocks: ``name=(width, how many)`` of one layer call."""
        return sum(
            tokens * width * count * self.element_bytes
            for width, count in arrays.values()
            if self.is_fresh(width)
        )


def attention_cost(w: LayerWidths, batch: Batch, tokens: float) -> Cost:
    """Norm, q, k, v, rotary embedding, attention; the input of o_proj, without o_proj itself.

    Elements read and written a token: 7 H for the norm (square, mean, two products), 10 for each
    column of q and k (two products, a sum, a half negated and joined); q, k and v read their input
    and write their output, which counts where H is small.
    """
    elements = 7 * w.hidden + 10 * (w.query + w.key) + 3 * w.hidden + w.query + 2 * w.key
    return Cost(
        products=2 * w.attention_in * tokens,
        # Two products of S/2 keys on average, 2 operations each, for every query column.
        attention=2 * batch.window * w.query * tokens,
        traffic=elements * batch.element_bytes * tokens,
        fresh=batch.fresh(tokens, norm=(w.hidden, 3), query=(w.query, 6), key=(w.key, 6)),
    )


def ffn_cost(w: LayerWidths, batch: Batch, tokens: float) -> Cost:
    """Norm, gate, up, activation; the input of down_proj, without down_proj itself.

    Elements: 7 H for the norm, 5 I for the activation and the product with it; gate and up read
    their input and write their output.
    """
    elements = 7 * w.hidden + 5 * w.ffn + 2 * w.hidden + 2 * w.ffn
    return Cost(
        products=2 * w.ffn_in * tokens,
        traffic=elements * batch.element_bytes * tokens,
        fresh=batch.fresh(tokens, norm=(w.hidden, 3), ffn=(w.ffn, 4)),
    )


def outputs_cost(w: LayerWidths, batch: Batch, tokens: float) -> Cost:
    """o_proj and down_proj (input and output), two residual sums, the hidden state kept: 8 H."""
    return Cost(
        products=2 * (w.attention_out + w.ffn_out) * tokens,
        traffic=(10 * w.hidden + w.query + w.ffn) * batch.element_bytes * tokens,
        fresh=batch.fresh(tokens, hidden=(w.hidden, 4)),
    )


def layer_cost(w: LayerWidths, batch: Batch, tokens: float, *, masked: bool = False) -> Cost:
    """One forward of a layer; a mask multiplies the inputs of both output projections in place."""
    cost = attention_cost(w, batch, tokens) + ffn_cost(w, batch, tokens)
    cost += outputs_cost(w, batch, tokens)
    mask = 2 * (w.query + w.ffn) * batch.element_bytes * tokens if masked else 0.0
    return cost + Cost(traffic=mask, calls=tokens / (batch.micro_batch * batch.window))


def int8_cost(w: LayerWidths, tokens: float) -> Cost:
    """What int8 x int8 adds to a layer's forward; see :func:`digits_cost`."""
    inputs = 5 * w.hidden + w.query + w.ffn
    outputs = w.query + 2 * w.key + 2 * w.hidden + 2 * w.ffn
    return Cost(products=2 * w.projections * tokens) + digits_cost(inputs, outputs, tokens)


def digits_cost(inputs: float, outputs: float, tokens: float) -> Cost:
    """Inputs written as two int8 digits and two sums joined; every product is made for both digits.

    An element of an input takes 66 bytes (absolute, largest, divided, rounded, what is left, its
    digit), an element of a result 36 (the second sum divided, the first added, scaled by token,
    then by row).
    """
    return Cost(traffic=tokens * (66 * inputs + 36 * outputs))


def dequantise_cost(
    elements: float, stored_bytes: float, compute_bytes: int, *, in_blocks: bool = False
) -> Cost:
    """Stored weights made dense: read, written; int8 also scaled in place.

    Args:
        elements: of the weights.
        stored_bytes: of one element as stored: 1 is int8.
        compute_bytes: c.
        in_blocks: of rows that stay in the cache: as much as reading what is stored and writing it
            once (measured: 4 to 5 ms instead of 10 for 16.8 M elements).
    """
    if stored_bytes == compute_bytes:
        return Cost()
    passes = 3 if stored_bytes == 1 and not in_blocks else 1
    return Cost(traffic=elements * (stored_bytes + passes * compute_bytes))


def head_cost(
    spec: ModelSpec, batch: Batch, tokens: float, *, rows: int, chunk_tokens: int
) -> Cost:
    """Final norm, logits and their log-sum-exp, in chunks of ``rows`` of the vocabulary.

    The norm is computed once (7 H, and 2 H to keep it), its result gathered for each chunk (2 H).
    The log-sum-exp reads a logit for the largest, reads and writes the difference to it and the
    exponential, and reads that for the sum: 24 bytes in fp32; from bf16 it is converted first
    (2 + 4).
    """
    chunks = math.ceil(spec.vocabulary / rows)
    logits = tokens * spec.vocabulary
    each = 24 + (6 if batch.element_bytes == 2 else 0)
    hidden = (9 + 2 * chunks) * spec.hidden * batch.element_bytes * tokens
    fresh = 4 * logits if rows * chunk_tokens * 4 >= FRESH_BLOCK_BYTES else 0.0
    return Cost(products=2 * spec.hidden * logits, traffic=each * logits + hidden, fresh=fresh)


def stand_ins_cost(w: LayerWidths, share: float, tokens: float, element_bytes: int) -> Cost:
    """Guesses of a pool's inputs in masked evaluation, for both groups.

    Products with a matrix of ``p C`` rows and ``(1 - p) C`` columns in the compute dtype; the
    others' inputs are gathered (2), the pool's are gathered and its guesses chosen from (6).
    """
    columns = w.query + w.ffn
    products = 2 * share * (1 - share) * (w.query**2 + w.ffn**2) * tokens
    traffic = (2 * (1 - share) + 6 * share) * columns * element_bytes * tokens
    if element_bytes == 4:  # whatever the arithmetic of the projections
        return Cost(fp32_products=products, traffic=traffic)
    return Cost(products=products, traffic=traffic)


def make_stand_ins_cost(w: LayerWidths, share: float) -> Cost:
    """Stand-ins of both groups from the inverse M of the Gram matrix: ``-(M_pp)^-1 M_pc``.

    M is ``N^T N``, so that its rows of the pool are a product of ``p C``, C and C; then a factor of
    ``M_pp`` and two substitutions with ``(1 - p) C`` right sides.
    """
    cubes = w.query**3 + w.ffn**3
    return Cost(
        fp32_products=2 * share * cubes,
        solves=(share**3 / 3 + 2 * share**2 * (1 - share)) * cubes,
    )


def refine_cost(
    w: LayerWidths, tokens: float, *, steps: int, blocks: int, iterations: int, keep: bool
) -> Cost:
    """The FFN's channels moved, in ``steps`` problems on a part of the tokens each, all in fp32.

    For J projections into the FFN. The residual takes a pass of the whole sublayer for each block;
    slopes a pass of gate and up and 2 J activations (8 elements each a channel); the pull and each
    iteration's way there and back twice the sublayer's products (9 J elements), without slopes kept
    another pass of gate and up and the activations. In each step ``2 iterations + 3`` triangular
    solves turn the weights into white coordinates and back; the inputs are whitened once.
    """
    sublayer, inputs = w.ffn_in + w.ffn_out, w.ffn_in / (w.ffn * w.hidden)
    slopes = 1 if keep else 1 + iterations
    products = (blocks + 1 + 2 * iterations) * sublayer + slopes * w.ffn_in
    elements = (16 * slopes + 9 * (iterations + 1)) * inputs + 5 * blocks
    cost = Cost(
        tf32_products=2 * products * tokens,
        traffic=4 * elements * w.ffn * tokens,
        solves=steps * (2 * iterations + 3) * w.ffn_in * w.hidden + w.hidden**3 / 3,
    )
    return cost + gram_cost(w.hidden, tokens)


def gram_cost(columns: float, tokens: float) -> Cost:
    """X x^T of an input with so many columns, added up over tokens, in fp32."""
    return Cost(gram_products=2 * columns**2 * tokens)


def exact_prior_cost(w: LayerWidths, *, factored: bool) -> Cost:
    """The inverse of both groups' Gram matrices: C^3/3 for a factor, C^3/3 for its inverse.

    The diagonal blocks that KV groups own are products (C^2 for each of a unit's columns) and small
    solves with H right sides.

    Args:
        w: the layer.
        factored: recovery has made the factor already.
    """
    cubes = (w.query**3 + w.ffn**3) / 3
    units = w.query / w.query_unit
    blocks = units * (2 * w.query_unit**3 / 3 + 2 * w.query_unit**2 * w.hidden)
    return Cost(
        fp32_products=w.query**2 * w.query_unit,
        solves=cubes * (1 if factored else 2) + blocks,
    )


def refit_outputs_cost(w: LayerWidths, tokens: float) -> Cost:
    """o_proj and down_proj refitted."""
    return refit_output_cost(w.query, w.hidden, tokens) + refit_output_cost(w.ffn, w.hidden, tokens)


def refit_output_cost(columns: float, hidden: float, tokens: float) -> Cost:
    """An output projection refitted: Gram and cross moments, then a solve with H right sides.

    The cross moments T^T X cost 2 C H a token; a target takes three sums and its energy (10 H
    elements). The solve: a factor C^3/3, 2 C^2 H of substitution, and W G as a product.
    """
    square = columns**2 * hidden
    return gram_cost(columns, tokens) + Cost(
        gram_products=2 * columns * hidden * tokens,
        fp32_products=2 * square,
        solves=columns**3 / 3 + 2 * square,
        traffic=10 * 4 * hidden * tokens,
    )


def refit_inputs_cost(w: LayerWidths, tokens: float) -> Cost:
    """q, k, v, gate and up refitted: X^T X and N^T X of both sublayers, one factor each.

    For R rows: 2 H^2 R of substitution, and W N^T X and W G as products.
    """
    h = w.hidden
    rows = (w.attention_in + w.ffn_in) / h
    return Cost(
        gram_products=2 * 2 * 2 * h**2 * tokens,
        fp32_products=2 * 2 * h**2 * rows,
        solves=2 * h**3 / 3 + 2 * h**2 * rows,
    )

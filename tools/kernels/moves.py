"""What each kernel moves of memory, and the least it must: the last columns of docs/kernels.md.

Bytes are those that multiprocessors ask of memory and of the second cache. What a block reads again counts once where its
own cache has it; what several blocks read counts for each. Formulas are for one token of a model whose weights have `w`
bytes each, over all layers, that is for one step of decode; those of training are for one token of a step of it, forward and backward.
"""

import re
from dataclasses import dataclass
from typing import Callable


@dataclass(frozen=True)
class Geometry:
    """A model, and where its sequence stands. The defaults are the real one's, whose keys and values are bf16."""

    layers: int = 28
    hidden: int = 3072
    intermediate: int = 24576
    heads: int = 16
    key_value_heads: int = 16
    head_dim: int = 256
    experts: int = 4
    top_k: int = 2
    vocabulary: int = 256_000
    # Positions that the token sees, in spans of 256.
    context: int = 4096
    kv_bytes: int = 2

    @property
    def query(self):
        return self.heads * self.head_dim

    @property
    def key_value(self):
        return self.key_value_heads * self.head_dim

    @property
    def dense(self):
        """(times, rows of all matrices, columns, bytes a result) of the products with dense weights."""
        # Those of the output projection are added to what is there.
        of_layer = [(self.query + 2 * self.key_value, self.hidden, 4), (self.hidden, self.query, 8)]
        return [(self.layers, *matrix) for matrix in of_layer] + [(1, self.vocabulary, self.hidden, 4)]

    @property
    def spans(self):
        return -(-self.context // 256)


# Bytes of a weight; integers with a scale of two bytes for each 32.
WEIGHT_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}
# Bytes of an activation as products take it: integers with a scale and a sum for each 32.
TILED_BYTES = {"f32": 4, "bf16": 4, "f16": 4, "int8": 1 + 8 / 32, "int4": 1 + 8 / 32}
TENSOR_BYTES = TILED_BYTES | {"bf16": 2, "f16": 2}


def products(matrices, weight, activation, rows_of_block):
    """(moved, least) of products: weights, results, and activations once per block of rows, or once."""
    moved = least = 0
    for times, rows, columns, result in matrices:
        others = rows * columns * weight + rows * result
        moved += times * (others + -(-rows // rows_of_block) * columns * activation)
        least += times * (others + columns * activation)
    return moved, least


def gate_up(g, weight, activation, rows_of_block):
    matrices = [(g.layers * g.top_k, g.intermediate, g.hidden, 4)]
    moved, least = products(matrices, weight, activation, rows_of_block)
    # The other matrix shares activations and results.
    other = g.layers * g.top_k * g.intermediate * g.hidden * weight
    return moved + other, least + other


def down(g, weight, activation, rows_of_block):
    return products([(g.layers * g.top_k, g.hidden, g.intermediate, 4)], weight, activation, rows_of_block)


def same(moved):
    return moved, moved


def embed(g):
    # A word of four bytes holds two bf16.
    return 32 * g.hidden / 2 + 4 * g.hidden, 2 * g.hidden + 4 * g.hidden


def norm(g):
    # Two a layer and one before the head.
    return same((2 * g.layers + 1) * 12 * g.hidden)


def round_activations(g):
    return same(g.layers * 5.25 * (g.query + g.top_k * g.intermediate))


def rotate_and_store(g):
    elements = 2 * g.query + 2 * g.key_value + g.key_value + g.head_dim / 2
    return same(g.layers * (4 * elements + 2 * g.key_value * g.kv_bytes))


def attention(g):
    cache = 2 * g.context * g.head_dim * g.kv_bytes
    other = 4 * g.query + 4 * g.heads * g.spans * (g.head_dim + 2)
    return g.layers * (g.heads * cache + other), g.layers * (g.key_value_heads * cache + other)


def attention_tensor(g, weight=2, *_):
    # Integers with a scale of four bytes for each position and head.
    element = 2 if weight == 2 else 1 + 4 / g.head_dim
    cache = 2 * g.context * g.head_dim * element
    other = 8 * g.query
    return g.layers * (g.heads * cache + other), g.layers * (g.key_value_heads * cache + other)


def attention_merge(g):
    return same(g.layers * (4 * g.heads * g.spans * (g.head_dim + 2) + 4 * g.query))


def route(g):
    rows = next(rows for rows in (4, 8, 16, 32, 48, 64) if g.experts <= rows)
    other = 4 * g.hidden + 16 * g.top_k
    return g.layers * (4 * rows * g.hidden + other), g.layers * (4 * g.experts * g.hidden + other)


def group(g):
    written = 8 * g.top_k + 4 * (g.experts + 1)
    return g.layers * (8 * g.top_k + written), g.layers * (4 * g.top_k + written)


def combine(g):
    return same(g.layers * (4 * g.top_k + 8) * g.hidden)


def log_softmax_at(g):
    return 8 * g.vocabulary, 4 * g.vocabulary


def select_candidates(g):
    # A copy, and of each 2,048 tokens the 256 largest with their ids.
    return same(9 * g.vocabulary)


def merge_candidates(g):
    return same(5 * g.vocabulary + 8 * 256)


def training_matrices(g, dense, experts, head):
    """(times, rows, columns) of the products with weights, each of the three so often in all layers."""
    of_layer = [(g.query + 2 * g.key_value, g.hidden), (g.hidden, g.query)]
    of_expert = [(2 * g.intermediate, g.hidden), (g.hidden, g.intermediate)]
    yield from ((dense, *matrix) for matrix in of_layer)
    yield from ((experts * g.top_k, *matrix) for matrix in of_expert)
    yield head, g.vocabulary, g.hidden


def training_product(g, weight, _, rows_of_block):
    # A layer's activations are computed twice, and logits; activations are f32 for every format.
    matrices = [(*matrix, 8) for matrix in training_matrices(g, 2 * g.layers, 2 * g.layers, 2)]
    return products(matrices, weight, 4, rows_of_block)


def training_product_gradient(g, weight, _, rows_of_block):
    # Below the lowest gate there is none. The columns of a matrix are the rows of its transpose.
    matrices = training_matrices(g, g.layers - 1, g.layers - 1, 1)
    matrices = [(times, columns, rows, 8) for times, rows, columns in matrices]
    return products(matrices, weight, 4, rows_of_block)


def training_multiply(g):
    moved = least = 0
    # (times, rows, depth, columns, bytes a result); a token's scores are one row of each head.
    up, down, heads = 2 * g.layers, g.layers - 1, g.heads
    products = [(up * heads, 1, g.head_dim, g.context, 4), (up * heads, 1, g.context, g.head_dim, 4)]
    products += [(down * heads, 1, g.head_dim, g.context, 4)] * 2
    products += [(down * heads, 1, g.context, g.head_dim, 8), (down * heads, g.context, 1, g.head_dim, 8)]
    products += [(down * heads, g.context, 1, g.head_dim, 8), (g.layers, 1, g.hidden, g.experts, 8)]
    products += [(down, 1, g.experts, g.hidden, 8), (g.layers, g.experts, 1, g.hidden, 8)]
    for times, rows, depth, columns, result in products:
        results = result * rows * columns
        moved += times * (4 * depth * (rows * -(-columns // 64) + columns * -(-rows // 64)) + results)
        least += times * (4 * depth * (rows + columns) + results)
    return moved, least


def training_softmax(g):
    scores = 2 * g.layers * g.heads * g.context
    return 20 * scores, 8 * scores


def training_softmax_gradient(g):
    return same((g.layers - 1) * (16 * g.heads * g.context + 8 * g.query))


def training_log_sum(g):
    return 8 * g.vocabulary, 4 * g.vocabulary


def training_logit_gradient(g):
    return same(8 * g.vocabulary)


def training_norm_gradient(g):
    # Two a layer but the lowest, and one before the head.
    return same((2 * g.layers - 1) * 20 * g.hidden)


def training_rotate(g):
    return same((3 * g.layers - 1) * 8 * (g.query + g.key_value))


def training_gather(g):
    # Inputs twice, the gradient of the sum, and the same with weights; and before the head.
    return same(8 * g.hidden * ((4 * g.layers - 1) * g.top_k + 1))


def training_combine(g):
    return same(g.hidden * ((2 * g.layers - 1) * (4 * g.top_k + 8) + 12))


def training_row_products(g):
    return same(g.layers * g.top_k * (8 * g.hidden + 4))


def training_geglu(g):
    return same(2 * g.layers * g.top_k * 12 * g.intermediate)


def training_geglu_gradient(g):
    return same((g.layers - 1) * g.top_k * 20 * g.intermediate)


@dataclass(frozen=True)
class Moves:
    """In words, for any number of tokens, and (moved, least) in bytes for one: of the geometry, and of the bytes of a weight
    and of an activation where they are of several formats."""

    moved: str
    least: str
    bytes: Callable
    # Rows of a block where weights are multiplied.
    rows_of_block: int = 0


TILED = "activations per 16 rows"
TENSOR = "activations per 128 rows"
NARROW = "activations per 32 rows"
TRAINED = "activations per 64 rows"
ONCE_OF_EXPERTS = "of each touched expert once"
OF_EXPERTS = "of each touched expert once per"
LEAST_OF_EXPERTS = "those of touched experts and activations once"
DENSE = lambda g, *rest: products(g.dense, *rest)

# In the order of a pass, and then what training has of its own.
MOVES = {
    "embed": Moves("32 for each 4 of a row (a sector for a word), 4 written a column", "the row, 4 written a column", embed),
    "norm": Moves("8 read and 4 written a column, 1.25 more in int8, 2 more in halves", "the same", norm),
    "round_activations": Moves("4 read and 1.25 or 2 written a column", "the same", round_activations),
    "matmul_tensor": Moves(f"weights once per 64 tokens, {TENSOR}", "weights and activations once", DENSE, 128),
    "matmul": Moves(f"weights once per tile of tokens, {TILED}", "weights and activations once", DENSE, 16),
    "matmul_narrow": Moves(f"weights once, {NARROW}", "weights and activations once", DENSE, 32),
    "rotate_and_store": Moves("query and key once each way, value once, page elements once", "the same", rotate_and_store),
    "attention": Moves(
        "keys and values of all positions once per head and token, 4 (head_dim + 2) a span of 256",
        "keys and values once per key-value head and sequence",
        attention,
    ),
    "attention_tensor": Moves(
        "keys and values of all positions once per head and 64 tokens",
        "keys and values once per key-value head and sequence",
        attention_tensor,
    ),
    "attention_merge": Moves("4 (head_dim + 2) a span of 256 positions, 4 written a column", "the same", attention_merge),
    "route": Moves("the router's rows, filled up to 4, 8 or 16, once per token", "its rows once", route),
    "group": Moves("4 read a choice twice, 8 written", "4 read, 8 written", group),
    "gate_up": Moves(f"gate and up {OF_EXPERTS} tile of its tokens, {TILED}", LEAST_OF_EXPERTS, gate_up, 16),
    "down": Moves(f"down {OF_EXPERTS} tile of its tokens, {TILED}", LEAST_OF_EXPERTS, down, 16),
    "gate_up_tensor": Moves(f"gate and up {OF_EXPERTS} 64 of its slots, {TENSOR}", LEAST_OF_EXPERTS, gate_up, 128),
    "down_tensor": Moves(f"down {OF_EXPERTS} 64 of its slots, {TENSOR}", LEAST_OF_EXPERTS, down, 128),
    "gate_up_narrow": Moves(f"gate and up {ONCE_OF_EXPERTS}, {NARROW}", LEAST_OF_EXPERTS, gate_up, 32),
    "down_narrow": Moves(f"down {ONCE_OF_EXPERTS}, {NARROW}", LEAST_OF_EXPERTS, down, 32),
    "combine": Moves("4 a slot and column, 8 a column of x", "the same", combine),
    "select_candidates": Moves("4 read and 5 written a logit", "the same", select_candidates),
    "merge_candidates": Moves("5 a logit, 8 written a candidate", "the same", merge_candidates),
    "log_softmax_at": Moves("4 a logit twice", "4 a logit", log_softmax_at),
    "training_product": Moves(f"weights once per 64 tokens, {TRAINED}", "weights and activations once", training_product, 64),
    "training_product_gradient": Moves(
        "weights once per 64 tokens, gradients per 64 columns",
        "weights and gradients once",
        training_product_gradient,
        64,
    ),
    "training_multiply": Moves("each side once per 64 rows or columns of the other", "each side once", training_multiply),
    "training_softmax": Moves("12 read and 8 written a score", "4 read and 4 written", training_softmax),
    "training_softmax_gradient": Moves("8 a score each way", "the same", training_softmax_gradient),
    "training_log_sum": Moves("4 a logit twice", "4 a logit", training_log_sum),
    "training_logit_gradient": Moves("4 a logit each way", "the same", training_logit_gradient),
    "training_norm_gradient": Moves("16 read and 4 written a column", "the same", training_norm_gradient),
    "training_rotate": Moves("4 a number each way", "the same", training_rotate),
    "training_gather": Moves("4 a number each way", "the same", training_gather),
    "training_combine": Moves("4 a slot and column, 8 a column of the sum", "the same", training_combine),
    "training_row_products": Moves("8 a column, 4 written a row", "the same", training_row_products),
    "training_geglu": Moves("8 read and 4 written a number", "the same", training_geglu),
    "training_geglu_gradient": Moves("12 read and 8 written a number", "the same", training_geglu_gradient),
}


def split(name):
    """What MOVES calls a row of the table, and the format of its weights where it has one."""
    family = re.fullmatch(r"(.*)_(f32|bf16|f16|int8|int4)", name)
    family, format = (family[1], family[2]) if family else (name, None)
    if family not in MOVES:
        raise SystemExit(f"{name}: tools/kernels/moves.py does not say what it moves")
    return family, format


def order(name):
    """A row's place in the table."""
    return list(MOVES).index(split(name)[0])


def step(name, geometry=Geometry()):
    """(moved, least) in bytes of one step of decode."""
    family, format = split(name)
    moves = MOVES[family]
    if format is None:
        return moves.bytes(geometry)
    activations = TENSOR_BYTES if family.endswith(("_tensor", "_narrow")) else TILED_BYTES
    return moves.bytes(geometry, WEIGHT_BYTES[format], activations[format], moves.rows_of_block)


def readable(count):
    """Bytes in three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # What is nearer to one of them than to 999 of the smaller.
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"

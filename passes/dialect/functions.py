"""What the function bodies of the ops share: functions of standard ops, in the same domain of the same file.

A runtime without our library inlines them. ``K`` is in_features, ``N`` out_features; all floats are float32.
"""

from collections.abc import Iterable

import onnx
from onnx import FunctionProto

_HEAD = '<domain: "sparsify", opset_import: ["" : 23, "sparsify" : 1]>\n'


def function(text: str) -> FunctionProto:
    """Parse the text of a function, without its first line."""
    return onnx.parser.parse_function(_HEAD + text)


# x [..., K] and a dense weight [N, K]. Gemm takes an absent bias as absent, which Add would not.
_DENSE_LINEAR = function("""
dense_linear (x, weight, bias) => (y)
{
    k = Shape <start = 1> (weight)
    out = Shape <start = 0, end = 1> (weight)
    minus1 = Constant <value_ints = [-1]> ()
    rows = Concat <axis = 0> (minus1, k)
    x2 = Reshape (x, rows)
    y2 = Gemm <transB = 1> (x2, weight, bias)
    tokens = Shape <start = 0, end = -1> (x)
    y_shape = Concat <axis = 0> (tokens, out)
    y = Reshape (y2, y_shape)
}
""")

# Values [N, K n/m] float32 and their packed positions: the dense [N, K]. The index bits b follow from m.
_NM_WEIGHT = function("""
nm_weight <n, m> (values, indices) => (weight)
{
    n0 = Constant <value_int: int = @n> ()
    m0 = Constant <value_int: int = @m> ()
    axis0 = Constant <value_ints = [0]> ()
    axis2 = Constant <value_ints = [2]> ()
    n1 = Unsqueeze (n0, axis0)
    m1 = Unsqueeze (m0, axis0)

    two = Constant <value_int = 2> ()
    four = Constant <value_int = 4> ()
    eight = Constant <value_int = 8> ()
    sixteen = Constant <value_int = 16> ()
    one = Constant <value_int = 1> ()
    zero = Constant <value_int = 0> ()
    over2 = Greater (m0, two)
    over4 = Greater (m0, four)
    over16 = Greater (m0, sixteen)
    bits_a = Where (over2, two, one)
    bits_b = Where (over4, four, bits_a)
    bits = Where (over16, eight, bits_b)

    shift64 = Range (zero, eight, bits)
    shift = Cast <to = 2> (shift64)
    span = Pow (two, bits)
    ones64 = Sub (span, one)
    ones = Cast <to = 2> (ones64)
    byte = Unsqueeze (indices, axis2)
    shifted = BitShift <direction = "RIGHT"> (byte, shift)
    fields = BitwiseAnd (shifted, ones)
    flat = Constant <value_ints = [0, -1]> ()
    row_fields = Reshape (fields, flat)

    kept = Shape <start = 1> (values)
    columns = Constant <value_ints = [1]> ()
    row_index = Slice (row_fields, axis0, kept, columns)
    keep_rest = Constant <value_ints = [0, -1]> ()
    by_group = Concat <axis = 0> (keep_rest, n1)
    index8 = Reshape (row_index, by_group)
    index = Cast <to = 7> (index8)
    update = Reshape (values, by_group)
    groups = Shape <start = 0, end = 2> (index)
    dense_shape = Concat <axis = 0> (groups, m1)
    empty = ConstantOfShape (dense_shape)
    scattered = ScatterElements <axis = 2> (empty, index, update)
    weight = Reshape (scattered, flat)
}
""")

# A mask [N, ceil(K / 8)] as int64 zeros and ones [N, K].
_MASK_BITS = function("""
mask_bits <in_features> (mask) => (bits)
{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    flat = Constant <value_ints = [0, -1]> ()
    k0 = Constant <value_int: int = @in_features> ()
    k = Unsqueeze (k0, axis0)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    eight = Constant <value_int = 8> ()
    shift64 = Range (zero, eight, one)
    shift = Cast <to = 2> (shift64)
    one8 = Cast <to = 2> (one)
    byte = Unsqueeze (mask, axis2)
    shifted = BitShift <direction = "RIGHT"> (byte, shift)
    fields = BitwiseAnd (shifted, one8)
    padded = Reshape (fields, flat)
    bits8 = Slice (padded, axis0, k, axis1)
    bits = Cast <to = 7> (bits8)
}
""")

# The place of every weight [N, K] among the stored values: how many mask bits stand before its own.
_PLACES = function("""
places (bits) => (place)
{
    minus1 = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    line = Reshape (bits, minus1)
    place_line = CumSum <exclusive = 1> (line, zero)
    bits_shape = Shape (bits)
    place = Reshape (place_line, bits_shape)
}
""")

# The same where every 64 columns of a row begin a new byte of two values.
_NIBBLE_PLACES = function("""
nibble_places (bits) => (place)
{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    minus1 = Constant <value_ints = [-1]> ()
    flat = Constant <value_ints = [0, -1]> ()
    no_pads = Constant <value_ints = [0, 0, 0]> ()
    chunked = Constant <value_ints = [0, -1, 64]> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    zero = Constant <value_int = 0> ()
    along = Constant <value_int = 2> ()
    width = Constant <value_ints = [64]> ()
    k = Shape <start = 1> (bits)
    negative = Neg (k)
    pad = Mod (negative, width)
    pads = Concat <axis = 0> (no_pads, pad)
    padded = Pad (bits, pads, zero)
    chunks = Reshape (padded, chunked)
    count = ReduceSum <keepdims = 1> (chunks, axis2)
    count_and_one = Add (count, one)
    bytes = Div (count_and_one, two)
    line = Reshape (bytes, minus1)
    start_line = CumSum <exclusive = 1> (line, zero)
    start_nibble = Mul (start_line, two)
    count_shape = Shape (count)
    start = Reshape (start_nibble, count_shape)
    inside = CumSum <exclusive = 1> (chunks, along)
    place3 = Add (start, inside)
    place2 = Reshape (place3, flat)
    place = Slice (place2, axis0, k, axis1)
}
""")

# Values [stored] float32 to their places: the dense [N, K]. The zero appended to the values is what Gather finds
# where a matrix has no values at all.
_SPREAD = function("""
spread (values, bits, place) => (weight)
{
    spare = Constant <value_floats = [0.0]> ()
    values_and_zero = Concat <axis = 0> (values, spare)
    found = Gather (values_and_zero, place)
    nothing = Constant <value_float = 0.0> ()
    stored = Cast <to = 9> (bits)
    weight = Where (stored, found, nothing)
}
""")

# Bytes [..., B] uint8 as the codes -8 .. 7 they hold, float32 [..., 2 B]; the lower half of a byte is the first.
_INT4_CODES = function("""
int4_codes (bytes) => (codes)
{
    last = Constant <value_ints = [-1]> ()
    four64 = Constant <value_int = 4> ()
    fifteen64 = Constant <value_int = 15> ()
    four = Cast <to = 2> (four64)
    fifteen = Cast <to = 2> (fifteen64)
    low = BitwiseAnd (bytes, fifteen)
    high = BitShift <direction = "RIGHT"> (bytes, four)
    low1 = Unsqueeze (low, last)
    high1 = Unsqueeze (high, last)
    pairs = Concat <axis = -1> (low1, high1)
    front = Shape <start = 0, end = -1> (bytes)
    shape = Concat <axis = 0> (front, last)
    stored = Reshape (pairs, shape)
    stored32 = Cast <to = 1> (stored)
    eight = Constant <value_float = 8.0> ()
    codes = Sub (stored32, eight)
}
""")

# A dense weight of codes [N, K] times the scales [N, ceil(K / group)] of its groups.
_SCALE_GROUPS = function("""
scale_groups <group> (codes, scales) => (weight)
{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    flat = Constant <value_ints = [0, -1]> ()
    once = Constant <value_ints = [1, 1]> ()
    group0 = Constant <value_int: int = @group> ()
    group1 = Unsqueeze (group0, axis0)
    scales32 = Cast <to = 1> (scales)
    column = Unsqueeze (scales32, axis2)
    shape = Concat <axis = 0> (once, group1)
    repeated = Expand (column, shape)
    padded = Reshape (repeated, flat)
    k = Shape <start = 1> (codes)
    each = Slice (padded, axis0, k, axis1)
    weight = Mul (codes, each)
}
""")

# A dense weight of codes [N, K] times the scale of each row.
_SCALE_ROWS = function("""
scale_rows (codes, scales) => (weight)
{
    axis1 = Constant <value_ints = [1]> ()
    column = Unsqueeze (scales, axis1)
    weight = Mul (codes, column)
}
""")

# storage.py: quantise_tokens. The sum of x * 0 is 0, or NaN for a token that is not finite; a maximum may skip a NaN.
QUANTISE_TOKENS = function("""
quantise_tokens (x) => (y)
{
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    most = Constant <value_float = 127.0> ()
    least = Constant <value_float = 1.1754943508222875e-38> ()
    size = Abs (x)
    largest = ReduceMax <keepdims = 1> (size, last)
    step = Div (largest, most)
    tiny = Less (step, least)
    divisor = Where (tiny, one, step)
    factor = Where (tiny, zero, step)
    ratio = Div (x, divisor)
    code = Round (ratio)
    product = Mul (code, factor)
    zeros = Mul (x, zero)
    not_finite = ReduceSum <keepdims = 1> (zeros, last)
    y = Add (product, not_finite)
}
""")

_SHARED = {
    f.name: f
    for f in (
        _DENSE_LINEAR, _NM_WEIGHT, _MASK_BITS, _PLACES, _NIBBLE_PLACES, _SPREAD, _INT4_CODES, _SCALE_GROUPS,
        _SCALE_ROWS, QUANTISE_TOKENS,
    )
}  # fmt: skip


def with_shared(bodies: Iterable[FunctionProto]) -> list[FunctionProto]:
    """The bodies of ops, each once, and behind them the shared functions that they call."""
    found = {body.name: body for body in bodies}
    called = {node.op_type for body in found.values() for node in body.node if node.domain == "sparsify"}
    return [*found.values(), *(_SHARED[name] for name in sorted(called))]

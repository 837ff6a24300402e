"""The scan as a graph of ordinary ONNX operators: no Scan, no Loop, and a number of operators that no size changes.

A direction walks over L = H W positions, cut into M blocks of T. All blocks go through the T positions of a block side
by side, one after the other: h <- exp(dt A) h + dt u B. They do so twice. The first time they start at zero, and only
their last states count. These are scanned in groups of `GROUP` blocks, then between groups by shifts of 1, 2, 4, ..
groups (Hillis and Steele). The second time each block starts at the right state, takes the decays of the first time,
and y = C h is kept. Every exponent is a sum of dt A, which is at most 0, so that every decay lies in [0, 1]: nothing
overflows, and what underflows is 0 and should be. Backward directions go through blocks and positions from the last to
the first. The end of a walk is padded: u is 0 there, and so no state comes of it whatever dt is.

A runtime goes through memory once for each operator, so their number at a position is what counts: multiply, exp,
multiply, multiply, add the first time, and multiply, multiply, add and a product with C the second time. Two directions
go side by side, and the others after them, so that the states of a step stay in a CPU's cache. ONNX Runtime visits the
inputs of an operator from the last that was written to the first; nodes are written such that it uses values soon after
it made them, which saves a third of the time. What else was tried is in benchmarks/LIMITS.md.

Sums of dt and h are in float32.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from serpent_ir.export.task import ARTANH

DOMAIN = "serpent_ir"
"""The domain of the operator that stands for a scan until `expand_scans` has replaced it."""
BLOCK = 32
"""T. Longer blocks make smaller tensors of states, which stay in a CPU's cache, and more operators."""
ALONE = 64
"""The longest walk of a fixed size that is one block, and gone through once."""
GROUP = 8
"""Blocks whose states are scanned one after the other."""
LARGEST_MAP = 1 << 30
"""Numbers of the largest map, L d, for which a graph of any size has shifts enough: 4 GB in float32."""
FORMULATION = "blocks of 32 positions, gone through twice, without Scan and Loop"


def expand_scans(model: onnx.ModelProto) -> int:
    """Replace every `serpent_ir::ss2d` and `::selective_scan` of a model by ordinary operators, in place.

    Returns how many there were.
    """
    graph = model.graph
    values = {value.name: value for value in graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape for value in (*graph.value_info, *graph.input)}
    nodes, count = [], 0

    def sizes(name: str) -> list[int]:
        if name in values:
            return list(values[name].dims)
        return [side.dim_value for side in shapes[name].dim]

    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        scan = _Graph(f"{node.op_type}_{count}/")
        if node.op_type == "ss2d":
            u, proj, *parameters = node.input
            arrays = [numpy_helper.to_array(values[name]).astype(np.float32) for name in parameters]
            _write(scan, u, proj, node.output[0], sizes(u)[1:3], *arrays)
        else:
            _write_sequences(scan, list(node.input), list(node.output), [sizes(node.input[0]), sizes(node.input[-1])])
        nodes += scan.nodes
        graph.initializer.extend(scan.initializers())
        count += 1
    del graph.node[:]
    graph.node.extend(nodes)
    used = set(_inputs(nodes))
    kept = [value for value in graph.initializer if value.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    others = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(others)
    return count


def _inputs(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """What nodes read, and the nodes of bodies of loops inside them."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _inputs(attribute.g.node)


def weights_in_half(model: onnx.ModelProto) -> None:
    """Keep matrices of weights as float16, each with a Cast to float32, which runtimes do once, as they load."""
    graph = model.graph
    casts = []
    for value in graph.initializer:
        if value.data_type == onnx.TensorProto.FLOAT and len(value.dims) > 1 and "/constant_" not in value.name:
            name = value.name
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).astype(np.float16), f"{name}.half"))
            casts.append(helper.make_node("Cast", [value.name], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


class _Graph:
    """Nodes with names of their own, and each constant once."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple, tuple[str, np.ndarray]] = {}
        self._names = 0

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes) -> str:
        return self.split(operator, *inputs, names=[output or self.name()], **attributes)[0]

    def split(self, operator: str, *inputs: str, names: list[str], **attributes) -> list[str]:
        self.nodes.append(helper.make_node(operator, inputs, names, f"{self.prefix}{len(self.nodes)}", **attributes))
        return names

    def parts(self, x: str, count: int, axis: int) -> list[str]:
        """x in `count` equal parts along an axis, which stays."""
        names = [self.name() for _ in range(count)]
        return [x] if count == 1 else self.split("Split", x, names=names, axis=axis, num_outputs=count)

    def joined(self, parts: Iterable[str], axis: int) -> str:
        parts = list(parts)
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=axis)

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def constant(self, value: np.ndarray) -> str:
        key = (value.dtype.str, value.shape, value.tobytes())
        return self._constants.setdefault(key, (f"{self.prefix}constant_{len(self._constants)}", value))[0]

    def initializers(self) -> list[onnx.TensorProto]:
        return [numpy_helper.from_array(value, name) for name, value in self._constants.values()]

    def cut(self, x: str, start: int, end: str | int, axis: int, step: int = 1) -> str:
        last = self.ints(end) if isinstance(end, int) else end
        return self.add("Slice", x, self.ints(start), last, self.ints(axis), self.ints(step))

    def reversed(self, x: str, axis: int) -> str:
        return self.cut(x, -1, -(1 << 62), axis, -1)

    def padded(self, x: str, rank: int, axis: int, count: str | int, *, before: bool = False) -> str:
        """Zeros at the start or at the end of an axis."""
        place = axis if before else rank + axis
        if isinstance(count, int):
            if not count:
                return x
            return self.add("Pad", x, self.ints(*(count if i == place else 0 for i in range(2 * rank))))
        zeros = (
            [self.ints(*[0] * place)] * bool(place),
            [self.ints(*[0] * (2 * rank - 1 - place))] * (place < 2 * rank - 1),
        )
        return self.add("Pad", x, self.joined([*zeros[0], count, *zeros[1]], 0))

    def name(self) -> str:
        self._names += 1
        return f"{self.prefix}v{self._names}"


def softplus(graph: _Graph, x: str) -> str:
    """max(x, 0) + log(1 + z) with z = exp(-|x|), where log(1 + z) = 2 artanh(w) and w = z / (2 + z) <= 1/3.

    ONNX Runtime's Softplus takes 11 ns an element on a CPU, and its Log 1.7, more than all of this; and log(1 + z)
    would lose a small z.
    """

    def number(value: float) -> str:
        return graph.constant(np.array([value], np.float32))

    z = graph.add("Exp", graph.add("Neg", graph.add("Abs", x)))
    w = graph.add("Div", z, graph.add("Add", z, number(2)))
    square = graph.add("Mul", w, w)
    *others, last = ARTANH
    series = graph.add("Mul", square, number(last))
    for value in others[:0:-1]:
        series = graph.add("Mul", graph.add("Add", series, number(value)), square)
    log = graph.add("Mul", graph.add("Add", series, number(others[0])), w)
    return graph.add("Add", graph.add("Relu", x), log)


def _write(
    graph: _Graph,
    u: str,
    proj: str,
    output: str,
    sides: list[int],
    dt_weight: np.ndarray,
    dt_bias: np.ndarray,
    A_log: np.ndarray,
    D: np.ndarray,
) -> None:
    """`serpent_ir.ops.ss2d` of u (B, H, W, d) and proj (B, H, W, 4, R + 2N). `sides` are H and W, 0 where free."""
    d, states, rank = *A_log.shape[1:], dt_weight.shape[-1]
    row = rank + 2 * states
    if sides[0] * sides[1]:
        cut = _Cut(graph, sides[0] * sides[1], d)
        upright, turned = graph.ints(0, *sides, d), graph.ints(0, *sides[::-1], d)
    else:
        upright = graph.add("Shape", u)
        turned = graph.add("Gather", upright, graph.ints(0, 2, 1, 3))
        cut = _Cut(graph, graph.add("Mul", graph.cut(upright, 1, 2, 0), graph.cut(upright, 2, 3, 0)), d)

    def blocks(rows: str, columns: str, channels: int) -> str:
        """Walks by rows and by columns, (B, H, W, channels) and (B, W, H, channels), as (2, B, M, T, channels)."""
        walks = [graph.add("Reshape", y, graph.ints(0, -1, channels)) for y in (rows, columns)]
        both = graph.joined((graph.add("Unsqueeze", y, graph.ints(0)) for y in walks), 0)
        return cut.into_blocks(graph, both, channels)

    inputs = blocks(u, _turned(graph, u), d)
    rows = graph.add("Reshape", proj, graph.ints(0, 0, 0, 4 * row))
    columns = _turned(graph, rows)
    sums = []
    for k in (slice(0, 2), slice(2, 4)):  # forward, backward
        by_rows = graph.cut(rows, k.start * row, (k.start + 1) * row, 3)
        by_columns = graph.cut(columns, (k.start + 1) * row, (k.start + 2) * row, 3)
        names = [graph.name() for _ in range(3)]
        given = blocks(by_rows, by_columns, row)
        low, B, C = graph.split("Split", given, graph.ints(rank, states, states), names=names, axis=4)
        weight, bias = dt_weight[k].transpose(0, 2, 1)[:, None, None], dt_bias[k][:, None, None, None]
        product = graph.add("MatMul", low, graph.constant(np.ascontiguousarray(weight)))
        dt = softplus(graph, graph.add("Add", product, graph.constant(bias)))
        A = -np.exp(A_log[k].transpose(0, 2, 1)[:, None, None].astype(np.float64)).astype(np.float32)
        sums.append(_walks(graph, cut, inputs, dt, B, C, graph.constant(A), (states, d), backward=k.start > 0)[0])
    y = cut.joined(graph, graph.add("Add", *sums), d)
    lines = (graph.add("Squeeze", x, graph.ints(0)) for x in graph.parts(y, 2, 0))
    rows, columns = (graph.add("Reshape", x, shape) for x, shape in zip(lines, (upright, turned), strict=True))
    y = graph.add("Add", rows, _turned(graph, columns))
    graph.add("Add", y, graph.add("Mul", u, graph.constant(D.sum(0))), output=output)


def _write_sequences(graph: _Graph, inputs: list[str], outputs: list[str], shapes: list[list[int]]) -> None:
    """K walks of given u and dt (K, B, L, d), B and C (K, B, L, N) and A (K, N, d): y like u, the state (K, B, N, d).

    `shapes` are those of u and A, with 0 where a size is free.
    """
    (_, _, length, d), (K, states, _) = shapes
    *given, A = inputs
    cut = _Cut(graph, length or graph.cut(graph.add("Shape", given[0]), 2, 3, 0), d)
    u, dt, B, C = (cut.into_blocks(graph, x, n) for x, n in zip(given, (d, d, states, states), strict=True))
    rate = graph.add("Reshape", A, graph.ints(K, 1, 1, states, d))
    y, ends = _walks(graph, cut, u, dt, B, C, rate, (states, d))
    y = cut.joined(graph, y, d)
    graph.add("Identity", y, output=outputs[0])
    if len(outputs) > 1 and outputs[1]:  # at the padded end dt is 0, so that the state stays
        graph.add("Squeeze", graph.cut(ends, -1, 1 << 62, 2), graph.ints(2), output=outputs[1])


def _turned(graph: _Graph, x: str) -> str:
    return graph.add("Transpose", x, perm=[0, 2, 1, 3])


class _Cut:
    """How walks are cut into blocks: numbers where their length is fixed, and names of values where not."""

    def __init__(self, graph: _Graph, length: int | str, d: int):
        self.block, self.group, self.blocks = BLOCK, GROUP, 0  # 0 blocks: any number
        if isinstance(length, int):
            self.block = length if length <= ALONE else BLOCK
            self.blocks = -(-length // self.block)
            self.group = min(GROUP, self.blocks)
            groups = -(-self.blocks // self.group)
            self.length, self.rest = graph.ints(length), -length % self.block
            self.count, self.rest_of_groups = graph.ints(self.blocks), -self.blocks % self.group
            self.shifts: list[str | int] = [1 << k for k in range((groups - 1).bit_length())]
            self.groups, self.one = graph.ints(groups), 1
            return

        def rest(count: str, of: int) -> tuple[str, str]:
            """What is missing to a multiple of `of`, and how often `of` goes into that."""
            missing = graph.add("Mod", graph.add("Neg", count), graph.ints(of))
            return missing, graph.add("Div", graph.add("Add", count, missing), graph.ints(of))

        self.length = length
        self.rest, self.count = rest(length, self.block)
        self.rest_of_groups, self.groups = rest(self.count, self.group)
        # No more zeros than there are groups: 2^15 would need gigabytes.
        most = (LARGEST_MAP // (d * self.block * self.group)).bit_length()
        self.shifts = [graph.add("Min", graph.ints(1 << k), self.groups) for k in range(most)]
        self.one = graph.ints(1)

    def into_blocks(self, graph: _Graph, x: str, channels: int) -> str:
        """(K, B, L, channels) as (K, B, M, T, channels), with zeros at the end."""
        return graph.add("Reshape", graph.padded(x, 4, 2, self.rest), graph.ints(0, 0, -1, self.block, channels))

    def joined(self, graph: _Graph, x: str, channels: int) -> str:
        """The way back."""
        x = graph.add("Reshape", x, graph.ints(0, 0, -1, channels))
        return graph.add("Slice", x, graph.ints(0), self.length, graph.ints(2)) if self.rest else x


def _walks(
    graph: _Graph,
    cut: _Cut,
    u: str,
    dt: str,
    B: str,
    C: str,
    rate: str,
    tail: tuple[int, int],
    *,
    backward: bool = False,
) -> tuple[str, str]:
    """K walks: y (K, B, M, T, d) without D, and the last states of all blocks (K, B, M, N, d).

    u and dt (K, B, M, T, d), B and C (K, B, M, T, N), rate (K, 1, 1, N, d), which is A; `tail` is (N, d).
    """
    T = cut.block
    dts, dtus = graph.parts(dt, T, 3), graph.parts(graph.add("Mul", dt, u), T, 3)  # (K, B, M, 1, d)
    # Not transposed: ONNX Runtime would split first, and then copy each part.
    Bs = [graph.add("Reshape", x, graph.ints(0, 0, 0, -1, 1)) for x in graph.parts(B, T, 3)]  # (K, B, M, N, 1)
    Cs = graph.parts(C, T, 3)  # (K, B, M, 1, N)
    order = range(T)[::-1] if backward else range(T)
    decays, drives = {}, {}
    for t in order:
        if t != order[0] or cut.blocks != 1:
            decays[t] = graph.add("Exp", graph.add("Mul", dts[t], rate))
        drives[t] = graph.add("Mul", dtus[t], Bs[t])

    def walk(h: str | None, drives: dict[int, str]) -> list[str]:
        """States (K, B, M, N, d) in the order of the walk."""
        states = []
        for t in order:
            h = graph.add("Add", graph.add("Mul", decays[t], h), drives[t]) if h else drives[t]
            states.append(h)
        return states

    states = walk(None, drives)
    if cut.blocks != 1:
        sum_ = graph.add("ReduceSum", dt, graph.ints(3), keepdims=1)
        start = _starts(graph, cut, graph.add("Exp", graph.add("Mul", sum_, rate)), states[-1], tail, backward)
        # B and dt u the other way round, or runtimes would keep those products from the first time as well.
        states = walk(start, {t: graph.add("Mul", Bs[t], dtus[t]) for t in order})
    outputs = {t: graph.add("MatMul", Cs[t], h) for t, h in zip(order[::-1], states[::-1], strict=True)}
    return graph.joined((outputs[t] for t in range(T)), 3), states[-1]


def _starts(graph: _Graph, cut: _Cut, decay: str, end: str, tail: tuple[int, int], backward: bool) -> str:
    """States before each block, from the blocks' decays and last states, all (K, B, M, N, d)."""

    def parts(x: str) -> list[str]:
        x = graph.padded(x, 5, 2, cut.rest_of_groups)
        return graph.parts(graph.add("Reshape", x, graph.ints(0, 0, -1, cut.group, *tail)), cut.group, 3)

    decays, ends = parts(decay), parts(end)
    order = range(cut.group)[::-1] if backward else range(cut.group)
    total, state = decays[order[0]], ends[order[0]]
    for k in order[1:]:
        total = graph.add("Mul", total, decays[k])
        state = graph.add("Add", graph.add("Mul", decays[k], state), ends[k])

    def shifted(x: str, by: int | str) -> str:
        if backward:
            start = graph.ints(by) if isinstance(by, int) else by
            return graph.add("Slice", graph.padded(x, 6, 2, by), start, graph.ints(1 << 62), graph.ints(2))
        return graph.add("Slice", graph.padded(x, 6, 2, by, before=True), graph.ints(0), cut.groups, graph.ints(2))

    for by in cut.shifts:
        state = graph.add("Add", state, graph.add("Mul", total, shifted(state, by)))
        if by != cut.shifts[-1]:
            total = graph.add("Mul", total, shifted(total, by))
    state = shifted(state, cut.one)
    starts = {order[0]: state}
    for k, after in itertools.pairwise(order):
        state = graph.add("Add", graph.add("Mul", decays[k], state), ends[k])
        starts[after] = state
    x = graph.add("Reshape", graph.joined((starts[k] for k in range(cut.group)), 3), graph.ints(0, 0, -1, *tail))
    return graph.add("Slice", x, graph.ints(0), cut.count, graph.ints(2)) if cut.rest_of_groups else x

"""The scan as a graph of ordinary ONNX operators: no Scan, no Loop, and a number of operators that no size changes.

A walk over L = H W positions is cut into M blocks of T. All blocks, walks and images of a batch go through the T
positions of a block side by side, one after the other and from a state of zero: T times h <- exp(dt A) h + dt u B. What
the state before a block adds is C . exp(A (dt_1 + .. + dt_t)) h_start, and blocks' last states are scanned in the same
way: in groups of `GROUP`, then between groups by shifts of 1, 2, 4, .. groups (Hillis and Steele). Every exponent is a
sum of dt A, which is at most 0, so that every decay lies in [0, 1]: nothing overflows, and what underflows is 0 and
should be.

Sums of dt and h are in float32. ONNX Runtime's Softplus takes 20 ns an element on a CPU, thirty times as long as the
scan needs for one, so it is written out (`softplus`).
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

DOMAIN = "serpent_ir"
"""The domain of the operator that stands for a scan until `expand_scans` has replaced it."""
GROUP = 8
"""Blocks whose states are scanned one after the other."""
DOUBLINGS = 18
"""Shifts of a graph for any size: it is exact up to T * GROUP * 2^18 positions, which are 2^25 or more."""
FORMULATION = "blocks of 16 or 32 positions, without Scan and Loop"


def block_length(channels: int, states: int) -> int:
    """T. Longer blocks make smaller tensors of states, which stay in a CPU's cache, and more operators."""
    return 32 if channels * states <= 512 else 16


def expand_scans(model: onnx.ModelProto) -> int:
    """Replace every `serpent_ir::ss2d` of a model by ordinary operators, in place. Returns how many there were."""
    graph = model.graph
    values = {value.name: value for value in graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape for value in (*graph.value_info, *graph.input)}
    nodes, count = [], 0
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        u, proj, *parameters = node.input
        sides = [side.dim_value for side in shapes[u].dim[1:3]] if u in shapes else [0, 0]
        scan = _Graph(f"ss2d_{count}/")
        arrays = [numpy_helper.to_array(values[name]).astype(np.float32) for name in parameters]
        _write(scan, u, proj, node.output[0], sides, *arrays)
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
        return self.split(operator, *inputs, names=[output or self._name()], **attributes)[0]

    def split(self, operator: str, *inputs: str, names: list[str], **attributes) -> list[str]:
        self.nodes.append(helper.make_node(operator, inputs, names, f"{self.prefix}{len(self.nodes)}", **attributes))
        return names

    def parts(self, x: str, count: int, axis: int) -> list[str]:
        """x in `count` equal parts along an axis, which stays."""
        names = [self._name() for _ in range(count)]
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

    def _name(self) -> str:
        self._names += 1
        return f"{self.prefix}v{self._names}"


def softplus(graph: _Graph, x: str) -> str:
    """max(x, 0) + log(1 + z) with z = exp(-|x|), to the last bits for small z too: what 1 + z rounds off is added."""
    one = graph.constant(np.ones(1, np.float32))
    z = graph.add("Exp", graph.add("Neg", graph.add("Abs", x)))
    sum_ = graph.add("Add", z, one)
    lost = graph.add("Sub", z, graph.add("Sub", sum_, one))
    return graph.add("Add", graph.add("Relu", x), graph.add("Add", graph.add("Log", sum_), lost))


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
    block = block_length(d, states)
    row = rank + 2 * states
    length = sides[0] * sides[1]
    if length:
        block = min(block, length)
    A = graph.constant(-np.exp(A_log.transpose(0, 2, 1))[:, None, None])  # (4, 1, 1, N, d)

    def walks(x: str, channels: int) -> tuple[str, str]:
        """By rows and by columns: (B, L, channels) each."""
        turned = graph.add("Transpose", x, perm=[0, 2, 1, 3])
        by_rows, by_columns = (graph.add("Reshape", y, graph.ints(0, -1, channels)) for y in (x, turned))
        return by_rows, by_columns

    def four(rows: str, columns: str, rows_back: str, columns_back: str) -> str:
        """(4, B, L, channels), the last two from the end to the start."""
        forward = graph.joined((graph.add("Unsqueeze", x, graph.ints(0)) for x in (rows, columns)), 0)
        back = graph.joined((graph.add("Unsqueeze", x, graph.ints(0)) for x in (rows_back, columns_back)), 0)
        return graph.joined([forward, graph.reversed(back, 2)], 0)

    u_rows, u_columns = walks(u, d)
    p_rows, p_columns = walks(graph.add("Reshape", proj, graph.ints(0, 0, 0, 4 * row)), 4 * row)
    u_walks = four(u_rows, u_columns, u_rows, u_columns)
    of = [graph.cut((p_rows, p_columns)[k % 2], k * row, (k + 1) * row, 2) for k in range(4)]
    low, B, C = graph.split(
        "Split", four(*of), graph.ints(rank, states, states), names=[graph._name() for _ in range(3)], axis=3
    )
    weight, bias = (graph.constant(x) for x in (dt_weight.transpose(0, 2, 1)[:, None], dt_bias[:, None, None]))
    dt = softplus(graph, graph.add("Add", graph.add("MatMul", low, weight), bias))
    dtu = graph.add("Mul", dt, u_walks)

    if length:
        rest: str | int = -length % block
        blocks = -(-length // block)
        lengths: str = graph.ints(length)
    else:
        shape = graph.add("Shape", u_rows)
        lengths = graph.cut(shape, 1, 2, 0)
        rest = graph.add("Mod", graph.add("Neg", lengths), graph.ints(block))
        blocks = 0

    def by_position(x: str, channels: int, *, upright: bool = False) -> list[str]:
        """T pieces (4, B, M, 1, channels), or (4, B, M, channels, 1). At a padded position dt and dt u are 0."""
        x = graph.add("Reshape", graph.padded(x, 4, 2, rest), graph.ints(0, 0, -1, block, channels))
        if upright:
            return graph.parts(graph.add("Transpose", x, perm=[0, 1, 2, 4, 3]), block, 4)
        return graph.parts(x, block, 3)

    steps, inputs = by_position(dt, d), by_position(dtu, d)
    Bs, Cs = by_position(B, states, upright=True), by_position(C, states)
    h, since, local, sums = "", "", [], []
    for t in range(block):
        drive = graph.add("Mul", inputs[t], Bs[t])  # (4, B, M, N, d)
        if t:
            decay = graph.add("Exp", graph.add("Mul", steps[t], A))
            h = graph.add("Add", graph.add("Mul", decay, h), drive)
            since = graph.add("Add", since, steps[t])
        else:
            h, since = drive, steps[t]
        sums.append(since)
        local.append(graph.add("MatMul", Cs[t], h))
    if blocks == 1:
        outputs = local
    else:
        starts = _starts(graph, graph.add("Exp", graph.add("Mul", since, A)), h, blocks, (states, d))
        outputs = []
        for t in range(block):
            from_start = graph.add("Mul", graph.add("Exp", graph.add("Mul", sums[t], A)), starts)
            outputs.append(graph.add("Add", local[t], graph.add("MatMul", Cs[t], from_start)))
    y = graph.add("Reshape", graph.joined(outputs, 3), graph.ints(0, 0, -1, d))
    y = graph.add("Slice", y, graph.ints(0), lengths, graph.ints(2))
    forward, back = graph.parts(y, 2, 0)
    rows, columns = graph.parts(graph.add("Add", forward, graph.reversed(back, 2)), 2, 0)
    rows, columns = (graph.add("Squeeze", x, graph.ints(0)) for x in (rows, columns))
    if length:
        upright, turned = graph.ints(0, *sides, d), graph.ints(0, *sides[::-1], d)
    else:
        upright = graph.add("Shape", u)
        turned = graph.add("Gather", upright, graph.ints(0, 2, 1, 3))
    columns = graph.add("Transpose", graph.add("Reshape", columns, turned), perm=[0, 2, 1, 3])
    y = graph.add("Add", graph.add("Reshape", rows, upright), columns)
    graph.add("Add", y, graph.add("Mul", u, graph.constant(D.sum(0))), output=output)


def _starts(graph: _Graph, decay: str, end: str, blocks: int, tail: tuple[int, int]) -> str:
    """States before each of M blocks, from the blocks' decays and last states, all (4, B, M, N, d)."""
    if blocks:
        group = min(GROUP, blocks)
        rest: str | int = -blocks % group
        doublings = (-(-blocks // group) - 1).bit_length()
        count = graph.ints(blocks)
    else:
        group, doublings = GROUP, DOUBLINGS
        count = graph.cut(graph.add("Shape", end), 2, 3, 0)
        rest = graph.add("Mod", graph.add("Neg", count), graph.ints(group))
    decays, ends = (
        graph.parts(graph.add("Reshape", graph.padded(x, 5, 2, rest), graph.ints(0, 0, -1, group, *tail)), group, 3)
        for x in (decay, end)
    )
    total, state = decays[0], ends[0]
    for a, b in zip(decays[1:], ends[1:], strict=True):
        total, state = graph.add("Mul", total, a), graph.add("Add", graph.add("Mul", a, state), b)

    groups = graph.ints(-(-blocks // group)) if blocks else graph.cut(graph.add("Shape", state), 2, 3, 0)

    def shifted(x: str, by: int | str) -> str:
        return graph.add("Slice", graph.padded(x, 6, 2, by, before=True), graph.ints(0), groups, graph.ints(2))

    for k in range(doublings):
        # Where the size is free, no more zeros than there are groups: 2^17 would need gigabytes.
        by = 1 << k if blocks else graph.add("Min", graph.ints(1 << k), groups)
        state = graph.add("Add", state, graph.add("Mul", total, shifted(state, by)))
        if k + 1 < doublings:
            total = graph.add("Mul", total, shifted(total, by))
    state = shifted(state, 1)
    starts = [state]
    for a, b in zip(decays[:-1], ends[:-1], strict=True):
        state = graph.add("Add", graph.add("Mul", a, state), b)
        starts.append(state)
    x = graph.add("Reshape", graph.joined(starts, 3), graph.ints(0, 0, -1, *tail))
    return graph.add("Slice", x, graph.ints(0), count, graph.ints(2))

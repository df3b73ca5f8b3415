"""Uses of parameters outside of layer calls: found in the autograd graph, with the features they give.

From a parameter the search follows the graph through operations without samples (views, a weight norm, looked-up
positions) to those where samples come in: a product with rows of samples, a sum or scale that broadcasts over them, a
convolution, a norm, a lookup. There the gradient separates the samples, and the operations before are differentiated
for each sample. Guesses from shapes (is this dimension the samples?) are never trusted: the probe confirms or refutes them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from adaptive_tangents.capture.graph import Parents
from adaptive_tangents.capture.groups import Group
from adaptive_tangents.capture.layers import convolution_of, learning, lookup, normalized_channels
from adaptive_tangents.capture.sample_layouts import SampleLayout, arranged, gathered, layouts
from adaptive_tangents.features.blocks import Block, Slot
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Summand

Signature = tuple[Any, ...]
UseKey = tuple[Any, ...]
"""A signature, and the number of earlier uses with the same signature."""
Node = Any  # torch.autograd.graph.Node, but TorchScript's nodes are not of that type
_Made = Outer | Lookup | Flipped | Dense

_VIEWS = (
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Slice", "Split",
    "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Unbind", "Select", "Alias", "Clone",
)  # fmt: skip
_DEEPEST = 64  # operations between a parameter and its samples; deeper searches only wander through the network


@dataclass(frozen=True)
class Step:
    """An operation without samples: a value of ``shape`` enters on input ``index`` and leaves as output ``output``."""

    node: Node
    index: int
    output: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """One use of a parameter where samples come in.

    ``chain`` leads there from the parameter, and its value arrives with shape ``tail``. ``shape`` is the shape of the
    operation's output, ``kind`` says what it does, and ``factor`` is a number in front of it.
    """

    kind: str
    node: Node
    index: int
    shape: tuple[int, ...]
    tail: tuple[int, ...]
    chain: tuple[Step, ...]
    layouts: tuple[SampleLayout, ...]
    factor: float = 1.0

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.node, 0)

    @property
    def signature(self) -> Signature:
        """Identifies the use; the same use in another batch has the same signature."""
        return (self.kind, self.node.name(), self.index, *((s.node.name(), s.index, s.output) for s in self.chain))


def terms_of(
    leaf: Node, shape: tuple[int, ...], parents: Parents, n: int, *, allowed: frozenset[Signature] | None,
    refused: frozenset[Signature],
) -> list[Term] | None:  # fmt: skip
    """All uses of a parameter, or None if one is of no known kind.

    Only ``allowed`` uses count, if these are known from another batch. ``refused`` uses are skipped: features made from
    them were refuted.
    """
    found: list[Term] = []
    stack: list[tuple[Any, int, tuple[int, ...], tuple[Step, ...]]] = [(leaf, 0, shape, ())]
    visited = 0
    while stack:
        node, output, tail, chain = stack.pop()
        uses = [(parent, index) for parent, index, number in parents.get(node, ()) if number == output]
        visited += 1
        if not uses:
            return None  # reached the network's output
        for parent, index in uses:
            term = _term(parent, index, tail, chain, n)
            known = term is not None and term.signature not in refused
            if term is not None and known and (allowed is None or term.signature in allowed):
                found.append(term)
                continue
            if len(chain) >= _DEEPEST or visited > 16 * _DEEPEST or parent not in parents:
                return None
            outputs = getattr(parent, "_input_metadata", ())
            numbers = {k for _, _, k in parents[parent]}
            if any(made.is_nested_tensor for made in outputs):
                return None  # its shape is no shape of a whole tensor
            if not numbers or max(numbers) >= len(outputs) or not callable(parent):
                return None  # a node without known output shapes, or one that cannot be called
            for number in numbers:
                step = Step(parent, index, number, tail)
                stack.append((parent, number, tuple(outputs[number].shape), (*chain, step)))
    return found


def _term(node: Node, index: int, tail: tuple[int, ...], chain: tuple[Step, ...], n: int) -> Term | None:
    """The use of a parameter on input ``index`` of ``node``, if samples come in there."""
    operand = OPERANDS.get((operation(node), index))
    made = node._input_metadata[0]
    if operand is None or made.dtype.is_complex or made.is_nested_tensor:
        return None
    shape = operand.shape(node)
    ways = tuple(way for way in layouts(shape, n) if operand.fits(tail, shape, way))
    if not ways or not operand.known(node):
        return None
    return Term(operand.kind, node, index, shape, tail, chain, ways, operand.factor(node))


def operation(node: Node) -> str:
    """The name of a node's operation: ``AddmmBackward0`` is Addmm."""
    return str(node.name()).rpartition("Backward")[0]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _free(tail: tuple[int, ...], shape: tuple[int, ...], way: SampleLayout) -> bool:
    """Whether a tensor of shape ``tail`` broadcasts over the samples of ``shape``."""
    padded = (1,) * (len(shape) - len(tail)) + tail
    return len(padded) == len(shape) and padded[1 if way == "second" else 0] == 1


def _leading(tail: tuple[int, ...], shape: tuple[int, ...], way: SampleLayout) -> bool:
    """Whether samples are in the first dimension of ``shape``, alone or with others."""
    return way != "second"


@dataclass(frozen=True)
class Operand:
    """What an operation does with a parameter on one of its inputs.

    ``shape`` is the shape of what the parameter meets, and ``fits(tail, shape, way)`` says whether its samples may have
    the layout ``way``. ``known`` says whether the operation's settings are supported; ``factor`` is a number in front.
    """

    kind: str
    fits: Callable[[tuple[int, ...], tuple[int, ...], SampleLayout], bool] = _leading
    known: Callable[[Node], bool] = lambda node: True
    shape: Callable[[Node], tuple[int, ...]] = _shape
    factor: Callable[[Node], float] = lambda node: 1.0


def _of_matrix(node: Node) -> tuple[int, ...]:
    return _shape(node)[-2:]


def _is_bilinear(node: Node) -> bool:
    expanded = [list(node._saved_expand1), list(node._saved_expand2)[1:], list(node._saved_expand3)]
    return expanded == [[1, 3], [], [1, 2]] and list(node._saved_sumdim) == [2, 3]


_SUM = Operand("sum", _free)

# By operation and input.
OPERANDS: Mapping[tuple[str, int], Operand] = {
    ("Mm", 1): Operand("product", shape=_of_matrix),
    ("Addmm", 2): Operand("product", shape=_of_matrix, known=lambda node: node._saved_alpha == 1),
    ("Bmm", 1): Operand("product", shape=_of_matrix, known=lambda node: _shape(node)[0] == 1),
    ("Trilinear", 1): Operand("bilinear", known=_is_bilinear),
    ("Convolution", 1): Operand("convolution", known=lambda node: not node._saved_transposed),
    ("Convolution", 2): Operand("channels"),
    ("NativeBatchNorm", 1): Operand("normalized", known=lambda node: not node._saved_training),
    ("NativeBatchNorm", 2): Operand("channels", known=lambda node: not node._saved_training),
    ("NativeGroupNorm", 1): Operand("normalized"),
    ("NativeGroupNorm", 2): Operand("channels"),
    ("Embedding", 0): Operand(
        "lookup",
        fits=lambda tail, shape, way: True,
        known=lambda node: not node._saved_scale_grad_by_freq,
        shape=lambda node: tuple(node._saved_indices.shape),
    ),
    ("NativeLayerNorm", 1): Operand("scale", _free),
    ("NativeLayerNorm", 2): _SUM,
    ("Add", 0): _SUM,
    ("Add", 1): Operand("sum", _free, factor=lambda node: float(node._saved_alpha)),
    ("Sub", 0): _SUM,
    ("Sub", 1): Operand("sum", _free, factor=lambda node: -float(node._saved_alpha)),
    ("Addmm", 0): Operand("sum", _free, factor=lambda node: float(node._saved_beta)),
    ("Expand", 0): _SUM,
    ("PreluKernel", 1): Operand("scale", _free),
    ("Mul", 0): Operand("scale", _free, known=lambda node: isinstance(node._saved_other, Tensor)),
    ("Mul", 1): Operand("scale", _free, known=lambda node: isinstance(node._saved_self, Tensor)),
}


# Features of a term, from the gradients g (c, *shape) at its output.


def part(term: Term, slot: Slot, rows: int, way: SampleLayout, gradient: Tensor, n: int) -> _Made:
    """The features of a term, in the columns (o, width) of its slot."""
    saved: Any = term.node
    if term.kind == "lookup":
        index, c = arranged(saved._saved_indices, way, n), len(gradient)
        t = index.numel() // n
        signals = arranged(gradient, way, n, lead=1).reshape(c, n, t, gradient.shape[-1])
        backward = signals.permute(1, 2, 0, 3).contiguous()
        index = index.reshape(n, t)
        looked = lookup(backward, index, term.tail[0], learning(index, saved._saved_padding_idx, gradient))
        if not term.chain and slot.transposed:
            return looked
        return Dense(slot.place(_undone(looked.features(slice(None)).mT, term), rows))
    if term.kind in ("product", "bilinear", "convolution"):
        outer = _product(term, way, gradient, n)
        if isinstance(outer, Outer):
            matrix = _as_matrix(term, slot, outer, rows)
            if matrix is not None:
                return matrix
            values = outer.features(slice(None))  # (n, c, outputs, inputs)
        else:
            values = outer.values
        values = values.mT if term.kind == "product" else values
        return Dense(slot.place(_undone(values.reshape(*values.shape[:2], *term.tail), term), rows))
    return Dense(slot.place(_undone(_reduced(term, way, gradient, n), term), rows))


def _product(term: Term, way: SampleLayout, gradient: Tensor, n: int) -> Outer | Dense:
    saved: Any = term.node
    g = arranged(gradient.reshape(len(gradient), *term.shape), way, n, lead=1)
    if term.kind == "convolution":
        made = gathered(convolution_of(saved, arranged(saved._saved_input.detach(), way, n), g, term.tail[2:]), n)
        assert not isinstance(made, Lookup)
        return made
    if term.kind == "bilinear":
        x, y = (arranged(t.detach().reshape(term.shape[0], -1), way, n) for t in (saved._saved_i1, saved._saved_i3))
        rows = (x[:, :, None] * y[:, None]).flatten(1)
    else:
        rows = saved._saved_mat1 if operation(term.node) == "Addmm" else saved._saved_self
        rows = arranged(rows.detach().reshape(rows.shape[-2:]), way, n)
    c, k, o = g.shape[0], rows.shape[0] // n, g.shape[-1]
    backward = g.reshape(c, n, k, o).permute(1, 2, 0, 3).contiguous()
    return Outer(backward, rows.reshape(n, k, rows.shape[-1]))


def _as_matrix(term: Term, slot: Slot, outer: Outer, rows: int) -> Outer | Flipped | None:
    """The factors as factors of the slot's matrix, if the chain only moves entries into rows of it; otherwise None."""
    if any(operation(step.node) not in _VIEWS for step in term.chain):
        return None
    o, i = outer.backward.shape[-1], outer.inputs.shape[-1]
    # Number the entries and see where the chain moves them: (i, o) for products, (o, i) otherwise.
    count = torch.arange(1, o * i + 1, dtype=torch.float64, device=outer.inputs.device)
    numbers = count.reshape(i, o).mT if term.kind == "product" else count.reshape(o, i)
    arrived = slot.place(_back(count.reshape(1, *term.tail), term.chain)[0], rows)
    for flipped in (False, True):
        expected = numbers.mT if flipped else numbers
        height = expected.shape[0]
        if expected.shape[1] != arrived.shape[1] or height > arrived.shape[0]:
            continue
        first = int((arrived[:, 0] != 0).nonzero()[0]) if bool(arrived.any()) else 0
        if first + height > arrived.shape[0] or not torch.equal(arrived[first : first + height], expected):
            continue
        if float(arrived.abs().sum()) != float(expected.sum()):
            continue
        above, below = first, arrived.shape[0] - first - height
        pad = torch.nn.functional.pad
        if flipped:
            return Flipped(outer.backward, pad(outer.inputs, (above, below)))
        return Outer(pad(outer.backward, (above, below)), outer.inputs)
    return None


def _reduced(term: Term, way: SampleLayout, gradient: Tensor, n: int) -> Tensor:
    """∂f/∂(arriving value), (n, c, *tail), of a sum, a scale, or one value per channel."""
    saved: Any = term.node
    g, c = term.factor * gradient if term.factor != 1 else gradient, len(gradient)
    name = operation(term.node)
    if term.kind in ("channels", "normalized"):
        g = arranged(g, way, n, lead=1)
        if term.kind == "normalized":
            g = g * arranged(normalized_channels(saved, name).detach(), way, n).reshape(g.shape[1:])
        channels = term.tail[0]
        return g.reshape(c, n, -1, channels, g[0, 0, 0].numel()).sum((2, 4)).transpose(0, 1)
    if term.kind == "scale":
        if name == "NativeLayerNorm":
            other = (saved._saved_input - saved._saved_result1) * saved._saved_result2
        elif name == "PreluKernel":
            other = saved._saved_self.clamp_max(0)
        else:
            other = saved._saved_other if term.index == 0 else saved._saved_self
        g = g * other.detach()
    k = g.shape[1] // n
    if way == "second":
        g = g.transpose(1, 2).unsqueeze(3)
    elif way == "last":
        g = g.reshape(c, k, n, *g.shape[2:]).transpose(1, 2)
    else:
        g = g.reshape(c, n, k, *g.shape[2:])
    tail = (1,) * (g.ndim - 2 - len(term.tail)) + term.tail
    summed = [2 + d for d, size in enumerate(tail) if size == 1 and g.shape[2 + d] != 1]
    g = g.sum(summed, keepdim=True) if summed else g
    return g.reshape(c, n, *term.tail).transpose(0, 1)


def _undone(values: Tensor, term: Term) -> Tensor:
    """From ∂f/∂(arriving value) (n, c, *tail) to ∂f/∂θ (n, c, *shape), through the operations without samples."""
    n, c = values.shape[:2]
    back = _back(values.reshape(n * c, *term.tail), term.chain)
    return back.reshape(n, c, *back.shape[1:])


def _back(values: Tensor, chain: Sequence[Step]) -> Tensor:
    with torch.no_grad():
        for step in reversed(chain):
            try:
                values = torch.func.vmap(lambda g, step=step: _step_back(step, g))(values)
            except RuntimeError:
                values = torch.stack([_step_back(step, g) for g in values])
    return values


def _step_back(step: Step, gradient: Tensor) -> Tensor:
    shapes = [tuple(metadata.shape) for metadata in step.node._input_metadata]
    given = [gradient if k == step.output else gradient.new_zeros(shape) for k, shape in enumerate(shapes)]
    node: Any = step.node
    found = node(*given)
    back: Tensor = found[step.index] if isinstance(found, tuple) else found
    # A broadcast gradient comes back unsummed: autograd's engine would sum it.
    return back if back.shape == step.shape else back.sum_to_size(step.shape)


def signatures(terms: Mapping[str, list[Term]]) -> frozenset[Signature]:
    """The signatures of all terms of a block."""
    return frozenset(term.signature for found in terms.values() for term in found)


def keyed(terms: Mapping[str, list[Term]]) -> dict[str, list[tuple[UseKey, Term]]]:
    """Every use with a key; the same use in another batch has the same key."""
    seen: Counter[Signature] = Counter()
    found: dict[str, list[tuple[UseKey, Term]]] = {}
    for parameter, uses in terms.items():
        found[parameter] = []
        for term in uses:
            found[parameter].append(((*term.signature, seen[term.signature]), term))
            seen[term.signature] += 1
    return found


def block_of(
    group: Group,
    terms: Mapping[str, list[Term]],
    gradients: Mapping[tuple[Any, int], Tensor],
    out: Tensor,
    layouts: Mapping[UseKey, SampleLayout],
) -> Block:
    """The block made from uses in the graph, each in its parameter's columns."""
    (n, c), (rows, width) = out.shape, group.matrix
    parts: list[Summand] = []
    both = set[Node]()  # products that add the bias, too: its input column is one
    uses = keyed(terms)
    for slot in group.slots:
        for key, term in uses[slot.parameter]:
            if term.node in both:
                continue
            made = part(term, slot, rows, layouts[key], gradients[term.node, 0], n)
            bias = group.slots[1] if group.joined and slot is group.slots[0] else None
            if bias is not None and isinstance(made, Outer) and term.shape[-1] == rows:
                both |= {t.node for t in terms[bias.parameter] if t.node is term.node and not t.chain and t.factor == 1}
            parts.append(_in_columns(made, slot, width, ones=term.node in both, joined=group.joined))
    return group.of(parts or [Dense(out.new_zeros(()).expand(n, c, rows, width))])


def _in_columns(made: _Made, slot: Slot, width: int, *, ones: bool, joined: bool) -> _Made:
    """The features of a parameter in its columns of a block; ``ones`` sets the last input column to one, for the bias."""
    around = (slot.column, width - slot.column - slot.width)
    if isinstance(made, Dense) and joined and slot.width == 1:
        axis = torch.zeros(width, dtype=made.values.dtype, device=made.values.device)
        axis[slot.column] = 1
        return Outer(made.values[:, None, :, :, 0], axis.expand(len(made.values), 1, width))
    if around == (0, 0):
        return made
    pad = torch.nn.functional.pad
    if isinstance(made, Outer):
        inputs = pad(made.inputs, around)
        if ones:
            inputs[..., -1] = 1
        return Outer(made.backward, inputs)
    if isinstance(made, Flipped):
        return Flipped(pad(made.backward, around), made.inputs)
    assert isinstance(made, Dense)
    return Dense(pad(made.values, around))

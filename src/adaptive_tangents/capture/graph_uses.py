"""Uses of parameters outside of layer calls, found in the autograd graph.

From a parameter the search follows the graph through operations without samples (views, a weight norm, looked-up
positions) to those where samples come in: a product with rows of samples, a sum or scale that broadcasts over them, a
convolution, a norm, a lookup. There the gradient separates the samples, and the operations before are differentiated
for each sample (`use_features`). Guesses from shapes (is this dimension the samples?) are never trusted: the probe confirms
or refutes them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from adaptive_tangents.capture.graph import Parents, operation
from adaptive_tangents.capture.held_nodes import Node
from adaptive_tangents.capture.sample_layouts import SampleLayout, layouts

Signature = tuple[Any, ...]
UseKey = tuple[Any, ...]
"""A signature, and the number of earlier uses with the same signature."""

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
    operation's output, ``kind`` says what it does, and ``factor`` is a number in front of it. The same use in another
    batch has the same ``signature``.
    """

    kind: str
    node: Node
    index: int
    shape: tuple[int, ...]
    tail: tuple[int, ...]
    chain: tuple[Step, ...]
    layouts: tuple[SampleLayout, ...]
    factor: float
    signature: Signature

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.node, 0)


def terms_of(
    leaf: Node, shape: tuple[int, ...], parents: Parents, n: int, *, allowed: frozenset[Signature] | None,
    refused: frozenset[Signature],
) -> list[Term] | None:  # fmt: skip
    """All uses of a parameter, or None if one is of no known kind.

    Only ``allowed`` uses count, if these are known from another batch. ``refused`` uses are skipped: features made from
    them were refuted.
    """
    found: list[Term] = []
    direct = [(parent, index) for parent, index, _ in parents.get(leaf, ())]
    stack: list[tuple[list[tuple[Node, int]], tuple[int, ...], tuple[Step, ...], Signature]] = [(direct, shape, (), ())]
    left = 16 * (_DEEPEST + len(direct))
    while stack:
        uses, tail, chain, path = stack.pop()
        left -= 1
        if not uses:
            return None  # reached the network's output
        for parent, index in uses:
            term = _term(parent, index, tail, chain, path, n)
            known = term is not None and term.signature not in refused
            if term is not None and known and (allowed is None or term.signature in allowed):
                found.append(term)
                continue
            name = operation(parent)
            if len(chain) >= _DEEPEST or left < 0 or not name:
                return None  # not one of torch's own: such a node is never called
            following = defaultdict[int, list[tuple[Node, int]]](list)
            for user, place, number in parents[parent]:
                following[number].append((user, place))
            outputs = parent._input_metadata
            if any(made.is_nested_tensor for made in outputs):
                return None  # its shape is no shape of a whole tensor
            if not following or max(following) >= len(outputs) or not callable(parent):
                return None  # the network's output, a node without known output shapes, or one that cannot be called
            for number, users in following.items():
                step = Step(parent, index, number, tail)
                longer = (*path, (name, index, number))
                stack.append((users, tuple(outputs[number].shape), (*chain, step), longer))
    return found


def _term(
    node: Node, index: int, tail: tuple[int, ...], chain: tuple[Step, ...], path: Signature, n: int
) -> Term | None:
    """The use of a parameter on input ``index`` of ``node``, if samples come in there."""
    name, made = operation(node), node._input_metadata[0]
    operand = OPERANDS.get((name, index))
    if operand is None or made.dtype.is_complex or made.is_nested_tensor:
        return None
    shape = operand.shape(node)
    ways = tuple(way for way in layouts(shape, n) if operand.fits(tail, shape, way))
    if not ways or not operand.known(node):
        return None
    signature = (operand.kind, name, index, path)
    return Term(operand.kind, node, index, shape, tail, chain, ways, operand.factor(node), signature)


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
            found[parameter].append(((term.signature, seen[term.signature]), term))
            seen[term.signature] += 1
    return found

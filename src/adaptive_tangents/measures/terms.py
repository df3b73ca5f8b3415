"""Features of some samples as terms of left and right factors, and the sums over samples that fits of their sides need.

A block's feature is Φ = Σ_t l_t r_tᵀ. A term holds l (n, c, t, o) and r (n, c, t, i); a dimension c of size 1 stands for all
outputs. Features without factors are a term whose left factors are the rows of an identity, which is not formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Flipped, Lookup, Outer, Summand, sum_tensors

_LISTED = 1024  # units; lookups of fewer are multiplied out


@dataclass(frozen=True)
class Rows:
    """Factors h_t = w_t (e_{j_t} + Σ_r s_{t,r} d_r): rows of an identity that is not formed, as in ``Lookup``."""

    part: Lookup

    def listed(self) -> Float[Tensor, "n 1 t d"]:
        """The factors themselves."""
        return self.against(torch.eye(self.part.directions.shape[1], device="cpu").to(self.part.weights))

    def against(self, columns: Float[Tensor, "d k"]) -> Float[Tensor, "n 1 t k"]:
        """hᵀX for each of the factors h."""
        return self.part.against(columns)[:, None]

    def spread(self, values: Float[Tensor, "n 1 t k"]) -> Float[Tensor, "d k"]:
        """Σ h vᵀ over samples and positions."""
        part, flat = self.part, (values[:, 0] * self.part.weights[..., None]).flatten(0, 1)
        out = part.directions.mT @ (part.coefficients.flatten(0, 1).mT @ flat)
        return out.index_add_(0, part.index.flatten(), flat)

    def gram(self, other: "Rows") -> Float[Tensor, "n 1 t s"]:
        """h·h′ for the pairs of positions of each sample."""
        a, b = self.part, other.part
        gram = (a.index[:, :, None] == b.index[:, None]).to(a.weights)
        if len(a.directions) + len(b.directions):
            gram += b.directions.mT[a.index] @ b.coefficients.mT
            gram += a.coefficients @ (a.directions.mT[b.index].mT + a.directions @ b.directions.mT @ b.coefficients.mT)
        return (gram * a.weights[:, :, None] * b.weights[:, None])[:, None]


Units = Tensor | Rows | None  # factors (n, c or 1, t, d), kept as rows of an identity, or all the rows of an identity


@dataclass(frozen=True)
class Term:
    """Σ_t l_t r_tᵀ for each sample and output."""

    left: Units
    right: Units

    @property
    def flipped(self) -> "Term":
        """The term of Φᵀ."""
        return Term(self.right, self.left)

    def onto(self, left: Float[Tensor, "o p"] | None, right: Float[Tensor, "i q"] | None) -> "Term":
        """The term of Q_LᵀΦQ_R."""
        return Term(_onto(self.left, left), _onto(self.right, right))

    def dense(self) -> "Term":
        """The same, multiplied out."""
        if self.left is None:
            return self
        left, right = (units.listed() if isinstance(units, Rows) else units for units in (self.left, self.right))
        assert left is not None
        return Term(None, left.mT.contiguous() if right is None else left.mT @ right)


def _onto(units: Units, columns: Tensor | None) -> Units:
    if columns is None:
        return units
    if units is None:
        return columns[None, None]
    return units.against(columns) if isinstance(units, Rows) else units @ columns


def terms_of(block: Block) -> list[Term]:
    """A block as terms, multiplied out where that takes less memory."""
    (o, i), c = block.shape, block.outputs
    dense: list[Summand] = []
    found: list[Term] = []
    for part in block.summands:
        small = isinstance(part, Outer | Flipped) and part.backward.shape[1] * (c * o + i) < c * o * i
        if isinstance(part, Lookup):
            rows = Rows(part)
            found.append(Term(_by_output(part.backward), rows.listed() if i <= _LISTED else rows))
        elif small and isinstance(part, Outer):
            found.append(Term(_by_output(part.backward), part.inputs[:, None]))
        elif small and isinstance(part, Flipped):
            found.append(Term(part.inputs[:, None], _by_output(part.backward)))
        else:
            dense.append(part)
    return [*found, Term(None, block.of(dense).features())] if dense else found


def _by_output(backward: Float[Tensor, "n t c o"]) -> Float[Tensor, "n c t o"]:
    return backward.transpose(1, 2).contiguous()


def stacked(terms: Sequence[Term]) -> Term:
    """Terms of different samples as one; their factors are the same on every sample, or run over samples."""
    first = terms[0]
    if len(terms) == 1:
        return first
    if len({(type(term.left), type(term.right)) for term in terms}) > 1 or isinstance(first.right, Rows):
        return Term(None, torch.cat([values(term) for term in terms]))
    left, right = ([term.left for term in terms], [term.right for term in terms])
    return Term(_stacked(left), _stacked(right))


def _stacked(units: Sequence[Units]) -> Units:
    parts = [part for part in units if isinstance(part, Tensor)]
    return torch.cat(parts) if parts else None


def positions_of(term: Term) -> int:
    """How many positions t a term has."""
    return next(
        units.shape[2] if isinstance(units, Tensor) else 1 for units in (term.left, term.right) if units is not None
    )


def rows_of(terms: Sequence[Term]) -> int:
    """How many pairs of samples and outputs terms have."""
    shapes = [units.shape for term in terms for units in (term.left, term.right) if isinstance(units, Tensor)]
    return max(shape[0] for shape in shapes) * max(shape[1] for shape in shapes)


def joined(terms: Sequence[Term]) -> Term:
    """The sum of terms (n, c, o, i) as one term, multiplied out."""
    return Term(None, sum_tensors([values(term) for term in terms]))


def values(term: Term) -> Float[Tensor, "n c o i"]:
    """A term multiplied out."""
    made = term.dense().right
    made = made.listed() if isinstance(made, Rows) else made
    assert made is not None
    return made


def moment(a: Sequence[Term], b: Sequence[Term]) -> Float[Tensor, "o p"]:
    """Σ A Bᵀ over samples and outputs, for the left side; flip both for the right."""
    return sum_tensors([_outer(x.left, _gram(x.right, y.right), y.left) for x in a for y in b])


def inner(a: Sequence[Term], b: Sequence[Term]) -> float:
    """Σ ⟨A, B⟩ over samples and outputs."""
    total = 0.0
    for x in a:
        for y in b:
            if x.left is None and y.left is None and isinstance(x.right, Tensor) and isinstance(y.right, Tensor):
                total += float((x.right * y.right).sum())
                continue
            left, right = _gram(x.left, y.left), _gram(x.right, y.right)
            assert left is not None
            assert right is not None
            total += float((left * right).sum())
    return total


def _gram(a: Units, b: Units) -> Float[Tensor, "n c t s"] | None:
    """a·b for the pairs of positions of each sample and output; None is an identity."""
    if a is None or b is None:
        assert not isinstance(a, Rows)
        assert not isinstance(b, Rows)
        return a if b is None else b.mT
    if isinstance(a, Rows):
        if isinstance(b, Rows):
            return a.gram(b)
        gram = _gram(b, a)
        assert gram is not None
        return gram.mT
    if isinstance(b, Rows):
        part = b.part
        index = part.index[:, None, None].expand(*a.shape[:3], -1)
        plain = a.gather(3, index) + a @ part.directions.mT @ part.coefficients.mT[:, None]
        return plain * part.weights[:, None, None]
    return a @ b.mT


def _outer(left: Units, gram: Float[Tensor, "n c t s"] | None, right: Units) -> Float[Tensor, "o p"]:
    """Σ l_t g_ts r_sᵀ over samples, outputs and positions."""
    right = right.listed() if isinstance(right, Rows) else right
    if gram is None:
        assert right is not None
        inside = right
    else:
        if isinstance(left, Tensor) and right is not None and gram.shape[2] > gram.shape[3]:
            return _outer(right, gram.mT, left).mT  # sums over the more positions first
        inside = gram if right is None else gram @ right
    if left is None:
        return inside.sum((0, 1))
    if isinstance(left, Rows):
        return left.spread(inside.sum(1, keepdim=True))
    for k in (0, 1):
        if left.shape[k] < inside.shape[k]:
            inside = inside.sum(k, keepdim=True)
    rows = left.reshape(-1, left.shape[3])
    return rows.mT @ inside.expand(*left.shape[:3], -1).reshape(len(rows), -1)

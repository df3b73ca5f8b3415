"""The summands of a block's features; every kind has the same few products.

- ``Outer``: a sum of outer products over positions t, the form of most layers;
- ``Lookup``: the same for inputs that are rows of an identity, kept as indices: embeddings;
- ``Flipped``: outer products with the signals on the input side: a weight that is used transposed;
- ``Dense``: the features themselves, for a parameter without factors, or where they take less memory;
- ``Shared``: fixed directions D_k with coefficients s_k(x), which a joint transform adds to every block;
- ``Weighted``: factors times one gain per entry, Z ∘ Σ_t δ_t h_tᵀ, which an entrywise transform makes of factors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.features.transforms import LowRank, Scaled, Side, Update
from adaptive_tangents.linalg.factor_products import over_positions, product, times, weighted_outer
from adaptive_tangents.linalg.hadamard import Rows

Index = slice | Int[Tensor, " _k"]


@dataclass(frozen=True)
class Outer:
    """Φ(x_k)_c = Σ_t δ_{k,t,c} h_{k,t}ᵀ: backward signals δ (n, t, c, o) and layer inputs h (n, t, i)."""

    backward: Float[Tensor, "n t c o"]
    inputs: Float[Tensor, "n t i"]

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units, materialized."""
        backward = self.backward[..., rows]
        n, t, c, r = backward.shape
        return product(backward.reshape(n, t, c * r).mT, self.inputs).reshape(n, c, r, self.inputs.shape[-1])

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        projected = times(self.inputs, directions.flatten(0, 1).mT)
        return over_positions(self.backward, projected.view(*projected.shape[:2], *directions.shape[:2]))

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return weighted_outer(weights, self.backward, self.inputs)

    def coordinates(self, left: Rows, right: Rows) -> Float[Tensor, "n c k"]:
        """s_jᵀΦ(x)_c r_j for pairs of rows (s_j, r_j) of the two sides."""
        return _paired(left.apply(self.backward), right.apply(self.inputs))

    def transformed(self, left: Side | None, right: Side | None) -> "Outer":
        return Outer(
            self.backward if left is None else left.apply(self.backward),
            self.inputs if right is None else right.apply(self.inputs),
        )

    def scaled(self, scale: float) -> "Outer":
        return Outer(scale * self.backward, self.inputs)

    def map(self, function: "SampleMap") -> "Outer":
        return Outer(function(self.backward), function(self.inputs))


@dataclass(frozen=True)
class Lookup:
    """Φ(x_k)_c = Σ_t δ_{k,t,c} h_{k,t}ᵀ with h_t = w_t (e_{j_t} + Σ_r s_{t,r} d_r): rows of an identity, moved by M_R.

    ``index`` j (n, t) and ``weights`` w (n, t) are an embedding's inputs. A transform of the input side adds
    ``coefficients`` s (n, t, r) on ``directions`` d (r, i); before any transform, r = 0. The identity is never formed.
    """

    backward: Float[Tensor, "n t c o"]
    index: Int[Tensor, "n t"]
    weights: Float[Tensor, "n t"]
    coefficients: Float[Tensor, "n t r"]
    directions: Float[Tensor, "r i"]

    def features(self, rows: slice) -> Float[Tensor, "n c q i"]:
        """The features of a range of output units, materialized."""
        backward = self.backward[..., rows] * self.weights[..., None, None]
        n, t, c, r = backward.shape
        signals = backward.reshape(n, t, c * r).mT
        out = signals @ self.coefficients @ self.directions
        out.scatter_add_(2, self.index[:, None].expand(n, c * r, t), signals)
        return out.reshape(n, c, r, self.directions.shape[1])

    def against(self, columns: Float[Tensor, "i k"]) -> Float[Tensor, "n t k"]:
        """hᵀX for each of the inputs h."""
        plain = columns[self.index]
        return (plain + self.coefficients @ (self.directions @ columns)) * self.weights[..., None]

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        n, t, _, o = self.backward.shape
        k = directions.shape[0]
        projected = self.against(directions.flatten(0, 1).mT).reshape(n, t, k, o)
        return (self.backward @ projected.mT).sum(1)

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        weighted = torch.einsum("nc,ntco,nt->nto", weights, self.backward, self.weights).flatten(0, 1)
        out = weighted.mT @ self.coefficients.flatten(0, 1) @ self.directions
        return out.index_add_(1, self.index.flatten(), weighted.mT)

    def coordinates(self, left: Rows, right: Rows) -> Float[Tensor, "n c k"]:
        """s_jᵀΦ(x)_c r_j for pairs of rows (s_j, r_j) of the two sides."""
        inputs = right.of_units(self.index).to(self.weights) + self.coefficients @ right.apply(self.directions)
        return _paired(left.apply(self.backward), inputs * self.weights[..., None])

    def transformed(self, left: Side | None, right: Side | None) -> "Outer | Lookup":
        backward = self.backward if left is None else left.apply(self.backward)
        if right is None:
            return Lookup(backward, self.index, self.weights, self.coefficients, self.directions)
        if isinstance(right, LowRank | Update):
            # M h = h + U (g − 1) Uᵀh, or h + U Vᵀh: the same identity row, and r more directions.
            plain = Lookup(self.backward, self.index, torch.ones_like(self.weights), self.coefficients, self.directions)
            if isinstance(right, LowRank):
                written, read = right.directions, right.directions * (right.gains - 1)
            else:
                written, read = right.written, right.read
            added = plain.against(read.to(self.weights.dtype))
            return Lookup(
                backward, self.index, self.weights, torch.cat([self.coefficients, added], -1),
                torch.cat([self.directions, written.to(self.weights.dtype).mT]),
            )  # fmt: skip
        if isinstance(right, Scaled) and self.directions.shape[0] == 0:
            gains = right.gains.to(self.weights.dtype)
            return Lookup(backward, self.index, self.weights * gains[self.index], self.coefficients, self.directions)
        columns = right.matrix().to(self.weights.dtype).mT
        return Outer(backward, self.against(columns))

    def scaled(self, scale: float) -> "Lookup":
        return Lookup(scale * self.backward, self.index, self.weights, self.coefficients, self.directions)

    def map(self, function: "SampleMap") -> "Lookup":
        index = self.index if function.index is None else self.index[function.index]
        kept = (
            function(self.weights),
            function(self.coefficients),
            self.directions.to(function.dtype or self.weights.dtype),
        )
        return Lookup(function(self.backward), index, *kept)

    def input_gram(self, other: "Lookup") -> Float[Tensor, "N M"]:
        """h·h′ for all pairs of positions; samples and positions are one dimension."""
        a, b = self.index.flatten(), other.index.flatten()
        u, v = self.coefficients.flatten(0, 1), other.coefficients.flatten(0, 1)
        gram = (a[:, None] == b[None]).to(u.dtype)
        gram += other.directions[:, a].mT @ v.mT + u @ (
            self.directions[:, b] + (self.directions @ other.directions.mT) @ v.mT
        )
        return gram * self.weights.flatten()[:, None] * other.weights.flatten()

    def restricted(self, kept: Int[Tensor, " k"]) -> "Lookup":
        """The same with only the columns ``kept``, which are sorted and hold every index; it has no directions."""
        position = torch.searchsorted(kept, self.index.contiguous())
        return Lookup(self.backward, position, self.weights, self.coefficients, self.directions[:, kept])


@dataclass(frozen=True)
class Flipped:
    """Φ(x_k)_c = Σ_t h_{k,t} δ_{k,t,c}ᵀ: ``Outer`` transposed, with the signals (n, t, c, i) on the input side."""

    backward: Float[Tensor, "n t c i"]
    inputs: Float[Tensor, "n t o"]

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units, materialized."""
        return Outer(self.backward, self.inputs[..., rows]).features(slice(None)).mT

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        return Outer(self.backward, self.inputs).inner(directions.mT)

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return Outer(self.backward, self.inputs).combine(weights).mT

    def coordinates(self, left: Rows, right: Rows) -> Float[Tensor, "n c k"]:
        """s_jᵀΦ(x)_c r_j for pairs of rows (s_j, r_j) of the two sides."""
        return Outer(self.backward, self.inputs).coordinates(right, left)

    def transformed(self, left: Side | None, right: Side | None) -> "Flipped":
        moved = Outer(self.backward, self.inputs).transformed(right, left)
        return Flipped(moved.backward, moved.inputs)

    def scaled(self, scale: float) -> "Flipped":
        return Flipped(scale * self.backward, self.inputs)

    def map(self, function: "SampleMap") -> "Flipped":
        return Flipped(function(self.backward), function(self.inputs))


@dataclass(frozen=True)
class Dense:
    """Materialized features Φ (n, c, o, i)."""

    values: Float[Tensor, "n c o i"]

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units."""
        return self.values[:, :, rows]

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        return self.values.flatten(2) @ directions.flatten(1).mT

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return torch.einsum("nc,ncoi->oi", weights, self.values)

    def coordinates(self, left: Rows, right: Rows) -> Float[Tensor, "n c k"]:
        """s_jᵀΦ(x)_c r_j for pairs of rows (s_j, r_j) of the two sides."""
        n, _, o, i = self.values.shape
        # Written as factors: a position is a unit of the narrower side, and its input is a unit vector.
        if o < i:
            return _paired(right.apply(self.values.transpose(1, 2)), left.of_units(self._units(o)).expand(n, o, -1))
        return _paired(left.apply(self.values.permute(0, 3, 1, 2)), right.of_units(self._units(i)).expand(n, i, -1))

    def _units(self, size: int) -> Int[Tensor, " _d"]:
        return torch.arange(size, device=self.values.device)

    def transformed(self, left: Side | None, right: Side | None) -> "Dense":
        values = self.values if right is None else right.apply(self.values)
        return Dense(values if left is None else left.apply(values.mT).mT)

    def scaled(self, scale: float) -> "Dense":
        return Dense(scale * self.values)

    def map(self, function: "SampleMap") -> "Dense":
        return Dense(function(self.values))


@dataclass(frozen=True)
class Shared:
    """Φ(x_k)_c = Σ_j s_{k,c,j} D_j: coefficients s (n, c, k) on directions D (k, o, i) that all samples share."""

    coefficients: Float[Tensor, "n c k"]
    directions: Float[Tensor, "k o i"]

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units, materialized."""
        return torch.einsum("nck,kri->ncri", self.coefficients, self.directions[:, rows])

    def inner(self, directions: Float[Tensor, "m o i"]) -> Float[Tensor, "n c m"]:
        """⟨Φ(x)_c, D_k⟩ for each of the fixed matrices D."""
        return self.coefficients @ (self.directions.flatten(1) @ directions.flatten(1).mT)

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return torch.einsum("k,koi->oi", torch.einsum("nc,nck->k", weights, self.coefficients), self.directions)

    def coordinates(self, left: Rows, right: Rows) -> Float[Tensor, "n c k"]:
        """s_jᵀΦ(x)_c r_j for pairs of rows (s_j, r_j) of the two sides."""
        return self.coefficients @ Dense(self.directions[None]).coordinates(left, right)[0]

    def transformed(self, left: Side | None, right: Side | None) -> "Shared":
        return Shared(self.coefficients, Dense(self.directions[None]).transformed(left, right).values[0])

    def scaled(self, scale: float) -> "Shared":
        return Shared(scale * self.coefficients, self.directions)

    def map(self, function: "SampleMap") -> "Shared":
        return Shared(function(self.coefficients), self.directions.to(function.dtype or self.directions.dtype))


@dataclass(frozen=True)
class Weighted:
    """Φ(x_k)_c = Z ∘ Σ_j Φ_j(x_k)_c: factors of one or several kinds, times one gain Z (o, i) per entry.

    Z is not a product of two sides, so kernels are made from materialized features, some output units at a time.
    """

    gains: Float[Tensor, "o i"]
    parts: "tuple[Outer | Lookup | Flipped, ...]"

    def features(self, rows: slice) -> Float[Tensor, "n c r i"]:
        """The features of a range of output units, materialized."""
        return self.gains[rows] * sum_tensors([part.features(rows) for part in self.parts])

    def inner(self, directions: Float[Tensor, "k o i"]) -> Float[Tensor, "n c k"]:
        """⟨Z ∘ Φ(x)_c, D_k⟩ = ⟨Φ(x)_c, Z ∘ D_k⟩ for each of the fixed matrices D."""
        return sum_tensors([part.inner(self.gains * directions) for part in self.parts])

    def combine(self, weights: Float[Tensor, "n c"]) -> Float[Tensor, "o i"]:
        """Σ_{k,c} a_{k,c} Φ(x_k)_c."""
        return self.gains * sum_tensors([part.combine(weights) for part in self.parts])

    def coordinates(self, left: Rows, right: Rows) -> Float[Tensor, "n c k"]:
        """s_jᵀΦ(x)_c r_j for pairs of rows (s_j, r_j) of the two sides."""
        return Dense(self.features(slice(None))).coordinates(left, right)

    def transformed(self, left: Side | None, right: Side | None) -> "Weighted | Dense":
        if isinstance(left, Scaled | None) and isinstance(right, Scaled | None):
            return Weighted(Dense(self.gains[None, None]).transformed(left, right).values[0, 0], self.parts)
        return Dense(self.features(slice(None))).transformed(left, right)

    def scaled(self, scale: float) -> "Weighted":
        return Weighted(scale * self.gains, self.parts)

    def map(self, function: "SampleMap") -> "Weighted":
        return Weighted(self.gains.to(function.dtype or self.gains.dtype), tuple(p.map(function) for p in self.parts))


@dataclass(frozen=True)
class SampleMap:
    """A map for every tensor that runs over samples: it selects samples, then converts the dtype."""

    index: Index | None = None
    dtype: torch.dtype | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.index is None else tensor[self.index]
        return tensor if self.dtype is None else tensor.to(self.dtype)


Factors = Outer | Lookup | Flipped
Summand = Factors | Dense | Shared | Weighted


def factors_of(part: Summand) -> tuple[Factors, ...]:
    """The factors that a summand holds."""
    if isinstance(part, Weighted):
        return part.parts
    return () if isinstance(part, Dense | Shared) else (part,)


def tensors_of(part: Summand) -> list[Tensor]:
    """The tensors that a summand holds; the first runs over samples."""
    if isinstance(part, Weighted):
        return [*(tensor for inner in part.parts for tensor in tensors_of(inner)), part.gains]
    return list(vars(part).values())


def entrywise(part: Summand, gains: Float[Tensor, "o i"]) -> Summand:
    """The summand of Z ∘ Φ."""
    if isinstance(part, Dense):
        return Dense(gains * part.values)
    if isinstance(part, Shared):
        return Shared(part.coefficients, gains * part.directions)
    return Weighted(gains * part.gains, part.parts) if isinstance(part, Weighted) else Weighted(gains, (part,))


def _paired(signals: Float[Tensor, "n t c k"], inputs: Float[Tensor, "n t k"]) -> Float[Tensor, "n c k"]:
    """Σ_t signals · inputs, for each coordinate."""
    product = signals * inputs.to(signals)[:, :, None]
    return product[:, 0] if product.shape[1] == 1 else product.sum(1)


def sum_tensors(tensors: list[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total

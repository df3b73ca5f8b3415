"""How well a structured transform explains a measured feature change: min over M of Σ_k‖φ̄(x_k) − Mφ₀(x_k)‖².

Left and right factors come from alternating least squares on moments of the features, with a ridge toward the identity. The
ridge's strength is chosen on samples held out from the fit; R² is reported on further samples, held out from both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Index, SampleMap
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Entrywise, Matrix, Sides, Transform
from adaptive_tangents.kernels.derived_kernels import largest, power_of_two
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import Progress
from adaptive_tangents.structures.base import Fixed, Full, Structure, check_sketch
from adaptive_tangents.structures.grouped import Grouped, LayerScale
from adaptive_tangents.structures.mixed import Mixed, as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED, Left, Right, TwoSided

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ROUNDS, _USUAL_ROUNDS = 30, 10  # of least squares: at most, and as a rule
_CHUNK = 32_000_000


@dataclass(frozen=True)
class Explanation:
    """R² = 1 − Σ‖φ̄ − Mφ₀‖²/Σ‖φ̄ − φ₀‖² of a structured transform.

    Attributes:
        structure: the structure of M.
        r2: R² of each block, on samples held out; NaN for a block without change.
        total: R² over all blocks, on samples held out.
        fit_r2: R² of each block on the samples fitted.
        strengths: the ridge toward the identity chosen for each block, relative to the features' mean square.
        transforms: the M found, by block; None for Full, whose M is never formed.
        samples: how many samples were fitted, used to choose the ridge, and reported on.
    """

    structure: Structure
    r2: Mapping[str, float]
    total: float
    fit_r2: Mapping[str, float]
    strengths: Mapping[str, float]
    transforms: Mapping[str, Transform] | None = field(repr=False)
    samples: tuple[int, int, int]


def explain(
    start_feats: TangentFeatures,
    end_feats: TangentFeatures,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED,
    *,
    strengths: Sequence[float] = _STRENGTHS,
    generator: torch.Generator | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    r"""R² of the best transform of a structure for the feature change φ₀ → φ̄ measured on the same samples.

    Half of the samples are fitted, a quarter chooses the ridge toward the identity, and a quarter is reported on. The
    structure's penalties are not used: the question is what any M of its shape can explain.

    Args:
        start_feats: φ₀, features of at least 8 samples.
        end_feats: φ̄, features of the same samples in the same order.
        structure: Fixed, LayerScale, Rows, Columns, Diagonal, Left, Right, TwoSided or Full; or a mapping from patterns of
            block names to any of these but Full.
        strengths: ridges to choose from, relative to the features' mean square.
        generator: shuffles the samples before they are split; None is a generator with seed 0.
        memory_limit: bytes that may be used; None is that of ``start_feats``.
        progress: called with "blocks" and the fraction of them that is done.

    Raises:
        TangentError: when the features do not belong together, there are fewer than 8 samples, nothing changed, or the
            structure has no least-squares fit, or a side of a block has too many units for the memory limit.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Linear(3, 1)
    >>> feats = at.tangent_features(model, torch.randn(40, 3))
    >>> doubled = feats.transformed({"weight": at.features.transforms.Sides(scale=2.0)})
    >>> round(at.explain(feats, doubled, at.LayerScale()).total, 3)
    1.0
    """
    structure = as_structure("explain", structure)
    start_feats.check_origin("explain", end_feats)
    check_sketch("explain", structure, start_feats)
    _check(start_feats, end_feats)
    n = start_feats.n
    order = torch.randperm(n, generator=generator or torch.Generator().manual_seed(0)).to(start_feats.device)
    quarter = max(2, n // 4)
    parts = (
        order[2 * quarter :].sort().values,
        order[:quarter].sort().values,
        order[quarter : 2 * quarter].sort().values,
    )
    start, end = _moderate(start_feats, end_feats)
    if not any(_Pair(*_wide(block, end.blocks[name])).change > 0 for name, block in start.blocks.items()):
        raise TangentError("explain: the features are the same at start and end, so there is no change to explain")
    sizes = (len(parts[0]), len(parts[1]), len(parts[2]))
    if isinstance(structure, Full):
        return _explain_full(start.to(torch.float64), end.to(torch.float64), structure, parts, sizes, strengths)
    own = structure.of_blocks(start.blocks) if isinstance(structure, Mixed) else dict.fromkeys(start.blocks, structure)
    for one in own.values():
        if isinstance(one, Full):
            raise TangentError(
                "explain: Full explains all blocks by one transform; pass it alone, not for a pattern of blocks"
            )
        if not isinstance(one, Fixed | Grouped | Left | Right | TwoSided):
            raise TangentError(
                f"explain: {type(one).__name__} has no least-squares fit; use one of the named structures"
            )
    limit = limit_for(start.limit if memory_limit is None else memory_limit, start.device)
    for name, block in start.blocks.items():
        _check_room(block, end.blocks[name], own[name], limit)
    r2, fit_r2, chosen = {}, {}, {}
    transforms: dict[str, Transform] = {}
    errors, changes = 0.0, 0.0
    for done, (name, block) in enumerate(start.blocks.items(), start=1):
        pairs = [_Pair(*_wide(block, end.blocks[name], index)) for index in parts]
        best, strength = _best(pairs, own[name], strengths)
        transforms[name], chosen[name] = best, strength
        error, change = pairs[2].error(best), pairs[2].change
        errors, changes = errors + error, changes + change
        r2[name] = _r2(error, change)
        fit_r2[name] = _r2(pairs[0].error(best), pairs[0].change)
        if progress is not None:
            progress("blocks", done / len(start.blocks))
    return Explanation(structure, r2, _r2(errors, changes), fit_r2, chosen, transforms, sizes)


def explain_operations(block: Block, after: Block, structure: Structure, n: int) -> float:
    """Operations that `explain` is expected to take for one block on n samples, a multiply-add as two."""
    (o, i), c = block.shape, block.outputs
    inner = 2.0 * n * c * o * i
    if block.outer is not None and after.outer is not None:
        t = block.outer.backward.shape[1]
        s = after.outer.backward.shape[1]
        inner = min(inner, 2.0 * n * t * s * (c * c * o + i))
    forming = 2.0 * n * c * o * i * max(block.positions, after.positions)
    sides = _sides(block, structure).values()
    each: float = sum(4.0 * n * c * o * i * d + 2 * forming for d in sides)
    if len(sides) == 2:
        each = len(_STRENGTHS) * _USUAL_ROUNDS * (each + 2 * forming + sum(d**3 for d in sides))
    return 12 * inner + each + sum(6.0 * d**3 for d in sides)


def _moderate(start: TangentFeatures, end: TangentFeatures) -> tuple[TangentFeatures, TangentFeatures]:
    """Both features over the same power of two, so that float64 holds their squares."""
    signs = torch.ones(start.n, start.c, dtype=start.dtype, device=start.device)
    signs[::2] = -1
    sizes = [largest(matrix) for feats in (start, end) for matrix in feats.to(start.dtype).combine(signs).values()]
    scale = power_of_two(max(sizes))
    if scale == 1 or start.dtype != torch.float64:  # float64 holds the squares of any float32
        return start, end
    small = Sides(scale=1 / scale)
    return start.transformed(dict.fromkeys(start.blocks, small)), end.transformed(dict.fromkeys(end.blocks, small))


def _sides(block: Block, structure: Structure) -> dict[str, int]:
    """The units of each side that a structure has a full matrix for."""
    (o, i), kind = block.shape, type(structure)
    return (
        {"left": o}
        if kind is Left
        else {"right": i}
        if kind is Right
        else {"left": o, "right": i}
        if kind is TwoSided
        else {}
    )


def _check_room(block: Block, after: Block, structure: Structure, limit: int) -> None:
    """Raise TangentError where a matrix of one side would exceed the limit; factors on both sides need none."""
    if _factored(block, after):
        return
    for side, size in _sides(block, structure).items():
        remedy = f"leave block {block.name!r} out with wrt, or use a structure without its {side} side, of {size} units"
        require_memory("explain", 4 * 8 * size**2, limit, remedy=remedy)


def _factored(a: Block, b: Block) -> bool:
    """Whether both blocks are factors and nothing else."""
    return a.outer is not None and b.outer is not None and len(a.summands) == len(b.summands) == 1


@dataclass(frozen=True)
class _Pair:
    """One block's features before (A) and after (B) on the same samples; sums are over samples and outputs."""

    before: Block
    after: Block

    @cached_property
    def size(self) -> float:
        """Σ‖B‖²."""
        return _inner(self.after, self.after)

    @cached_property
    def change(self) -> float:
        """Σ‖B − A‖², or zero if it is only rounding."""
        change = self.error(Sides())
        return change if change > 1e-13 * self.size else 0.0

    def error(self, transform: Transform) -> float:
        """Σ‖B − M A‖²."""
        if isinstance(transform, Entrywise):
            moved = self.before.entrywise(transform.gains)
        else:
            assert isinstance(transform, Sides)
            moved = self.before.transformed(transform.left, transform.right, transform.scale)
        return max(0.0, self.size - 2 * _inner(self.after, moved) + _inner(moved, moved))


def _wide(block: Block, after: Block, index: Index | None = None) -> tuple[Block, Block]:
    """Some samples of a block before and after, in float64; one block at a time, to save memory."""
    return block.map(index=index, dtype=torch.float64), after.map(index=index, dtype=torch.float64)


def _best(pairs: list[_Pair], structure: Structure, strengths: Sequence[float]) -> tuple[Transform, float]:
    if isinstance(structure, Fixed):
        return Sides(), 0.0
    if isinstance(structure, LayerScale):
        size = _inner(pairs[0].before, pairs[0].before)
        return Sides(scale=_inner(pairs[0].after, pairs[0].before) / size if size > 0 else 1.0), 0.0
    if isinstance(structure, Grouped):
        return _by_group(pairs, structure, strengths)
    if not isinstance(structure, TwoSided):
        return _one_sided(pairs, "left" if isinstance(structure, Left) else "right", strengths)
    candidates = [(_alternate(pairs[0], strength), strength) for strength in strengths]
    return min(candidates, key=lambda found: pairs[1].error(found[0]))


def _by_group(pairs: list[_Pair], structure: Grouped, strengths: Sequence[float]) -> tuple[Transform, float]:
    """One factor for each group of entries, z = (Σ B·A + μ)/(Σ A·A + μ)."""

    def total(a: Block, b: Block) -> Tensor:
        sums = reduce(torch.add, ((x * y).sum((0, 1)) for x, y in _in_parts(a, b)))
        return sums.sum(structure.dimensions, keepdim=True) if structure.dimensions else sums

    fitting, choosing = ((total(pair.before, pair.before), total(pair.after, pair.before)) for pair in pairs[:2])
    found: list[tuple[float, float, Tensor]] = []
    for strength in strengths:
        ridge = strength * float(fitting[0].mean()) + torch.finfo(fitting[0].dtype).tiny
        gains = (fitting[1] + ridge) / (fitting[0] + ridge)
        square, cross = choosing
        found.append((float((gains**2 * square - 2 * gains * cross).sum()), strength, gains))
    _, strength, gains = min(found, key=lambda candidate: candidate[0])
    return structure.transform(gains), strength


def _one_sided(pairs: list[_Pair], side: str, strengths: Sequence[float]) -> tuple[Sides, float]:
    """One side from two moments, computed once for all strengths; Σ‖B − MA‖² = Σ‖B‖² − 2⟨M, ΣBAᵀ⟩ + ⟨M ΣAAᵀ, M⟩."""
    fitting, choosing = (
        (_moment(pair.before, pair.before, side), _moment(pair.after, pair.before, side)) for pair in pairs[:2]
    )
    found: list[tuple[float, float, Tensor]] = []
    for strength in strengths:
        factor = _ridge(*fitting, strength)
        square, cross = choosing
        error = float(((factor @ square) * factor).sum() - 2 * (factor * cross).sum())  # without Σ‖B‖², common to all
        found.append((error, strength, factor))
    _, strength, factor = min(found, key=lambda candidate: candidate[0])
    return Sides(Matrix(factor), None) if side == "left" else Sides(None, Matrix(factor)), strength


def _alternate(pair: _Pair, strength: float) -> Sides:
    """Alternating least squares, each side minimizing Σ‖B − M_L A M_Rᵀ‖² + μ‖M − I‖² with the other held."""
    factors: dict[str, Tensor | None] = {"left": None, "right": None}
    previous = torch.inf
    for _ in range(_ROUNDS):
        for side in factors:
            factors[side] = _solve_side(pair, side, factors, strength)
        current = sum(float(f.norm()) for f in factors.values() if f is not None)
        if abs(current - previous) <= 1e-4 * current:
            break
        previous = current
    left, right = factors["left"], factors["right"]
    return Sides(None if left is None else Matrix(left), None if right is None else Matrix(right))


def _solve_side(pair: _Pair, side: str, factors: Mapping[str, Tensor | None], strength: float) -> Tensor:
    """M_L = (Σ B M_R Aᵀ + μI)(Σ A M_RᵀM_R Aᵀ + μI)⁻¹, and the same on the other side with A, B transposed."""
    other = factors["right" if side == "left" else "left"]
    middle = None if other is None else Matrix(other)
    moved = pair.before.transformed(None, middle) if side == "left" else pair.before.transformed(middle, None)
    return _ridge(_moment(moved, moved, side), _moment(pair.after, moved, side), strength)


def _ridge(square: Float[Tensor, "d d"], cross: Float[Tensor, "d d"], strength: float) -> Float[Tensor, "d d"]:
    """(cross + μI)(square + μI)⁻¹, μ relative to the mean of the square's diagonal."""
    size = square.shape[0]
    ridge = strength * float(square.trace()) / size + torch.finfo(square.dtype).tiny
    eye = torch.eye(size, dtype=square.dtype, device=square.device)
    factor: Tensor = torch.cholesky_solve((cross + ridge * eye).mT, torch.linalg.cholesky(square + ridge * eye))
    return factor.mT


def _moment(a: Block, b: Block, side: str) -> Float[Tensor, "d d"]:
    """Σ A Bᵀ for the left side (o, o), Σ Aᵀ B for the right (i, i)."""
    if a.outer is not None and b.outer is not None and _factored(a, b):
        total: Tensor | None = None
        for part in ranges(a.samples, max(1, _CHUNK // _cost(a, b))):
            x, y = (block.outer.map(SampleMap(part)) for block in (a, b))  # type: ignore[union-attr]
            # Reduce the longer of the two position axes first: a path average has more positions than a single point.
            if side == "left":
                grams, spec = x.inputs @ y.inputs.mT, "ntco,ntcr->or"
                if x.inputs.shape[1] <= y.inputs.shape[1]:
                    piece = torch.einsum(spec, x.backward, torch.einsum("nts,nsco->ntco", grams, y.backward))
                else:
                    piece = torch.einsum(spec, torch.einsum("nts,ntco->nsco", grams, x.backward), y.backward)
            else:
                grams = x.backward.flatten(2) @ y.backward.flatten(2).mT
                if x.inputs.shape[1] <= y.inputs.shape[1]:
                    piece = torch.einsum("nti,ntj->ij", x.inputs, grams @ y.inputs)
                else:
                    piece = torch.einsum("nsi,nsj->ij", grams.mT @ x.inputs, y.inputs)
            total = piece if total is None else total + piece
        assert total is not None
        return total
    spec = "kor,kpr->op" if side == "left" else "koi,koj->ij"
    pieces = (torch.einsum(spec, x.flatten(0, 1), y.flatten(0, 1)) for x, y in _in_parts(a, b))
    return reduce(torch.add, pieces)


def _in_parts(a: Block, b: Block) -> Iterator[tuple[Float[Tensor, "n c o i"], Float[Tensor, "n c o i"]]]:
    """The features of both blocks, a few samples at a time."""
    for part in ranges(a.samples, max(1, _CHUNK // max(1, a.outputs * a.shape[0] * a.shape[1]))):
        yield a.map(index=part).features(), b.map(index=part).features()


def _inner(a: Block, b: Block) -> float:
    """Σ_k ⟨A_k, B_k⟩ over samples and outputs."""
    if a.outer is not None and b.outer is not None and _factored(a, b):
        total = 0.0
        for part in ranges(a.samples, max(1, _CHUNK // _cost(a, b))):
            x, y = (block.outer.map(SampleMap(part)) for block in (a, b))  # type: ignore[union-attr]
            signals = x.backward.flatten(2) @ y.backward.flatten(2).mT
            total += float((signals * (x.inputs @ y.inputs.mT)).sum())
        return total
    return sum(float((x * y).sum()) for x, y in _in_parts(a, b))


def _cost(a: Block, b: Block) -> int:
    """Entries needed for one sample's pairs of positions."""
    assert a.outer is not None
    t, c, o = a.outer.backward.shape[1:]
    return t * max(b.positions, c * o, a.shape[1])


def _explain_full(
    start: TangentFeatures, end: TangentFeatures, structure: Full, parts: tuple[Int[Tensor, " _k"], ...],
    sizes: tuple[int, int, int], strengths: Sequence[float],
) -> Explanation:  # fmt: skip
    """M = I + Δᵀ(K + μI)⁻¹φ: kernel regression of each sample's change on the changes of the fitted samples."""
    fitted, rows = start[parts[0]], end[parts[0]]
    size = fitted.n * fitted.c
    kernel = fitted.kernel().reshape(size, size)
    values, vectors = torch.linalg.eigh(kernel)

    among = _changes(fitted, rows, fitted, rows)

    def prepared(index: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        here, there = start[index], end[index]
        own = {name: float(change.diagonal().sum()) for name, change in _changes(here, there, here, there).items()}
        return here.kernel(fitted).reshape(-1, size), _changes(here, there, fitted, rows), own

    def errors(held: tuple[Tensor, dict[str, Tensor], dict[str, float]], strength: float) -> dict[str, float]:
        cross, mixed, own = held
        inverse = (vectors / (values.clamp_min(0) + strength * float(kernel.diagonal().mean()))) @ vectors.mT
        weights = cross @ inverse
        return {
            name: max(
                0.0,
                own[name] - 2 * float((weights * mixed[name]).sum()) + float(((weights @ among[name]) * weights).sum()),
            )
            for name in own
        }

    fitting, choosing, reporting = (prepared(index) for index in parts)
    chosen = min(strengths, key=lambda strength: sum(errors(choosing, strength).values()))
    error, change, fit_error, fit_change = errors(reporting, chosen), reporting[2], errors(fitting, chosen), fitting[2]
    return Explanation(
        structure,
        {name: _r2(error[name], change[name]) for name in error},
        _r2(sum(error.values()), sum(change.values())),
        {name: _r2(fit_error[name], fit_change[name]) for name in fit_error},
        dict.fromkeys(error, chosen),
        None,
        sizes,
    )


def _changes(
    a0: TangentFeatures, a1: TangentFeatures, b0: TangentFeatures, b1: TangentFeatures
) -> dict[str, Float[Tensor, "k m"]]:
    """Inner products of the changes Δ = φ̄ − φ₀ of two sets of samples, per block."""
    size = (a0.n * a0.c, b0.n * b0.c)
    same = a0 is b0 and a1 is b1
    pairs = [(a1, b1, 1.0), (a1, b0, -1.0), (a0, b1, -1.0), (a0, b0, 1.0)]
    total: dict[str, Tensor] = {}
    for a, b, sign in pairs:
        for name, kernel in a.kernel(None if same and a is b else b, by_block=True).items():
            total[name] = total.get(name, 0) + sign * kernel.reshape(size)
    return total


def _r2(error: float, change: float) -> float:
    return 1 - error / change if change > 0 else float("nan")


def _check(start: TangentFeatures, end: TangentFeatures) -> None:
    if (start.n, start.c) != (end.n, end.c) or {k: b.shape for k, b in start.blocks.items()} != {
        k: b.shape for k, b in end.blocks.items()
    }:
        raise TangentError(
            f"explain: the features differ in samples, outputs or blocks: {start!r} and {end!r}; "
            "make both on the same samples with the same model, wrt and output_fn"
        )
    if start.n < 8:
        raise TangentError(f"explain: needs at least 8 samples to fit, choose and report, got {start.n}")

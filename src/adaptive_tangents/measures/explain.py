"""How well a structured transform explains a measured feature change: min over M of Σ_k‖φ̄(x_k) − Mφ₀(x_k)‖².

Left and right sides have few directions (`few_directions`), with a ridge on them. The ridge's strength and the rank are chosen
on samples held out from the fit; R² is reported on further samples, held out from both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Entrywise, Matrix, Sides, Transform, Update
from adaptive_tangents.kernels.derived_kernels import largest, power_of_two
from adaptive_tangents.measures import few_directions
from adaptive_tangents.measures.few_directions import SIDES, Samples, Search, Side, Sums, narrowed, sums
from adaptive_tangents.measures.terms import inner
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import Progress
from adaptive_tangents.structures.base import Fixed, Full, Structure, check_sketch
from adaptive_tangents.structures.grouped import Grouped, LayerScale
from adaptive_tangents.structures.mixed import Mixed, as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED, Left, Right, TwoSided

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
RANKS = (1, 2, 4, 8, 16, 32)
_CHUNK = 4_000_000  # entries of features that are formed at once
_LEAST = 8  # units that a wide side is narrowed to where memory is scarce
_TINY = 1e-8  # of a scale, so that directions relative to it are finite


@dataclass(frozen=True)
class Explanation:
    """R² = 1 − Σ‖φ̄ − Mφ₀‖²/Σ‖φ̄ − φ₀‖² of a structured transform.

    Attributes:
        structure: the structure of M.
        r2: R² of each block, on samples held out; NaN for a block without change.
        total: R² over all blocks, on samples held out.
        fit_r2: R² of each block on the samples fitted.
        strengths: the ridge chosen for each block, relative to the features' mean square.
        transforms: the M found, by block; None for Full, whose M is never formed.
        samples: how many samples were fitted, used to choose the ridge and the rank, and reported on.
        ranks: the rank of M's sides chosen for each block that has sides of a rank.
        r2_by_rank: R² of these blocks at each rank tried, on the samples of ``r2``, each at its own best ridge.
    """

    structure: Structure
    r2: Mapping[str, float]
    total: float
    fit_r2: Mapping[str, float]
    strengths: Mapping[str, float]
    transforms: Mapping[str, Transform] | None = field(repr=False)
    samples: tuple[int, int, int]
    ranks: Mapping[str, int] = field(default_factory=dict)
    r2_by_rank: Mapping[str, Mapping[int, float]] = field(default_factory=dict, repr=False)


def explain(
    start_feats: TangentFeatures,
    end_feats: TangentFeatures,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED,
    *,
    strengths: Sequence[float] = _STRENGTHS,
    rank: int | Sequence[int] | None = RANKS,
    generator: torch.Generator | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    r"""R² of the best transform of a structure for the feature change φ₀ → φ̄ measured on the same samples.

    Half of the samples are fitted, a quarter chooses the rank and the ridge, and a quarter is reported on. The sides of Left,
    Right and TwoSided are M = σ(I + UVᵀ) of rank k, fitted with a ridge on UVᵀ without forming features; a side of full rank
    is any matrix, with a ridge toward the identity. The structure's penalties are not used: the question is what any M of
    its shape can explain.

    Args:
        start_feats: φ₀, features of at least 8 samples.
        end_feats: φ̄, features of the same samples in the same order.
        structure: Fixed, LayerScale, Rows, Columns, Diagonal, Left, Right, TwoSided or Full; or a mapping from patterns of
            block names to any of these but Full.
        strengths: ridges to choose from, relative to the features' mean square.
        rank: the rank k of each side, or several to choose from; None is full rank, at a cost of n·c·o·i·min(o, i) a round.
        generator: shuffles the samples before they are split; None is a generator with seed 0.
        memory_limit: bytes that may be used; None is that of ``start_feats``.
        progress: called with "blocks" and the fraction of the work on them that is done.

    Raises:
        TangentError: when the features do not belong together, there are fewer than 8 samples, nothing changed, a rank is not
            positive, the structure has no least-squares fit, or the memory limit is too small.

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
    ranks = _checked_ranks(rank)
    n = start_feats.n
    order = torch.randperm(n, generator=generator or torch.Generator().manual_seed(0)).to(start_feats.device)
    quarter = max(2, n // 4)
    parts = (
        order[2 * quarter :].sort().values,
        order[:quarter].sort().values,
        order[quarter : 2 * quarter].sort().values,
    )
    start, end = _moderate(start_feats, end_feats)
    sizes = (len(parts[0]), len(parts[1]), len(parts[2]))
    if isinstance(structure, Full):
        if not any(_change(Samples(block, end.blocks[name], order)) > 0 for name, block in start.blocks.items()):
            raise TangentError(_UNCHANGED)
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
    width = {name: _width(block, own[name], n, ranks, limit) for name, block in start.blocks.items()}
    work = {n: explain_operations(block, end.blocks[n], own[n], start.n) for n, block in start.blocks.items()}
    found: dict[str, _Found] = {}
    done = 0.0
    for name, block in start.blocks.items():

        def tick(fraction: float, name: str = name, done: float = done) -> None:
            if progress is not None:
                progress("blocks", min(1.0, (done + fraction * work[name]) / sum(work.values())))

        sets = [Samples(block, end.blocks[name], index) for index in parts]
        found[name] = _best(sets, own[name], strengths, ranks, width[name], tick)
        done += work[name]
        tick(1.0, name, done - work[name])
    if not any(changed > 0 for one in found.values() for changed in one.changes):
        raise TangentError(_UNCHANGED)
    total = _r2(sum(one.errors[2] for one in found.values()), sum(one.changes[2] for one in found.values()))
    return Explanation(
        structure,
        {name: one.r2(2) for name, one in found.items()},
        total,
        {name: one.r2(0) for name, one in found.items()},
        {name: one.strength for name, one in found.items()},
        {name: one.transform for name, one in found.items()},
        sizes,
        {name: one.rank for name, one in found.items() if one.rank is not None},
        {name: one.by_rank for name, one in found.items() if one.rank is not None},
    )


_UNCHANGED = "explain: the features are the same at start and end, so there is no change to explain"


def explain_operations(block: Block, after: Block, structure: Structure, n: int) -> float:
    """Operations that `explain` is expected to take for one block on n samples at the default ranks, a multiply-add as two."""
    (o, i), c = block.shape, block.outputs
    t, s = (max(1, min(part.positions or o * i, c * o * i // (c * o + i))) for part in (block, after))
    work = 2.0 * n * s * (s + t) * (c * o + i)
    fitted = {SIDES.index(side): (o, i)[SIDES.index(side)] for side in _sides(structure)}
    for k, size in fitted.items():
        kept, signals = min(size, few_directions.WIDE), c if k == 0 else 1
        work += 2.0 * n * kept * signals * size * (s + t) + (n * t * signals * size + size**2) * min(size, 600)
    if len(fitted) == 2:
        p, q = (min(size, few_directions.WIDE) for size in (o, i))
        work += 2.0 * n * c * p * q * s + 150 * (2.0 * n * c * p * q * (p + q) + 20 * (p**3 + q**3))
    return work


def _sides(structure: Structure) -> tuple[str, ...]:
    """The sides that a structure fits."""
    return {Left: SIDES[:1], Right: SIDES[1:], TwoSided: SIDES}.get(type(structure), ())


def _checked_ranks(rank: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if rank is None:
        return None
    ranks = tuple(sorted({rank} if isinstance(rank, int) else set(rank)))
    if not ranks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ranks):
        raise TangentError(f"explain: rank must be a positive integer, several, or None for full rank, got {rank!r}")
    return ranks


def _moderate(start: TangentFeatures, end: TangentFeatures) -> tuple[TangentFeatures, TangentFeatures]:
    """Both features over the same power of two, so that float64 holds their squares."""
    signs = torch.ones(start.n, start.c, dtype=start.dtype, device=start.device)
    if start.dtype != torch.float64:  # float64 holds the squares of any float32
        return start, end
    signs[::2] = -1
    sizes = [largest(matrix) for feats in (start, end) for matrix in feats.to(start.dtype).combine(signs).values()]
    scale = power_of_two(max(sizes))
    if scale == 1:
        return start, end
    small = Sides(scale=1 / scale)
    return start.transformed(dict.fromkeys(start.blocks, small)), end.transformed(dict.fromkeys(end.blocks, small))


def _width(block: Block, structure: Structure, n: int, ranks: tuple[int, ...] | None, limit: int) -> int:
    """To how many units a wide side is narrowed, so that the sums of a block stay within the limit."""
    sides = _sides(structure)
    widest = max(block.shape)
    width = widest if ranks is None else max(few_directions.WIDE, 2 * max(ranks))

    def needed(width: int) -> int:
        o, i = (min(size, width) for size in block.shape)
        moments = sum({"left": o, "right": i}[side] ** 2 for side in sides)
        held = 2 * n * block.outputs * o * i if len(sides) == 2 and ranks is not None else 0
        return 8 * (4 * moments + held)

    while ranks is not None and needed(width) > limit and width > _LEAST:
        width = max(_LEAST, width // 2)
    side = max(sides, key=lambda side: block.shape[SIDES.index(side)], default="")
    if sides:
        units = block.shape[SIDES.index(side)]
        remedy = f"leave block {block.name!r} out with wrt, or use a structure without its {side} side, of {units} units"
        less = "give a rank, " if ranks is None else ""
        require_memory("explain", needed(width), limit, remedy=less + remedy)
    return width


@dataclass(frozen=True)
class _Found:
    """What explains one block best; errors and changes on the samples fitted, used to choose, and reported on."""

    transform: Transform
    strength: float
    errors: tuple[float, float, float]
    changes: tuple[float, float, float]
    rank: int | None = None
    by_rank: Mapping[int, float] = field(default_factory=dict)

    def r2(self, which: int) -> float:
        return _r2(self.errors[which], self.changes[which])


def _best(
    sets: list[Samples], structure: Structure, strengths: Sequence[float], ranks: tuple[int, ...] | None, width: int,
    tick: Callable[[float], None],
) -> _Found:  # fmt: skip
    if _sides(structure):
        return _by_sides(sets, _sides(structure), strengths, ranks, width, tick)
    changes = tuple(map(_change, sets))
    if isinstance(structure, Fixed):
        return _Found(Sides(), 0.0, changes, changes)  # type: ignore[arg-type]
    if isinstance(structure, LayerScale):
        size, mixed = _inner(sets[0], "before", "before"), _inner(sets[0], "after", "before")
        transform, strength = Sides(scale=mixed / size if size > 0 else 1.0), 0.0
    else:
        assert isinstance(structure, Grouped)
        transform, strength = _by_group(sets, structure, strengths)  # type: ignore[assignment]
    errors = tuple(_error(samples, transform) for samples in sets)
    return _Found(transform, strength, errors, changes)  # type: ignore[arg-type]


def _by_sides(
    sets: list[Samples], sides: tuple[str, ...], strengths: Sequence[float], ranks: tuple[int, ...] | None, width: int,
    tick: Callable[[float], None],
) -> _Found:  # fmt: skip
    """Sides of every rank and strength from the same sums, each rank from the one before; then the chosen one alone."""
    units = {side: sets[0].before.shape[SIDES.index(side)] for side in sides}
    most = max(units.values())
    tried = (None,) if ranks is None else sorted({min(k, most) for k in ranks})
    axes = {s: narrowed(sets[0], s, strengths[::2], min(max(tried), units[s]), width) if ranks else None for s in sides}
    solves = len(strengths) * len(tried) * few_directions.STEPS
    fitting, choosing, reporting = (
        sums(samples, axes, count) for samples, count in zip(sets, (solves, solves // 2, 1), strict=True)
    )
    tick(0.5)
    search = Search(fitting, units, fitting.square[sides[0]].new_tensor(strengths))
    held = search.begin()
    found: list[tuple[float, int | None, float, dict[str, Side]]] = []
    by_rank: dict[int, float] = {}
    for count, k in enumerate(tried, start=1):
        held = search.improved(held, k, few_directions.ROUNDS if k is None else few_directions.STEPS)
        errors = choosing.errors(held)
        best = int(errors.argmin())
        one = {side: batch[best : best + 1] for side, batch in held.items()}
        found.append((float(errors[best]), k, strengths[best], one))
        if k is not None:
            by_rank[k] = _r2(float(reporting.errors(one)), reporting.change)
        tick(0.5 + 0.4 * count / len(tried))
    _, k, strength, chosen = min(found, key=lambda candidate: candidate[0])
    if k is not None:
        only = replace(search, strengths=search.strengths.new_tensor([strength]))
        chosen = only.improved(chosen, k, few_directions.ROUNDS)
        by_rank[k] = _r2(float(reporting.errors(chosen)), reporting.change)
    done: tuple[Sums, Sums, Sums] = (fitting, choosing, reporting)
    return _Found(
        _transform(chosen, axes, k),
        strength,
        tuple(float(each.errors(chosen)) for each in done),  # type: ignore[arg-type]
        tuple(each.change for each in done),  # type: ignore[arg-type]
        k if k is not None else most,
        by_rank if k is not None else {most: _r2(float(reporting.errors(chosen)), reporting.change)},
    )


def _transform(sides: dict[str, Side], axes: Mapping[str, Tensor | None], rank: int | None) -> Sides:
    """M_L, M_R = I + UVᵀ and their common scale; a matrix where nothing was narrowed and the rank is full."""
    found: dict[str, Matrix | Update] = {}
    total = 1.0
    for name, side in sides.items():
        columns, inside = axes[name], side.inside[0]
        if columns is None and (rank is None or rank >= len(inside)):
            found[name] = Matrix(inside)
            continue
        scale = float(side.scale)
        scale = scale if abs(scale) > _TINY else _TINY
        u, values, vt = torch.linalg.svd(side.change[0] / scale)
        u, v = u[:, :rank] * values[:rank], vt[:rank].mT
        found[name] = Update(u, v) if columns is None else Update(columns @ u, columns @ v)
        total *= scale
    return Sides(found.get("left"), found.get("right"), total)


def _inner(samples: Samples, first: str, second: str) -> float:
    """Σ⟨A, B⟩ of the features "before" and "after"."""
    return sum(inner(*({"before": a, "after": b}[name] for name in (first, second))) for a, b in samples.parts())


def _change(samples: Samples) -> float:
    """Σ‖B − A‖², or zero if it is only rounding."""
    return sums(samples, {}, 1).change


def _error(samples: Samples, transform: Transform) -> float:
    """Σ‖B − M A‖²."""
    if isinstance(transform, Entrywise):
        moved = samples.before.entrywise(transform.gains)
    else:
        assert isinstance(transform, Sides)
        moved = samples.before.transformed(transform.left, transform.right, transform.scale)
    held = sums(replace(samples, before=moved), {}, 1)
    return max(0.0, held.after - 2 * held.mixed + held.before)


def _by_group(sets: list[Samples], structure: Grouped, strengths: Sequence[float]) -> tuple[Transform, float]:
    """One factor for each group of entries, z = (Σ B·A + μ)/(Σ A·A + μ)."""

    def totals(samples: Samples) -> tuple[Tensor, Tensor]:
        """Σ A·A and Σ B·A, entry by entry, in one pass over the features."""
        (o, i), c = samples.before.shape, samples.before.outputs
        square = cross = torch.zeros((), dtype=torch.float64, device=samples.index.device)
        for part in ranges(len(samples.index), max(1, _CHUNK // (c * o * i))):
            index = samples.index[part]
            a, b = (x.map(index=index, dtype=torch.float64).features() for x in (samples.before, samples.after))
            square, cross = square + (a * a).sum((0, 1)), cross + (b * a).sum((0, 1))
        dims = structure.dimensions
        return (square.sum(dims, keepdim=True), cross.sum(dims, keepdim=True)) if dims else (square, cross)

    fitting, (square, cross) = totals(sets[0]), totals(sets[1])
    found: list[tuple[float, float, Tensor]] = []
    for strength in strengths:
        ridge = strength * float(fitting[0].mean()) + torch.finfo(square.dtype).tiny
        gains = (fitting[1] + ridge) / (fitting[0] + ridge)
        found.append((float((gains**2 * square - 2 * gains * cross).sum()), strength, gains))
    _, strength, gains = min(found, key=lambda candidate: candidate[0])
    return structure.transform(gains), strength


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

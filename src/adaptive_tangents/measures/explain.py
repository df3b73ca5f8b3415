"""How well a structured transform explains a measured feature change: min over M of Σ_k‖φ̄(x_k) − Mφ₀(x_k)‖².

Left and right sides have few directions (`few_directions`), with a ridge on them. The ridge's strength and the rank are
chosen on samples held out from the fit; R² is reported on further samples, held out from both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block, check_finite_blocks
from adaptive_tangents.features.tangent_features import TangentFeatures, check_features
from adaptive_tangents.features.transforms import Sides, Transform
from adaptive_tangents.kernels.derived_kernels import largest, power_of_two
from adaptive_tangents.measures.block_fits import Fits, Found, last_of_least, r_squared, sides_of, unrounded, width_of
from adaptive_tangents.measures.few_directions import SIDES, WIDE, Samples
from adaptive_tangents.runtime.figures import bars, lines, panels
from adaptive_tangents.runtime.memory import limit_for
from adaptive_tangents.runtime.progress import Asked, Progress, shown
from adaptive_tangents.runtime.told import few_digits, html, short
from adaptive_tangents.structures.base import Fixed, Full, Structure, check_sketch
from adaptive_tangents.structures.described import read_with_structure, write_with_structure
from adaptive_tangents.structures.grouped import Grouped
from adaptive_tangents.structures.mixed import Mixed, as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED, Left, Right, TwoSided

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
RANKS = (0, 1, 2, 4, 8, 16, 32)
# Operations of a large product that take as long as one of these parts does, as measured in benchmarks/bench_inspect.py.
_IN_NORMS, _IN_ONE_SIDE, _IN_ROUNDS = 0.13, 2.2, 4.2


@dataclass(frozen=True, repr=False)
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
        squares: Σ‖φ̄ − Mφ₀‖² and Σ‖φ̄ − φ₀‖² of each block on the samples of ``r2``.
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
    squares: Mapping[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return (
            f"Explanation({short(few_digits(self.structure))}: R² {self.total:.4g} over {len(self.r2)} blocks, on "
            f"{self.samples[2]} samples held out)"
        )

    def _repr_html_(self) -> str:
        samples = " + ".join(map(str, self.samples))
        facts = {"structure": few_digits(self.structure), "R²": f"{self.total:.4g}", "samples": samples}
        rows = ((name, self.r2[name], self.fit_r2[name], self.ranks.get(name, ""), self.strengths[name])
                for name in self._largest)  # fmt: skip
        return html("Explanation", facts, ("block", "R²", "fitted", "rank", "ridge"), rows)

    @property
    def _largest(self) -> list[str]:
        """The blocks, by the size of their change."""
        return sorted(self.r2, key=lambda name: -self.squares.get(name, (0.0, 0.0))[1])

    def plot(self) -> "Figure":
        """R² of the blocks that change most, and where sides have a rank, R² at each rank tried."""
        ranked = {name: self.r2_by_rank[name] for name in self._largest if name in self.r2_by_rank}
        figure, axes = panels("plot", 2 if ranked else 1, len(self.r2))
        shown = {name: self.r2[name] for name in self._largest if math.isfinite(self.r2[name])}
        notes = {name: f"rank {rank}" for name, rank in self.ranks.items()}
        bars(axes[0], shown, f"R² {self.total:.3g} over all blocks", "R² on samples held out", notes)
        if ranked:
            curves = {name: (list(tried), list(tried.values())) for name, tried in ranked.items()}
            ticks = sorted({rank for tried in ranked.values() for rank in tried})
            lines(axes[1], curves, "By rank", ("rank", "R² on samples held out"), log="x", ticks=ticks)
        return figure

    def save(self, path: str | Path, *, without_structure: bool = False) -> None:
        """Write the explanation as a safetensors file, all but tensors as JSON in its header; ``load_explanation`` reads it.

        Args:
            path: of the file; one that is there is replaced.
            without_structure: keep only the structure's name, as where a penalty is a function of your own.

        Raises:
            TangentError: when the structure cannot be described, or the file cannot be written.
        """
        write_with_structure(Path(path), "explanation", self, (Explanation,), without_structure=without_structure)


def load_explanation(path: str | Path) -> Explanation:
    """An explanation that ``Explanation.save`` wrote, on the CPU.

    Args:
        path: of the file.

    Raises:
        TangentError: when the file cannot be read, is no explanation, or was changed.
    """
    found: Explanation = read_with_structure(
        "load_explanation", Path(path), "explanation", (Explanation,), (), "Explanation.save"
    )
    return found


def explain(
    start_feats: TangentFeatures,
    end_feats: TangentFeatures,
    structure: Structure | Mapping[str, Structure] = TWO_SIDED,
    *,
    strengths: Sequence[float] = _STRENGTHS,
    rank: int | Sequence[int] | None = RANKS,
    generator: torch.Generator | None = None,
    memory_limit: int | None = None,
    progress: Asked = None,
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
        strengths: ridges to choose from, finite and 0 or more, relative to the features' mean square.
        rank: the rank k of each side, or several to choose from (0: one factor for the block); None is full rank, at a cost
            of n·c·o·i·min(o, i) a round.
        generator: shuffles the samples before they are split; None is a generator with seed 0.
        memory_limit: bytes that may be used; None is that of ``start_feats``.
        progress: called with "blocks" and the fraction of the work on them that is done; True shows a bar.

    Raises:
        TangentError: when the features do not belong together, there are fewer than 8 samples, nothing changed, they are
            not finite, a rank or a strength is negative, the structure has no least-squares fit, or the memory limit is too
            small.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Linear(3, 1)
    >>> feats = at.tangent_features(model, torch.randn(40, 3))
    >>> doubled = feats.transformed({"weight": at.features.transforms.Sides(scale=2.0)})
    >>> round(at.explain(feats, doubled, at.LayerScale()).total, 3)
    1.0
    """
    for each in (start_feats, end_feats):
        check_features("explain", each)
    with shown(progress) as told:
        return explanations(
            start_feats, end_feats, {"": as_structure("explain", structure)}, strengths=strengths, rank=rank,
            generator=generator, memory_limit=memory_limit, progress=told,
        )[""]  # fmt: skip


def explanations(
    start_feats: TangentFeatures, end_feats: TangentFeatures, structures: Mapping[str, Structure], *,
    strengths: Sequence[float] = _STRENGTHS, rank: int | Sequence[int] | None = RANKS,
    generator: torch.Generator | None = None, memory_limit: int | None = None, progress: Progress | None = None,
) -> dict[str, Explanation]:  # fmt: skip
    """`explain` for several structures, by the same names; what they have in common is computed once."""
    start_feats.check_origin("explain", end_feats)
    for structure in structures.values():
        check_sketch("explain", structure, start_feats)
    _check(start_feats, end_feats)
    ranks, strengths = _checked_ranks(rank), _checked_strengths(strengths)
    n = start_feats.n
    order = torch.randperm(n, generator=generator or torch.Generator().manual_seed(0), device="cpu").to(
        start_feats.device
    )
    quarter = max(2, n // 4)
    parts = (
        order[2 * quarter :].sort().values,
        order[:quarter].sort().values,
        order[quarter : 2 * quarter].sort().values,
    )
    start, end, units = _moderate(start_feats, end_feats, by_block=True)
    sizes = (len(parts[0]), len(parts[1]), len(parts[2]))
    by_block = {key: one for key, one in structures.items() if not isinstance(one, Full)}
    own = {key: _of_blocks(structure, start.blocks) for key, structure in by_block.items()}
    limit = limit_for(start.limit if memory_limit is None else memory_limit, start.device)
    width = {
        name: min((width_of(block, each[name], n, ranks, limit) for each in own.values()), default=0)
        for name, block in start.blocks.items()
    }
    work = [
        (key, name, explain_operations(block, end.blocks[name], each[name], n))
        for name, block in start.blocks.items()
        for key, each in own.items()
    ]
    found: dict[str, dict[str, Found]] = {key: {} for key in own}
    done, whole = 0.0, sum(share for _, _, share in work)
    fits: Fits | None = None
    for key, name, share in work:

        def tick(fraction: float, done: float = done, share: float = share) -> None:
            if progress is not None:
                progress("blocks", min(1.0, (done + fraction * share) / whole))

        if fits is None or fits.name != name:
            fits = Fits(name, start.blocks[name], end.blocks[name], parts, strengths, ranks, width[name])
        found[key][name] = fits.best(own[key][name], tick)
        done += share
        tick(1.0, done - share)
    told = {}
    for key, structure in structures.items():
        if isinstance(structure, Full):
            if not any(Samples(block, end.blocks[name], order).change > 0 for name, block in start.blocks.items()):
                raise TangentError(_UNCHANGED)
            first, last, _ = _moderate(start_feats, end_feats, by_block=False)
            wide = first.to(torch.float64), last.to(torch.float64)
            told[key] = _explain_full(*wide, structure, parts, sizes, strengths)
        else:
            told[key] = _told(structure, found[key], sizes, units)
    return told


def _told(
    structure: Structure, found: Mapping[str, Found], samples: tuple[int, int, int], units: Mapping[str, float]
) -> Explanation:
    """The explanation from what was found of blocks over their units, whose squares float64 may not hold."""
    if not any(changed > 0 for one in found.values() for changed in one.changes):
        raise TangentError(_UNCHANGED)
    most = max(units[name] for name, one in found.items() if any(changed > 0 for changed in one.changes))
    squares = {}
    for name, one in found.items():
        unit = units[name]
        squares[name] = (one.errors[2] * unit * unit, one.changes[2] * unit * unit)
    shares = {name: (units[name] / most) * (units[name] / most) for name in found}
    return Explanation(
        structure,
        {name: one.r2(2) for name, one in found.items()},
        r_squared(
            sum(shares[name] * one.errors[2] for name, one in found.items()),
            sum(shares[name] * one.changes[2] for name, one in found.items()),
        ),
        {name: one.r2(0) for name, one in found.items()},
        {name: one.strength for name, one in found.items()},
        {name: one.transform for name, one in found.items()},
        samples,
        {name: one.rank for name, one in found.items() if one.rank is not None},
        {name: one.by_rank for name, one in found.items() if one.rank is not None},
        squares,
    )


def _of_blocks(structure: Structure, blocks: Mapping[str, Block]) -> dict[str, Structure]:
    """The structure of each block."""
    own = structure.of_blocks(blocks) if isinstance(structure, Mixed) else dict.fromkeys(blocks, structure)
    for one in own.values():
        if isinstance(one, Full):
            raise TangentError(
                "explain: Full explains all blocks by one transform; pass it alone, not for a pattern of blocks"
            )
        if not isinstance(one, Fixed | Grouped | Left | Right | TwoSided):
            raise TangentError(
                f"explain: {type(one).__name__} has no least-squares fit; use one of the named structures"
            )
    return own


_UNCHANGED = "explain: the features are the same at start and end, so there is no change to explain"


def explain_operations(block: Block, after: Block, structure: Structure, n: int) -> float:
    """What `explain` is expected to take for a block on n samples, in operations of a large product."""
    (o, i), c = block.shape, block.outputs
    if block.lookup is not None:
        i = min(i, n * block.positions)  # entries that no sample looks up are left out
    t, s = (max(1, min(part.positions or o * i, c * o * i // (c * o + i))) for part in (block, after))
    work = _IN_NORMS * 2.0 * n * s * (s + t) * (c * o + i)
    fitted = {SIDES.index(side): (o, i)[SIDES.index(side)] for side in sides_of(structure)}
    for k, size in fitted.items():
        kept, signals = min(size, WIDE), c if k == 0 else 1
        moments = 2.0 * n * kept * signals * size * (s + t) + (n * t * signals * size + size**2) * min(size, 600)
        work += _IN_ONE_SIDE * moments
    if len(fitted) == 2:
        p, q = (min(size, WIDE) for size in (o, i))
        work += _IN_ROUNDS * (2.0 * n * c * p * q * s + 150 * (2.0 * n * c * p * q * (p + q) + 20 * (p**3 + q**3)))
    return work


def _checked_ranks(rank: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if rank is None:
        return None
    ranks = tuple(rank) if isinstance(rank, Sequence) else (rank,)
    if not ranks or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in ranks):
        raise TangentError(
            f"explain: rank must be 0 or more, several such integers, or None for full rank, got {rank!r}"
        )
    return tuple(sorted(set(ranks)))


def _checked_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths, weakest first."""
    try:
        found = tuple(sorted(float(strength) for strength in strengths))
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 <= strength < math.inf for strength in found):
        raise TangentError(f"explain: strengths are one or several finite numbers, each 0 or more, got {strengths!r}")
    return found


def _moderate(
    start: TangentFeatures, end: TangentFeatures, *, by_block: bool
) -> tuple[TangentFeatures, TangentFeatures, dict[str, float]]:
    """Both features over powers of two, so that float64 holds their squares: one for each block, or one for all."""
    units = dict.fromkeys(start.blocks, 1.0)
    if start.dtype != torch.float64:  # float64 holds the squares of any float32
        return start, end, units
    signs = torch.ones(start.n, start.c, dtype=start.dtype, device=start.device)
    signs[::2] = -1
    first, last = (feats.to(start.dtype).combine(signs) for feats in (start, end))
    sizes = {name: max(largest(first[name]), largest(last[name])) for name in units}
    units = {name: power_of_two(sizes[name] if by_block else max(sizes.values())) for name in units}
    small = {name: Sides(scale=1 / unit) for name, unit in units.items() if unit != 1}
    return start.transformed(small), end.transformed(small), units


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
        ridge = max(strength, torch.finfo(values.dtype).eps) * float(kernel.diagonal().mean())
        inverse = (vectors / (values.clamp_min(0) + ridge)) @ vectors.mT
        weights = cross @ inverse
        return {
            name: unrounded(
                own[name] - 2 * float((weights * mixed[name]).sum()) + float(((weights @ among[name]) * weights).sum())
            )
            for name in own
        }

    fitting, choosing, reporting = (prepared(index) for index in parts)
    tried = [sum(errors(choosing, strength).values()) for strength in strengths]
    chosen = strengths[last_of_least(tried, sum(choosing[2].values()))]
    error, change, fit_error, fit_change = errors(reporting, chosen), reporting[2], errors(fitting, chosen), fitting[2]
    return Explanation(
        structure,
        {name: r_squared(error[name], change[name]) for name in error},
        r_squared(sum(error.values()), sum(change.values())),
        {name: r_squared(fit_error[name], fit_change[name]) for name in fit_error},
        dict.fromkeys(error, chosen),
        None,
        sizes,
        squares={name: (error[name], change[name]) for name in error},
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
    for feats in (start, end):
        check_finite_blocks("explain", feats.blocks)

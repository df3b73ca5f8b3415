"""Sketches: unbiased, seeded projections of tangent features, for networks whose features are too large to keep.

Every block is projected through its factors, y_j = s_jᵀΦr_j = Σ_t (s_j·δ_t)(r_j·h_t), so a sample's p numbers never
exist at once. Several independent repetitions give the error by their spread. A block no larger than its sketch stays exact.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.capture.network import OutputFn, Selection
from adaptive_tangents.capture.state_names import Params
from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block, stack_blocks
from adaptive_tangents.features.kernel_layout import Outputs, working_dtype
from adaptive_tangents.features.summands import Dense, Index
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Transform
from adaptive_tangents.linalg.hadamard import SignRows, paired_rows
from adaptive_tangents.runtime import tensor_files as files
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.runtime.memory import limit_for, require_memory
from adaptive_tangents.runtime.progress import Asked, Progress, told, with_bar
from adaptive_tangents.sketching.block_projection import acts_on, projected
from adaptive_tangents.sketching.jackknife import SketchedMeasure, jackknifed

Shapes = Mapping[str, tuple[int, int]]
Projections = Mapping[str, tuple[tuple[SignRows, SignRows], ...]]

_CHUNK_BYTES = 256_000_000  # of factors held at a time while a sketch is made: more is no faster,
_GRADIENTS = 4  # but for large networks, of which as much is held as so many gradients take
_LEAST_SHARE = 0.01  # of an equal share: a block that is small on a few samples may be larger on others


@dataclass(frozen=True)
class Sketch:
    r"""How to sketch features, without bias: E⟨SΦ, SΦ′⟩ = ⟨Φ, Φ′⟩.

    A repetition's coordinates of block ℓ are s_jᵀΦ_ℓr_j/√k_ℓ for k_ℓ pairs of rows of Hadamard matrices with random signs.
    They depend on seed, block and repetition alone. Derivation in docs/theory.md, §8.

    Args:
        dim: the number of coordinates of all blocks and repetitions together.
        seed: the seed of the projections, at least 0.
        repetitions: the number of independent repetitions, at least 2; their spread gives the error.
        shares: each block's share of the coordinates, as ``fitted`` measures it; None is the same for every block. Blocks
            with no more entries than their share stay exact.

    Raises:
        TangentError: when a value is out of range.

    >>> import torch, adaptive_tangents as at
    >>> model, x = torch.nn.Linear(40, 30), torch.randn(5, 40)
    >>> feats = at.Sketch(400, seed=1).apply(at.tangent_features(model, x))
    >>> feats.p, feats.kernel().shape
    (400, torch.Size([5, 30, 5, 30]))
    """

    dim: int
    seed: int = 0
    repetitions: int = 8
    shares: Mapping[str, float] | None = field(default=None, hash=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("dim", "seed", "repetitions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TangentError(f"Sketch: {name} is a whole number, got {value!r}")
            object.__setattr__(self, name, int(value))  # of NumPy's, whose kind would be part of the sketch
        if self.dim < 1:
            raise TangentError(f"Sketch: dim is a positive number of coordinates, got {self.dim}")
        if self.repetitions < 2:
            raise TangentError(
                f"Sketch: repetitions is at least 2, as their spread is the error, got {self.repetitions}"
            )
        if self.seed < 0:
            raise TangentError(f"Sketch: seed is a whole number of at least 0, got {self.seed}")
        for name, share in (self.shares or {}).items():
            if not (math.isfinite(share) and share > 0):
                raise TangentError(f"Sketch: shares are positive numbers, got {share} for block {name!r}")

    def fitted(self, feats: TangentFeatures) -> "Sketch":
        r"""The same sketch, with the shares that give the least error on features like these: the mean of K_ℓ(x, x).

        The error is Σ_ℓ V_ℓ/k_ℓ, least for k_ℓ ∝ √V_ℓ, and V_ℓ grows as the square of the block's kernel. The shares are
        part of the sketch, so use the result for all data.

        Args:
            feats: exact features; a few samples suffice.

        Raises:
            TangentError: when the features are a sketch, or zero.

        >>> import torch, adaptive_tangents as at
        >>> model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.ReLU(), torch.nn.Linear(50, 50))
        >>> sketch = at.Sketch(1000).fitted(at.tangent_features(model, torch.randn(4, 50)))
        >>> sketch.shares["2"] > sketch.shares["0"]
        True
        """
        _refuse_sketch("fitted", feats)
        kernels = feats.kernel(outputs="diagonal", by_block=True)
        sizes = {name: float(kernel.diagonal().double().mean()) for name, kernel in kernels.items()}
        total, least = sum(sizes.values()), _LEAST_SHARE / len(sizes)
        if total == 0:
            raise TangentError("fitted: the features are zero, so no block has a share; give other samples")
        return replace(self, shares={name: max(size / total, least) for name, size in sizes.items()})

    def sizes(self, shapes: Shapes) -> dict[str, int]:
        """Number of coordinates in one repetition of each block that is sketched; the other blocks stay exact.

        Args:
            shapes: the shape (o, i) of each block, by name.

        Raises:
            TangentError: when ``dim`` is too small for these blocks, or the shares are of other blocks.
        """
        if self.shares is not None and set(self.shares) != set(shapes):
            raise TangentError(
                f"Sketch: shares are of blocks {', '.join(self.shares)} and the features have {', '.join(shapes)}; measure "
                "them with sketch.fitted on features of this model and wrt"
            )
        shares = self.shares or dict.fromkeys(shapes, 1.0)
        rest, left = dict(shapes), self.dim
        while rest:
            unit = left / sum(shares[name] for name in rest)
            small = [name for name, (o, i) in rest.items() if o * i <= unit * shares[name]]
            if not small:
                break
            left -= sum(o * i for o, i in (rest.pop(name) for name in small))
        free = left // self.repetitions - len(rest)
        if rest and free < 0:
            raise TangentError(
                f"Sketch: dim = {self.dim} leaves {left} coordinates for {len(rest)} blocks in {self.repetitions} "
                f"repetitions; take a dim of at least {self.dim - left + len(rest) * self.repetitions}, or fewer blocks"
            )
        total = sum(shares[name] for name in rest)
        return {name: 1 + int(free * shares[name] / total) for name in rest}

    def apply(self, feats: TangentFeatures, *, fingerprint: str | None = None) -> "SketchedFeatures":
        """The sketch of exact, averaged or adapted features.

        Args:
            feats: the features.
            fingerprint: a hash of the model's parameters, which ``save_sketch`` needs; None leaves it unknown.

        Raises:
            TangentError: when the features are a sketch already, or as in ``sizes``.
        """
        _refuse_sketch("apply", feats)
        return _sketched(self, feats, _projections(self, _shapes(feats)), fingerprint)

    def describe(self) -> dict[str, object]:
        """The sketch's settings, as plain JSON values."""
        return {
            "method": "pairs of rows of signed Hadamard matrices", "dim": self.dim, "seed": self.seed,
            "repetitions": self.repetitions, "shares": None if self.shares is None else dict(self.shares),
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class SketchedFeatures(TangentFeatures):
    """A sketch of tangent features, used like any TangentFeatures; a sketched block is (repetitions, coordinates).

    Kernels are unbiased estimates. A vector over parameters is one over the p coordinates. A sketched block can only be
    transformed as a whole: by the structures ``Fixed``, ``LayerScale`` and ``Full``.

    Attributes:
        n, c: number of samples and of outputs.
        blocks: the sketched or exact features of each parameter block, by name.
        parameters: name and shape of each sketched block or exact parameter.
        limit: bytes that ``dense`` and ``kernel`` may use; None is half of what is free.
        sketch: how the features were sketched.
        shapes: the shape (o, i) of each block before it was sketched, by name.
        fingerprint: a hash of the model's parameters; None if unknown.
    """

    sketch: Sketch = field(kw_only=True)
    shapes: Shapes = field(kw_only=True)
    fingerprint: str | None = field(default=None, kw_only=True)

    @property
    def sketched(self) -> tuple[str, ...]:
        """The blocks that are sketched; all others are exact."""
        return tuple(name for name, block in self.blocks.items() if block.shape != self.shapes[name])

    @property
    def origin(self) -> str:
        # Sorted, because the order of the blocks does not matter.
        of = files.fingerprint([sorted(self.shapes.items()), sorted((self.sketch.shares or {}).items())])
        sketch = self.sketch
        return f"a sketch (dim {sketch.dim}, seed {sketch.seed}, {sketch.repetitions} repetitions, of blocks {of[:8]})"

    def __repr__(self) -> str:
        kept = len(self.blocks) - len(self.sketched)
        whole = sum(o * i for o, i in self.shapes.values())
        return (
            f"SketchedFeatures(n={self.n}, c={self.c}, {self.p} coordinates for {whole} parameters, {len(self.sketched)} "
            f"blocks sketched, {kept} exact, {self.sketch.repetitions} repetitions, seed {self.sketch.seed})"
        )

    def __getitem__(self, index: Index) -> "SketchedFeatures":
        return self.of(super().__getitem__(index))

    def to(self, dtype: torch.dtype) -> "SketchedFeatures":
        return self.of(super().to(dtype))

    def transformed(self, transforms: Mapping[str, Transform]) -> "SketchedFeatures":
        """Adapted features Mφ.

        Args:
            transforms: a transform for each block to adapt, by name; for a sketched block a factor, or a joint transform
                that was found from the same sketch.

        Raises:
            TangentError: when a transform acts on the sides or entries of a sketched block.
        """
        for name, transform in transforms.items():
            if name in self.sketched and not acts_on(transform, self.blocks[name]):
                raise TangentError(
                    f"transformed: block {name!r} is a sketch, on which {type(transform).__name__} cannot act by sides or "
                    "entries; transform first and sketch then, sketch.apply(feats.transformed(M))"
                )
        return self.of(super().transformed(transforms))

    def kernel_estimate(
        self, other: "SketchedFeatures | None" = None, *, outputs: Outputs = "full"
    ) -> "SketchedKernel":
        r"""The kernel with the standard error of every entry, √(Σ_r(K_r − K̄)²/(R(R − 1))) from the R repetitions K_r.

        Args:
            other: features of the columns' samples, by the same sketch; None is these features.
            outputs: "full" (n, c, m, c), "trace" (n, m) or "diagonal" (n, m, c), as in ``kernel``.

        Raises:
            TangentError: as ``kernel``; when three kernels would exceed the memory limit; after a joint transform.
        """
        if any(block.shared is not None for feats in (self, other or self) for block in feats.blocks.values()):
            raise TangentError(
                "kernel_estimate: a joint transform (Full) has moved all repetitions along one direction, so their spread is "
                "no longer the error; use kernel, or estimate before transforming"
            )
        kernel = self.kernel(other, outputs=outputs)
        remedy = "use outputs='trace' or 'diagonal', or fewer samples"
        require_memory("kernel_estimate", 3 * kernel.nbytes, limit_for(self.limit, self.device), remedy=remedy)
        spread, count = torch.zeros_like(kernel), self.sketch.repetitions
        if self.sketched:
            alone = SketchedKernel(
                kernel, spread, self.sketch, self._sketched_alone(), other and other._sketched_alone(), outputs
            )
            mean = alone.left.kernel(alone.right, outputs=outputs)
            for r in range(count):
                spread += (alone.of_repetitions([r]) - mean) ** 2
        return SketchedKernel(kernel, (spread / (count * (count - 1))).sqrt(), self.sketch, self, other, outputs)

    def only(self, repetitions: list[int]) -> TangentFeatures:
        """The features of some of the repetitions, again an unbiased sketch; exact blocks stay as they are.

        Args:
            repetitions: indices of the repetitions.
        """
        blocks = dict(self.blocks)
        for name in self.sketched:
            (part,), (total, size) = blocks[name].summands, blocks[name].shape
            rows = part.features(slice(None))[:, :, repetitions] * math.sqrt(total / len(repetitions))
            blocks[name] = replace(blocks[name].of([Dense(rows)]), shape=(len(repetitions), size))
        return TangentFeatures(self.n, self.c, blocks, self.parameters, self.limit)

    def of(self, feats: TangentFeatures) -> "SketchedFeatures":
        held = (feats.n, feats.c, feats.blocks, feats.parameters, feats.limit)
        return SketchedFeatures(*held, sketch=self.sketch, shapes=self.shapes, fingerprint=self.fingerprint)

    def _sketched_alone(self) -> "SketchedFeatures":
        blocks = {name: self.blocks[name] for name in self.sketched}
        return self.of(replace(self, blocks=blocks))


@dataclass(frozen=True, repr=False, eq=False)
class SketchedKernel:
    """An unbiased estimate of a kernel from a sketch, with the standard error of every entry.

    Attributes:
        kernel, standard_error: the estimate and its errors, both (n, c, m, c), (n, m) or (n, m, c).
        sketch: the sketch.
        left, right: the features of the rows and of the columns; a ``right`` of None is ``left``.
        outputs: "full", "trace" or "diagonal".
    """

    kernel: Tensor = field(repr=False)
    standard_error: Tensor = field(repr=False)
    sketch: Sketch
    left: SketchedFeatures
    right: SketchedFeatures | None
    outputs: Outputs

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.kernel.shape))
        return f"SketchedKernel({shape}, {self.outputs}, relative error {self.relative_error:.2g}, from {self.left!r})"

    @property
    def relative_error(self) -> float:
        """√Σ(standard error)²/‖K‖ over all entries."""
        return float(self.standard_error.double().norm() / self.kernel.double().norm())

    def error_of(self, measure: Callable[[Tensor], float]) -> SketchedMeasure:
        r"""Any measure of the kernel with its standard error and bias, by the jackknife over the R repetitions.

        With v from all repetitions and v_r from all but the r-th, the standard error is √((R − 1)/R Σ_r(v_r − v̄)²) and the
        bias (R − 1)(v̄ − v). A sketch biases nonlinear measures: its errors add to the norm in an alignment, for example.

        Args:
            measure: maps a kernel to a number; it is called on R + 1 kernels.

        Source: Efron & Stein, Ann. Stat. 1981.

        >>> import torch, adaptive_tangents as at
        >>> model, x, y = torch.nn.Linear(40, 1), torch.randn(12, 40), torch.randn(12)
        >>> found = at.tangent_kernel(model, x, outputs="trace", sketch=at.Sketch(32))
        >>> measured = found.error_of(lambda K: at.alignment(K, y))
        >>> 0 < measured.standard_error < 0.2
        True
        """
        value, count = float(measure(self.kernel)), self.sketch.repetitions
        if not self.left.sketched:
            return SketchedMeasure(value, 0.0, 0.0, count)
        rest = [[k for k in range(count) if k != r] for r in range(count)]
        return jackknifed(value, [float(measure(self.of_repetitions(kept))) for kept in rest])

    def of_repetitions(self, repetitions: list[int]) -> Tensor:
        """The kernel from some of the repetitions alone.

        Args:
            repetitions: indices of the repetitions.
        """
        right = None if self.right is None else self.right.only(repetitions)
        return self.left.only(repetitions).kernel(right, outputs=self.outputs)


@with_bar
def sketch_features(
    model: nn.Module, x: Batch, sketch: Sketch, *, params: Params | None = None,
    wrt: Selection | None = None, output_fn: OutputFn | None = None, memory_limit: int | None = None,
    progress: Asked = None,
) -> SketchedFeatures:  # fmt: skip
    r"""The sketch of tangent features, made a few samples at a time: the factors of all samples are never held.

    Up to rounding it equals ``sketch.apply(tangent_features(...))``, in whatever batches the samples come.

    Args:
        model: the network f; it is left as it was.
        x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        sketch: the sketch.
        params: a state dict to evaluate the model at, as ``tangent_features`` takes; None is the model's own values.
        wrt: the parameters θ: a name pattern, a parameter, or several of these; None is all that require a gradient.
        output_fn: picks a tensor (n, c) from what the model returns; None takes that itself, or its `logits`.
        memory_limit: bytes that may be used; None is half of what is free.
        progress: called with "samples" and the fraction that is done; True shows a bar.

    Raises:
        TangentError: as ``tangent_features`` and ``Sketch.apply``, and when the sketch would exceed the memory limit.

    >>> import torch, adaptive_tangents as at
    >>> model, x, sketch = torch.nn.Linear(40, 30), torch.randn(8, 40), at.Sketch(256)
    >>> feats, more = at.sketch_features(model, x, sketch), at.sketch_features(model, x[:3], sketch)
    >>> torch.allclose(feats[:3].kernel(), more.kernel(), atol=1e-4)
    True
    """
    call, progress = "sketch_features", told(progress)
    capture = Capture(call, model, x, params, wrt, output_fn, memory_limit)
    net, n = capture.network, samples(x)
    made_from = files.fingerprint([dict(net.parameters), dict(net.buffers), net.selected])
    held = min(capture.limit // 4, max(_CHUNK_BYTES, _GRADIENTS * capture.gradient_bytes))
    chunk = max(1, min(n, held // capture.bytes_per_sample))
    made: list[SketchedFeatures] = []
    projections: Projections | None = None
    for part in ranges(n, chunk):
        feats = capture.features(x if chunk >= n else take(x, part))
        if projections is None:
            projections = _projections(sketch, _shapes(feats))
        made.append(_sketched(sketch, feats, projections, made_from))
        del feats
        # Twice, because joining the parts copies them once.
        needed = 2 * n * made[0].bytes // made[0].n
        require_memory(call, needed, capture.limit, remedy="take a smaller dim or fewer samples")
        if progress is not None:
            progress("samples", part.stop / n)
    first = made[0]
    parts = [dict(feats.blocks) for feats in made]
    del made
    blocks = {name: stack_blocks([part.pop(name) for part in parts]) for name in first.blocks}
    return first.of(TangentFeatures(n, first.c, blocks, first.parameters, memory_limit))


def sketched_kernel(
    model: nn.Module, x: Batch, x2: Batch | None, sketch: Sketch, outputs: Outputs, params: Params | None,
    wrt: Selection | None, output_fn: OutputFn | None, memory_limit: int | None, progress: Progress | None,
) -> SketchedKernel:  # fmt: skip
    """``tangent_kernel`` from a sketch."""
    left, right = (
        None if batch is None else
        sketch_features(
            model, batch, sketch, params=params, wrt=wrt, output_fn=output_fn, memory_limit=memory_limit, progress=progress
        )
        for batch in (x, x2)
    )  # fmt: skip
    assert left is not None
    return left.kernel_estimate(right, outputs=outputs)


def _projections(sketch: Sketch, shapes: Shapes) -> Projections:
    """The Hadamard rows of every repetition, for the blocks that are sketched."""
    return {
        name: tuple(paired_rows((sketch.seed, name, r), shapes[name], size) for r in range(sketch.repetitions))
        for name, size in sketch.sizes(shapes).items()
    }


def _sketched(
    sketch: Sketch, feats: TangentFeatures, projections: Projections, fingerprint: str | None
) -> SketchedFeatures:
    blocks: dict[str, Block] = {}
    parameters: dict[str, tuple[int, ...]] = {}
    for name, block in feats.blocks.items():
        block = block.map(dtype=working_dtype(feats.dtype))
        if name in projections:
            blocks[name] = projected(block, projections[name])
            parameters[name] = blocks[name].shape
        else:
            blocks[name] = block.of([Dense(block.features())])
            parameters |= {slot.parameter: feats.parameters[slot.parameter] for slot in block.slots}
    shapes = _shapes(feats)
    held = (feats.n, feats.c, blocks, parameters, feats.limit)
    return SketchedFeatures(*held, sketch=sketch, shapes=shapes, fingerprint=fingerprint)


def _shapes(feats: TangentFeatures) -> dict[str, tuple[int, int]]:
    return {name: block.shape for name, block in feats.blocks.items()}


def _refuse_sketch(call: str, feats: TangentFeatures) -> None:
    if isinstance(feats, SketchedFeatures):
        raise TangentError(
            f"{call}: the features are {feats.origin} already; give exact ones, as tangent_features makes them"
        )

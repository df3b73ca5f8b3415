"""The tangent features of a network on a batch: every block in factors, with products, kernels and transforms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.contraction import contract_blocks
from adaptive_tangents.features.kernel_layout import (
    Outputs,
    Precision,
    check_outputs,
    check_overflow,
    check_precision,
    empty_kernel,
    entries,
    finish,
    kernel_dtype,
    mirror,
    working_dtype,
)
from adaptive_tangents.features.plans import KernelPlan, plan_block
from adaptive_tangents.features.summands import Index, Shared, sum_tensors, tensors_of
from adaptive_tangents.features.transforms import Entrywise, Joint, Sides, Transform
from adaptive_tangents.runtime.figures import bars, heat, lines, panels
from adaptive_tangents.runtime.memory import format_bytes, limit_for, require_memory
from adaptive_tangents.runtime.told import few, html, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWN = 200  # samples of a kernel that is drawn


@dataclass(frozen=True, eq=False)
class TangentFeatures:
    r"""Tangent features φ(x) = ∂f/∂θ of n samples with c outputs, held block by block as Σ_t δ_t h_tᵀ.

    ``tangent_features`` makes them. Adapted and averaged features have this type, too.

    Attributes:
        n: number of samples.
        c: number of outputs.
        blocks: the features of each parameter block, by name.
        parameters: name and shape of each parameter, in the order of ``model.named_parameters()``; every vector of p
            entries has this order.
        limit: bytes that ``dense`` and ``kernel`` may use; None is half of what is free.

    >>> import torch, adaptive_tangents as at
    >>> feats = at.tangent_features(torch.nn.Linear(3, 2), torch.randn(5, 3))
    >>> feats.n, feats.c, feats.p
    (5, 2, 8)
    >>> phi = feats.dense().flatten(0, 1)
    >>> torch.allclose(feats.kernel().flatten(2).flatten(0, 1), phi @ phi.T, atol=1e-6)
    True
    """

    n: int
    c: int
    blocks: Mapping[str, Block]
    parameters: Mapping[str, tuple[int, ...]]
    limit: int | None = field(default=None, repr=False)

    @property
    def p(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(shape).numel() for shape in self.parameters.values())

    @property
    def bytes(self) -> int:
        """Bytes that the features take."""
        return sum(block.bytes for block in self.blocks.values())

    @property
    def dtype(self) -> torch.dtype:
        """The features' dtype."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The features' device."""
        return self._like.device

    @property
    def origin(self) -> str:
        """How the features were made: "exact", or by which sketch; only features of one origin can be combined."""
        return "exact"

    @property
    def _like(self) -> Tensor:
        return next(tensor for block in self.blocks.values() for tensor in tensors_of(block.summands[0]))

    def __repr__(self) -> str:
        shapes = few([f"{name}: {b.shape[0]}×{b.shape[1]} {b.kind}" for name, b in self.blocks.items()])
        return f"{type(self).__name__}(n={self.n}, c={self.c}, p={self.p}, {{{shapes}}})"

    def _repr_html_(self) -> str:
        facts = {"samples": self.n, "outputs": self.c, "parameters": self.p, "dtype": self.dtype, "origin": self.origin}
        rows = (
            (name, f"{b.shape[0]} × {b.shape[1]}", b.positions, b.kind, format_bytes(b.bytes))
            for name, b in self.blocks.items()
        )
        return html(type(self).__name__, facts, ("block", "o × i", "positions", "kind", "bytes"), rows)

    def plot(self) -> "Figure":
        """The kernel of up to 200 samples, summed over outputs: as a picture, its eigenvalues, and each block's share."""
        some = self[: min(self.n, _DRAWN)]
        parts = some.kernel(outputs="trace", by_block=True)
        kernel = sum_tensors(list(parts.values())).double().cpu()
        traces = {name: float(part.double().diagonal().sum()) for name, part in parts.items()}
        names, whole = sorted(traces, key=lambda name: -traces[name]), sum(traces.values()) or 1.0
        figure, (left, middle, right) = panels("plot", 3, len(names))
        heat(left, kernel.numpy(), "Kernel", "sample")
        values = torch.linalg.eigvalsh(kernel).flip(0).clamp_min(0).tolist()
        values = [value for value in values if value > 1e-12 * values[0]]
        lines(middle, {"": (range(1, len(values) + 1), values)}, "Spectrum", ("index", "eigenvalue"), log="xy")
        bars(right, {name: 100 * traces[name] / whole for name in names}, "Blocks", "share of the trace, %")
        return figure

    def __getitem__(self, index: Any) -> "TangentFeatures":
        """The features of some of the samples.

        Args:
            index: a slice, a list, array or tensor of sample indices, or a mask of n booleans.

        Raises:
            TangentError: when the index is none of these, or names samples that are not there.
        """
        index = self._samples(index)
        blocks = {name: block.map(index=index) for name, block in self.blocks.items()}
        n = torch.empty(self.n, device=self.device)[index].shape[0]
        return TangentFeatures(n, self.c, blocks, self.parameters, self.limit)

    def _samples(self, index: Any) -> Index:
        if isinstance(index, slice):
            return index
        try:
            given = torch.as_tensor(index, device=self.device)
            chosen = torch.arange(self.n, device=self.device)[given if given.numel() else given.long()]
        except (IndexError, TypeError, ValueError, RuntimeError):
            chosen = torch.empty((), device="cpu")
        if chosen.ndim != 1:
            raise TangentError(
                f"features: samples are chosen by a slice, a vector of indices below {self.n} or a mask of {self.n} "
                f"booleans, got {short(repr(index))}"
            )
        return chosen

    def to(self, dtype: torch.dtype) -> "TangentFeatures":
        """The features in another floating dtype.

        Args:
            dtype: the dtype to convert to.
        """
        blocks = {name: block.map(dtype=dtype) for name, block in self.blocks.items()}
        return TangentFeatures(self.n, self.c, blocks, self.parameters, self.limit)

    def split(self, vector: Float[Tensor, " p"]) -> dict[str, Float[Tensor, "_o _i"]]:
        """A vector over parameters as one matrix per block.

        Args:
            vector: one entry per parameter (p,).

        Raises:
            TangentError: when the vector does not have p entries.
        """
        if vector.shape != (self.p,):
            raise TangentError(f"split: expected a vector of p = {self.p} entries, got shape {tuple(vector.shape)}")
        sizes = [torch.Size(shape).numel() for shape in self.parameters.values()]
        parts = zip(self.parameters.items(), torch.split(vector, sizes), strict=True)
        named = {name: part.reshape(shape) for (name, shape), part in parts}
        return {name: block.join(named) for name, block in self.blocks.items()}

    def join(self, matrices: Mapping[str, Float[Tensor, "_o _i"]]) -> Float[Tensor, " p"]:
        """One matrix per block as a vector over parameters (p,); the inverse of ``split``.

        Args:
            matrices: a matrix (o, i) for each block, by name.

        Raises:
            TangentError: when the matrices are of other blocks.
        """
        self.check_matrices("join", matrices)
        named = {k: v for name, block in self.blocks.items() for k, v in block.split(matrices[name]).items()}
        return torch.cat([named[name].flatten() for name in self.parameters])

    def dense(self) -> Float[Tensor, "n c p"]:
        """φ as one array, parameters in the order of ``model.named_parameters()``.

        Raises:
            TangentError: when the array would exceed the memory limit.
        """
        needed = self.n * self.c * self.p * self._like.element_size()
        limit = limit_for(self.limit, self.device)
        require_memory("dense", 2 * needed, limit, remedy="use kernel, matvec or rmatvec, which never form it")
        out = self._like.new_zeros(self.n, self.c, self.p)
        offsets, start = {}, 0
        for name, shape in self.parameters.items():
            offsets[name], start = start, start + torch.Size(shape).numel()
        for block in self.blocks.values():
            phi = block.features()
            for slot in block.slots:
                first, size = offsets[slot.parameter], block.shape[0] * slot.width
                out[:, :, first : first + size] = slot.take(phi).reshape(self.n, self.c, size)
        return out

    def matvec(self, v: Float[Tensor, " p"]) -> Float[Tensor, "n c"]:
        """φ v: the first-order change of every output when the parameters move by v.

        Args:
            v: a vector over parameters (p,), in the features' dtype and on their device.

        Raises:
            TangentError: when shape, dtype or device do not fit.
        """
        self._check("matvec", v, (self.p,))
        return self.inner(self.split(v))

    def rmatvec(self, a: Float[Tensor, "n c"]) -> Float[Tensor, " p"]:
        """φᵀ a = Σ_{k,j} a_{kj} ∂f_j(x_k)/∂θ, a vector over parameters (p,).

        Args:
            a: one weight per sample and output (n, c), in the features' dtype and on their device.

        Raises:
            TangentError: when shape, dtype or device do not fit.
        """
        self._check("rmatvec", a, (self.n, self.c))
        return self.join(self.combine(a))

    def inner(self, matrices: Mapping[str, Float[Tensor, "_o _i"]]) -> Float[Tensor, "n c"]:
        """φ β for coefficients β that are given block by block.

        Args:
            matrices: a matrix B (o, i) for each block, by name.

        Raises:
            TangentError: when the matrices are of other blocks, as those of a fit of other parameters.
        """
        self.check_matrices("inner", matrices)
        return sum_tensors([block.inner(matrices[name][None])[..., 0] for name, block in self.blocks.items()])

    def combine(self, a: Float[Tensor, "n c"]) -> dict[str, Float[Tensor, "_o _i"]]:
        """Σ_{k,j} a_{kj} Φ_ℓ(x_k)_j for every block ℓ: φᵀ a as one matrix (o, i) per block.

        Args:
            a: one weight per sample and output (n, c).
        """
        return {name: block.combine(a) for name, block in self.blocks.items()}

    def transformed(self, transforms: Mapping[str, Transform]) -> "TangentFeatures":
        """Adapted features Mφ, again in factors: δ → M_L δ, h → M_R h.

        Args:
            transforms: a transform for each block to adapt, by name; other blocks stay as they are.

        Raises:
            TangentError: when there is no block of a name.
        """
        blocks = dict(self.blocks)
        for name, transform in transforms.items():
            if name not in blocks:
                raise TangentError(f"transformed: there is no block {name!r}; blocks are {', '.join(blocks)}")
            if isinstance(transform, Sides):
                blocks[name] = blocks[name].transformed(transform.left, transform.right, transform.scale)
            elif isinstance(transform, Entrywise):
                blocks[name] = blocks[name].entrywise(transform.gains.to(self._like))
        for joint in {id(t): t for t in transforms.values() if isinstance(t, Joint)}.values():
            direction = {name: matrix.to(self._like) for name, matrix in joint.direction.items()}
            along = (joint.gain - 1) * sum_tensors(
                [blocks[name].inner(matrix[None]) for name, matrix in direction.items()]
            )
            for name, matrix in direction.items():
                blocks[name] = blocks[name].plus(Shared(along, matrix[None]))
        return TangentFeatures(self.n, self.c, blocks, self.parameters, self.limit)

    def plan(self, other: "TangentFeatures | None" = None, *, outputs: Outputs = "full") -> KernelPlan:
        """Route, operations and bytes of ``kernel`` with the same arguments, before anything runs.

        Args:
            other: features of the columns' samples; None is these features.
            outputs: "full" (n, c, m, c), "trace" (n, m) summed over outputs, or "diagonal" (n, m, c) each output with
                itself.

        Raises:
            TangentError: when the two features do not belong together.
        """
        return self._plan(other, outputs, kernels=1)

    @overload
    def kernel(
        self, other: "TangentFeatures | None" = None, *, outputs: Outputs = "full", by_block: Literal[False] = False,
        precision: Precision = "float32",
    ) -> Tensor: ...  # fmt: skip
    @overload
    def kernel(
        self, other: "TangentFeatures | None" = None, *, outputs: Outputs = "full", by_block: Literal[True],
        precision: Precision = "float32",
    ) -> dict[str, Tensor]: ...  # fmt: skip
    def kernel(
        self, other: "TangentFeatures | None" = None, *, outputs: Outputs = "full", by_block: bool = False,
        precision: Precision = "float32",
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """K(x, x′) = φ(x) φ(x′)ᵀ; among the same samples it is exactly symmetric.

        Args:
            other: features of the columns' samples; None is these features.
            outputs: "full" (n, c, m, c), "trace" (n, m) summed over outputs, or "diagonal" (n, m, c) each output with
                itself.
            by_block: whether to give one kernel per block, by name; they add up to the whole.
            precision: "float32" contracts in float32, or in the features' own dtype if that is better; "mixed" adds up
                the blocks in float64; "float64" contracts in float64; "bfloat16" rounds features to bfloat16 and
                contracts in float32. The error of each is in docs/precision.md.

        Raises:
            TangentError: when the two features do not belong together, or memory would exceed the limit.
        """
        check_outputs("kernel", outputs)
        check_precision("kernel", precision)
        if precision == "bfloat16" and self.dtype != torch.bfloat16:
            rounded = [None if feats is None else feats.to(torch.bfloat16) for feats in (self, other)]
            assert rounded[0] is not None
            return rounded[0].kernel(rounded[1], outputs=outputs, by_block=by_block)  # type: ignore[call-overload, no-any-return]
        plan = self._plan(other, outputs, kernels=len(self.blocks) if by_block else 1, precision=precision)
        remedy = "use outputs='trace' or 'diagonal', tangent_kernel, or fewer samples"
        require_memory("kernel", plan.kernel_bytes, plan.limit, remedy=remedy)
        partner = self if other is None else other
        size = (self.n, partner.n, self.c)
        if by_block:
            kernels = {name: empty_kernel(*size, outputs, self._like, precision) for name in self.blocks}
        else:
            kernels = dict.fromkeys(self.blocks, empty_kernel(*size, outputs, self._like, precision))
        contract_blocks(
            self.blocks, partner.blocks, plan, kernels, outputs, symmetric=other is None, precision=precision
        )
        for kernel in {id(k): k for k in kernels.values()}.values():
            check_overflow(kernel, self.c if outputs == "full" else 1)
            if other is None:
                mirror(kernel)
        finished = {name: finish(kernel, *size, outputs) for name, kernel in kernels.items()}
        return finished if by_block else next(iter(finished.values()))

    def _plan(
        self, other: "TangentFeatures | None", outputs: Outputs, *, kernels: int, precision: Precision = "float32"
    ) -> KernelPlan:
        if other is not None:
            self.check_origin("kernel", other)
            self._check_partner(other)
        partner = self if other is None else other
        itemsize = working_dtype(self.dtype, precision).itemsize
        result = kernel_dtype(self.dtype, precision).itemsize
        count = self.n * partner.n * entries(outputs, self.c)
        limit = limit_for(self.limit, self.device)
        # If the kernel has another dtype than a block's share, the share is held beside it until it is added.
        kernel_bytes = kernels * count * result + (count * itemsize if result != itemsize else 0)
        budget = max(limit - kernel_bytes, itemsize)
        steps = tuple(
            plan_block(
                block, partner.blocks[name], self.n, partner.n, self.c, outputs,
                symmetric=other is None, budget=budget, itemsize=itemsize,
            )
            for name, block in self.blocks.items()
        )  # fmt: skip
        held = self.bytes + (0 if other is None else other.bytes)
        if itemsize > self.dtype.itemsize:
            # Blocks are converted one at a time.
            pairs = (
                (block.bytes, 0 if other is None else other.blocks[name].bytes) for name, block in self.blocks.items()
            )
            held += max(sum(pair) for pair in pairs) * itemsize // self.dtype.itemsize
        return KernelPlan(steps, kernel_bytes, held, limit)

    def check_matrices(
        self, call: str, matrices: Mapping[str, Tensor], what: str = "the coefficients are of", *, finite: bool = False
    ) -> None:
        """Raise TangentError unless there is one matrix for each block, of its shape.

        Args:
            call: the function whose name the error has.
            matrices: by name of the block.
            what: what the matrices are, for the message.
            finite: whether all numbers must be finite, too.
        """
        given, own = ({name: tuple(m.shape) for name, m in each.items()} for each in (matrices, self.blocks))
        if given != own:
            raise TangentError(
                f"{call}: {what} blocks {given}, these features have {own}; make the features with the same model, wrt and "
                "output_fn"
            )
        for name in matrices if finite else ():
            if not bool(matrices[name].isfinite().all()):
                raise TangentError(
                    f"{call}: {what} blocks that are not finite, such as {name!r}; give those of another fit"
                )

    def check_origin(self, call: str, other: "TangentFeatures") -> None:
        """Raise TangentError unless these features and others have one origin.

        Args:
            call: the name of the calling function, for the message.
            other: the features to compare with.
        """
        if self.origin != other.origin:
            raise TangentError(
                f"{call}: the features are {self.origin} and {other.origin}; make both exact, or both with the same sketch"
            )

    def _check(self, call: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape:
            raise TangentError(f"{call}: expected shape {shape}, got {tuple(value.shape)}")
        if value.dtype != self.dtype or value.device != self.device:
            raise TangentError(
                f"{call}: features are {self.dtype} on {self.device}, got {value.dtype} on {value.device}; "
                "convert one of them"
            )

    def _check_partner(self, other: "TangentFeatures") -> None:
        mine, theirs = ({name: b.shape for name, b in feats.blocks.items()} for feats in (self, other))
        if mine != theirs or self.c != other.c:
            raise TangentError(
                f"kernel: the two features differ: blocks {mine} with {self.c} outputs and {theirs} with {other.c}; "
                "make both from the same model, wrt and output_fn"
            )
        if (self.dtype, self.device) != (other.dtype, other.device):
            raise TangentError(
                f"kernel: features are {self.dtype} on {self.device} and {other.dtype} on {other.device}; "
                "convert one with .to, or make both with the same model and inputs"
            )


def check_features(call: str, given: object) -> None:
    """Raise TangentError unless features are given."""
    if not isinstance(given, TangentFeatures):
        raise TangentError(f"{call}: takes features, such as at.tangent_features(model, x), got {described(given)}")


def described(given: object) -> str:
    """The type of what was given, and its shape."""
    shape = getattr(given, "shape", None)
    return type(given).__name__ if shape is None else f"{type(given).__name__} of shape {tuple(shape)}"

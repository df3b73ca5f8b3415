"""The features that a stored kernel is made from, and the kernel of a tile: blocks contracted, then added in float64."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from glob import escape
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, cast_tensor, check_form, samples, take, tensors
from adaptive_tangents.capture.batches import cast as in_dtype
from adaptive_tangents.capture.belongings import copied
from adaptive_tangents.capture.capture import Capture
from adaptive_tangents.capture.lease import LOCK
from adaptive_tangents.capture.network import OutputFn, Selection, check_model, select
from adaptive_tangents.capture.state_names import Params
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.features.kernel_layout import Outputs, entries, working_dtype
from adaptive_tangents.features.summands import sum_tensors
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Transform
from adaptive_tangents.storage.planning import Sizes

_MEASURED = 16  # samples whose features are made to measure the memory of one
_FORMS = 8  # quadratic forms of a probe


@runtime_checkable
class Sketching(Protocol):
    """A way to make features smaller, such as `Sketch`."""

    def apply(self, feats: TangentFeatures) -> TangentFeatures:
        """The smaller features."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings; they are stored with the kernel."""
        ...


@dataclass(frozen=True)
class Stream:
    """Features of any range of samples of x and x₂ in the form that is contracted: adapted, sketched, in their dtype."""

    capture: Capture
    x: Batch
    x2: Batch | None
    outputs: Outputs
    by_block: bool
    cast: torch.dtype | None
    transforms: Mapping[str, Transform] | None
    sketch: Sketching | None

    @property
    def n(self) -> int:
        """Number of samples of the rows."""
        return samples(self.x)

    @property
    def m(self) -> int:
        """Number of samples of the columns."""
        return samples(self.x if self.x2 is None else self.x2)

    @property
    def c(self) -> int:
        """Number of outputs of the network."""
        return self.capture.probe.c

    def features(self, x: Batch, pass_samples: int | None = None) -> TangentFeatures:
        """The features of a batch, made ``pass_samples`` samples at a time."""
        feats = self.capture.features(x, pass_samples)
        feats = feats if self.transforms is None else feats.transformed(self.transforms)
        feats = feats if self.sketch is None else self.sketch.apply(feats)
        return feats if self.cast is None else feats.to(self.cast)

    def part(self, side: int, rows: slice, pass_samples: int) -> TangentFeatures:
        """The features of some samples of x (side 0) or of x₂ (side 1)."""
        batch = self.x2 if side else self.x
        assert batch is not None
        whole = rows == slice(0, self.m if side else self.n)
        return self.features(batch if whole else take(batch, rows), pass_samples)

    def probed(self) -> Float[Tensor, " k"]:
        """The kernel's trace for a few samples, each with itself: nearly the same for the same network on any machine.

        Then, unless outputs are summed over, rᵀKr for random r, as no rotation of the outputs changes a trace.
        """
        index = self.capture.probe.index
        feats = self.features(take(self.x, index.to(tensors(self.x)[0].device)), len(index))
        with raised_as(self.capture.call, "kernel"):
            traces = feats.kernel(outputs="trace").diagonal()
        if self.outputs == "trace" or self.c == 1:
            return traces
        drawn = torch.randn(_FORMS, feats.n, self.c, generator=torch.Generator().manual_seed(0), device="cpu").to(
            traces
        )
        blocks = [block.map(dtype=drawn.dtype) for block in feats.blocks.values()]
        forms = [sum_tensors([block.combine(r).square().sum() for block in blocks]) for r in drawn]
        return torch.cat([traces, torch.stack(forms).to(traces) / self.c])

    def some(self) -> TangentFeatures:
        """The features of a few samples, to estimate the cost of all of them."""
        most = max(1, self.capture.limit // 4 // self.capture.bytes_per_sample)
        return self.features(take(self.x, slice(0, min(_MEASURED, self.n, most))))

    def sizes(self, feats: TangentFeatures) -> Sizes:
        """The memory of one sample, measured on the features of a few."""
        probe = self.capture.probe
        # Without what all samples share, for example the directions of a transform.
        held = feats.bytes if feats.n == 1 else -(-(feats.bytes - feats[:1].bytes) // (feats.n - 1))
        made = 2 * probe.held_bytes() - probe.whole_bytes
        made += held if self.transforms is not None or self.sketch is not None or self.cast is not None else 0
        itemsize = torch.empty((), dtype=working_dtype(feats.dtype), device="cpu").element_size()
        # The gradients of all parameters, and the largest once more, as a block's matrix.
        gradients = [self.capture.network.parameters[name].nbytes for name in self.capture.network.selected]
        checking = sum(gradients) + max(gradients)
        needed = (max(1, held), made, probe.pass_bytes, checking, feats.bytes)
        return Sizes(self.n, self.m, self.x2 is None, *needed, entries(self.outputs, self.c), itemsize)


def stream(
    call: str, model: Any, x: Any, x2: Any, *, outputs: Outputs, params: Params | None,
    wrt: Selection | None, by_block: bool, output_fn: OutputFn | None, memory_limit: int | None, dtype: torch.dtype | None,
    transforms: Mapping[str, Transform] | None, sketch: Sketching | None,
) -> Stream:  # fmt: skip
    """The features of a kernel, after all checks.

    ``dtype`` is that of the network's evaluation; bfloat16 is that of its features only.
    """
    if dtype not in (None, torch.float64, torch.float32, torch.bfloat16):
        raise TangentError(f"{call}: dtype is torch.float64, torch.float32, torch.bfloat16 or None, got {dtype}")
    cast = torch.bfloat16 if dtype == torch.bfloat16 else None
    if dtype in (torch.float64, torch.float32):
        check_model(call, model)
        check_form(call, x)
        wrt = tuple(escape(name) for name in select(call, model, wrt))
        model, params = _module_in(call, model, dtype), in_dtype(params, dtype)
        x, x2 = in_dtype(x, dtype), in_dtype(x2, dtype)
    capture = Capture(call, model, x, params, wrt, output_fn, memory_limit)
    if x2 is not None:
        capture.check_more(x2)
    return Stream(capture, x, x2, outputs, by_block, cast, transforms, sketch)


def contracted(
    left: TangentFeatures, right: TangentFeatures | None, outputs: Outputs, working_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    """The kernel of every block, one after the other, with at most ``working_bytes`` beside each kernel."""
    m, c = (left if right is None else right).n, left.c
    itemsize = torch.empty((), dtype=working_dtype(left.dtype), device="cpu").element_size()
    limit = left.n * m * entries(outputs, c) * itemsize + working_bytes
    for name, block in left.blocks.items():
        one = replace(left, blocks={name: block}, limit=limit)
        other = None if right is None else replace(right, blocks={name: right.blocks[name]}, limit=limit)
        yield name, one.kernel(other, outputs=outputs)


def summed(kernels: Iterator[tuple[str, Tensor]]) -> Tensor:
    """The sum of the blocks' kernels, added in float64 and rounded once to their dtype."""
    _, first = next(kernels)
    total = first
    for k, (_, kernel) in enumerate(kernels):
        total = total.double() if k == 0 else total
        total += kernel
    return total.to(first.dtype)


def _module_in(call: str, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model in another dtype, or the model itself if it has that dtype."""
    if all(cast_tensor(t, dtype) is t for t in (*model.parameters(), *model.buffers())):
        return model
    try:
        with LOCK:
            made = copied(call, model)
        # Not .to(dtype), which drops imaginary parts.
        made._apply(lambda t: cast_tensor(t, dtype))  # type: ignore[no-untyped-call]
        return made
    except (RuntimeError, TypeError) as error:
        raise TangentError(
            f"{call}: the model cannot be copied in order to evaluate it in {dtype} ({error}); pass it in that dtype"
        ) from error

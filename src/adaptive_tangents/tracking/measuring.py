"""Numbers of a network at its present parameters: its kernel by groups of blocks, its outputs and targets."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from adaptive_tangents.capture.batches import Batch, mapped, samples, take
from adaptive_tangents.capture.network import OutputFn, Selection, network
from adaptive_tangents.checks import class_columns
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.kernels.tangent_kernel import tangent_kernel
from adaptive_tangents.loading.outputs import pick
from adaptive_tangents.measures.alignment import alignment, cka
from adaptive_tangents.runtime.chunks import ranges
from adaptive_tangents.tracking.layers import ALL, Groups, grouped
from adaptive_tangents.tracking.records import KernelNumbers

CALL = "Tracker.record"
_MOST_OUTPUTS, _DIRECTIONS = 10, 8  # all outputs up to the first, as many directions of more
_CHUNK = 64

Kernels = dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """A network at one step: outputs (n, c) and kernels (n, n) by group, "all" among them, in float64 on the CPU."""

    outputs: Float[Tensor, "n c"]
    kernels: Kernels = field(repr=False)
    names: tuple[str, ...] = field(repr=False)


def alike(seen: Seen, first: Float[Tensor, "n c"] | None) -> Seen:
    """What is seen; raises TangentError where the outputs of the first record were of another number."""
    before, now = (None if first is None else first.shape[1]), seen.outputs.shape[1]
    if now != before:
        raise TangentError(f"{CALL}: the network has {now} output(s), and had {before} at first; begin a new Tracker")
    return seen


@dataclass(frozen=True)
class Question:
    """What is measured: the parameters, the outputs and the groups."""

    wrt: Selection | None
    output_fn: OutputFn | None
    groups: Groups | None
    outputs: str | int
    seed: int
    memory_limit: int | None

    def see(self, model: nn.Module, x: Batch) -> Seen:
        """The outputs and kernels of samples at the model's present parameters."""
        x = _as_model(model, x)
        net = network(CALL, model, x, None, self.wrt, self._picked)
        parts = ranges(samples(x), _CHUNK)
        with torch.no_grad():
            outputs = net.lend(lambda: torch.cat([net(take(x, part), {}) for part in parts]))
        weights = self.directions(outputs.shape[1])
        with raised_as(CALL, "tangent_kernel", "kernel"):
            blocks = tangent_kernel(
                model, x, outputs="trace", wrt=self.wrt, by_block=True, output_fn=self._along(weights),
                memory_limit=self.memory_limit,
            )  # fmt: skip
        found = grouped(CALL, list(blocks), self.groups)
        kernels = {group: _total([blocks[name] for name in members]) for group, members in found.items()}
        return Seen(outputs.double().cpu(), {ALL: _total(list(kernels.values())), **kernels}, net.selected)

    def directions(self, c: int) -> Float[Tensor, "c k"] | None:
        """Random orthogonal directions of the outputs whose kernel is that of all outputs on average; None: all."""
        k = self.outputs if isinstance(self.outputs, int) else (c if self.outputs == "trace" else _directions(c))
        if k >= c:
            return None
        drawn = torch.randn(c, k, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64, device="cpu")
        directions: Tensor = torch.linalg.qr(drawn)[0] * math.sqrt(c / k)
        return directions

    def described(self, c: int) -> list[int]:
        """What makes kernels of c outputs comparable: c, how many directions they are of, and the seed that draws these."""
        weights = self.directions(c)
        return [c] if weights is None else [c, weights.shape[1], self.seed]

    def told(self, c: int) -> str:
        """A phrase on which outputs' kernel is measured."""
        weights = self.directions(c)
        if weights is not None:
            return (
                f"summed over {weights.shape[1]} random directions of the {c} outputs, an unbiased estimate of the sum over "
                "all"
            )
        return "exact, of the one output" if c == 1 else f"exact, summed over all {c} outputs"

    def _along(self, weights: Tensor | None) -> OutputFn:
        if weights is None:
            return self._picked

        def along(out: Any) -> Tensor:
            picked = self._picked(out)
            return picked @ weights.to(picked)

        return along

    def _picked(self, out: Any) -> Tensor:
        return pick(out, CALL) if self.output_fn is None else self.output_fn(out)


def _directions(c: int) -> int:
    return c if c <= _MOST_OUTPUTS else _DIRECTIONS


def _total(kernels: list[Tensor]) -> Float[Tensor, "n n"]:
    return torch.stack([kernel.detach().double().cpu() for kernel in kernels]).sum(0)


def _as_model(model: nn.Module, x: Batch) -> Batch:
    """A batch on the model's device, its floating numbers in the model's dtype if no parameter has theirs."""
    first = next((p for p in model.parameters()), None)
    if first is None:
        return x
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}

    def fitted(value: Tensor) -> Tensor:
        other = value.is_floating_point() and dtypes and value.dtype not in dtypes
        return value.to(first.device, next(iter(dtypes)) if other else value.dtype)

    batch: Batch = mapped(x, fitted)
    return batch


def kinds_of(y: Tensor | None) -> Int[Tensor, " k"] | None:
    """The class numbers that occur among all samples, sorted; None where there are none."""
    if y is None or y.is_floating_point() or y.is_complex() or y.numel() != len(y):
        return None
    kinds: Tensor = torch.unique(y.long())
    return kinds


def target_columns(y: Tensor | None, c: int, kinds: Int[Tensor, " k"] | None) -> Float[Tensor, "n c"] | None:
    """Labels as targets of c outputs: one-hot, −1 and 1 for two classes and one output, or real targets as they are."""
    if y is None:
        return None
    if y.is_floating_point() or y.is_complex():
        columns = class_columns("Tracker", y, c)
        columns = columns[:, None] if columns.ndim == 1 else columns
    elif c == 1 and kinds is not None and len(kinds) <= 2:
        columns = torch.where(_upper(y.reshape(-1), kinds), 1.0, -1.0).double()[:, None]
    elif c > 1 and kinds is not None and y.ndim == 1 and 0 <= int(kinds[0]) <= int(kinds[-1]) < c:
        columns = functional.one_hot(y.long(), c).double()
    else:
        if kinds is not None:  # few samples may lack the class that does not fit
            class_columns("Tracker", kinds.repeat(2), c)
        columns = class_columns("Tracker", y, c)
    if columns.ndim != 2 or columns.shape[1] != c:
        raise TangentError(
            f"Tracker: y has {columns[0].numel()} target(s) for each sample and the model {c} output(s); give class numbers "
            f"(n,), or real targets (n, {c})"
        )
    return columns


def kernel_numbers(
    kernel: Float[Tensor, "n n"],
    target: Tensor | None,
    change: Tensor | None,
    start: Tensor | None,
    last: Tensor | None,
) -> KernelNumbers:
    """The numbers of one kernel, beside targets, the change of outputs, and kernels of earlier records."""
    return KernelNumbers(
        trace=float(kernel.trace()),
        alignment=_defined(alignment, kernel, target),
        alignment_centered=_defined(alignment, kernel, target, centered=True),
        alignment_change=_defined(alignment, kernel, change),
        alignment_change_centered=_defined(alignment, kernel, change, centered=True),
        cka_start=_defined(cka, kernel, start),
        cka_last=_defined(cka, kernel, last),
    )


def _defined(measure: Callable[..., float], kernel: Tensor, other: Tensor | None, **options: bool) -> float | None:
    """The measure; None where there is nothing to measure with, or the angle is not defined."""
    if other is None:
        return None
    try:
        return measure(kernel, other, **options)
    except TangentError:
        return None


def loss_and_accuracy(
    outputs: Float[Tensor, "n c"], y: Tensor | None, kinds: Int[Tensor, " k"] | None
) -> tuple[float | None, float | None]:
    """Cross-entropy and accuracy for class numbers, of one output as a logit; the mean squared error for real targets."""
    if y is None:
        return None, None
    if y.is_floating_point():
        return float((outputs - y.double().reshape(outputs.shape)).square().mean()), None
    if kinds is None:
        return None, None
    classes = y.reshape(-1)
    if outputs.shape[1] > 1:
        right = (outputs.argmax(1) == classes.long()).double().mean()
        return float(functional.cross_entropy(outputs, classes.long())), float(right)
    upper = _upper(classes, kinds)
    right = ((outputs[:, 0] > 0) == upper).double().mean()
    return float(functional.binary_cross_entropy_with_logits(outputs[:, 0], upper.double())), float(right)


def _upper(classes: Tensor, kinds: Int[Tensor, " k"]) -> Tensor:
    """Which samples are of the upper one of two classes: 1 of 0 and 1, or of −1 and 1, else the larger number of all."""
    known = any(set(kinds.tolist()) <= pair for pair in ({0, 1}, {-1, 1}))
    return classes == 1 if known else classes.long() > kinds[0]


def numbers_by_group(
    seen: Seen, target: Tensor | None, change: Tensor | None, start: Mapping[str, Tensor], last: Mapping[str, Tensor]
) -> dict[str, KernelNumbers]:
    """The numbers of the whole ("all") and of each group."""
    return {
        group: kernel_numbers(kernel, target, change, start.get(group), last.get(group))
        for group, kernel in seen.kernels.items()
    }

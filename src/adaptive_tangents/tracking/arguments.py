"""What a tracker takes, checked: labels, options, numbers of the caller, and where numbers go."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from adaptive_tangents.capture.batches import Batch, samples, tensors
from adaptive_tangents.checks import as_tensor, check_finite, listed
from adaptive_tangents.errors import TangentError
from adaptive_tangents.tracking.records import NUMBERS

_OWN = frozenset({*NUMBERS, "group", "loss", "accuracy", "moved", "seconds", "note"})


@runtime_checkable
class Writer(Protocol):
    """A writer of scalars, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


Log = Writer | Callable[[dict[str, float], int], Any]
"""Where numbers go: a writer of scalars, or a function of the numbers by name and the step."""


def send(log: Log, scalars: Mapping[str, float], step: int) -> None:
    """Give numbers to a writer of scalars or to a function."""
    if isinstance(log, Writer):
        for name, value in scalars.items():
            log.add_scalar(name, value, step)
    else:
        log(dict(scalars), step)


def count_samples(call: str, x: Batch) -> int:
    """The number of samples of a batch; raises TangentError unless it is that of every tensor."""
    counts = {len(t) if t.ndim else 0 for t in tensors(x)}
    if len(counts) != 1 or 0 in counts:
        raise TangentError(f"{call}: every tensor of x has the samples first, got {sorted(counts)} of them")
    return samples(x)


def labels_of(call: str, y: Any, n: int) -> Tensor | None:
    """Labels or targets of n samples on the CPU."""
    if y is None:
        return None
    labels = as_tensor(call, "y", y, torch.device("cpu")).detach().cpu()
    labels = labels.long() if labels.dtype == torch.bool else labels
    if labels.ndim not in (1, 2) or len(labels) != n:
        raise TangentError(
            f"{call}: y has shape {tuple(labels.shape)} and x {n} samples; give class numbers ({n},), or real targets ({n},) "
            f"or ({n}, c)"
        )
    check_finite(call, "the target", [labels])
    return labels


def check_options(call: str, n: int, wanted: int | None, every: int, budget: float | None, outputs: str | int) -> None:
    """Raise TangentError for options out of their range."""
    if wanted is not None and not (_whole(wanted) and 1 <= wanted <= n):
        raise TangentError(
            f"{call}: samples is 1 to {n}, the samples of x, got {wanted}; or None to let the tracker choose"
        )
    if not _whole(every) or every < 1:
        raise TangentError(f"{call}: every is a positive number of calls, got {every}")
    if budget is not None and not 0 < budget < math.inf:
        raise TangentError(
            f"{call}: budget is a share of the time of training, such as 0.05, got {budget}; None takes every record"
        )
    known = outputs in ("auto", "trace") if isinstance(outputs, str) else _whole(outputs) and outputs >= 1
    if not known:
        raise TangentError(f"{call}: outputs is 'auto', 'trace' or a positive number of directions, got {outputs!r}")


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def step_of(call: str, step: object) -> int:
    """A step of training, a whole number in any type; raises TangentError for what is none, such as 1.5 epochs."""
    try:
        whole: int = int(step)  # type: ignore[call-overload]
        if whole != step:
            raise ValueError
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TangentError(
            f"{call}: step is a whole number, got {step!r}; give that of the optimizer's step"
        ) from error
    return whole


def check_values(call: str, names: Iterable[str]) -> None:
    """Raise TangentError if numbers of the caller have names of the record's own, which they would replace in tables."""
    taken = [name for name in names if name in _OWN]
    if taken:
        raise TangentError(
            f"{call}: {listed(taken)} is a column of the record's own, measured on the tracker's samples; give another name, "
            f"e.g. train_{taken[0]}"
        )


def number(call: str, name: str, value: object) -> float:
    """A number that the caller gave, such as a tensor of one entry."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TangentError(
            f"{call}: {name} is a number, got {type(value).__name__}; give one, e.g. loss.item()"
        ) from error


def check_outputs(call: str, what: str, recorded: Sequence[int] | None, now: Sequence[int]) -> None:
    """Raise TangentError if a curve is of kernels along other directions of the outputs, as ``Question.described`` says."""

    def told(described: Sequence[int]) -> str:
        c, *rest = described
        return (
            f"along {rest[0]} directions of {c} outputs that seed {rest[1]} draws" if rest else f"of all {c} output(s)"
        )

    if recorded is not None and list(recorded) != list(now):
        raise TangentError(
            f"{call}: {what} is of kernels {told(recorded)}, and this tracker's are {told(now)}; give the same outputs and "
            "seed, or start a new curve"
        )


def check_log(call: str, log: object) -> None:
    """Raise TangentError unless numbers can be given to ``log``, or it is None."""
    if log is not None and not isinstance(log, Writer) and not callable(log):
        raise TangentError(
            f"{call}: log is a writer with add_scalar, or a function of numbers and a step, got {type(log).__name__}"
        )

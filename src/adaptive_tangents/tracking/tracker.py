"""``Tracker``: what training does to a network's tangent kernel, recorded while it runs."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, check_form, take, tensors
from adaptive_tangents.capture.network import OutputFn, Selection
from adaptive_tangents.capture.refusals import check_is_module
from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError, TangentWarning
from adaptive_tangents.runtime.tensor_files import fingerprint
from adaptive_tangents.tracking.arguments import (
    Log,
    check_log,
    check_options,
    check_outputs,
    check_values,
    count_samples,
    labels_of,
    number,
    send,
    step_of,
)
from adaptive_tangents.tracking.budget import Budget, Cost
from adaptive_tangents.tracking.files import (
    FORMAT,
    KIND,
    check_state,
    history_of,
    read_state,
    tensors_under,
    write_state,
)
from adaptive_tangents.tracking.history import History
from adaptive_tangents.tracking.layers import ALL, Groups, check_groups
from adaptive_tangents.tracking.measuring import (
    CALL,
    Kernels,
    Question,
    Seen,
    alike,
    kinds_of,
    loss_and_accuracy,
    numbers_by_group,
    target_columns,
)
from adaptive_tangents.tracking.records import Record
from adaptive_tangents.tracking.untouched import device_of, in_evaluation, unwrapped, wait_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


_FEWEST, MOST_SAMPLES = 16, 128  # where the tracker chooses
_SECONDS = 0.25  # of a record, at most, where it chooses more than the fewest samples


class Tracker:
    """Records of the tangent kernel in the middle of any training: ``record(step)`` in the loop is all it needs.

    Training goes on bit for bit as without it: the network is measured in evaluation mode, exactly, on samples chosen at
    the first record, and left as found. Records are taken as often as a share of the time of training allows; nothing is
    measured before the first ``record``.

    Args:
        model: the network that is trained; wrappers of torch.compile and of data-parallel training are looked through.
        x: samples first, as the network takes them; moved to its device for every record.
        y: class numbers (n,), or real targets (n,) or (n, c), for alignment and loss; None leaves these out.
        samples: how many of x are measured, drawn by ``seed`` at the first record; None is up to 128 whose record takes
            a quarter of a second at most, and 16 at least. Give a number to have the same samples in every run.
        every: calls of ``record`` between two records at least.
        budget: seconds of all records over those of training, at most; the first and the last record are taken whatever
            they cost, and until all records took 3 seconds, some are taken whatever their share: at the calls 1, 2, 3, 4, 6,
            8, 12, 16, … of ``every``. None takes a record at every ``every``-th call.
        wrt: the parameters whose features are measured, as in ``tangent_kernel``; None is all that require a gradient.
        outputs: "trace" sums the kernel over all outputs, at a backward pass for each; a number sums over as many random
            directions of the outputs, whose kernel is the same on average; "auto" is "trace" for up to 10 outputs
            and 8 directions for more.
        output_fn: picks a tensor (n, c) from what the model returns; None takes the tensor or the logits.
        groups: patterns of block names by the name of a group; None groups blocks by layer, named as ``inspect`` does.
        seed: of samples and directions.
        log: where the numbers of each record go: a TensorBoard ``SummaryWriter``, or a function of the numbers by name
            and the step.
        memory_limit: bytes that a record may use; None is half of what is free.
        clock: gives seconds.

    Raises:
        TangentError: when an argument does not fit.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    >>> x, y = torch.randn(30, 4), torch.randint(3, (30,))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> tracker = Tracker(model, x, y, budget=None, every=5)
    >>> for step in range(11):
    ...     _ = tracker.record(step)
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    >>> [row["step"] for row in tracker.table()], list(tracker.records[0].groups)
    ([0, 5, 10], ['layer 0', 'layer 2'])
    """

    def __init__(
        self,
        model: nn.Module,
        x: Batch,
        y: Any = None,
        *,
        samples: int | None = None,
        every: int = 1,
        budget: float | None = 0.05,
        wrt: Selection | None = None,
        outputs: str | int = "auto",
        output_fn: OutputFn | None = None,
        groups: Groups | None = None,
        seed: int = 0,
        log: Log | None = None,
        memory_limit: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        call = "Tracker"
        self.model = unwrapped(model) if isinstance(model, nn.Module) else model
        check_is_module(call, self.model)
        check_form(call, x)
        n = count_samples(call, x)
        check_options(call, n, samples, every, budget, outputs)
        check_groups(call, groups)
        check_log(call, log)
        self._x, self._y = x, labels_of(call, y, n)
        self._kinds = kinds_of(self._y)
        self._n, self._samples, self._seed = n, samples, seed
        self._question = Question(wrt, output_fn, groups, outputs, seed, memory_limit)
        self._log = log
        self._budget = Budget(budget, every, clock)
        self._records: list[Record] = []
        self._index: Tensor | None = None
        self._start: Kernels = {}
        self._last: Kernels = {}
        self._first_outputs: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._step = 0
        self._recorded_at = -1

    # recording

    def record(self, step: int | None = None, **values: float | Tensor) -> Record | None:
        """A record of the network as it is, if one is due; call it at every step of training, or now and then.

        The first call always takes one. What cannot be measured later on, such as a network whose parameters are not finite,
        is a warning and a note in the record: training goes on.

        Args:
            step: of training; None is the number of calls before.
            values: numbers to keep in the record beside its own columns, such as ``lr=…``.

        Returns:
            The record, or None if none is due.

        Raises:
            TangentError: when the first record cannot be made, step is not whole, or a value no number or named as a column.
        """
        check_values(CALL, values)
        self._arrive(step)
        found = self._measure(values) if self._budget.due else None
        self._budget.calls += 1
        return found

    def close(self, step: int | None = None, **values: float | Tensor) -> Record | None:
        """The last record, whether due or not; None if the last call of ``record`` gave one. It may be called again.

        Args:
            step: of training; None is that of the last call of ``record``.
            values: numbers to keep in the record beside its own.
        """
        check_values(CALL, values)
        same = step is None or (self._records and step == self._records[-1].step)
        if self._recorded_at == self._budget.calls - 1 and self._records and same:
            return None
        self._arrive(self._step if step is None else step)
        found = self._measure(values)
        self._recorded_at = self._budget.calls - 1
        return found

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None and self._budget.calls:
            self.close()

    def _arrive(self, step: int | None) -> None:
        self._step = self._budget.calls if step is None else step_of(CALL, step)
        self._budget.tick()

    def _measure(self, values: Mapping[str, Any]) -> Record:
        wait_for(device_of(self.model))
        self._budget.tick()
        kept = {name: number(CALL, name, value) for name, value in values.items()}
        try:
            seen, last = self._seen()
        except (TangentError, torch.OutOfMemoryError) as error:
            if not self._records:
                raise
            record = self._unmeasured(error, kept)
        else:
            record = self._from(seen, kept)
            record = replace(record, seconds=self._budget.spent(last=last))
        self._records.append(record)
        self._recorded_at = self._budget.calls
        if self._log is not None:
            send(self._log, record.scalars(), record.step)
        return record

    def _seen(self) -> tuple[Seen, float | None]:
        """The network now; with the seconds of the last of several measurements, where samples are still to be chosen."""
        if self._index is not None:
            return alike(self._look(self._x), self._first_outputs), None
        fixed = self._budget.share is None or self._samples is not None
        size = min(self._n, (self._samples or MOST_SAMPLES) if fixed else _FEWEST)
        while True:
            before = self._budget.clock()
            index = self._drawn(size)
            seen = self._look(take(self._x, index))
            seconds = self._budget.clock() - before
            room = int(size * _SECONDS / max(seconds, 1e-9))
            larger = min(self._n, MOST_SAMPLES, _FEWEST * 2 ** max(0, int(math.log2(max(1, room // _FEWEST)))))
            if fixed or larger <= size:
                break
            size = larger
        self._begin(index, seen)
        return seen, seconds

    def _begin(self, index: Tensor, seen: Seen) -> None:
        """Keep the samples chosen, and what later records are compared with."""
        y = None if self._y is None else self._y[index]
        target_columns(y, seen.outputs.shape[1], self._kinds)  # raises before anything is kept
        self._index, self._x, self._y = index, take(self._x, index), y
        self._first_outputs = seen.outputs

    def _look(self, x: Batch) -> Seen:
        return in_evaluation(self.model, lambda: self._question.see(self.model, x))

    def _drawn(self, size: int) -> Tensor:
        if size == self._n:
            return torch.arange(self._n, device="cpu")
        drawn = torch.randperm(self._n, generator=torch.Generator().manual_seed(self._seed), device="cpu")
        return drawn[:size].sort().values

    def _from(self, seen: Seen, values: Mapping[str, float]) -> Record:
        first = self._first_outputs
        assert first is not None
        target = target_columns(self._y, seen.outputs.shape[1], self._kinds)
        change = seen.outputs - first
        moved = bool(change.any())
        for group, kernel in seen.kernels.items():
            self._start.setdefault(group, kernel)
        numbers = numbers_by_group(seen, target, change if moved else None, self._start, self._last)
        loss, accuracy = loss_and_accuracy(seen.outputs, self._y, self._kinds)
        note = _trained_anew(self._names, seen.names) if self._names else ""
        self._last, self._names = seen.kernels, seen.names
        return Record(
            step=self._step, whole=numbers.pop(ALL), groups=numbers, loss=loss, accuracy=accuracy,
            moved=float(change.square().mean().sqrt()), values=dict(values), note=note,
        )  # fmt: skip

    def _unmeasured(self, error: BaseException, values: Mapping[str, float]) -> Record:
        if not self._records[-1].note.startswith("not measured"):
            warnings.warn(
                f"{CALL}: step {self._step} is not measured: {error}; training goes on, and so do records",
                TangentWarning,
                stacklevel=5,
            )
        seconds = self._budget.spent()
        return Record(
            step=self._step, whole=None, groups={}, values=dict(values), seconds=seconds, note=f"not measured: {error}"
        )

    # what was recorded

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, in order of training."""
        return tuple(self._records)

    @property
    def step(self) -> int:
        """The step of the last call."""
        return self._step

    @property
    def cost(self) -> Cost:
        """Seconds of all records, and of training from the first record to the last call."""
        return Cost(self._budget.seconds, self._budget.training, len(self._records))

    @property
    def history(self) -> History:
        """The records until now with their cost, without the network."""
        return History(self.records, self._note, self.cost, self._budget.share)

    def table(self, *, groups: bool = False) -> list[dict[str, Any]]:
        """The records as rows, one a record; None where a number is not defined.

        Args:
            groups: adds a row for each group of blocks, and a column "group", which is "all" for the whole.
        """
        return self.history.table(groups=groups)

    def to_frame(self) -> "DataFrame":
        """The rows of ``table(groups=True)`` as a pandas DataFrame.

        Raises:
            TangentError: when pandas is not installed.
        """
        return self.history.to_frame()

    def plot(self) -> "Figure":
        """Alignment, CKA, trace and loss by step, and below them alignment, share of the trace and CKA of every group.

        Raises:
            TangentError: when matplotlib is not installed, or nothing was recorded.
        """
        return self.history.plot()

    def summary(self) -> str:
        """What is measured, the records, and what they took, as text to read."""
        return self.history.summary()

    def __repr__(self) -> str:
        return f"<Tracker of {type(self.model).__name__}: {self.history.told_cost()}>"

    @property
    def _note(self) -> str:
        if self._first_outputs is None or self._index is None:
            return "nothing was recorded yet"
        n, c = len(self._index), self._first_outputs.shape[1]
        of = "" if n == self._n else f" of {self._n}"
        return f"K of {n}{of} samples in evaluation mode, {self._question.told(c)}"

    # to go on later

    def state_dict(self) -> dict[str, Any]:
        """Everything that a tracker of the same samples needs to go on: records, K₀, the last K, the samples chosen, costs.

        It holds numbers, strings and tensors only, so that ``torch.load(weights_only=True)`` reads it in a checkpoint.
        """
        budget = self._budget
        held = {f"start/{name}": kernel for name, kernel in self._start.items()}
        held |= {f"last/{name}": kernel for name, kernel in self._last.items()}
        if self._index is not None and self._first_outputs is not None:
            held |= {"index": self._index, "outputs": self._first_outputs}
        numbers = {
            "kind": KIND, "format": FORMAT, "records": [asdict(record) for record in self._records], "note": self._note,
            "budget": budget.share, "calls": budget.calls, "seconds": budget.seconds, "training": budget.training,
            "recent": list(budget.recent), "names": list(self._names), "step": self._step, "all": self._n,
            "samples": None if self._index is None else self._identity(), "recorded_at": self._recorded_at,
            "outputs": None if self._first_outputs is None else self._question.described(self._first_outputs.shape[1]),
        }  # fmt: skip
        return {"numbers": numbers, "tensors": {name: tensor.clone() for name, tensor in held.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the records of an earlier tracker, before the first record of this one.

        Args:
            state: what ``state_dict`` gave.

        Raises:
            TangentError: when this is no such state, it is of other samples, or this tracker has records.
        """
        self._resume(state, "Tracker.load_state_dict", "the state")

    def save(self, path: str | Path) -> None:
        """Write the state as a safetensors file; ``load`` goes on with it, ``at.tracking.load_history`` reads the records.

        Args:
            path: of the file.

        Raises:
            TangentError: when it cannot be written.
        """
        write_state(Path(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """Go on with the records of a file that ``save`` wrote, before the first record of this tracker.

        Args:
            path: of the file.

        Raises:
            TangentError: when the file cannot be read, it is of other samples, or this tracker has records.
        """
        self._resume(read_state(Path(path), "Tracker.load"), "Tracker.load", str(path))

    def _resume(self, state: Mapping[str, Any], call: str, what: str) -> None:
        check_state(state, call, what)
        if self._records:
            raise TangentError(f"{call}: this tracker has {len(self._records)} records; load into a new one")
        history, numbers = history_of(state, call, what), state["numbers"]
        if not history.records:
            return
        try:
            index, outputs = state["tensors"]["index"], state["tensors"]["outputs"]
            fits = numbers["all"] == self._n
            x, y = (take(self._x, index), None if self._y is None else self._y[index]) if fits else (self._x, self._y)
            self._check_same(call, what, numbers, x, y, fits)
            check_outputs(call, what, numbers.get("outputs"), self._question.described(outputs.shape[1]))
            budget = self._budget
            budget.calls, budget.recent = numbers["calls"], list(numbers["recent"])
            budget.seconds, budget.training = numbers["seconds"], numbers["training"]
            self._step, self._recorded_at = numbers["step"], numbers["recorded_at"]
            self._names = tuple(numbers["names"])
        except (KeyError, IndexError) as error:
            raise TangentError(f"{call}: {what} is damaged ({error}); give what Tracker.save wrote") from error
        self._records, self._index, self._x, self._y = list(history.records), index, x, y
        self._first_outputs = outputs
        self._start, self._last = tensors_under(state, "start/"), tensors_under(state, "last/")
        self._budget.tick()

    def _check_same(
        self, call: str, what: str, numbers: Mapping[str, Any], x: Batch, y: Tensor | None, fits: bool
    ) -> None:
        if not fits or _identity(x, y) != numbers["samples"]:
            raise TangentError(
                f"{call}: {what} was recorded on other samples or labels ({numbers['all']} in all, here {self._n}); give the "
                "same x and y, or start a new curve"
            )

    def _identity(self) -> str:
        return _identity(self._x, self._y)


def _identity(x: Batch, y: Tensor | None) -> str:
    return fingerprint([*tensors(x), *([] if y is None else [y])])


def _trained_anew(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    """What changed in the set of parameters that are measured; empty if nothing did."""
    more = [name for name in now if name not in set(before)]
    fewer = [name for name in before if name not in set(now)]
    said = [f"{len(more)} more parameters require a gradient ({listed(more, most=4)})"] if more else []
    said += [f"{len(fewer)} no longer require a gradient ({listed(fewer, most=4)})"] if fewer else []
    return f"since the last record {' and '.join(said)}, so K is of other parameters from here on" if said else ""

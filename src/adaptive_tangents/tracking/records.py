"""What one record says: numbers of the kernel, of the whole network and of each group of blocks."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KernelNumbers:
    """Numbers of one kernel, of all blocks or of a group; None where a number is not defined.

    Attributes:
        trace: tr K of the samples, summed over outputs.
        alignment: the cosine of K with the labels' kernel.
        alignment_centered: the same with both centered over samples.
        alignment_change: the cosine of K with the kernel of f − f₀, the network's change since the first record.
        alignment_change_centered: the same with both centered over samples.
        cka_start: CKA of K with K of the first record: 1 if the kernel has not turned.
        cka_last: CKA of K with K of the record before.
    """

    trace: float
    alignment: float | None = None
    alignment_centered: float | None = None
    alignment_change: float | None = None
    alignment_change_centered: float | None = None
    cka_start: float | None = None
    cka_last: float | None = None


NUMBERS = tuple(each.name for each in fields(KernelNumbers))


@dataclass(frozen=True, kw_only=True)
class Record:
    """The network at one step of training, measured on the tracker's samples.

    Attributes:
        step: of training, as ``record`` was told, or the number of its calls before.
        whole: of the kernel of all blocks; None if it could not be measured, and ``note`` says why.
        groups: of the kernel of each group of blocks; they add up to the whole.
        loss: on the samples: cross-entropy for class numbers, the mean squared error for real targets; None without labels.
        accuracy: the share of the samples whose class is right; None without class numbers.
        moved: the root mean square of f − f₀ over samples and outputs.
        values: what the caller gave to ``record`` by name.
        seconds: that the record took.
        note: what a reader must know of this record, such as parameters that require a gradient only now; else empty.
    """

    step: int
    whole: KernelNumbers | None
    groups: Mapping[str, KernelNumbers] = field(repr=False)
    loss: float | None = None
    accuracy: float | None = None
    moved: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""

    def scalars(self, prefix: str = "tangents", *, groups: bool = True) -> dict[str, float]:
        """The numbers by name, for a logger, with dots for spaces; those that are not defined are left out.

        Args:
            prefix: of every name.
            groups: whether numbers of groups are among them.

        >>> Record(step=0, whole=KernelNumbers(trace=2.0), groups={"head": KernelNumbers(trace=1.0)}).scalars()
        {'tangents/trace': 2.0, 'tangents/head/trace': 1.0}
        """
        found = {f"{prefix}/{name}": value for name, value in self._defined()}
        for group, numbers in self.groups.items() if groups else ():
            tag = group.replace(" ", ".")  # loggers take no spaces
            found |= {f"{prefix}/{tag}/{name}": value for name, value in defined_numbers(numbers)}
        return found

    def rows(self, *, groups: bool = False) -> Iterator[dict[str, Any]]:
        """The record as rows: one of the whole, and one of each group.

        Args:
            groups: whether there are rows of groups, and a column "group".
        """
        shared = {"step": self.step, "loss": self.loss, "accuracy": self.accuracy, "moved": self.moved}
        rest = {**self.values, "seconds": self.seconds, "note": self.note}
        whole = dict.fromkeys(NUMBERS) if self.whole is None else asdict(self.whole)
        yield {"step": self.step, **({"group": "all"} if groups else {}), **whole, **shared, **rest}
        for group, numbers in self.groups.items() if groups else ():
            yield {"step": self.step, "group": group, **asdict(numbers), **shared, **rest}

    def _defined(self) -> Iterator[tuple[str, float]]:
        if self.whole is not None:
            yield from defined_numbers(self.whole)
        for name in ("loss", "accuracy", "moved"):
            value = getattr(self, name)
            if value is not None:
                yield name, value


def defined_numbers(numbers: KernelNumbers) -> Iterator[tuple[str, float]]:
    """Names and values of the numbers that are defined."""
    yield from ((name, value) for name, value in asdict(numbers).items() if value is not None)


def record_of(row: Mapping[str, Any]) -> Record:
    """A record from what ``asdict`` made of it."""
    whole = row["whole"]
    return Record(
        **{
            **row,
            "whole": None if whole is None else KernelNumbers(**whole),
            "groups": {group: KernelNumbers(**numbers) for group, numbers in row["groups"].items()},
        }
    )

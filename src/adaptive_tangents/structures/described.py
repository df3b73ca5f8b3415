"""Records with a structure on disk, and the structure that stands for one that no file describes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.transforms import (
    Entrywise,
    Joint,
    LowRank,
    Matrix,
    Modal,
    Scaled,
    Sides,
    Update,
)
from adaptive_tangents.penalties.closed_forms import Absolute, Composition, LogSquared, NoAdaptation, Power, Quadratic
from adaptive_tangents.runtime.records import NotKept, read_record, write_record
from adaptive_tangents.structures.base import Fixed, Full, Matrices, Solution, Structure
from adaptive_tangents.structures.grouped import Columns, Diagonal, LayerScale, Rows
from adaptive_tangents.structures.mixed import Mixed
from adaptive_tangents.structures.modes import Modes
from adaptive_tangents.structures.spectral import Left, Right, TwoSided


@dataclass(frozen=True)
class Named(Structure):
    """A structure of which only the name is known; every method raises TangentError.

    Args:
        name: how the structure prints itself.
    """

    name: str

    def __repr__(self) -> str:
        return self.name

    def solution(self, coefficients: Matrices) -> Solution:
        raise self._unknown("solution")

    def dual(self, matrices: Matrices) -> float:
        raise self._unknown("dual")

    def with_scales(self, scales: Mapping[str, float]) -> Structure:
        raise self._unknown("with_scales")

    def _unknown(self, call: str) -> TangentError:
        return TangentError(
            f"{call}: of {self.name} only the name was kept, because its penalty is a function; make the structure again"
        )


_PENALTIES = (Quadratic, Absolute, Power, LogSquared, NoAdaptation, Composition)
_STRUCTURES = (Fixed, Full, LayerScale, Rows, Columns, Diagonal, Left, Right, TwoSided, Modes, Mixed, Named)
_TRANSFORMS = (Sides, Entrywise, Joint, LowRank, Scaled, Matrix, Update, Modal)
_KINDS: tuple[type, ...] = (*_PENALTIES, *_STRUCTURES, *_TRANSFORMS)


def write_with_structure(
    path: Path, what: str, record: Any, kinds: tuple[type, ...], *, without_structure: bool
) -> None:
    """Write a record that has a ``structure``; raises TangentError where it cannot be described or written."""
    record = replace(record, structure=Named(repr(record.structure))) if without_structure else record
    try:
        write_record(path, what, record, (*kinds, *_KINDS))
    except NotKept as error:
        raise TangentError(
            f"save: {error}, and a file describes only the library's own structures and penalties; "
            "save(path, without_structure=True) keeps all else, and the structure's name"
        ) from error
    except OSError as error:
        raise TangentError(f"save: {path} cannot be written ({error}); give another path") from error


def read_with_structure(
    call: str, path: Path, what: str, wanted: tuple[type, ...], others: tuple[type, ...], writer: str
) -> Any:
    """The record of a file, an instance of one of ``wanted``; raises TangentError if it is none."""
    found = read_record(call, path, what, (*wanted, *others, *_KINDS), writer)
    if not isinstance(found, wanted):
        raise TangentError(f"{call}: {path} holds a {type(found).__name__}; give a file that {writer} wrote")
    return found

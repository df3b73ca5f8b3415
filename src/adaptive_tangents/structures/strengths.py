"""The strength of a structure's penalties, changed by one factor for all of them."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from adaptive_tangents.errors import TangentError
from adaptive_tangents.penalties.closed_forms import Composition, NoAdaptation, Penalty
from adaptive_tangents.structures.base import Structure


def strengthened(structure: Structure, factor: float) -> Structure:
    """The structure with the strength λ of every penalty times a factor.

    Args:
        structure: any structure whose penalties are among its fields.
        factor: what to multiply every λ by, positive.

    Raises:
        TangentError: for a structure that is no dataclass.

    >>> from adaptive_tangents.penalties import Quadratic
    >>> from adaptive_tangents.structures import Left
    >>> strengthened(Left(Quadratic(2.0)), 3.0)
    Left(penalty_on_transform=Quadratic(strength=6.0))
    """
    if not is_dataclass(structure):
        raise TangentError(
            f"strength: {type(structure).__name__} is no dataclass, so its penalties are not known; write it as a frozen "
            "dataclass, or leave strength=1.0"
        )
    moved = {f.name: _stronger(getattr(structure, f.name), factor) for f in fields(structure) if f.init}
    changed = {name: value for name, value in moved.items() if value is not getattr(structure, name)}
    return replace(structure, **changed)


def has_strength(structure: Structure) -> bool:
    """Whether a structure has penalties with a strength: ``Fixed`` has none."""
    return is_dataclass(structure) and any(_holds(getattr(structure, f.name)) for f in fields(structure))


def _holds(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if isinstance(value, Structure):
        return has_strength(value)
    return isinstance(value, Penalty) and not isinstance(value, NoAdaptation)


def _stronger(value: Any, factor: float) -> Any:
    if isinstance(value, Structure):
        return strengthened(value, factor)
    if isinstance(value, Penalty):
        return _stronger_penalty(value, factor)
    if isinstance(value, Mapping) and any(isinstance(held, Penalty | Structure) for held in value.values()):
        return {key: _stronger(held, factor) for key, held in value.items()}
    return value


def _stronger_penalty(penalty: Penalty, factor: float) -> Penalty:
    if isinstance(penalty, NoAdaptation):
        return penalty
    if isinstance(penalty, Composition):
        return Composition([_stronger_penalty(part, factor) for part in penalty.parts])
    if is_dataclass(penalty):
        return replace(penalty, strength=factor * penalty.strength)
    return Penalty(penalty.function, strength=factor * penalty.strength, derivative=penalty.derivative)

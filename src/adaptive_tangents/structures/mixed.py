"""Structures by pattern of block names: different transforms or strengths for different blocks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.structures.base import Matrices, Solution, Structure, check_structure, joined_solution

_REST = "*"


@dataclass(frozen=True)
class Mixed(Structure):
    r"""A structure for each group of blocks, by patterns on their names: Ω̃(β) = Σ over groups of that group's Ω̃.

    Functions with an argument ``structure`` also take the mapping itself. ``Full`` is one transform of its group's blocks.

    Args:
        structures: maps patterns of block names, with the wildcards of file names, to structures. "*" is the rest: any other
            pattern comes before it.

    Raises:
        TangentError: once block names are known, when a pattern matches no block, or a block matches no pattern or two.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> feats = at.tangent_features(model, torch.randn(10, 4))
    >>> found = at.fit(feats, torch.randn(10), structure={"2": at.Fixed(), "*": at.TwoSided(at.Quadratic(0.1))})
    >>> found.transforms["2"]
    Sides(left=None, right=None, scale=1.0)
    """

    structures: Mapping[str, Structure]

    def __post_init__(self) -> None:
        wrong = [key for key, value in self.structures.items() if not isinstance(value, Structure)]
        if wrong or not self.structures:
            raise TangentError(
                f"Mixed: give structures by pattern, such as {{'conv*': Modes(), '*': Fixed()}}; got "
                f"{'none' if not wrong else f'{self.structures[wrong[0]]!r} for {wrong[0]!r}'}"
            )

    @property
    def whole_blocks(self) -> bool:
        return all(structure.whole_blocks for structure in self.structures.values())

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The blocks that each pattern matches; "*" is absent if it matches none.

        Args:
            names: names of all blocks.

        Raises:
            TangentError: when a pattern matches no block, or a block matches no pattern or two.
        """
        names = list(names)
        patterns = [pattern for pattern in self.structures if pattern != _REST]
        found: dict[str, list[str]] = {pattern: [] for pattern in patterns}
        rest: list[str] = []
        for name in names:
            matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
            if len(matching) > 1:
                raise TangentError(
                    f"Mixed: block {name!r} is matched by {matching[0]!r} and by {matching[1]!r}; make the patterns "
                    "exclude each other (only '*' may overlap others)"
                )
            (found[matching[0]] if matching else rest).append(name)
        empty = [pattern for pattern, held in found.items() if not held]
        if empty:
            raise TangentError(f"Mixed: {empty[0]!r} matches no block; blocks are {', '.join(names)}")
        if rest and _REST not in self.structures:
            raise TangentError(
                f"Mixed: no pattern matches block {rest[0]!r}; add '*', such as '*': Fixed() to leave the rest unchanged"
            )
        return {**found, _REST: rest} if rest else found

    def of_blocks(self, names: Iterable[str]) -> dict[str, Structure]:
        """The structure of every block.

        Args:
            names: names of all blocks.
        """
        groups = self.groups(names)
        return {name: self.structures[pattern] for pattern, held in groups.items() for name in held}

    def prepared(self, feats: TangentFeatures) -> "Mixed":
        groups = self.groups(feats.blocks)
        made = {pattern: self.structures[pattern].prepared(_only(feats, names)) for pattern, names in groups.items()}
        return Mixed({**self.structures, **made})

    def norms_of(self, names: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
        if not names:
            return {}
        found: dict[str, tuple[str, ...]] = {}
        for pattern, held in self.groups(names).items():
            part = self.structures[pattern].norms_of(held)
            if part is None:
                return None
            found |= part
        return found

    def with_scales(self, scales: Mapping[str, float]) -> "Mixed":
        return Mixed({pattern: structure.with_scales(scales) for pattern, structure in self.structures.items()})

    def rotates(self, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
        return {name: structure.rotates([name])[name] for name, structure in self.of_blocks(names).items()}

    def solution(self, coefficients: Matrices) -> Solution:
        parts = [
            self.structures[pattern].solution({name: coefficients[name] for name in names})
            for pattern, names in self.groups(coefficients).items()
        ]
        return joined_solution(parts)

    def dual(self, matrices: Matrices) -> float:
        return sum(
            self.structures[pattern].dual({name: matrices[name] for name in names})
            for pattern, names in self.groups(matrices).items()
        )

    def proximal(self, coefficients: Matrices, step: float) -> dict[str, Tensor]:
        parts = [
            self.structures[pattern].proximal({name: coefficients[name] for name in names}, step)
            for pattern, names in self.groups(coefficients).items()
        ]
        return {name: matrix for part in parts for name, matrix in part.items()}


def as_structure(call: str, given: object) -> Structure:
    """The structure given, or ``Mixed`` of a mapping by pattern; raises TangentError for anything else."""
    if not isinstance(given, Mapping):
        return check_structure(call, given)
    return Mixed({pattern: check_structure(call, value, f"{pattern!r}: ") for pattern, value in given.items()})


def _only(feats: TangentFeatures, names: list[str]) -> TangentFeatures:
    """The features of some of the blocks."""
    blocks = {name: feats.blocks[name] for name in names}
    kept = {slot.parameter for block in blocks.values() for slot in block.slots}
    return replace(feats, blocks=blocks, parameters={k: v for k, v in feats.parameters.items() if k in kept})

"""Where the n samples are in a tensor inside the network: in its first or second dimension."""

from typing import Literal

from torch import Tensor

from adaptive_tangents.features.summands import Dense, Lookup, Outer

SampleLayout = Literal["first", "second", "last"]
"""Where samples are: "first" dimension, alone or as its outer index; "second" dimension; "last": inner index of the first."""


def layouts(shape: tuple[int, ...], n: int) -> tuple[SampleLayout, ...]:
    """The possible layouts of n samples in a tensor, likeliest first."""
    first = bool(shape) and shape[0] > 0 and shape[0] % n == 0
    second = n > 1 and len(shape) > 1 and shape[1] == n
    ways: list[SampleLayout] = ["first"] if first and (shape[0] == n or not second) else []
    ways += ["second"] if second else []
    ways += ["first"] if first and "first" not in ways else []
    return (*ways, "last") if first and n > 1 and shape[0] != n else tuple(ways)


def arranged(tensor: Tensor, way: SampleLayout, n: int, *, lead: int = 0) -> Tensor:
    """The tensor with the samples as outer index of dimension ``lead``; what belongs to a sample follows it."""
    if way == "second":
        return tensor.transpose(lead, lead + 1)
    if way == "last":
        before, rest = tensor.shape[:lead], tensor.shape[lead + 1 :]
        return tensor.reshape(*before, -1, n, *rest).transpose(lead, lead + 1).reshape(*before, -1, *rest)
    return tensor


def gathered(part: Outer | Lookup | Dense, n: int) -> Outer | Lookup | Dense:
    """Features of n·k rows as features of n samples: a sample's k rows become its positions."""
    if isinstance(part, Dense):
        return part if len(part.values) == n else Dense(part.values.reshape(n, -1, *part.values.shape[1:]).sum(1))
    if len(part.backward) == n:
        return part
    return type(part)(**{
        name: tensor if name == "directions" else tensor.reshape(n, len(tensor) // n * tensor.shape[1], *tensor.shape[2:])
        for name, tensor in vars(part).items()
    })  # fmt: skip

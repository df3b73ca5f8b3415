"""Checks of a penalty: its strength λ is usable, and its function is an ω."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError

Function = Callable[[Tensor], Tensor]


def check_strength(name: str, strength: float) -> None:
    """Raise TangentError unless λ is positive and finite."""
    if not 0 < strength < float("inf"):
        raise TangentError(
            f"{name}: the strength λ is positive and finite, got {strength}; use Fixed() for no adaptation"
        )


def check_function(function: Any, derivative: Function | None) -> None:
    """Raise TangentError unless a function is an ω on test points z from 1 to 1e150, and the derivative is its own."""
    near, far = (
        torch.logspace(-9, 1, 301, dtype=torch.float64, device="cpu"),
        torch.logspace(1.05, 150, 300, dtype=torch.float64, device="cpu"),
    )
    z = torch.cat([near.new_ones(1), 1 + near, far])
    values = _called("the function", function, z)
    if bool((~(values > -torch.inf)).any()):
        where = ~(values > -torch.inf)
        raise TangentError(
            f"Penalty: ω(z) is {float(values[where][0])} at z = {_first(z, where)}; it is finite or +inf"
        )
    if abs(float(values[0])) > 1e-12:
        raise TangentError(
            f"Penalty: ω(1) is {float(values[0]):.6g} and must be 0, for no adaptation costs nothing; "
            "subtract the value at 1"
        )
    falls = values.diff() < -1e-12 * (1 + values[:-1].abs())
    if bool(falls.any()):
        raise TangentError(
            f"Penalty: ω decreases between z = {_first(z[:-1], falls)} and {_first(z[1:], falls)}; "
            "ω must not decrease: a transform further from the identity cannot cost less"
        )
    middle, last = float(values[450]), float(values[-1])
    if last <= middle < float("inf"):
        raise TangentError(
            f"Penalty: ω stops growing at {last:.6g}: transforms of any size would cost no more, so no best one exists; "
            "give an ω that grows without bound"
        )
    slopes = _slopes(function, derivative, z)
    wrong = torch.isnan(slopes) & values.isfinite()
    if bool(wrong.any()):
        raise TangentError(f"Penalty: ω′ is nan at z = {_first(z, wrong)}; give derivative=")
    _check_slopes(function, slopes, z, values, "autograd gives" if derivative is None else "the given derivative is")


def _check_slopes(function: Function, slopes: Tensor, z: Tensor, values: Tensor, source: str) -> None:
    """Compare slopes with central differences; a few points near a kink or a jump may differ."""
    inner = (z > 1.001) & (z < 1e6) & values.isfinite()
    at, step = z[inner], 1e-5 * z[inner]
    secant = (function(at + step) - function(at - step)) / (2 * step)
    scale = values[inner] / at + secant.abs() + 1e-300
    off = ((secant - slopes[inner]).abs() > 1e-3 * scale) & secant.isfinite()
    if int(off.sum()) > 0.1 * len(at):
        place = int(off.nonzero()[0])
        raise TangentError(
            f"Penalty: at z = {float(at[place]):.4g} {source} {float(slopes[inner][place]):.6g} where ω rises at "
            f"{float(secant[place]):.6g}; write ω in torch operations, or give its derivative="
        )


def _slopes(function: Function, derivative: Function | None, z: Tensor) -> Tensor:
    if derivative is not None:
        return _called("the derivative", derivative, z)
    with torch.enable_grad():
        at = z.clone().requires_grad_()
        total = function(at)
        if not total.requires_grad:
            return torch.zeros_like(z)
        return torch.autograd.grad(torch.where(total.isfinite(), total, 0.0).sum(), at)[0]


def _called(name: str, function: Any, z: Tensor) -> Tensor:
    """The function at z, after checking that it acts element by element."""
    remedy = "it takes a tensor of any shape and gives one of that shape, element by element"
    if not callable(function):
        raise TangentError(f"Penalty: {name} is a {type(function).__name__}, not a function; {remedy}")
    try:
        values = function(z.clone())
        square = function(z[:600].clone().reshape(20, 30).flip(0))
    except Exception as error:
        raise TangentError(f"Penalty: {name} raised {type(error).__name__} ({error}); {remedy}") from error
    for found, given in ((values, z.shape), (square, (20, 30))):
        if not isinstance(found, Tensor) or found.shape != given:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise TangentError(f"Penalty: {name} of a tensor of shape {tuple(given)} gives {got}; {remedy}")
    again = square.detach().flip(0).flatten()
    if not torch.allclose(again.nan_to_num(), values.detach()[:600].nan_to_num(), rtol=1e-9, atol=1e-12):
        raise TangentError(f"Penalty: {name} at a z depends on the other entries of the tensor; {remedy}")
    return torch.Tensor.double(values.detach())


def _first(z: Tensor, where: Tensor) -> str:
    return f"{float(z[where][0]):.6g}"

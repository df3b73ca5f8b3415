"""Penalties against numeric minimisation of their definitions (theory §2)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
import theory_reference as reference

CLOSED: dict[str, Callable[[float], at.Penalty]] = {
    "quadratic": at.Quadratic,
    "absolute": at.Absolute,
    "quadratic with itself": lambda s: at.Quadratic(s).compose(at.Quadratic(s)),
    "absolute with itself": lambda s: at.Absolute(s).compose(at.Absolute(s)),
}
OMEGA: dict[str, Callable[[float], reference.Omega]] = {
    "quadratic": reference.quadratic,
    "absolute": reference.absolute,
    "quadratic with itself": lambda s: reference.composed(reference.quadratic(s), reference.quadratic(s)),
    "absolute with itself": lambda s: reference.composed(reference.absolute(s), reference.absolute(s)),
}
MIXED = {
    "quadratic and absolute": (at.Quadratic(0.3), at.Absolute(2.0), reference.quadratic(0.3), reference.absolute(2.0)),
    "very unequal": (at.Quadratic(1e-4), at.Quadratic(1e4), reference.quadratic(1e-4), reference.quadratic(1e4)),
    "unequal absolute": (at.Absolute(0.1), at.Absolute(50.0), reference.absolute(0.1), reference.absolute(50.0)),
}
VALUES = [10.0**k for k in range(-12, 13)]
strengths = st.floats(-6, 6).map(lambda x: 10.0**x)
magnitudes = st.floats(-12, 12).map(lambda x: 10.0**x)


def scalar(x: float, *, grad: bool = False) -> Tensor:
    return torch.tensor([x], dtype=torch.float64, requires_grad=grad)


def zs() -> Tensor:
    return 1 + torch.logspace(-6, 8, 15, dtype=torch.float64)


@pytest.mark.parametrize("name", ["quadratic", "absolute"])
@settings(max_examples=40)
@given(strength=strengths, v=magnitudes)
def test_induced_penalty_is_the_minimum_over_z(name: str, strength: float, v: float) -> None:
    induced = CLOSED[name](strength).induced()
    value, z = reference.induced(OMEGA[name](strength), v)
    assert float(induced.value(scalar(v))) == pytest.approx(value, rel=1e-12)
    assert float(induced.minimizer(scalar(v))) == pytest.approx(z, rel=1e-6)  # golden section sees z to √eps only


@pytest.mark.parametrize("v", VALUES)
@pytest.mark.parametrize("name", ["quadratic with itself", "absolute with itself"])
def test_induced_penalty_of_two_equal_sides_is_the_minimum_over_both(name: str, v: float) -> None:
    one = OMEGA[name.split()[0]](0.7)
    expected = reference.induced_by_two(one, one, v)
    assert float(CLOSED[name](0.7).induced().value(scalar(v))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("v", VALUES[::3])
@pytest.mark.parametrize("name", MIXED)
def test_induced_penalty_of_two_different_sides_is_the_minimum_over_both(name: str, v: float) -> None:
    first, second, one, other = MIXED[name]
    expected = reference.induced_by_two(one, other, v)
    assert float(first.compose(second).induced().value(scalar(v))) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("z", [1.0, 1 + 1e-9, 1.5, 4.0, 1e3, 1e9])
@pytest.mark.parametrize("name", MIXED)
def test_composition_is_the_least_that_two_factors_of_z_pay(name: str, z: float) -> None:
    first, second, one, other = MIXED[name]
    expected = float(reference.composed(one, other)(np.array([z - 1]))[0])
    assert float(first.compose(second).value(scalar(z))) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert float(second.compose(first).value(scalar(z))) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("sides", [2, 3, 5])
@pytest.mark.parametrize("penalty", [at.Quadratic(0.4), at.Absolute(3.0)])
def test_equal_penalties_share_a_value_evenly(penalty: at.Penalty, sides: int) -> None:
    whole: at.Penalty = penalty
    for _ in range(sides - 1):
        whole = whole.compose(penalty)
    z = zs()
    torch.testing.assert_close(whole.value(z), sides * penalty.value(z ** (1 / sides)), rtol=1e-8, atol=1e-16)


def test_composition_does_not_depend_on_grouping() -> None:
    a, b, c = at.Quadratic(0.1), at.Absolute(2.0), at.Quadratic(30.0)
    z, v = zs(), torch.logspace(-12, 12, 25, dtype=torch.float64)
    grouped = [a.compose(b).compose(c), a.compose(b.compose(c)), at.Composition((c, at.Composition((a, b))))]
    for other in grouped[1:]:
        torch.testing.assert_close(other.value(z), grouped[0].value(z), rtol=1e-8, atol=1e-16)
        torch.testing.assert_close(other.induced().value(v), grouped[0].induced().value(v), rtol=1e-11, atol=0.0)


@given(strength=strengths, v=magnitudes)
def test_quadratic_minimiser_solves_its_quartic(strength: float, v: float) -> None:
    z = at.Quadratic(strength).induced().minimizer(scalar(v))
    assert float(z) >= 1
    # z − 1 rounds at z = 1: compare v²/z³ with λ(z − 1) to the accuracy that z has.
    torch.testing.assert_close(strength * (z - 1), v**2 / z**3, rtol=1e-11, atol=4e-16 * strength * float(z))


@given(strength=strengths, v=magnitudes)
def test_quadratic_with_itself_has_the_square_of_the_root_of_its_sextic(strength: float, v: float) -> None:
    z = at.Quadratic(strength).compose(at.Quadratic(strength)).induced().minimizer(scalar(v))
    a = z.sqrt()
    torch.testing.assert_close(strength * (a - 1), v**2 / a**5, rtol=1e-11, atol=4e-16 * strength * float(a))


@given(strength=strengths, v=magnitudes)
def test_absolute_minimisers_are_the_stated_powers(strength: float, v: float) -> None:
    one = at.Absolute(strength)
    ratio = 2 * v**2 / strength
    assert float(one.induced().minimizer(scalar(v))) == pytest.approx(max(1.0, ratio ** (1 / 3)), rel=1e-12)
    two = one.compose(one).induced().minimizer(scalar(v))
    assert float(two) == pytest.approx(max(1.0, ratio ** (1 / 5)) ** 2, rel=1e-12)


@given(strength=strengths, v=magnitudes)
def test_closed_forms_of_the_table_hold(strength: float, v: float) -> None:
    one, x = at.Absolute(strength), scalar(v)
    half = strength / 2
    expected = v**2 if v**2 <= half else 3 * half ** (2 / 3) * v ** (2 / 3) - strength
    assert float(one.induced().value(x)) == pytest.approx(expected, rel=1e-10)
    a = max(1.0, (2 * v**2 / strength) ** 0.2)
    both = one.compose(one).induced().value(x)
    assert float(both) == pytest.approx(2 * strength * (a - 1) + v**2 / a**4, rel=1e-10)
    z = float(reference.bisected_gain(strength, np.array([v]))[0])
    assert float(at.Quadratic(strength).induced().value(x)) == pytest.approx(
        strength * (z - 1) ** 2 + (v / z) ** 2, rel=1e-10
    )
    a = float(reference.bisected_gain(strength, np.array([v]), power=5.0)[0])
    both = at.Quadratic(strength).compose(at.Quadratic(strength)).induced().value(x)
    assert float(both) == pytest.approx(2 * strength * (a - 1) ** 2 + v**2 / a**4, rel=1e-10)


@pytest.mark.parametrize("name", CLOSED)
@settings(max_examples=40)
@given(strength=strengths, v=magnitudes)
def test_derivative_is_that_of_the_value(name: str, strength: float, v: float) -> None:
    induced = CLOSED[name](strength).induced()
    step = 1e-4
    points = torch.tensor([v * (1 + k * step) for k in (-2, -1, 1, 2)], dtype=torch.float64)
    f = induced.value(points)
    difference = float(f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * v * step)
    near_kink = name.startswith("absolute") and abs(2 * v**2 / strength - 1) < 0.01
    assert float(induced.derivative(scalar(v))) == pytest.approx(difference, rel=1e-3 if near_kink else 1e-8)


@pytest.mark.parametrize("name", CLOSED)
@given(strength=strengths, v=magnitudes)
def test_pull_excess_and_elasticity_belong_together(name: str, strength: float, v: float) -> None:
    penalty = CLOSED[name](strength)
    z = scalar(1 + v)
    if v > 1e-3:
        back = penalty.excess(penalty.pull(z))
        torch.testing.assert_close(1 + back, z, rtol=1e-11, atol=0.0)
    u = scalar(v)
    low, high = (torch.log1p(penalty.excess(u * math.exp(h))) for h in (-1e-4, 1e-4))
    if not name.startswith("absolute") or abs(2 * v / strength - 1) > 0.01:
        numeric = float(high - low) / 2e-4
        assert float(penalty.elasticity(u)) == pytest.approx(numeric, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("name", CLOSED)
@given(strength=strengths)
def test_small_values_are_treated_as_by_the_fixed_kernel(name: str, strength: float) -> None:
    v = scalar(1e-7 * math.sqrt(strength))
    torch.testing.assert_close(CLOSED[name](strength).induced().value(v), v**2, rtol=1e-12, atol=0.0)


# What a huge value costs, relative to its leading power, and that power.
ASYMPTOTES = {
    "quadratic": (lambda s: 2 * s**0.5, 1.0),
    "absolute": (lambda s: 3 * (s / 2) ** (2 / 3), 2 / 3),
    "quadratic with itself": (lambda s: 3 * s ** (2 / 3), 2 / 3),
    "absolute with itself": (lambda s: 5 * (s / 2) ** (4 / 5), 2 / 5),  # 2λa + v²/a⁴ at a = (2v²/λ)^{1/5}
}


@pytest.mark.parametrize("name", ASYMPTOTES)
@given(strength=st.floats(-2, 2).map(lambda x: 10.0**x))
def test_large_values_cost_the_stated_power(name: str, strength: float) -> None:
    factor, power = ASYMPTOTES[name]
    induced = CLOSED[name](strength).induced()
    ratios = [float(induced.value(scalar(v))) / (factor(strength) * v**power) for v in (1e15, 1e30, 1e45)]
    errors = [abs(ratio - 1) for ratio in ratios]
    assert errors[2] < 1e-6
    assert errors[0] < 1e-2
    assert errors[0] + 1e-12 >= errors[1]
    assert errors[1] + 1e-12 >= errors[2]


@pytest.mark.parametrize("name", CLOSED)
@given(strength=strengths, v=magnitudes, factor=st.floats(1.0, 1e6))
def test_induced_penalty_rises_from_zero_more_slowly_than_the_square(
    name: str, strength: float, v: float, factor: float
) -> None:
    induced = CLOSED[name](strength).induced()
    low, high = float(induced.value(scalar(v))), float(induced.value(scalar(v * factor)))
    assert 0 < low <= v**2 * (1 + 1e-14)
    assert low * (1 - 1e-14) <= high <= low * factor**2 * (1 + 1e-12)
    assert float(induced.value(scalar(0.0))) == 0
    assert float(induced.minimizer(scalar(0.0))) == 1
    assert float(induced.derivative(scalar(0.0))) == 0


def test_only_one_sided_quadratic_induces_a_convex_penalty() -> None:
    v = torch.logspace(-3, 3, 200, dtype=torch.float64)
    for name, make in CLOSED.items():
        slopes = make(1.0).induced().derivative(v)
        convex = bool((slopes.diff() >= -1e-14).all())
        assert convex == (name == "quadratic"), name


@given(strength=strengths, share=st.floats(1e-6, 0.999))
def test_quadratic_dual_is_the_supremum_over_z(strength: float, share: float) -> None:
    s = 2 * math.sqrt(share * strength)
    expected = reference.dual(reference.quadratic(strength), s)
    assert float(at.Quadratic(strength).induced().dual(scalar(s))) == pytest.approx(expected, rel=1e-9)


@given(strength=strengths, share=st.floats(1.0, 1e6))
def test_quadratic_dual_is_infinite_from_the_slope_at_infinity_on(strength: float, share: float) -> None:
    s = 2 * math.sqrt(strength) * share * (1 + 1e-12)
    assert float(at.Quadratic(strength).dual(scalar(s))) == math.inf


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "quadratic"])
@given(s=magnitudes)
def test_other_duals_are_infinite_away_from_zero(name: str, s: float) -> None:
    penalty = CLOSED[name](1.0)
    assert float(penalty.induced().dual(scalar(s))) == math.inf
    assert float(penalty.dual(scalar(0.0))) == 0
    v = 1e6 / min(s, 1.0) ** 4  # far out, s·v − ω̃(v) exceeds any bound
    assert s * v - float(penalty.induced().value(scalar(v))) > 1e5


@given(strength=strengths, v=magnitudes, share=st.floats(0.0, 0.999))
def test_fenchel_inequality_is_tight_at_the_derivative(strength: float, v: float, share: float) -> None:
    induced = at.Quadratic(strength).induced()
    s = 2 * math.sqrt(share * strength)
    value = float(induced.value(scalar(v)))
    assert value + float(induced.dual(scalar(s))) >= v * s * (1 - 1e-12)
    slope = induced.derivative(scalar(v))
    if float(slope) < 2 * math.sqrt(strength) * (1 - 1e-6):  # closer than that, 1 − q has no digits left
        assert value + float(induced.dual(slope)) == pytest.approx(v * float(slope), rel=1e-7)


def test_quantities_keep_the_dtype_and_shape_they_are_given() -> None:
    v = torch.tensor([[0.0, 1e-3], [1.0, 1e6]], dtype=torch.float32)
    for make in CLOSED.values():
        induced = make(0.5).induced()
        for found in (induced.value(v), induced.derivative(v), induced.minimizer(v), induced.dual(v)):
            assert found.shape == v.shape
            assert found.dtype == v.dtype
        exact = induced.value(v.double())
        torch.testing.assert_close(induced.value(v).double(), exact, rtol=1e-5, atol=1e-12)


class LogSquared(at.Penalty):
    """λ (log z)², a user's own penalty: u = λ log z, so z = exp(u/λ)."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def value(self, z: Tensor) -> Tensor:
        return self.strength * z.log() ** 2

    def pull(self, z: Tensor) -> Tensor:
        return self.strength * z.log()

    def excess(self, u: Tensor) -> Tensor:
        return torch.expm1(u / self.strength)

    def elasticity(self, u: Tensor) -> Tensor:
        return u / self.strength

    def dual(self, s: Tensor) -> Tensor:
        return torch.where(s == 0, 0.0, torch.inf).to(s.dtype)


@given(strength=st.floats(-2, 2).map(lambda x: 10.0**x), v=st.floats(-9, 6).map(lambda x: 10.0**x))
def test_a_users_own_penalty_induces_its_numeric_minimum(strength: float, v: float) -> None:
    value, _ = reference.induced(reference.logarithm_squared(strength), v)
    assert float(LogSquared(strength).induced().value(scalar(v))) == pytest.approx(value, rel=1e-10)


def test_a_users_own_penalty_composes_with_the_named_ones() -> None:
    own, one = LogSquared(0.5), reference.logarithm_squared(0.5)
    for v in (1e-6, 0.1, 3.0, 1e4):
        expected = reference.induced_by_two(one, reference.quadratic(2.0), v)
        assert float(own.compose(at.Quadratic(2.0)).induced().value(scalar(v))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("make", [at.Quadratic, at.Absolute])
@pytest.mark.parametrize("strength", [0.0, -1.0, math.inf, math.nan])
def test_a_strength_that_is_not_positive_and_finite_is_refused(
    make: Callable[[float], at.Penalty], strength: float
) -> None:
    name = make(1.0).__class__.__name__
    with pytest.raises(
        at.TangentError, match=rf"{name}: the strength λ is positive and finite, got {strength}; use Fixed\(\)"
    ):
        make(strength)

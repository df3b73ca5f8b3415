"""Penalties against numeric minimization of their definitions (theory §2)."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.penalties.closed_forms import Composition
from draws import examples
from finite_differences import derivative

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
VALUES = [10.0**k for k in range(-12, 13, 2)]
strengths = st.floats(-6, 6).map(lambda x: 10.0**x)
magnitudes = st.floats(-12, 12).map(lambda x: 10.0**x)


def scalar(x: float, *, grad: bool = False) -> Tensor:
    return torch.tensor([x], dtype=torch.float64, requires_grad=grad)


def kinked_between(penalty: at.Penalty, low: float, high: float) -> bool:
    """Whether an absolute part starts to move between two levels; it starts at half its strength."""
    parts = getattr(penalty, "parts", (penalty,))
    return any(isinstance(part, at.Absolute) and low <= part.strength / 2 <= high for part in parts)


def zs() -> Tensor:
    return 1 + torch.logspace(-6, 8, 15, dtype=torch.float64)


@pytest.mark.parametrize("name", ["quadratic", "absolute"])
@examples(15)
@given(strength=strengths, v=magnitudes)
def test_induced_penalty_is_the_minimum_over_z(name: str, strength: float, v: float) -> None:
    induced = CLOSED[name](strength).induced()
    value, z = reference.induced(OMEGA[name](strength), v)
    assert float(induced.value(scalar(v))) == pytest.approx(value, rel=1e-12)
    assert float(induced.minimizer(scalar(v))) == pytest.approx(z, rel=1e-6)  # golden section finds z only to √eps


@pytest.mark.parametrize("v", VALUES)
@pytest.mark.parametrize("name", ["quadratic with itself", "absolute with itself"])
def test_induced_penalty_of_two_equal_sides_is_the_minimum_over_both(name: str, v: float) -> None:
    one = OMEGA[name.split()[0]](0.7)
    expected = reference.induced_by_two(one, one, v)
    assert float(CLOSED[name](0.7).induced().value(scalar(v))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("v", VALUES[::2])
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
    grouped = [
        a.compose(b).compose(c),
        a.compose(b.compose(c)),
        Composition((c, Composition((a, b)))),
    ]
    for other in grouped[1:]:
        torch.testing.assert_close(other.value(z), grouped[0].value(z), rtol=1e-8, atol=1e-16)
        torch.testing.assert_close(other.induced().value(v), grouped[0].induced().value(v), rtol=1e-11, atol=0.0)


@examples(10)
@given(strength=strengths, v=magnitudes)
def test_quadratic_minimizer_solves_its_quartic(strength: float, v: float) -> None:
    z = at.Quadratic(strength).induced().minimizer(scalar(v))
    assert float(z) >= 1
    # z − 1 rounds at z = 1: compare v²/z³ with λ(z − 1) to the accuracy that z has.
    torch.testing.assert_close(strength * (z - 1), v**2 / z**3, rtol=1e-11, atol=4e-16 * strength * float(z))


@examples(10)
@given(strength=strengths, v=magnitudes)
def test_quadratic_with_itself_has_the_square_of_the_root_of_its_sextic(strength: float, v: float) -> None:
    z = at.Quadratic(strength).compose(at.Quadratic(strength)).induced().minimizer(scalar(v))
    a = z.sqrt()
    torch.testing.assert_close(strength * (a - 1), v**2 / a**5, rtol=1e-11, atol=4e-16 * strength * float(a))


@examples(10)
@given(strength=strengths, v=magnitudes)
def test_absolute_minimizers_are_the_stated_powers(strength: float, v: float) -> None:
    one = at.Absolute(strength)
    ratio = 2 * v**2 / strength
    assert float(one.induced().minimizer(scalar(v))) == pytest.approx(max(1.0, ratio ** (1 / 3)), rel=1e-12)
    two = one.compose(one).induced().minimizer(scalar(v))
    assert float(two) == pytest.approx(max(1.0, ratio ** (1 / 5)) ** 2, rel=1e-12)


@examples(10)
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
@examples(15)
@given(strength=strengths, v=magnitudes)
def test_derivative_is_that_of_the_value(name: str, strength: float, v: float) -> None:
    induced = CLOSED[name](strength).induced()
    along = derivative(lambda t: induced.value(v * (1 + t)), 3e-5, at_once=True)
    along.check(v * induced.derivative(scalar(v)))


@pytest.mark.parametrize("name", CLOSED)
@examples(10)
@given(strength=strengths, v=magnitudes)
def test_pull_excess_and_elasticity_belong_together(name: str, strength: float, v: float) -> None:
    penalty = CLOSED[name](strength)
    z = scalar(1 + v)
    if v > 1e-3:
        back = penalty.excess(penalty.pull(z))
        torch.testing.assert_close(1 + back, z, rtol=1e-11, atol=0.0)
    u = scalar(v)
    if not kinked_between(penalty, v * math.exp(-2e-4), v * math.exp(2e-4)):
        # z − 1 is known only to the rounding of z.
        least = 1.0 if name.startswith("absolute") else 0.0
        along = derivative(
            lambda t: torch.log1p(penalty.excess(u * t.exp())), 1e-4, rounding=2e-15, least=least, at_once=True
        )
        along.check(penalty.elasticity(u))


@pytest.mark.parametrize("name", CLOSED)
@examples(10)
@given(strength=strengths)
def test_small_values_are_treated_as_by_the_fixed_kernel(name: str, strength: float) -> None:
    v = scalar(1e-7 * math.sqrt(strength))
    torch.testing.assert_close(CLOSED[name](strength).induced().value(v), v**2, rtol=1e-12, atol=0.0)


# The cost of a huge value relative to its leading power, and that power.
ASYMPTOTES = {
    "quadratic": (lambda s: 2 * s**0.5, 1.0),
    "absolute": (lambda s: 3 * (s / 2) ** (2 / 3), 2 / 3),
    "quadratic with itself": (lambda s: 3 * s ** (2 / 3), 2 / 3),
    "absolute with itself": (lambda s: 5 * (s / 2) ** (4 / 5), 2 / 5),  # 2λa + v²/a⁴ at a = (2v²/λ)^{1/5}
}


@pytest.mark.parametrize("name", ASYMPTOTES)
@examples(10)
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
@examples(10)
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


@examples(10)
@given(strength=strengths, share=st.floats(1e-6, 0.999))
def test_quadratic_dual_is_the_supremum_over_z(strength: float, share: float) -> None:
    s = 2 * math.sqrt(share * strength)
    expected = reference.dual(reference.quadratic(strength), s)
    assert float(at.Quadratic(strength).induced().dual(scalar(s))) == pytest.approx(expected, rel=1e-9)


@examples(10)
@given(strength=strengths, share=st.floats(1.0, 1e6))
def test_quadratic_dual_is_infinite_from_the_slope_at_infinity_on(strength: float, share: float) -> None:
    s = 2 * math.sqrt(strength) * share * (1 + 1e-12)
    assert float(at.Quadratic(strength).dual(scalar(s))) == math.inf


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "quadratic"])
@examples(10)
@given(s=magnitudes)
def test_other_duals_are_infinite_away_from_zero(name: str, s: float) -> None:
    penalty = CLOSED[name](1.0)
    assert float(penalty.induced().dual(scalar(s))) == math.inf
    assert float(penalty.dual(scalar(0.0))) == 0
    v = 1e6 / min(s, 1.0) ** 4  # for large v, s·v − ω̃(v) exceeds any bound
    assert s * v - float(penalty.induced().value(scalar(v))) > 1e5


@examples(10)
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


# Closed forms beyond the two of the table.

FAMILY: dict[str, tuple[at.Penalty, tuple[reference.PrecisePart, ...]]] = {
    "power 1.5": (at.Power(1.5, 0.4), (reference.precise_power(1.5, 0.4),)),
    "power 3": (at.Power(3.0, 7.0), (reference.precise_power(3.0, 7.0),)),
    "log squared": (at.penalties.LogSquared(0.3), (reference.precise_log_squared(0.3),)),
    "power 2.5 and power 6": (
        at.Power(2.5).compose(at.Power(6.0, 20.0)),
        (reference.precise_power(2.5, 1.0), reference.precise_power(6.0, 20.0)),
    ),
    "three kinds": (
        at.Quadratic(0.2).compose(at.penalties.LogSquared(5.0), at.Absolute(2.0)),
        (reference.precise_power(2, 0.2), reference.precise_log_squared(5.0), reference.precise_power(1, 2.0)),
    ),
    "kinked and fixed": (at.Absolute(3.0).compose(at.NoAdaptation()), (reference.precise_power(1, 3.0),)),
}


@pytest.mark.parametrize("v", [1e-12, 1e-4, 0.5, 3.0, 1e3, 1e12])
@pytest.mark.parametrize("name", FAMILY)
def test_value_and_minimizer_agree_with_forty_digits_at_every_scale(name: str, v: float) -> None:
    penalty, parts = FAMILY[name]
    value, excess = reference.precise_induced(parts, v)
    induced = penalty.induced()
    assert float(induced.value(scalar(v))) == pytest.approx(value, rel=4e-14)
    assert float(induced.minimizer(scalar(v))) == pytest.approx(1 + excess, rel=4e-14)
    assert float(penalty.excess(induced.level(scalar(v)))) == pytest.approx(excess, rel=1e-11, abs=1e-30)


@examples(10)
@given(strength=strengths, v=magnitudes)
def test_log_squared_follows_from_lamberts_function(strength: float, v: float) -> None:
    w = float(mpmath.lambertw(2 * mpmath.mpf(v) ** 2 / strength).real)
    induced = at.penalties.LogSquared(strength).induced()
    assert float(induced.value(scalar(v))) == pytest.approx(strength * (w * w / 4 + w / 2), rel=1e-12)
    assert float(induced.minimizer(scalar(v))) == pytest.approx(math.exp(w / 2), rel=1e-12)


@examples(10)
@given(strength=strengths, v=magnitudes)
def test_powers_of_one_and_two_are_absolute_and_quadratic(strength: float, v: float) -> None:
    for q, other in ((1.0, at.Absolute(strength)), (2.0, at.Quadratic(strength))):
        one, two = at.Power(q, strength).induced(), other.induced()
        for quantity in ("value", "derivative", "second_derivative", "minimizer", "level", "dual"):
            found, expected = getattr(one, quantity)(scalar(v)), getattr(two, quantity)(scalar(v))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


@examples(25)
@given(strength=strengths, v=magnitudes, q=st.floats(1.0, 8.0))
def test_no_adaptation_is_the_identity_of_composition(strength: float, v: float, q: float) -> None:
    one = at.Power(q, strength)
    for both in (
        one.compose(at.NoAdaptation()),
        at.NoAdaptation().compose(one, at.NoAdaptation()),
    ):
        for quantity in ("value", "derivative", "minimizer"):
            expected = getattr(one.induced(), quantity)(scalar(v))
            torch.testing.assert_close(getattr(both.induced(), quantity)(scalar(v)), expected, rtol=1e-13, atol=0.0)
        torch.testing.assert_close(both.value(zs()), one.value(zs()), rtol=1e-8, atol=1e-300)


def test_no_adaptation_leaves_the_fixed_kernel() -> None:
    v = torch.tensor([0.0, 1e-12, 3.0, 1e12], dtype=torch.float64)
    for nothing in (at.NoAdaptation(), at.NoAdaptation().compose(at.NoAdaptation())):
        assert nothing.induced().is_convex
        torch.testing.assert_close(nothing.induced().value(v), v**2)
        torch.testing.assert_close(nothing.induced().dual(v), v**2 / 4)
        assert nothing.induced().minimizer(v).tolist() == [1.0] * 4
        assert nothing.value(torch.tensor([1.0, 1.5])).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("q", [1.2, 2.0, 3.0, 9.0])
def test_a_power_grows_like_v_to_the_two_q_over_q_plus_two(q: float) -> None:
    low, high = (float(at.Power(q).induced().value(scalar(v))) for v in (1e40, 1e41))
    assert math.log10(high / low) == pytest.approx(2 * q / (q + 2), abs=1e-3)


EVERY: dict[str, at.Penalty] = {
    **{name: make(0.7) for name, make in CLOSED.items()},
    **{name: penalty for name, (penalty, _) in FAMILY.items()},
    "power 4 with itself": at.Power(4.0).compose(at.Power(4.0)),
    "power 6 with itself": at.Power(6.0).compose(at.Power(6.0)),
    "power 3, three times": at.Power(3.0).compose(at.Power(3.0), at.Power(3.0)),
    "no adaptation": at.NoAdaptation(),
}
CONVEX = {"quadratic", "power 3", "power 4 with itself", "power 6 with itself", "no adaptation"}


@pytest.mark.parametrize("name", EVERY)
def test_convexity_is_that_of_second_differences(name: str) -> None:
    induced = EVERY[name].induced()
    assert induced.is_convex == (name in CONVEX)
    assert ("not above ½" in induced.convexity) == induced.is_convex
    v = torch.logspace(-4, 9, 400, dtype=torch.float64)
    slopes = induced.value(v).diff() / v.diff()
    assert bool((slopes.diff() >= -1e-11 * slopes[1:]).all()) == induced.is_convex


def vectors(size: int, low: float = -4, high: float = 4) -> st.SearchStrategy[Tensor]:
    """Many values at once, between powers of ten: searches take as long for one."""
    entries = st.lists(st.floats(low, high), min_size=size, max_size=size)
    return entries.map(lambda x: 10 ** torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("name", EVERY)
@examples(3)
@given(v=vectors(25))
def test_second_derivative_is_that_of_the_derivative(name: str, v: Tensor) -> None:
    induced = EVERY[name].induced()
    ends = [induced.level(v * (1 + t)).tolist() for t in (-1e-4, 1e-4)]
    v = v[[not kinked_between(EVERY[name], low, high) for low, high in zip(*ends, strict=True)]]
    along = derivative(lambda t: induced.derivative(v * (1 + t[:, None])), 3e-5, at_once=True)
    along.check(v * induced.second_derivative(v))


DUAL = {
    "power 2.5": (at.Power(2.5, 0.6), reference.power(2.5, 0.6), math.inf),
    "power 3": (at.Power(3.0, 2.0), reference.power(3.0, 2.0), math.inf),
    "quadratic and fixed": (at.Quadratic(0.6).compose(at.NoAdaptation()), reference.quadratic(0.6), 2 * 0.6**0.5),
    "power 4 with itself": (
        at.Power(4.0).compose(at.Power(4.0)),
        reference.composed(reference.power(4.0, 1.0), reference.power(4.0, 1.0)),
        2 * 2**0.5,  # 2λ(√z − 1)⁴ grows like 2λz²
    ),
    "power 6 with itself": (
        at.Power(6.0).compose(at.Power(6.0)),
        lambda e: 2 * np.expm1(np.log1p(e) / 2) ** 6,
        math.inf,
    ),
}  # fmt: skip


@pytest.mark.parametrize("s", [0.05, 0.9, 1.5, 2.7, 3.0])
@pytest.mark.parametrize("name", [name for name in DUAL if name != "power 4 with itself"])
def test_finite_duals_are_the_supremum_over_z(name: str, s: float) -> None:
    penalty, omega, end = DUAL[name]
    found = float(penalty.induced().dual(scalar(s)))
    if s < end:
        assert found == pytest.approx(reference.dual(omega, s), rel=1e-9)
    else:
        assert found == math.inf


@pytest.mark.parametrize("name", DUAL)
@examples(3)
@given(v=vectors(25), share=st.lists(st.floats(0.01, 0.99), min_size=25, max_size=25).map(torch.tensor))
def test_duals_are_conjugate_to_the_value(name: str, v: Tensor, share: Tensor) -> None:
    penalty, _, end = DUAL[name]
    induced = penalty.induced()
    value, slope = induced.value(v), induced.derivative(v)
    s = share * min(end, 1e3)
    assert bool((value + induced.dual(s) >= v * s * (1 - 1e-11)).all())  # Fenchel and Young
    met = slope < 0.999 * end
    torch.testing.assert_close((value + induced.dual(slope))[met], (v * slope)[met], rtol=1e-9, atol=1e-12)
    if end < math.inf:
        assert float(induced.dual(scalar(end * (1 + 1e-9)))) == math.inf


PROXIMAL = {
    "quadratic": (at.Quadratic(0.5), reference.quadratic(0.5)),
    "absolute": (at.Absolute(2.0), reference.absolute(2.0)),
    "power 3": (at.Power(3.0), reference.power(3.0, 1.0)),
    "log squared": (at.penalties.LogSquared(0.2), reference.logarithm_squared(0.2)),
}


@pytest.mark.parametrize(("v", "step"), [(0.3, 0.5), (3.0, 0.02), (3.0, 4.0), (25.0, 30.0), (200.0, 500.0)])
@pytest.mark.parametrize("name", PROXIMAL)
def test_proximal_point_is_the_least_of_all(name: str, v: float, step: float) -> None:
    penalty, omega = PROXIMAL[name]
    w = float(penalty.induced().proximal(scalar(v), step))
    least, argmin = reference.proximal(omega, v, step)
    assert (w - v) ** 2 / (2 * step) + float(penalty.induced().value(scalar(w))) <= least * (1 + 1e-12)
    assert w == pytest.approx(argmin, rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_no_point_of_a_grid_is_better_than_the_proximal_one(name: str) -> None:
    induced = EVERY[name].induced()
    v = torch.tensor([0.5, 2.0, 6.0, 20.0, 100.0], dtype=torch.float64)
    grid = v[:, None] * torch.cat([torch.zeros(1), torch.logspace(-5, 0, 400)]).double()
    values = induced.value(grid)
    for step in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0):
        w = induced.proximal(v, step)
        reached = (w - v) ** 2 / (2 * step) + induced.value(w)
        least = ((grid - v[:, None]) ** 2 / (2 * step) + values).amin(1)
        assert bool((reached <= least * (1 + 1e-12)).all()), f"step {step}: {reached} above {least}"


@pytest.mark.parametrize("name", EVERY)
@examples(8)
@given(v=vectors(8, -6, 6), step=st.floats(-4, 4).map(lambda x: 10.0**x))
def test_proximal_point_is_stationary(name: str, v: Tensor, step: float) -> None:
    induced = EVERY[name].induced()
    w = induced.proximal(v, step)
    assert bool(((w > 0) & (w <= v)).all())
    torch.testing.assert_close(w + step * induced.derivative(w), v, rtol=1e-10, atol=0.0)


def test_proximal_operator_at_zero_and_of_bad_steps() -> None:
    assert float(at.Absolute().induced().proximal(scalar(0.0), 1.0)) == 0
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(at.TangentError, match="proximal: the step is positive and finite"):
            at.Absolute().induced().proximal(scalar(1.0), step)


@pytest.mark.parametrize("v", [-1.0, math.nan, math.inf])
def test_what_is_no_singular_value_is_refused(v: float) -> None:
    with pytest.raises(at.TangentError, match="v is a singular value, so 0 or more and finite"):
        at.Quadratic().induced().value(scalar(v))


def test_compositions_take_penalties_only_and_flatten() -> None:
    one, two, three = at.Quadratic(), at.Absolute(), at.Power(3.0)
    assert one.compose(two.compose(three), one).parts == (one, two, three, one)
    unchecked = getattr(at.Penalty.compose, "__wrapped__", at.Penalty.compose)
    for wrong in (2.0, lambda z: z - 1):
        with pytest.raises(at.TangentError, match=r"compose: give one or more penalties, got .*Penalty\(function\)"):
            unchecked(one, wrong)
    with pytest.raises(at.TangentError, match=r"compose: give one or more penalties$"):
        Composition(())


@pytest.mark.parametrize("q", [0.5, 0.0, -1.0, math.inf, math.nan])
def test_a_power_below_one_is_refused_with_the_way_out(q: float) -> None:
    with pytest.raises(at.TangentError, match=r"Power: q is finite and at least 1, got .*Penalty\(lambda z"):
        at.Power(q)


@pytest.mark.parametrize("make", [at.Quadratic, at.Absolute, at.penalties.LogSquared, lambda s: at.Power(3.0, s)])
@pytest.mark.parametrize("strength", [0.0, -1.0, math.inf, math.nan])
def test_a_strength_that_is_not_positive_and_finite_is_refused(
    make: Callable[[float], at.Penalty], strength: float
) -> None:
    name = make(1.0).__class__.__name__
    with pytest.raises(
        at.TangentError, match=rf"{name}: the strength λ is positive and finite, got {strength}; use Fixed\(\)"
    ):
        make(strength)

"""Penalties given as functions equal closed forms, find global minima among many valleys, and are checked."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import adaptive_tangents as at
from adaptive_tangents.penalties import penalty as penalty_module
from adaptive_tangents.penalties.checks import check_function
from adaptive_tangents.penalties.closed_forms import shares
from adaptive_tangents.penalties.scalar_search import convex_root, global_minimum, increasing_root
from adaptive_tangents.penalties.shared_minimum import minimizers
from finite_differences import derivative

Quantities = ("value", "derivative", "minimizer", "level")
V = torch.logspace(-12, 12, 25, dtype=torch.float64)


class Searched(at.Penalty):
    """A penalty treated as if its ω∘exp were not convex."""

    @property
    def shares_level(self) -> bool:
        return False


@pytest.fixture
def searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantity of the same penalties at the same values starts from the same search: make it once."""
    made: dict[tuple[object, ...], list[Tensor]] = {}
    search = minimizers

    def once(parts: Sequence[at.Penalty], v: Tensor, shift: Tensor | None = None) -> list[Tensor]:
        key = (*parts, *v.tolist(), *(() if shift is None else ("shift", *shift.tolist())))
        if key not in made:
            made[key] = search(parts, v, shift)
        return list(made[key])

    monkeypatch.setattr(penalty_module, "minimizers", once)


CLOSED: dict[str, tuple[at.Penalty, Callable[[Tensor], Tensor], float]] = {
    "quadratic": (at.Quadratic(0.3), lambda z: (z - 1) ** 2, 0.3),
    "absolute": (at.Absolute(5.0), lambda z: z - 1, 5.0),
    "power 1.5": (at.Power(1.5), lambda z: (z - 1) ** 1.5, 1.0),
    "power 3": (at.Power(3.0, 2.0), lambda z: (z - 1) ** 3, 2.0),
    "log squared": (at.penalties.LogSquared(0.1), lambda z: z.log() ** 2, 0.1),
    "no adaptation": (at.NoAdaptation(), lambda z: torch.where(z > 1, torch.inf, 0.0).to(z.dtype), 1.0),
}


@pytest.mark.usefixtures("searched_once")
@pytest.mark.parametrize("route", [at.Penalty, Searched], ids=["by level", "by search"])
@pytest.mark.parametrize("name", CLOSED)
def test_each_closed_form_is_what_its_function_gives(name: str, route: type[at.Penalty]) -> None:
    closed, function, strength = CLOSED[name]
    one, two = route(function, strength=strength).induced(), closed.induced()
    for quantity in Quantities:
        torch.testing.assert_close(getattr(one, quantity)(V), getattr(two, quantity)(V), rtol=2e-14, atol=0.0)
    scale = 2 / two.minimizer(V) ** 2
    torch.testing.assert_close(one.second_derivative(V) / scale, two.second_derivative(V) / scale, rtol=1e-6, atol=1e-8)
    for step in (1e-3, 1.0, 1e3):
        torch.testing.assert_close(one.proximal(V, step), two.proximal(V, step), rtol=1e-13, atol=0.0)
    s = torch.tensor([0.0, 0.1, 0.5, 1.0, 1.9, 3.0], dtype=torch.float64)
    torch.testing.assert_close(one.dual(s), two.dual(s), rtol=1e-12, atol=0.0)
    assert one.is_convex == two.is_convex


@pytest.mark.usefixtures("searched_once")
@pytest.mark.parametrize("other", [at.Absolute(0.4), at.penalties.LogSquared(2.0), at.NoAdaptation()])
@pytest.mark.parametrize("route", [at.Penalty, Searched], ids=["by level", "by search"])
@pytest.mark.parametrize("name", ["quadratic", "power 3"])
def test_functions_compose_with_closed_forms_as_closed_forms_do(
    name: str, route: type[at.Penalty], other: at.Penalty
) -> None:
    closed, function, strength = CLOSED[name]
    v, z = V[::3], 1 + torch.logspace(-3, 6, 7, dtype=torch.float64)
    one, two = other.compose(route(function, strength=strength)), closed.compose(other)
    for quantity in Quantities:
        found, expected = getattr(one.induced(), quantity)(v), getattr(two.induced(), quantity)(v)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(one.value(z), two.value(z), rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(one.pull(z), two.pull(z), rtol=1e-5, atol=1e-9)
    for found, expected in zip(
        shares((other, route(function, strength=strength)), v),
        shares((other, closed), v),
        strict=True,
    ):
        torch.testing.assert_close(1 + found, 1 + expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ["quadratic", "absolute"])
def test_equal_functions_share_a_value_as_their_closed_forms_do(name: str) -> None:
    closed, function, strength = CLOSED[name]
    own = at.Penalty(function, strength=strength)
    for count in (2, 3):
        one, two = own.compose(*[own] * (count - 1)).induced(), closed.compose(*[closed] * (count - 1)).induced()
        for quantity in Quantities:
            torch.testing.assert_close(getattr(one, quantity)(V), getattr(two, quantity)(V), rtol=1e-13, atol=0.0)


@pytest.mark.usefixtures("searched_once")
def test_two_functions_searched_together_are_the_composition_of_their_closed_forms() -> None:
    v = torch.tensor([0.0, 1e-3, 0.7, 20.0, 1e4], dtype=torch.float64)
    one, two = (Searched(CLOSED[name][1]) for name in ("quadratic", "absolute"))
    found, expected = one.compose(two).induced(), at.Quadratic().compose(at.Absolute()).induced()
    torch.testing.assert_close(found.value(v), expected.value(v), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(found.minimizer(v), expected.minimizer(v), rtol=1e-10, atol=0.0)


# Unlike any closed form: valleys, kinks, jumps, straight pieces, an end.
ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "waves": lambda z: z.log() + 0.225 * torch.sin(4 * z.log()),
    "root": lambda z: (z - 1) ** 0.5,
    "jump": lambda z: torch.where(z >= 2, z - 1, 0.1 * (z - 1)),
    "kink": lambda z: torch.maximum(z - 1, 5 * (z - 3) + 2),
    "bend": lambda z: torch.minimum(4 * (z - 1), 2 + 0.5 * (z - 1)),
    "straight": lambda z: z.log(),
    "late": lambda z: torch.relu(z - 2) ** 2,
    "end": lambda z: torch.where(z <= 3, (z - 1) ** 2, torch.inf),
}
POINTS = [0.0, 1e-6, 0.2, 0.6, 0.9, 1.1, 1.6, 2.4, 3.7, 9.0, 40.0, 1e3]


def brute(functions: Sequence[Callable[[Tensor], Tensor]], v: float, shift: float = 0.0, count: int = 400_001) -> float:
    """The least cost on a dense grid of log z, or of both logs for two functions."""
    end = math.log1p(v) + 3
    if len(functions) == 1:
        z = torch.linspace(0, end, count, dtype=torch.float64).exp()
        return float((functions[0](z) + v**2 / (z**2 + shift)).min())
    z = torch.linspace(0, end, int(count**0.5), dtype=torch.float64).exp()
    one, two = (function(z) for function in functions)
    return float((one[:, None] + two + v**2 / ((z[:, None] * z) ** 2 + shift)).min())


@pytest.mark.usefixtures("searched_once")
@pytest.mark.parametrize("name", ODD)
def test_an_odd_penalty_induces_its_global_minimum(name: str) -> None:
    penalty = at.Penalty(ODD[name])
    v = torch.tensor(POINTS, dtype=torch.float64)
    value, z = penalty.induced().value(v), penalty.induced().minimizer(v)
    torch.testing.assert_close(penalty.value(z) + (v / z) ** 2, value, rtol=1e-13, atol=0.0)  # attained
    for at_v, found in zip(POINTS, value.tolist(), strict=True):
        least = brute([ODD[name]], at_v)
        assert found <= least * (1 + 1e-10) + 1e-30
        assert found >= least * (1 - 1e-4)
    np.testing.assert_allclose(penalty.induced().derivative(v), 2 * v / z**2, rtol=1e-12)


def test_beside_a_jump_the_cheaper_side_is_taken() -> None:
    v = torch.linspace(1.3, 1.8, 20, dtype=torch.float64)
    for end in torch.linspace(1.9, 2.3, 15, dtype=torch.float64):
        jump = at.Penalty(lambda z, end=end: torch.where(z >= end, z - 1, 0.1 * (z - 1)))
        beside = 0.1 * (end - 1) + (v / end) ** 2  # just below the jump
        torch.testing.assert_close(jump.induced().value(v), beside, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", [name for name in ODD if name != "jump"])
def test_an_odd_penaltys_derivative_is_the_slope_of_its_value(name: str) -> None:
    induced = at.Penalty(ODD[name]).induced()
    for v in (0.21, 0.64, 1.37, 5.2, 33.0):
        one = torch.tensor([v], dtype=torch.float64)
        along = derivative(lambda t, v=v: induced.value(v * (1 + t)), 3e-5, at_once=True)
        along.check(v * induced.derivative(one))


@pytest.mark.usefixtures("searched_once")
@pytest.mark.slow
@pytest.mark.parametrize("pair", [("waves", "root"), ("jump", "waves"), ("end", "bend"), ("straight", "straight")])
def test_two_odd_penalties_share_a_value_at_the_global_minimum(pair: tuple[str, str]) -> None:
    functions = [ODD[name] for name in pair]
    one, two = map(at.Penalty, functions)
    v = torch.tensor([1.2], dtype=torch.float64)
    value = one.compose(two).induced().value(v)
    a, b = (1 + excess for excess in shares((one, two), v))
    torch.testing.assert_close(one.value(a) + two.value(b) + (v / (a * b)) ** 2, value, rtol=1e-12, atol=0.0)
    for at_v, found in zip(v.tolist(), value.tolist(), strict=True):
        least = brute(functions, at_v, count=4_000_000 if "jump" in pair else 1_000_000)
        assert least * (1 - 2e-3) <= found <= least * (1 + 1e-10)


def test_an_odd_penalty_composes_with_a_closed_form_at_the_global_minimum() -> None:
    one = at.Penalty(ODD["waves"]).compose(at.Quadratic(0.5))
    v = torch.tensor([0.3, 1.2, 4.0, 30.0], dtype=torch.float64)
    for at_v, found in zip(v.tolist(), one.induced().value(v).tolist(), strict=True):
        least = brute([ODD["waves"], lambda z: 0.5 * (z - 1) ** 2], at_v, count=1_000_000)
        assert least * (1 - 1e-3) <= found <= least * (1 + 1e-10)
    for z in (1.0, 1.7, 5.0, 60.0):
        a = torch.linspace(0, math.log(z), 200_001, dtype=torch.float64).exp()
        least = float((ODD["waves"](a) + 0.5 * (z / a - 1) ** 2).min())
        assert float(one.value(torch.tensor([z], dtype=torch.float64))) == pytest.approx(least, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("name", ["waves", "root", "bend", "end"])
@pytest.mark.parametrize("step", [0.05, 2.0, 40.0])
def test_proximal_point_of_an_odd_penalty_is_the_least_of_all(name: str, step: float) -> None:
    v = torch.tensor([0.4, 1.5, 6.0, 50.0], dtype=torch.float64)
    induced = at.Penalty(ODD[name]).induced()
    w = induced.proximal(v, step)
    reached = (w - v) ** 2 / (2 * step) + induced.value(w)
    for at_v, found in zip(v.tolist(), reached.tolist(), strict=True):
        least = brute([ODD[name]], at_v, shift=2 * step)
        assert least * (1 - 1e-4) <= found <= least * (1 + 1e-9)


@pytest.mark.usefixtures("searched_once")
def test_one_of_two_equal_sides_may_take_it_all() -> None:
    root = at.Penalty(lambda z: z.log().sqrt())  # concave in log z: two half transforms cost more than one whole
    v = torch.tensor([50.0, 0.1], dtype=torch.float64)
    first, second = (share[0] for share in shares((root, root), v))
    assert min(float(first), float(second)) == 0
    assert max(float(first), float(second)) > 5
    coefficients = {"w": torch.diag(v)}
    sides = at.TwoSided(root).update(coefficients)["w"]
    moved = sorted(float(side.matrix().det()) for side in (sides.left, sides.right))
    assert moved == pytest.approx([1.0, 1 + float(first + second)], rel=1e-12)


def test_a_level_that_does_not_determine_z_says_what_to_ask_instead() -> None:
    with pytest.raises(
        at.TangentError, match=r"a level does not determine z; use induced\(\)\.minimizer\(v\) or shares"
    ):
        at.Penalty(ODD["straight"]).excess(torch.tensor([1.0]))


@pytest.mark.parametrize(("name", "shared"), [("kink", True), ("late", True), ("end", True), ("straight", False)])
def test_straight_pieces_and_bends_are_searched_and_the_rest_is_not(name: str, shared: bool) -> None:
    assert at.Penalty(ODD[name]).shares_level == shared
    for other in ("waves", "root", "bend", "jump"):
        assert not at.Penalty(ODD[other]).shares_level


@pytest.mark.parametrize(("name", "convex"), [("kink", False), ("end", True), ("waves", False), ("root", False)])
def test_convexity_of_an_odd_penalty_is_that_of_second_differences(name: str, convex: bool) -> None:
    induced = at.Penalty(ODD[name]).induced()
    v = torch.linspace(0, 12, 1201, dtype=torch.float64)
    values = induced.value(v)
    assert bool((values[2:] - 2 * values[1:-1] + values[:-2] >= -1e-10).all()) == convex == induced.is_convex
    assert induced.convexity.startswith("ω̃′ never falls" if convex else "ω̃′ falls somewhere")


def test_an_end_gives_a_finite_dual_and_a_bend_none() -> None:
    s = torch.tensor([0.0, 0.5, 1.9, 3.0, 50.0], dtype=torch.float64)
    z = torch.linspace(1, 3, 400_001, dtype=torch.float64)
    expected = (s[:, None] ** 2 * z**2 / 4 - (z - 1) ** 2).amax(1)
    torch.testing.assert_close(at.Penalty(ODD["end"]).dual(s), expected, rtol=1e-9, atol=1e-12)
    assert at.Penalty(ODD["bend"]).dual(s).tolist() == [0.0] + [math.inf] * 4
    both = at.Penalty(ODD["end"]).compose(at.NoAdaptation())
    torch.testing.assert_close(both.dual(s), expected, rtol=1e-9, atol=1e-12)


def test_a_given_derivative_is_used_where_autograd_sees_nothing() -> None:
    def outside(z: Tensor) -> Tensor:
        return torch.from_numpy((z.detach().numpy() - 1) ** 2)

    with pytest.raises(at.TangentError, match=r"at z = .* autograd gives 0 where ω rises at .*give its derivative="):
        at.Penalty(outside)
    given = at.Penalty(outside, strength=0.3, derivative=lambda z: 2 * (z - 1)).induced()
    torch.testing.assert_close(given.minimizer(V), at.Quadratic(0.3).induced().minimizer(V), rtol=1e-13, atol=0.0)
    with pytest.raises(at.TangentError, match="the given derivative is"):
        at.Penalty(lambda z: (z - 1) ** 2, derivative=lambda z: 3 * (z - 1))


def test_all_penalties_are_penalties_and_fit_takes_a_function() -> None:
    x = torch.linspace(-1, 1, 6)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    feats = at.tangent_features(model, x)
    own, closed = at.Penalty(lambda z: (z - 1) ** 2, strength=0.5), at.Quadratic(0.5)
    assert all(isinstance(p, at.Penalty) for p in (own, closed, at.Absolute(), at.NoAdaptation(), own.compose(closed)))
    found = [at.fit(feats, x**2, structure=at.TwoSided(p), ridge=0.1).objective for p in (own, closed)]
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z, r"ω\(1\) is 1 and must be 0, for no adaptation costs nothing; subtract the value at 1"),
        (lambda z: (z - 1) * (3 - z).abs(), r"ω decreases between z = 2.* and .*; ω must not decrease"),
        (lambda z: -((z - 1) ** 2), "ω decreases between z = 1"),
        (lambda z: torch.log(z - 1), r"ω\(z\) is -inf at z = 1; it is finite or \+inf"),
        (lambda z: (2 - z) ** 0.5 - 1, r"ω\(z\) is nan at z = 2\..*; it is finite or \+inf"),
        (lambda z: 1 - 1 / z, "ω stops growing at 1: transforms of any size would cost no more"),
        (lambda z: 0 * z, "ω stops growing at 0"),
        (lambda z: (z - 1).sum(), r"the function of a tensor of shape \(602,\) gives shape \(\)"),
        (lambda z: float(z.max()) - 1, "gives a float; it takes a tensor of any shape"),
        (lambda z: math.log(z), r"the function raised .*; it takes a tensor of any shape"),
        (lambda z: (z - 1).flatten().cummax(0).values.reshape(z.shape), "at a z depends on the other entries"),
        (3.0, "the function is a float, not a function"),
    ],
)
def test_a_function_that_is_no_penalty_is_refused_by_what_is_wrong(function: object, message: str) -> None:
    with pytest.raises(at.TangentError, match=f"^Penalty: .*{message}"):
        check_function(function, None)


@pytest.mark.parametrize("strength", [0.0, -2.0, math.inf, math.nan])
def test_a_strength_must_be_positive_and_finite(strength: float) -> None:
    with pytest.raises(at.TangentError, match="Penalty: the strength λ is positive and finite, got"):
        at.Penalty(lambda z: z - 1, strength=strength)


def test_a_root_between_flat_pieces_and_steps_is_found_to_rounding() -> None:
    low, high = torch.full((4,), -3.0, dtype=torch.float64), torch.full((4,), 9.0, dtype=torch.float64)
    wanted = torch.tensor([0.1, 1.0, -2.0, 7.0], dtype=torch.float64)
    for error in (
        lambda x: x - wanted,
        lambda x: torch.sign(x - wanted),
        lambda x: torch.where(x > wanted, torch.inf, -1e-300 * torch.ones_like(x)),
        lambda x: torch.expm1(5 * (x - wanted)),
        lambda x: (x - wanted) ** 9,
    ):
        torch.testing.assert_close(increasing_root(error, low, high), wanted, rtol=0.0, atol=2e-15)
    assert increasing_root(lambda x: x - 20, low, high).tolist() == [9.0] * 4
    assert increasing_root(lambda x: x + 20, low, high).tolist() == [-3.0] * 4
    torch.testing.assert_close(
        convex_root(lambda x: x.exp() - wanted.exp(), torch.exp, high), wanted, rtol=0.0, atol=2e-15
    )


def test_the_deepest_of_many_valleys_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(50, 7, generator=generator, dtype=torch.float64) * 9
    depths = torch.rand(50, 7, generator=generator, dtype=torch.float64)

    def cost(x: Tensor) -> Tensor:
        return ((x[..., None] - places[:, None]).abs() * 5 - depths[:, None]).amin(-1) + 1

    zero = torch.zeros(50, dtype=torch.float64)
    found = global_minimum(cost, lambda x: torch.zeros_like(x), zero, zero + 9)
    torch.testing.assert_close(found, places.gather(1, depths.argmax(1, keepdim=True))[:, 0], rtol=0.0, atol=1e-11)

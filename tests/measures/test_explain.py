"""explain() against planted transforms and dense least squares (theory §7)."""

import functools
import importlib
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.features.summands import Dense, Outer
from adaptive_tangents.features.transforms import Matrix, Sides

explanation = importlib.import_module(
    "adaptive_tangents.measures.explain"
)  # the function of that name hides the module

SHAPES = ((4, 3, 2), (3, 5, 1), (3, 2, 0))
STRUCTURES: dict[str, at.structures.Structure] = {
    "Fixed": at.Fixed(),
    "LayerScale": at.LayerScale(),
    "Left": at.Left(),
    "Right": at.Right(),
    "TwoSided": at.TwoSided(),
    "Full": at.Full(),
}


def start(
    n: int = 80, c: int = 2, seed: int = 0, shapes: tuple[tuple[int, int, int], ...] = SHAPES
) -> at.TangentFeatures:
    return reference.problem(seed, n=n, c=c, shapes=shapes).feats


def factor(size: int, seed: int, spread: float = 0.6) -> Matrix:
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Matrix(torch.eye(size, dtype=torch.float64) + spread * noise)


def planted(feats: at.TangentFeatures, kind: str, seed: int = 5) -> dict[str, Sides]:
    """One transform of the given kind for each block."""
    found = {}
    for k, (name, block) in enumerate(feats.blocks.items()):
        o, i = block.shape
        left = factor(o, seed + 2 * k) if kind in ("Left", "TwoSided") else None
        right = factor(i, seed + 2 * k + 1) if kind in ("Right", "TwoSided") else None
        found[name] = Sides(left, right, 1.5 + k if kind == "LayerScale" else 1.0)
    return found


def materialized(feats: at.TangentFeatures) -> at.TangentFeatures:
    return reference.features_from({name: block.features() for name, block in feats.blocks.items()})


def shared_out(feats: at.TangentFeatures, weights: tuple[float, ...]) -> at.TangentFeatures:
    """The same features with every position split into several, as for the nodes of a path average."""
    blocks = {}
    for name, block in feats.blocks.items():
        if block.outer is None:
            blocks[name] = block
            continue
        backward = torch.cat([w * block.outer.backward for w in weights], 1)
        inputs = block.outer.inputs.repeat(1, len(weights), 1)
        blocks[name] = at.features.Block(name, block.shape, block.slots, outer=Outer(backward, inputs))
    return at.TangentFeatures(feats.n, feats.c, blocks, feats.parameters)


def noised(feats: at.TangentFeatures, spread: float, seed: int = 9) -> at.TangentFeatures:
    generator = torch.Generator().manual_seed(seed)
    return reference.features_from(
        {
            name: block.features()
            + spread * torch.randn(block.features().shape, generator=generator, dtype=torch.float64)
            for name, block in feats.blocks.items()
        }
    )


def dense(feats: at.TangentFeatures, name: str, rows: list[int]) -> np.ndarray:
    return feats.blocks[name].features()[rows].numpy()


def roles(
    before: at.TangentFeatures, after: at.TangentFeatures, structure: at.structures.Structure
) -> tuple[list[int], list[int]]:
    """Which samples are fitted and which reported, found by changing one sample's end at a time."""
    usual = at.explain(before, after, structure, strengths=(1e-3,), rank=None)
    assert usual.transforms is not None
    fitted, reported = [], []
    for k in range(before.n):
        scale = torch.ones(before.n, 1, 1, 1, dtype=torch.float64)
        scale[k] = 10.0
        changed = reference.features_from({name: scale * block.features() for name, block in after.blocks.items()})
        other = at.explain(before, changed, structure, strengths=(1e-3,), rank=None)
        assert other.transforms is not None
        if not same(usual.transforms, other.transforms):
            fitted.append(k)
        elif other.total != pytest.approx(usual.total, rel=1e-9):
            reported.append(k)
    return fitted, reported


def same(a: Mapping[str, Sides], b: Mapping[str, Sides]) -> bool:
    def numbers(sides: Sides) -> list[Tensor]:
        given = [side.matrix() for side in (sides.left, sides.right) if side is not None]
        return [*given, torch.tensor(sides.scale, dtype=torch.float64)]

    return all(torch.allclose(x, y, rtol=1e-9) for k in a for x, y in zip(numbers(a[k]), numbers(b[k]), strict=True))


# ------------------------------------------------------------------------------------------------ planted transforms


@pytest.mark.parametrize("kind", ["LayerScale", "Left", "Right", "TwoSided"])
def test_a_planted_transform_is_recovered_on_samples_held_out(kind: str) -> None:
    before = start()
    truth = planted(before, kind)
    after = before.transformed(truth)
    found = at.explain(before, after, STRUCTURES[kind], strengths=(1e-12, 1e-6, 1e-2))
    assert found.total > 0.9999
    assert min(found.r2.values()) > 0.9999
    assert found.transforms is not None
    probe = start(n=5, seed=77)
    moved, expected = probe.transformed(found.transforms).kernel(), probe.transformed(truth).kernel()
    torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["LayerScale", "Left", "Right", "TwoSided"])
def test_the_default_strengths_recover_a_planted_transform_too(kind: str) -> None:
    before = start()
    assert at.explain(before, before.transformed(planted(before, kind)), STRUCTURES[kind]).total > 0.99


def test_full_recovers_any_matrix_over_all_parameters() -> None:
    case = reference.problem(3, n=60, c=1, shapes=((2, 3, 1), (2, 2, 0)))
    p = case.rows.shape[1]
    m = torch.eye(p, dtype=torch.float64) + 0.5 * torch.randn(
        p, p, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    moved = [case.split(row) for row in case.rows @ m.mT]
    after = reference.features_from({name: torch.stack([row[name] for row in moved])[:, None] for name in case.phi})
    full = at.explain(case.feats, after, at.Full(), strengths=(1e-12, 1e-2))
    assert full.total > 0.9999
    assert full.transforms is None
    assert full.strengths == {"block0": 1e-12, "block1": 1e-12}
    assert at.explain(case.feats, after, at.TwoSided()).total < 0.9


def test_full_is_dense_least_squares_from_the_samples_fitted() -> None:
    """Fewer samples than parameters: M = I + Δᵀ(φφᵀ)⁻¹φ, the pseudo-inverse solution."""
    before = start(n=20, c=2)
    after = noised(before.transformed(planted(before, "TwoSided")), 0.3)
    fitted, reported = roles(before, after, at.Left())
    found = at.explain(before, after, at.Full(), strengths=(1e-13,))

    def rows(feats: at.TangentFeatures, index: list[int]) -> np.ndarray:
        return feats.dense()[index].flatten(0, 1).numpy()

    m = reference.best_full(rows(before, fitted), rows(after, fitted))
    a, b = rows(before, reported), rows(after, reported)
    assert found.total == pytest.approx(reference.r2(a, b, a @ m.T), abs=1e-6)
    sizes = [math.prod(shape) for shape in before.parameters.values()]
    for name, columns in zip(before.blocks, np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]), strict=True):
        expected = reference.r2(a[:, columns], b[:, columns], (a @ m.T)[:, columns])
        assert found.r2[name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_fixed_explains_nothing_and_a_transform_of_another_shape_not_everything(kind: str) -> None:
    before = start()
    after = before.transformed(planted(before, "TwoSided"))
    found = at.explain(before, after, STRUCTURES[kind])
    if kind == "Fixed":
        assert found.total == 0
        assert all(value == 0 for value in found.r2.values())
    elif kind in ("TwoSided", "Full"):  # any matrix includes these
        assert found.total > 0.99
    else:
        assert found.total < 0.97


# --------------------------------------------------------------------------------------------------- dense twins


FORMS: dict[str, Callable[[at.TangentFeatures], at.TangentFeatures]] = {
    "factored": lambda feats: feats,
    "materialized": materialized,
    "in five parts": lambda feats: shared_out(feats, (0.1, 0.2, 0.4, 0.2, 0.1)),
}


@functools.cache
def moved_end(kind: str) -> tuple[at.TangentFeatures, at.TangentFeatures, at.measures.Explanation]:
    """Features of a start and of an end, and what the end's dense twins say of it."""
    before = start(n=30)
    # An end that is not a transform of the start: other inputs, signals and numbers of positions.
    after = start(n=30, seed=50, shapes=((4, 3, 5), (3, 5, 1), (3, 2, 0)))
    mixed = at.TangentFeatures(
        30, 2,
        {
            name: at.features.Block(
                name, block.shape, block.slots,
                outer=None if block.outer is None else Outer(
                    torch.cat([block.outer.backward, 0.3 * after.blocks[name].outer.backward], 1),
                    torch.cat([block.outer.inputs, after.blocks[name].outer.inputs], 1),
                ),
                dense=None if block.dense is None
                else Dense(1.2 * block.dense.values + 0.3 * after.blocks[name].dense.values),
            )
            for name, block in before.transformed(planted(before, "TwoSided")).blocks.items()
        },
        before.parameters,
    )  # fmt: skip
    expected = at.explain(materialized(before), materialized(mixed), STRUCTURES[kind])
    return before, mixed, expected


# Each kind takes every form of the start and every form of the end; over the kinds all pairs of forms come.
IN_TURN = [
    (kind, form, list(FORMS)[(i + j) % len(FORMS)])
    for i, kind in enumerate(["LayerScale", "Left", "Right", "TwoSided", "Full"])
    for j, form in enumerate(FORMS)
]


@pytest.mark.parametrize(("kind", "start_form", "end_form"), IN_TURN)
def test_every_form_of_the_same_features_gives_the_same_answer(kind: str, start_form: str, end_form: str) -> None:
    before, mixed, expected = moved_end(kind)
    found = at.explain(FORMS[start_form](before), FORMS[end_form](mixed), STRUCTURES[kind])
    assert found.strengths == expected.strengths
    for name in before.blocks:
        assert found.r2[name] == pytest.approx(expected.r2[name], abs=1e-9)
        assert found.fit_r2[name] == pytest.approx(expected.fit_r2[name], abs=1e-9)
    if found.transforms is not None:
        assert same(found.transforms, expected.transforms)


@functools.cache
def ends_and_roles(kind: str) -> tuple[at.TangentFeatures, at.TangentFeatures, list[int], list[int]]:
    """Features of a start and of an end that one kind of transform explains in part, and the roles of their samples."""
    before = start(n=24)
    after = noised(before.transformed(planted(before, "TwoSided")), 0.5)
    return before, after, *roles(before, after, STRUCTURES[kind])


@pytest.mark.parametrize("strength", [1e-9, 1e-2, 3.0])
@pytest.mark.parametrize("kind", ["Left", "Right"])
def test_one_sided_transforms_are_those_of_dense_least_squares(kind: str, strength: float) -> None:
    before, after, fitted, reported = ends_and_roles(kind)
    found = at.explain(before, after, STRUCTURES[kind], strengths=(strength,), rank=None)
    assert found.transforms is not None
    error, change = 0.0, 0.0
    for name in before.blocks:
        a, b = dense(before, name, fitted), dense(after, name, fitted)
        size = a.shape[2 if kind == "Left" else 3]
        ridge = strength * float((a**2).sum()) / size  # relative to the mean square of the features along a direction
        solve = reference.best_left if kind == "Left" else reference.best_right
        m = solve(a, b, ridge)
        side = found.transforms[name].left if kind == "Left" else found.transforms[name].right
        assert side is not None
        np.testing.assert_allclose(side.matrix().numpy(), m, rtol=1e-7, atol=1e-8)
        spec = "op,ncpi->ncoi" if kind == "Left" else "ij,ncoj->ncoi"
        held, ended = dense(before, name, reported), dense(after, name, reported)
        assert found.fit_r2[name] == pytest.approx(reference.r2(a, b, np.einsum(spec, m, a)), abs=1e-9)
        assert found.r2[name] == pytest.approx(reference.r2(held, ended, np.einsum(spec, m, held)), abs=1e-9)
        error += float(((ended - np.einsum(spec, m, held)) ** 2).sum())
        change += float(((ended - held) ** 2).sum())
    assert found.total == pytest.approx(1 - error / change, abs=1e-9)


def test_a_scale_per_layer_is_that_of_dense_least_squares() -> None:
    before = start(n=24)
    after = noised(before.transformed(planted(before, "TwoSided")), 0.5)
    fitted, _ = roles(before, after, at.LayerScale())
    found = at.explain(before, after, at.LayerScale())
    assert found.transforms is not None
    for name in before.blocks:
        a, b = dense(before, name, fitted).ravel(), dense(after, name, fitted).ravel()
        assert found.transforms[name].scale == pytest.approx(
            np.linalg.lstsq(a[:, None], b, rcond=None)[0][0], rel=1e-10
        )


def test_two_sided_alternation_reaches_a_stationary_point_of_least_squares() -> None:
    """With a tiny ridge, each factor solves the dense problem given the other."""
    before = start(n=60, shapes=((3, 4, 2),))
    after = noised(before.transformed(planted(before, "TwoSided")), 0.2)
    fitted, _ = roles(before, after, at.Left())
    found = at.explain(before, after, at.TwoSided(), strengths=(1e-10,), rank=None)
    sides = found.transforms["block0"]
    a, b = dense(before, "block0", fitted), dense(after, "block0", fitted)
    left, right = sides.left.matrix().numpy(), sides.right.matrix().numpy()
    reached = float(((b - np.einsum("op,ncpj,ij->ncoi", left, a, right)) ** 2).sum())
    rights = np.einsum("ncoj,ij->ncoi", a, right)
    better = float(((b - np.einsum("op,ncpi->ncoi", reference.best_left(rights, b), rights)) ** 2).sum())
    assert better <= reached <= better * (1 + 1e-5)
    # L-BFGS from other starts finds nothing better beyond the stopping rule's tolerance.
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    best = math.inf
    for seed in range(3):
        m_left, m_right = (factor(s, 30 + seed).values.clone().requires_grad_(True) for s in (3, 4))
        optimizer = torch.optim.LBFGS(
            [m_left, m_right], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14
        )

        def closure(m_left: Tensor = m_left, m_right: Tensor = m_right) -> Tensor:
            m_left.grad = m_right.grad = None
            value = ((y - torch.einsum("op,ncpj,ij->ncoi", m_left, x, m_right)) ** 2).sum()
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, closure().item())
    assert reached <= best * (1 + 1e-5)


def test_more_freedom_explains_more_of_the_samples_fitted() -> None:
    before = start(n=60)
    after = noised(before.transformed(planted(before, "TwoSided")), 0.5)
    r2 = {kind: at.explain(before, after, one, strengths=(1e-10,)).fit_r2 for kind, one in STRUCTURES.items()}
    for name in before.blocks:
        assert r2["Fixed"][name] == 0 < r2["LayerScale"][name]
        assert r2["LayerScale"][name] <= min(r2["Left"][name], r2["Right"][name]) + 1e-9
        assert max(r2["Left"][name], r2["Right"][name]) <= r2["TwoSided"][name] + 1e-9
        assert r2["TwoSided"][name] <= r2["Full"][name] + 1e-9
        assert r2["Full"][name] <= 1


def test_the_strength_is_chosen_for_samples_that_were_not_fitted() -> None:
    """With only noise to explain, a strong ridge is chosen, and R² on fresh samples is not far below zero."""
    before = start(n=16, c=1, shapes=((10, 3, 1),))
    after = noised(before, 1.0)
    weak = at.explain(before, after, at.Left(), strengths=(1e-8,), rank=(1, 2, 4, 8))
    free = at.explain(before, after, at.Left())
    assert weak.r2["block0"] < -0.5
    assert free.strengths["block0"] >= 1.0
    assert free.r2["block0"] > weak.r2["block0"]
    assert free.fit_r2["block0"] < weak.fit_r2["block0"]


# ---------------------------------------------------------------------------------------------------- held-out samples


@pytest.mark.parametrize("kind", ["LayerScale", "Left", "Right", "TwoSided"])
def test_samples_reported_on_are_not_those_fitted(kind: str) -> None:
    before = start(n=20, c=1)
    after = noised(before.transformed(planted(before, "TwoSided")), 0.1)
    fitted, reported = roles(before, after, STRUCTURES[kind])
    found = at.explain(before, after, STRUCTURES[kind])
    assert found.samples == (10, 5, 5)
    assert len(fitted) == 10
    assert len(reported) == 5
    assert not set(fitted) & set(reported)
    # Changing all reported samples changes R² but not the transform or its strength.
    scale = torch.ones(20, 1, 1, 1, dtype=torch.float64)
    scale[reported] = -3.0
    other = at.explain(
        before,
        reference.features_from({name: scale * block.features() for name, block in after.blocks.items()}),
        STRUCTURES[kind],
    )
    assert same(found.transforms, other.transforms)
    assert found.strengths == other.strengths
    assert found.fit_r2 == pytest.approx(other.fit_r2, rel=1e-9)
    assert abs(other.total - found.total) > 1e-3


def test_the_same_call_gives_the_same_numbers_and_a_generator_another_split() -> None:
    before = start(n=30)
    after = noised(before.transformed(planted(before, "TwoSided")), 0.5)
    state = torch.get_rng_state()
    first, again = (at.explain(before, after, at.TwoSided()) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.r2 == again.r2
    assert first.strengths == again.strengths
    one, two = (at.explain(before, after, at.TwoSided(), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.r2 == two.r2
    assert one.r2 != first.r2


def test_rotating_either_side_of_the_features_rotates_the_transform() -> None:
    before = start(n=40, shapes=((4, 3, 2),))
    after = noised(before.transformed(planted(before, "TwoSided")), 0.3)
    q, w = (torch.linalg.qr(factor(s, 8).values)[0] for s in (4, 3))
    turn = {"block0": Sides(Matrix(q), Matrix(w))}
    for kind in ("Left", "Right", "TwoSided"):
        found = at.explain(before, after, STRUCTURES[kind])
        turned = at.explain(before.transformed(turn), after.transformed(turn), STRUCTURES[kind])
        assert turned.total == pytest.approx(found.total, rel=1e-9)


# ------------------------------------------------------------------------------------------------- unusual requests


def test_a_block_that_does_not_change_or_is_zero_has_no_r2_and_leaves_the_total_alone() -> None:
    before = start(n=20)
    truth = planted(before, "Left")
    after = before.transformed({"block0": truth["block0"]})
    dead = {"block1": Sides(scale=0.0)}
    for kind in ("LayerScale", "Left", "Right", "TwoSided"):
        found = at.explain(before.transformed(dead), after.transformed(dead), STRUCTURES[kind])
        assert math.isnan(found.r2["block1"])
        assert math.isnan(found.r2["block2"])
        assert found.total == pytest.approx(found.r2["block0"], rel=1e-9)


def test_features_that_do_not_belong_together_are_refused() -> None:
    before = start(n=12)
    words = r"explain: the features differ in samples, outputs or blocks: .* make both on the same samples"
    for other in (
        start(n=11),
        start(n=12, c=1),
        start(n=12, shapes=SHAPES[:2]),
        start(n=12, shapes=((4, 2, 2), *SHAPES[1:])),
    ):
        with pytest.raises(at.TangentError, match=words):
            at.explain(before, other, at.Left())


def test_too_few_samples_no_change_and_unknown_structures_are_refused() -> None:
    few = start(n=7)
    with pytest.raises(at.TangentError, match=r"explain: needs at least 8 samples to fit, choose and report, got 7"):
        at.explain(few, few, at.Left())
    feats = start(n=8)
    for structure in STRUCTURES.values():
        with pytest.raises(at.TangentError, match=r"explain: the features are the same at start and end"):
            at.explain(feats, materialized(feats), structure)
    after = feats.transformed(planted(feats, "Left"))
    assert at.explain(feats, after, at.LayerScale()).samples == (4, 2, 2)

    class Own(at.structures.Structure):
        def solution(self, coefficients: object) -> object:
            raise NotImplementedError

        def dual(self, matrices: object) -> float:
            raise NotImplementedError

    with pytest.raises(
        at.TangentError, match=r"explain: Own has no least-squares fit; use one of the named structures"
    ):
        at.explain(feats, after, Own())


def test_a_side_too_wide_for_memory_is_refused_naming_the_block() -> None:
    model = nn.Sequential(nn.Embedding(300_000, 2), nn.Flatten(), nn.Linear(4, 1)).double()
    index = torch.randint(300_000, (12, 2), generator=torch.Generator().manual_seed(0))
    feats = at.tangent_features(model, index)
    moved = feats.transformed({"0": Sides(scale=2.0)})
    with pytest.raises(
        at.TangentError, match=r"explain: needs .* leave block '0' out with wrt, or use .* right side, of 300000"
    ):
        at.explain(feats, moved, at.TwoSided(), rank=None)
    assert at.explain(feats, moved, at.TwoSided()).r2["0"] > 0.1
    with pytest.raises(
        at.TangentError, match=r"explain: needs 128 bytes .* limit is 100 bytes; leave block '0' out .* left side, of 2"
    ):
        at.explain(feats, moved, at.Left(), memory_limit=100)


@pytest.mark.parametrize("kind", [*STRUCTURES, "Rows", "Diagonal"])
@pytest.mark.parametrize("strengths", [(), (-1.0,), (1e-4, math.nan), (math.nan,), (math.inf,), (1e-4, math.inf), 0.1])
def test_strengths_that_are_no_finite_numbers_of_zero_or_more_are_refused(
    kind: str, strengths: tuple[float, ...]
) -> None:
    before = start(n=12)
    after = before.transformed(planted(before, "Left"))
    structure = STRUCTURES.get(kind) or {"Rows": at.Rows(), "Diagonal": at.Diagonal()}[kind]
    with pytest.raises(
        at.TangentError, match=r"^explain: strengths are one or several finite numbers, each 0 or more, got"
    ):
        at.explain(before, after, structure, strengths=strengths)


@pytest.mark.parametrize("kind", [*STRUCTURES, "Rows", "Diagonal"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused_naming_block_and_sample(kind: str, bad: float) -> None:
    before = start(n=12)
    values = {name: block.features().clone() for name, block in before.blocks.items()}
    values["block1"][7, 1, 2, 0] = bad
    after = reference.features_from(values)
    structure = STRUCTURES.get(kind) or {"Rows": at.Rows(), "Diagonal": at.Diagonal()}[kind]
    words = r"^explain: the features of block 'block1' are not finite at sample 7; remove the sample"
    for pair in ((before, after), (after, before)):
        with pytest.raises(at.TangentError, match=words):
            at.explain(*pair, structure)


def test_the_order_in_which_strengths_are_given_changes_nothing() -> None:
    before = start()
    after = before.transformed(planted(before, "Left"))
    strengths = (1e-4, 1e-2, 1.0)
    for kind in ("Left", "TwoSided"):
        one, other = (at.explain(before, after, STRUCTURES[kind], strengths=s) for s in (strengths, strengths[::-1]))
        assert one.squares == other.squares


@pytest.mark.parametrize("kind", ["Left", "Right", "TwoSided", "Full"])
def test_a_common_scale_changes_no_choice_even_among_ridges_that_tie(kind: str) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    end = {name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}
    pair = at.tangent_features(model, x), at.tangent_features(model, x, params=end)
    found = [
        at.explain(
            *(feats.transformed(dict.fromkeys(feats.blocks, Sides(scale=scale))) for feats in pair), STRUCTURES[kind]
        )
        for scale in (1.0, 1.1, 1.3, 7.0, 1e12, 1e100)
    ]
    for other in found[1:]:
        assert (other.ranks, other.strengths) == (found[0].ranks, found[0].strengths)
        assert other.r2 == pytest.approx(found[0].r2, abs=1e-9)


@pytest.mark.parametrize("kind", ["LayerScale", "Left", "Right", "TwoSided", "Rows"])
@pytest.mark.parametrize("scale", [1e-160, 1e-80, 1e-30, 1e30, 1e100])
def test_a_block_of_another_scale_keeps_its_r2_and_its_share_of_the_total(kind: str, scale: float) -> None:
    structure = STRUCTURES.get(kind, at.Rows())
    before = start()
    after = before.transformed(planted(before, "Left"))
    own = at.explain(before, after, structure)
    unequal = {"block1": Sides(scale=scale)}
    found = at.explain(before.transformed(unequal), after.transformed(unequal), structure)
    assert found.r2 == pytest.approx(own.r2, rel=1e-6, abs=1e-9)
    assert found.squares["block0"] == pytest.approx(own.squares["block0"], rel=1e-9)
    assert found.squares["block1"] == pytest.approx(
        [square * scale * scale for square in own.squares["block1"]], rel=1e-6
    )
    errors, changes = (
        sum((scale * scale if name == "block1" else 1.0) * pair[k] for name, pair in own.squares.items())
        for k in (0, 1)
    )
    assert found.total == pytest.approx(1 - errors / changes, rel=1e-6, abs=1e-9)


def test_a_total_of_blocks_whose_squares_float64_does_not_hold_is_that_of_any_other_scale() -> None:
    before = start()
    after = before.transformed(planted(before, "TwoSided"))
    own = at.explain(before, after, at.Left())
    for scale in (1e-200, 1e200):
        common = {name: Sides(scale=scale) for name in before.blocks}
        found = at.explain(before.transformed(common), after.transformed(common), at.Left())
        assert found.total == pytest.approx(own.total, rel=1e-9)
        assert found.r2 == pytest.approx(own.r2, rel=1e-9)

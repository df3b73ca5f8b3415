"""Sketches are unbiased, have the stated variance, are reproducible anywhere, and are refused if they do not match."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Shared, Weighted
from adaptive_tangents.features.transforms import Entrywise, Joint, LowRank, Sides
from adaptive_tangents.linalg.hadamard import JoinedRows, hadamard, paired_rows, pairs, projection_variance
from reference import jacobian

# ------------------------------------------------------------------------------------------------ projections


def rows_of(key: tuple[int | str, ...], shape: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows s (k, o) and r (k, i) written out."""
    made = paired_rows(key, shape, count)
    return tuple(side.apply(torch.eye(size).double()).mT.numpy() for side, size in zip(made, shape, strict=True))


def estimates(a: Tensor, b: Tensor, count: int, seeds: int) -> Tensor:
    """The estimate of ⟨A, B⟩ for many seeds, by the rows written out."""
    found = []
    for seed in range(seeds):
        s, r = rows_of((seed, "block", 0), tuple(a.shape), count)
        left, right = (np.einsum("ko,oi,ki->k", s, m.numpy(), r) for m in (a, b))
        found.append(float((left * right).mean()))
    return torch.tensor(found, dtype=torch.float64)


def two(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    a = torch.randn(*shape, dtype=torch.float64)
    return a, torch.randn(*shape, dtype=torch.float64) + a


def test_entries_of_hadamard_matrices_are_signs_and_rows_are_orthogonal() -> None:
    matrix = hadamard(torch.arange(16), torch.arange(16)).double()
    assert torch.equal(matrix.abs(), torch.ones(16, 16).double())
    assert torch.equal(matrix @ matrix.mT, 16 * torch.eye(16).double())
    # The recursion that usually defines it.
    small = matrix[:8, :8]
    assert torch.equal(matrix, torch.cat([torch.cat([small, small], 1), torch.cat([small, -small], 1)]))


@pytest.mark.parametrize(("o", "i"), [(1, 8), (4, 4), (2, 16), (16, 2), (8, 1)])
def test_no_pair_of_rows_comes_up_twice_and_every_row_equally_often(o: int, i: int) -> None:
    for count in range(1, o * i + 1):
        rows, columns = pairs(o, i, count)
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == count
        for places, size in ((rows, o), (columns, i)):
            often = np.bincount(places, minlength=size)
            assert often.max() - often.min() <= max(1, math.ceil(min(o, i) / size))
            if count % max(o, i) == 0:
                assert often.max() == often.min()


@pytest.mark.parametrize(("shape", "count"), [((3, 6), 1), ((3, 6), 7), ((5, 3), 8), ((1, 6), 3), ((4, 4), 12)])
def test_the_estimate_is_unbiased_with_the_variance_of_the_formula(shape: tuple[int, int], count: int) -> None:
    a, b = two(*shape)
    found = estimates(a, b, count, 500)
    variance = projection_variance(a, b, count)
    assert abs(float(found.mean()) - float((a * b).sum())) < 4 * math.sqrt(variance / len(found))
    spread = (found - (a * b).sum()) ** 2
    assert abs(float(spread.mean()) - variance) < 4 * float(spread.std()) / math.sqrt(len(spread))


@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (1, 4)])
def test_all_coordinates_together_are_exact(shape: tuple[int, int]) -> None:
    a, b = two(*shape)
    count = math.prod(1 << (size - 1).bit_length() for size in shape)
    assert torch.allclose(estimates(a, b, count, 3), (a * b).sum().expand(3))
    assert abs(projection_variance(a, b, count)) < 1e-9


def test_in_full_turns_the_variance_is_that_of_the_interaction_alone() -> None:
    a, b = two(4, 8)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 12)
    s, r = signs[:, :4], signs[:, 4:]
    both = ((s @ a) * r).sum(1) * ((s @ b) * r).sum(1)
    left, right = ((s @ (a @ b.mT)) * s).sum(1), ((r @ (a.mT @ b)) * r).sum(1)
    interaction = float(both.var(correction=0) - left.var(correction=0) - right.var(correction=0))
    for count in (8, 16, 24, 32):
        expected = interaction / count * (32 - count) / (3 * 7)
        assert projection_variance(a, b, count) == pytest.approx(expected, abs=1e-9)


def test_the_variance_is_at_most_twice_that_of_a_projection_without_structure_in_the_worst_case() -> None:
    u, v = torch.full((64, 1), 1.0, dtype=torch.float64), torch.full((1, 64), 1.0, dtype=torch.float64)
    bound = 4 * float((u @ v).norm()) ** 4
    for count in (64, 128, 512):
        assert 0.8 * bound < count * projection_variance(u @ v, u @ v, count) <= bound
    for seed in range(20):
        torch.manual_seed(seed)
        a, b = torch.randn(2, 16, 16, dtype=torch.float64)
        terms = (a.norm() * b.norm()) ** 2 + (a * b).sum() ** 2 + ((a.mT @ b) ** 2).sum() + ((a @ b.mT) ** 2).sum()
        for count in (16, 32, 64):
            assert count * projection_variance(a, b, count) <= float(terms) <= 4 * float((a.norm() * b.norm()) ** 2)


def test_equally_many_pairs_vary_half_as_much_as_pairs_drawn_one_by_one_where_features_are_of_rank_one() -> None:
    torch.manual_seed(0)
    u, v = torch.randn(32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    signs = (torch.randint(2, (2, 20_000, 32)) * 2 - 1).double()
    drawn = (signs[0] @ u) ** 2 * (signs[1] @ v) ** 2  # one coordinate's estimate of ‖uvᵀ‖²
    matrix = torch.outer(u, v)
    assert 0.4 < 32 * projection_variance(matrix, matrix, 32) / float(drawn.var()) < 0.6


def test_many_rows_at_once_are_those_made_one_by_one() -> None:
    x = torch.randn(3, 2, 300, dtype=torch.float64)
    (many, _), (few, _) = (paired_rows((0, "a", 0), (300, 8), count) for count in (512, 20))
    slow = torch.stack([hadamard(k[None], torch.arange(300))[0] * many.signs for k in many.chosen]).double()
    assert torch.allclose(many.apply(x), x @ slow.mT)
    assert torch.allclose(few.apply(x), many.apply(x)[..., :20])
    index = torch.tensor([[3, 299], [0, 3]])
    assert torch.equal(many.of_units(index).double(), slow.mT[index])


def test_rows_are_pinned_to_their_key_for_good() -> None:
    """They must never change, because sketches on disk are compared with new ones."""
    left, right = paired_rows((7, "layer", 1), (5, 3), 4)
    assert left.signs.tolist() == [-1.0, -1.0, 1.0, -1.0, -1.0]
    assert (left.chosen.tolist(), right.chosen.tolist()) == ([7, 1, 6, 3], [0, 1, 2, 3])
    for other in ((8, "layer", 1), (7, "layer2", 1), (7, "layer", 2)):
        changed = paired_rows(other, (64, 64), 64)[0]
        same = paired_rows((7, "layer", 1), (64, 64), 64)[0]
        assert not torch.equal(changed.signs, same.signs)
        assert not torch.equal(changed.chosen, same.chosen)


def summands() -> dict[str, Any]:
    torch.manual_seed(0)
    outer = Outer(torch.randn(3, 4, 2, 5), torch.randn(3, 4, 6))
    lookup = Lookup(
        torch.randn(3, 4, 2, 5), torch.randint(6, (3, 4)), torch.rand(3, 4), torch.randn(3, 4, 2), torch.randn(2, 6)
    )
    flipped = Flipped(torch.randn(3, 4, 2, 6), torch.randn(3, 4, 5))
    return {
        "outer": outer, "lookup": lookup, "flipped": flipped, "dense": Dense(torch.randn(3, 2, 5, 6)),
        "dense, narrow": Dense(torch.randn(3, 2, 5, 3)), "shared": Shared(torch.randn(3, 2, 4), torch.randn(4, 5, 6)),
        "weighted": Weighted(torch.rand(5, 6), (outer, flipped)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", summands())
def test_coordinates_of_every_kind_of_summand_are_those_of_its_features(kind: str) -> None:
    part = summands()[kind]
    phi = part.features(slice(None)).double().numpy()
    left, right = paired_rows((0, "a", 0), phi.shape[2:], 11)
    s, r = rows_of((0, "a", 0), phi.shape[2:], 11)
    found = part.coordinates(left, right).double().numpy()
    assert np.allclose(found, np.einsum("ko,ncoi,ki->nck", s, phi, r), atol=1e-4)


# ------------------------------------------------------------------------------------------------ sketches of networks


def network() -> tuple[nn.Module, Tensor]:
    """A convolution, layers with many positions and layers with one, c = 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 12), nn.Tanh(), nn.Linear(12, 2))
    return model, torch.randn(5, 2, 5, 5)


def text() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 9), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2))
    return model, torch.randint(30, (6, 4))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"network": network, "text": text}


def spread(found: list[Tensor]) -> tuple[Tensor, Tensor]:
    stack = torch.stack(found).double()
    return stack.mean(0), stack.std(0) / math.sqrt(len(stack))


@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_sketches_are_right_on_average_over_seeds(name: str) -> None:
    model, x = MODELS[name]()
    phi = jacobian(model, x)
    exact = np.einsum("kcp,ldp->kcld", phi, phi)
    feats = at.tangent_features(model, x)
    mean, error = spread([at.Sketch(64, seed, repetitions=2).apply(feats).kernel() for seed in range(60)])
    # 4.5 standard errors in the worst of a hundred entries.
    assert float(((mean - torch.from_numpy(exact)).abs() / error.clamp_min(1e-9)).max()) < 4.5
    assert float(error.mean()) > 0


def test_the_variance_of_a_kernel_entry_is_the_sum_of_those_of_its_blocks() -> None:
    model, x = network()
    feats = at.tangent_features(model.double(), x.double())
    sketch = at.Sketch(80, repetitions=2)
    sizes = sketch.sizes({name: block.shape for name, block in feats.blocks.items()})
    expected = 0.0
    for name, size in sizes.items():
        phi = feats.blocks[name].features()
        expected += projection_variance(phi[0, 0], phi[1, 1], size) / sketch.repetitions
    found = torch.stack([at.Sketch(80, seed, repetitions=2).apply(feats).kernel()[0, 0, 1, 1] for seed in range(120)])
    off = (found - feats.kernel()[0, 0, 1, 1]) ** 2
    assert abs(float(off.mean()) - expected) < 4 * float(off.std()) / math.sqrt(len(off))


@pytest.mark.parametrize("name", MODELS)
def test_samples_in_parts_another_day_and_while_capturing_give_the_same(name: str) -> None:
    model, x = MODELS[name]()
    sketch = at.Sketch(128, seed=3)
    after = sketch.apply(at.tangent_features(model, x))
    during = at.sketch_features(model, x, sketch)
    assert torch.equal(during.dense(), at.sketch_features(model, x, sketch).dense())
    small = at.sketch_features(model, x, sketch, memory_limit=max(20_000, 3 * during.bytes))
    parts = torch.cat([at.sketch_features(model, part, sketch).dense() for part in x.split(2)])
    scale = float(after.dense().abs().max())
    for other in (during.dense(), small.dense(), parts):
        assert float((other - after.dense()).abs().max()) < 1e-5 * scale
    assert (after.p, set(after.sketched)) == (during.p, set(during.sketched))
    assert during.p <= 128


def test_factors_of_few_samples_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    sizes = []
    apply = at.sketching.sketches._sketched
    monkeypatch.setattr(
        at.sketching.sketches, "_sketched", lambda s, feats, *rest: sizes.append(feats.n) or apply(s, feats, *rest)
    )
    monkeypatch.setattr(at.sketching.sketches, "_CHUNK_BYTES", 4000)
    monkeypatch.setattr(at.sketching.sketches, "_GRADIENTS", 0)
    assert at.sketch_features(model, x, at.Sketch(64)).n == 5
    assert len(sizes) > 1
    assert max(sizes) < 5


@pytest.mark.parametrize("most", [10**9, 0])
@pytest.mark.parametrize("count", [20, 512])
def test_joined_draws_are_the_draws_side_by_side(count: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_tangents.linalg.hadamard._JOINED_BYTES", most)
    draws = tuple(paired_rows((0, "a", r), (300, 8), count)[0] for r in range(3))
    x, index = torch.randn(2, 5, 300, dtype=torch.float64), torch.tensor([[3, 299], [3, 0]])
    assert torch.allclose(JoinedRows(draws).apply(x), torch.cat([rows.apply(x) for rows in draws], -1), atol=1e-10)
    units = JoinedRows(draws).of_units(index)
    assert torch.equal(units, torch.cat([rows.of_units(index) for rows in draws], -1))
    assert torch.allclose(units.double(), JoinedRows(draws).apply(torch.eye(300, dtype=torch.float64)[index]))


def test_a_sketch_as_large_as_the_features_is_exact() -> None:
    model, x = network()
    feats = at.tangent_features(model, x)
    found = at.Sketch(feats.p).apply(feats)
    assert found.sketched == ()
    assert torch.allclose(found.kernel(), feats.kernel(), atol=1e-5)
    estimate = found.kernel_estimate()
    assert not bool(estimate.standard_error.any())
    assert estimate.error_of(lambda K: float(K.sum())).standard_error == 0


def test_blocks_no_larger_than_their_sketch_stay_exact_and_dim_is_kept() -> None:
    model, x = network()
    feats = at.tangent_features(model, x)
    exact = feats.kernel(by_block=True)
    for dim in (60, 200, 400, 700):
        found = at.Sketch(dim, repetitions=4).apply(feats)
        assert dim - 4 * len(found.sketched) <= found.p <= dim
        for name, kernel in found.kernel(by_block=True).items():
            close = torch.allclose(kernel, exact[name], atol=1e-5)
            assert close == (name not in found.sketched)
            assert found.blocks[name].shape[0] == (4 if name in found.sketched else feats.blocks[name].shape[0])


def test_fitted_shares_follow_the_kernel_and_lower_the_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1))
    with torch.no_grad():
        model[4].weight.mul_(20)
        model[2].weight.mul_(0.05)
    x = torch.randn(8, 30)
    feats = at.tangent_features(model, x)
    plain = at.Sketch(160, repetitions=2)
    fitted = plain.fitted(feats[:4])
    own = {
        name: float(kernel.diagonal(dim1=0, dim2=1).mean())
        for name, kernel in feats[:4].kernel(outputs="diagonal", by_block=True).items()
    }
    total = sum(own.values())
    for name, share in fitted.shares.items():
        assert share == pytest.approx(max(own[name] / total, 0.01 / 3), rel=1e-5)

    def error(sketch: at.Sketch) -> float:
        made = [at.Sketch(sketch.dim, seed, 2, sketch.shares).apply(feats).kernel() for seed in range(25)]
        return float(((torch.stack(made) - feats.kernel()) ** 2).mean())

    assert error(fitted) < 0.8 * error(plain)


def test_averages_and_adapted_features_are_sketched_as_any_other() -> None:
    model, x = network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    average = at.average_features(model, start, {name: v + 0.1 for name, v in start.items()}, x, tol=1e-2)
    fit = at.fit(at.tangent_features(model, x), torch.randn(5, 2), structure=at.TwoSided(at.Quadratic(0.1)), ridge=0.1)
    sketch = at.Sketch(100, repetitions=2)
    for feats in (average, fit.transform(fit.features)):
        mean, error = spread([at.Sketch(100, seed, 2).apply(feats).kernel(outputs="trace") for seed in range(25)])
        assert float(((mean - feats.kernel(outputs="trace")).abs() / error).max()) < 4.5
    assert sketch.apply(average).n == 5


# ------------------------------------------------------------------------------------------------ errors


def test_standard_errors_are_those_seen_over_seeds() -> None:
    model, x = network()
    feats = at.tangent_features(model, x)
    exact = feats.kernel()
    off, said = [], []
    for seed in range(30):
        estimate = at.Sketch(96, seed, repetitions=8).apply(feats).kernel_estimate()
        off.append((estimate.kernel - exact) ** 2)
        said.append(estimate.standard_error**2)
    ratio = torch.stack(said).mean() / torch.stack(off).mean()
    assert 0.8 < float(ratio) < 1.25
    inside = (torch.stack(off) < 4 * torch.stack(said)).double().mean()
    assert 0.88 < float(inside) < 0.97  # Student's t with 7 degrees of freedom within 2: 0.914


def test_the_estimate_is_the_mean_of_its_repetitions_and_the_error_their_spread() -> None:
    model, x = network()
    found = at.sketch_features(model, x, at.Sketch(96, repetitions=4))
    other = at.sketch_features(model, x[:3], at.Sketch(96, repetitions=4))
    for right, outputs in ((None, "full"), (other, "trace"), (None, "diagonal")):
        estimate = found.kernel_estimate(right, outputs=outputs)
        single = torch.stack([estimate.of_repetitions([r]) for r in range(4)])
        assert torch.allclose(single.mean(0), estimate.kernel, atol=1e-4)
        assert torch.allclose(single.std(0) / 2, estimate.standard_error, atol=1e-4)
        assert torch.equal(estimate.kernel, found.kernel(right, outputs=outputs))
    assert estimate.relative_error == pytest.approx(float(estimate.standard_error.norm() / estimate.kernel.norm()))


def test_errors_of_measures_are_those_of_the_jackknife_and_their_bias_is_found() -> None:
    model, x = network()
    feats, y = at.tangent_features(model, x), torch.randn(5)

    def measure(K: Tensor) -> float:
        return at.alignment(K, y)

    exact = measure(feats.kernel(outputs="trace"))
    rows = []
    for seed in range(30):
        estimate = at.Sketch(48, seed, repetitions=6).apply(feats).kernel_estimate(outputs="trace")
        found = estimate.error_of(measure)
        rows.append((found.value, found.standard_error, found.corrected))
        if seed == 0:
            rest = [measure(estimate.of_repetitions([k for k in range(6) if k != r])) for r in range(6)]
            assert found.standard_error == pytest.approx(math.sqrt(5 / 6 * sum((v - sum(rest) / 6) ** 2 for v in rest)))
            assert found.bias == pytest.approx(5 * (sum(rest) / 6 - found.value))
    value, error, corrected = torch.tensor(rows, dtype=torch.float64).unbind(1)
    assert 0.8 < float((error**2).mean().sqrt() / value.std()) < 1.6
    assert abs(float(corrected.mean()) - exact) < abs(float(value.mean()) - exact)


def test_a_tangent_kernel_by_a_sketch_says_so() -> None:
    model, x = network()
    sketch = at.Sketch(96, seed=5)
    found = at.tangent_kernel(model, x, x[:2], outputs="trace", sketch=sketch)
    assert isinstance(found, at.sketching.SketchedKernel)
    assert (found.kernel.shape, found.standard_error.shape, found.sketch) == ((5, 2), (5, 2), sketch)
    assert "8 repetitions, seed 5" in repr(found)
    assert "coordinates for" in repr(found.left)
    assert isinstance(at.tangent_kernel(model, x), Tensor)
    assert torch.equal(found.kernel, at.tangent_kernel(model, x, x[:2], outputs="trace", sketch=sketch).kernel)
    assert sketch.describe() == json.loads(json.dumps(sketch.describe()))
    assert sketch.describe()["dim"] == 96


# ------------------------------------------------------------------------------------------------ transforms


def test_a_factor_a_block_commutes_with_the_sketch() -> None:
    model, x = network()
    feats, sketch = at.tangent_features(model, x), at.Sketch(96)
    transforms = {"0": Sides(scale=3.0), "3": Sides(), "5": Sides(scale=0.5)}
    one, two = sketch.apply(feats.transformed(transforms)), sketch.apply(feats).transformed(transforms)
    assert isinstance(two, at.sketching.SketchedFeatures)
    assert torch.allclose(one.dense(), two.dense(), atol=1e-5)


@pytest.mark.parametrize("structure", [at.Fixed(), at.LayerScale(at.Quadratic(0.1)), at.Full(at.Quadratic(0.1))])
def test_fits_that_treat_blocks_as_wholes_are_those_of_the_sketched_kernel(structure: at.structures.Structure) -> None:
    model, x = network()
    found = at.sketch_features(model, x, at.Sketch(96))
    y = torch.randn(5, 2)
    fit = at.fit(found, y, structure=structure, ridge=0.1)
    plain = at.TangentFeatures(
        found.n, found.c, found.blocks, found.parameters
    )  # features with that kernel, not a sketch
    assert fit.objective == pytest.approx(at.fit(plain, y, structure=structure, ridge=0.1).objective)
    assert fit.predict(found[:2]).shape == (2, 2)
    if isinstance(structure, at.Full):
        with pytest.raises(at.TangentError, match="kernel_estimate: a joint transform"):
            fit.transform(found).kernel_estimate()
        with pytest.raises(at.TangentError, match="has a joint transform; save the features before the transform"):
            at.sketching.save_sketch(Path("nowhere"), fit.transform(found))
    else:
        adapted = fit.transform(found).kernel_estimate()
        assert torch.allclose(adapted.kernel, fit.transform(found).kernel())


@pytest.mark.parametrize(
    "structure", [at.TwoSided(), at.Left(), at.Rows(), at.Diagonal(), at.Modes(), {"0": at.Right(), "*": at.Fixed()}]
)
def test_structures_that_act_within_blocks_are_refused(structure: at.structures.Structure) -> None:
    model, x = network()
    found, y = at.sketch_features(model, x, at.Sketch(96)), torch.randn(5, 2)
    words = r": the features are a sketch \(dim 96, .*\), whose coordinates have no output and input units left"
    with pytest.raises(at.TangentError, match="^fit" + words):
        at.fit(found, y, structure=structure)
    with pytest.raises(at.TangentError, match="^certify" + words):
        at.certify(found, y, coefficients={}, structure=structure)
    with pytest.raises(at.TangentError, match="^proximal_gradient" + words):
        at.solvers.proximal_gradient(found, y, structure=structure, ridge=1.0)
    with pytest.raises(at.TangentError, match="^explain" + words):
        at.explain(found, found, structure)


@pytest.mark.parametrize(
    "transform",
    [
        Sides(LowRank(torch.eye(6)[:, :1], torch.tensor([2.0]))),
        Entrywise(torch.ones(6, 19)),
        Joint({"0": torch.ones(6, 19)}, 2.0),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_transforms_within_a_sketched_block_are_refused(transform: Any) -> None:
    model, x = network()
    found = at.sketch_features(model, x, at.Sketch(96))
    with pytest.raises(
        at.TangentError, match=r"transformed: block '0' is a sketch, on which \w+ cannot act by sides or entries"
    ):
        found.transformed({"0": transform})


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dim": 0}, "Sketch: dim is a positive number of coordinates, got 0"),
        ({"dim": 8, "repetitions": 1}, "Sketch: repetitions is at least 2, as their spread is the error, got 1"),
        ({"dim": 8, "seed": -1}, "Sketch: seed is a whole number of at least 0, got -1"),
        ({"dim": 8, "shares": {"a": 0.0}}, "Sketch: shares are positive numbers, got 0.0 for block 'a'"),
        ({"dim": 8, "shares": {"a": math.nan}}, "Sketch: shares are positive numbers, got nan"),
    ],
)
def test_what_is_no_sketch_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(at.TangentError, match=words):
        at.Sketch(**given)


def test_a_dim_too_small_for_the_blocks_is_refused_with_one_that_is_not() -> None:
    model, x = network()
    with pytest.raises(
        at.TangentError,
        match=r"dim = 20 leaves 20 coordinates for 3 .*; take a dim of at least 24",
    ):
        at.sketch_features(model, x, at.Sketch(20))
    assert at.sketch_features(model, x, at.Sketch(24)).p == 24


def test_shares_of_other_blocks_are_refused() -> None:
    model, x = network()
    with pytest.raises(at.TangentError, match=r"Sketch: shares are of blocks a and the features have 0, 3, 5"):
        at.sketch_features(model, x, at.Sketch(96, shares={"a": 1.0}))


def test_sketches_do_not_mix_with_others_or_with_exact_features() -> None:
    model, x = network()
    feats = at.tangent_features(model, x)
    found = at.Sketch(96).apply(feats)
    for other in (at.Sketch(96, 1).apply(feats), feats, at.Sketch(96, shares={"0": 1, "3": 1, "5": 1}).apply(feats)):
        for left, right in ((found, other), (other, found)):
            with pytest.raises(
                at.TangentError, match=r"kernel: the features are .* and .*; make both exact, or both with"
            ):
                left.kernel(right)
    with pytest.raises(at.TangentError, match="explain: the features are a sketch"):
        at.explain(found, feats, at.LayerScale())
    fit = at.fit(found, torch.randn(5, 2), structure=at.LayerScale(), ridge=0.1)
    with pytest.raises(at.TangentError, match="predict: the features are a sketch"):
        fit.predict(at.Sketch(96, 1).apply(feats))
    with pytest.raises(at.TangentError, match="transform: the features are a sketch"):
        fit.transform(feats)
    for call in (at.Sketch(96).apply, at.Sketch(96).fitted):
        with pytest.raises(
            at.TangentError, match=r"(apply|fitted): the features are a sketch .* already; give exact ones"
        ):
            call(found)


def test_features_that_are_zero_have_no_shares() -> None:
    model, x = network()
    feats = at.tangent_features(model, x)
    zero = feats.transformed({name: Sides(scale=0.0) for name in feats.blocks})
    with pytest.raises(at.TangentError, match="fitted: the features are zero"):
        at.Sketch(96).fitted(zero)


def test_a_sketch_that_does_not_fit_into_memory_is_refused() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(60, 40), torch.randn(400, 60)
    limit = 40_000_000
    with pytest.raises(
        at.TangentError, match=r"sketch_features: needs .* of memory .* take a smaller dim or fewer samples"
    ):
        at.sketch_features(model, x, at.Sketch(2000), memory_limit=limit)
    found = at.sketch_features(model, x[:50], at.Sketch(100))
    limited = at.sketching.SketchedFeatures(
        found.n, found.c, found.blocks, found.parameters, 20_000_000, sketch=found.sketch, shapes=found.shapes
    )
    with pytest.raises(at.TangentError, match=r"kernel_estimate: needs .* of memory"):
        limited.kernel_estimate()


@pytest.mark.parametrize("given", [{"by_block": True}, {"tile": 3}, {"precision": "mixed"}])
def test_options_that_a_sketched_kernel_has_not_are_refused(given: dict[str, Any]) -> None:
    model, x = network()
    with pytest.raises(at.TangentError, match="tangent_kernel: with sketch, kernels are made whole and in float32"):
        at.tangent_kernel(model, x, sketch=at.Sketch(96), **given)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Tensor, at.Sketch, Path]:
    model, x = network()
    sketch = at.Sketch(300, seed=2, repetitions=4)  # the last layer's block is exact
    folder = tmp_path / "sketch"
    at.sketching.save_sketch(folder, at.sketch_features(model, x[:2], sketch))
    at.sketching.append_sketch(folder, at.sketch_features(model, x[2:], sketch))
    return model, x, sketch, folder


def test_what_is_saved_and_appended_is_what_is_loaded(saved) -> None:
    model, x, sketch, folder = saved
    found, whole = at.sketching.load_sketch(folder), at.sketch_features(model, x, sketch)
    assert torch.allclose(found.dense(), whole.dense(), atol=1e-5)
    assert (found.sketch, found.shapes, found.fingerprint, found.parameters, found.sketched) == (
        whole.sketch, dict(whole.shapes), whole.fingerprint, whole.parameters, whole.sketched,
    )  # fmt: skip
    assert 0 < len(found.sketched) < len(found.blocks)
    # New samples go with them, and exact blocks' parameters are still known by name.
    assert found.kernel(whole[:1]).shape == (5, 2, 1, 2)
    fitted = at.Sketch(300, shares={"0": 1.0, "3": 2.0, "5": 1.0})
    at.sketching.save_sketch(folder / "other", at.sketch_features(model, x, fitted))
    assert at.sketching.load_sketch(folder / "other").sketch == fitted


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[3].bias[0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model, x, s: at.sketch_features(changed(model), x, s), "parameters with hash"),
        (lambda model, x, s: at.sketch_features(model, x, at.Sketch(300, 3, 4)), "sketch .*\"seed\": 2.* there"),
        (lambda model, x, s: at.sketch_features(model, x, at.Sketch(301, 2, 4)), "sketch .*\"dim\": 300"),
        (lambda model, x, s: at.sketch_features(model, x, s, wrt=["0.*", "3.*"]), "shapes of blocks"),
        (lambda model, x, s: at.sketch_features(model, x, s, output_fn=lambda out: out[:, :1]), "outputs 2 there and 1 here"),
        (lambda model, x, s: at.sketch_features(model.double(), x.double(), s), "dtype"),
        (lambda model, x, s: at.sketch_features(model, x, s, wrt="*"), None),
    ],
)  # fmt: skip
def test_features_of_another_model_or_sketch_are_not_appended(saved, make, words: str | None) -> None:
    model, x, sketch, folder = saved
    feats = make(model, x, sketch)
    if words is None:
        at.sketching.append_sketch(folder, feats)
        return
    with pytest.raises(at.TangentError, match=rf"append_sketch: .* holds another sketch: .*{words}"):
        at.sketching.append_sketch(folder, feats)
    assert at.sketching.load_sketch(folder).n == 5


def test_features_of_parameters_not_known_are_not_saved(tmp_path: Path) -> None:
    model, x = network()
    feats = at.tangent_features(model, x)
    with pytest.raises(at.TangentError, match="save_sketch: the features do not say which parameters they belong to"):
        at.sketching.save_sketch(tmp_path, at.Sketch(96).apply(feats))
    at.sketching.save_sketch(tmp_path, at.Sketch(96).apply(feats, fingerprint="step 3"))
    assert at.sketching.load_sketch(tmp_path).fingerprint == "step 3"


def test_folders_that_hold_a_sketch_or_none_are_told_apart(saved, tmp_path: Path) -> None:
    model, x, sketch, folder = saved
    feats = at.sketch_features(model, x, sketch)
    with pytest.raises(at.TangentError, match=r"save_sketch: .* holds a sketch already; use append_sketch"):
        at.sketching.save_sketch(folder, feats)
    for call, rest in ((at.sketching.append_sketch, (feats,)), (at.sketching.load_sketch, ())):
        with pytest.raises(
            at.TangentError, match=r"(append|load)_sketch: .* holds no sketch; make one with save_sketch"
        ):
            call(tmp_path / "none", *rest)


def damaged(path: Path, **changes: Any) -> None:
    """Rewrite a part's header with wrong values."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["head"])
    save_file(load_file(path), path, metadata={"head": json.dumps(head | changes)})


def test_parts_that_are_missing_broken_or_changed_are_found(saved) -> None:
    _, _, _, folder = saved
    first, second = sorted(folder.iterdir())
    kept = second.read_bytes()
    second.write_bytes(kept[:-5])
    with pytest.raises(
        at.TangentError, match=r"load_sketch: .*00001.* cannot be read .* delete it and the parts after it"
    ):
        at.sketching.load_sketch(folder)
    turned = bytearray(kept)
    turned[-1] ^= 1
    second.write_bytes(bytes(turned))
    with pytest.raises(at.TangentError, match=r"load_sketch: .*00001.* is not as it was written"):
        at.sketching.load_sketch(folder)
    second.write_bytes(kept)
    damaged(second, format=2)
    with pytest.raises(at.TangentError, match=r"is of format 2, this version reads 1; update"):
        at.sketching.load_sketch(folder)
    second.write_bytes(kept)
    first.unlink()
    with pytest.raises(at.TangentError, match=r"lacks a part: .*00001.* comes after 2 samples and 0 are there"):
        at.sketching.load_sketch(folder)


def test_a_part_that_vanishes_while_it_is_read_is_an_error(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, folder = saved

    def gone(path: Path) -> dict[str, Tensor]:
        raise OSError("gone")

    monkeypatch.setattr(at.sketching.sketch_files, "read_tensors", gone)
    with pytest.raises(at.TangentError, match=r"load_sketch: .*00000.* cannot be read \(gone\); put back a copy"):
        at.sketching.load_sketch(folder)


def test_nothing_is_left_where_a_part_cannot_be_written(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, sketch, folder = saved
    feats = at.sketch_features(model, x, sketch)
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(
        at.TangentError, match=r"append_sketch: .* cannot be written .*No space left.*; nothing was added"
    ):
        at.sketching.append_sketch(folder, feats)
    assert len(list(folder.iterdir())) == 2
    monkeypatch.undo()
    # Another process takes the next number between the check and the write.
    heads = at.sketching.sketch_files._heads
    monkeypatch.setattr(at.sketching.sketch_files, "_heads", lambda *given: heads(*given)[:1])
    with pytest.raises(
        at.TangentError, match=r"append_sketch: .*00001.* was written by another process in the meantime"
    ):
        at.sketching.append_sketch(folder, feats)
    assert len(list(folder.iterdir())) == 2

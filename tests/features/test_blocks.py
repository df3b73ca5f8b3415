"""Blocks of every kind of summand behave like the features that they represent."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture import capture
from adaptive_tangents.features import blocks, contraction, kernel_layout, plans
from adaptive_tangents.features.blocks import Block, stack_blocks, sum_blocks
from adaptive_tangents.features.summands import Dense, Flipped, Lookup, Outer, Shared, Summand, Weighted, tensors_of
from adaptive_tangents.features.transforms import LowRank, Matrix, Modal, Scaled, Side
from cases import Forward, normal
from registry import by_name

N, C, O, I, T = 4, 3, 5, 6, 2
OUTPUTS = ("full", "trace", "diagonal")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lookup(seed: int = 0, rank: int = 0) -> Lookup:
    index = torch.randint(I, (N, T), generator=torch.Generator().manual_seed(seed))
    weights = draw(N, T, seed=seed + 1)
    return Lookup(draw(N, T, C, O, seed=seed + 2), index, weights, draw(N, T, rank), draw(rank, I, seed=seed + 3))


GAINS = 1 + draw(O, I, seed=11) ** 2
SUMMANDS: dict[str, list[Summand]] = {
    "outer": [Outer(draw(N, T, C, O), draw(N, T, I, seed=1))],
    "lookup": [lookup()],
    "moved lookup": [lookup(rank=2)],
    "flipped": [Flipped(draw(N, T, C, I), draw(N, T, O, seed=1))],
    "dense": [Dense(draw(N, C, O, I))],
    "tied table": [lookup(), Flipped(draw(N, T, C, I), draw(N, T, O, seed=1))],
    "two lookups": [lookup(), lookup(seed=5, rank=1)],
    "the same lookup twice": [lookup(), lookup()],
    "weighted": [Weighted(GAINS, (Outer(draw(N, T, C, O), draw(N, T, I, seed=1)),))],
    "weighted tied table": [Weighted(GAINS, (lookup(rank=1), Flipped(draw(N, T, C, I), draw(N, T, O, seed=1))))],
    "the same gains twice": [Weighted(GAINS, (lookup(),)), Weighted(GAINS, (lookup(seed=5),))],
    "different gains": [Weighted(GAINS, (lookup(),)), Weighted(GAINS + 1, (lookup(seed=5),))],
    "weighted and shared": [Weighted(GAINS, (lookup(),)), Shared(draw(N, C, 2, seed=4), draw(2, O, I, seed=5))],
    "all": [
        Outer(draw(N, T, C, O), draw(N, T, I, seed=1)), lookup(seed=7), Flipped(draw(N, 1, C, I), draw(N, 1, O, seed=1)),
        Dense(draw(N, C, O, I, seed=3)), Shared(draw(N, C, 2, seed=4), draw(2, O, I, seed=5)),
    ],
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", SUMMANDS)


def block(kind: str) -> Block:
    return Block("b", (O, I), ()).of(SUMMANDS[kind])


def written_out(part: Summand) -> NDArray[np.float64]:
    """Φ (n, c, o, i) of a summand by its definition, entry by entry."""
    if isinstance(part, Weighted):
        return part.gains.numpy() * sum(written_out(inner) for inner in part.parts)
    t = {name: value.numpy() for name, value in vars(part).items()}
    if isinstance(part, Dense):
        return t["values"]
    phi = np.zeros((N, C, O, I))
    for k in range(N):
        if isinstance(part, Shared):
            for c in range(C):
                phi[k, c] = sum(s * d for s, d in zip(t["coefficients"][k, c], t["directions"], strict=True))
            continue
        for p in range(t["backward"].shape[1]):
            if isinstance(part, Lookup):
                h = np.zeros(I)
                h[t["index"][k, p]] = 1
                h = t["weights"][k, p] * (h + t["coefficients"][k, p] @ t["directions"])
            else:
                h = t["inputs"][k, p]
            for c in range(C):
                outer = np.outer(t["backward"][k, p, c], h)
                phi[k, c] += outer.T if isinstance(part, Flipped) else outer
    return phi


def features(kind: str) -> NDArray[np.float64]:
    return sum(written_out(part) for part in SUMMANDS[kind])


def close(made: Tensor, expected: NDArray[np.float64], *, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(made.numpy(), expected, rtol=0, atol=atol)


@every_kind
def test_products_are_those_of_the_features_written_out(kind: str) -> None:
    made, phi = block(kind), features(kind)
    close(made.features(), phi)
    close(made.features(slice(1, 3)), phi[:, :, 1:3])
    close(made.inner(draw(2, O, I, seed=9)), np.einsum("ncoi,koi->nck", phi, draw(2, O, I, seed=9).numpy()))
    close(made.combine(draw(N, C, seed=8)), np.einsum("nc,ncoi->oi", draw(N, C, seed=8).numpy(), phi))
    close(made.scaled(-2.0).features(), -2 * phi)
    close(made.map(index=torch.tensor([2, 0])).features(), phi[[2, 0]])
    close(stack_blocks([made.map(index=slice(0, 1)), made.map(index=slice(1, N))]).features(), phi)
    close(sum_blocks([made, made.scaled(2.0)]).features(), 3 * phi)
    assert (made.samples, made.outputs) == (N, C)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("budget", [1, 10**8])
@pytest.mark.parametrize("kind", ["tied table", "moved tied table", "table and layer", "three kinds"])
def test_gram_matrices_of_every_two_kinds_of_factors_add_up_to_the_kernel(kind: str, budget: int, outputs: str) -> None:
    layer, table = Outer(draw(N, T, C, O), draw(N, T, I, seed=1)), Flipped(draw(N, 3, C, I), draw(N, 3, O, seed=1))
    parts: list[Summand] = {
        "tied table": [lookup(), table], "moved tied table": [lookup(rank=2), table],
        "table and layer": [layer, lookup(seed=7)], "three kinds": [layer, lookup(seed=7, rank=1), table],
    }[kind]  # fmt: skip
    made, phi = Block("b", (O, I), ()).of(parts), sum(written_out(part) for part in parts).reshape(N, C, -1)
    other = made.map(index=torch.tensor([2, 0]))
    assert plans.factors_only(made, other)
    for symmetric, partner, rows in ((True, made, phi), (False, other, phi[[2, 0]])):
        kernel = kernel_layout.empty_kernel(N, len(rows), C, outputs, made.features())
        contraction.accumulate(kernel, made, partner, outputs, route="gram", symmetric=symmetric, budget=budget)
        if symmetric:
            kernel_layout.mirror(kernel)
        close(kernel_layout.finish(kernel, N, len(rows), C, outputs), reference.kernel(phi, rows, outputs))


def test_a_tied_table_is_contracted_by_gram_matrices_if_it_is_wide() -> None:
    words, width, t = 3000, 8, 6
    index = torch.randint(words, (N, t), generator=torch.Generator().manual_seed(0))
    looked = Lookup(draw(N, t, C, width), index, torch.ones(N, t).double(), draw(N, t, 0), draw(0, words))
    table = Block("b", (width, words), ()).of([looked, Flipped(draw(N, t, C, words), draw(N, t, width, seed=1))])
    for outputs in OUTPUTS:
        step = plans.plan_block(table, table, N, N, C, outputs, symmetric=True, budget=10**9, itemsize=8)
        assert step.route == "gram"


@pytest.mark.parametrize("kind", ["outer", "lookup", "flipped", "tied table", "weighted"])
def test_samples_of_few_positions_and_of_many_join(kind: str) -> None:
    few, phi = block(kind), features(kind)
    many = sum_blocks([few, few.map(index=torch.tensor([2, 0, 1, 3]))])
    assert many.positions > few.positions
    both = [phi, phi + phi[[2, 0, 1, 3]]]
    close(stack_blocks([few, many]).features(), np.concatenate(both))
    close(stack_blocks([many, few]).features(), np.concatenate(both[::-1]))


def side(size: int, kind: str) -> Side:
    directions = torch.linalg.qr(draw(size, 2, seed=size)).Q
    if kind == "diagonal":
        return Scaled(1 + draw(size, seed=size) ** 2)
    if kind == "low rank":
        return LowRank(directions, torch.tensor([3.0, 0.5], dtype=torch.float64))
    return Matrix(draw(size, size, seed=size + 1))


@every_kind
@pytest.mark.parametrize("sides", ["low rank", "matrix", "diagonal"])
def test_transforms_act_on_both_sides_twice_over(kind: str, sides: str) -> None:
    left, right = side(O, sides), side(I, sides)
    once, twice = (
        block(kind).transformed(left, right),
        block(kind).transformed(left, right).transformed(None, right, 2.0),
    )
    a, b = left.matrix().numpy(), right.matrix().numpy()
    close(once.features(), a @ features(kind) @ b.T)
    close(twice.features(), 2 * a @ features(kind) @ b.T @ b.T)
    if kind == "lookup" and sides != "matrix":
        assert twice.lookup is not None
    if kind == "weighted" and sides == "diagonal":
        assert twice.weighted is not None
        assert twice.dense is None


@every_kind
def test_gains_act_on_entries_twice_over_and_before_sides(kind: str) -> None:
    made, right = block(kind).entrywise(GAINS), side(I, "matrix")
    phi = GAINS.numpy() * features(kind)
    close(made.features(), phi)
    close(made.entrywise(GAINS + 2).features(), (GAINS + 2).numpy() * phi)
    close(made.transformed(None, right).entrywise(GAINS).features(), GAINS.numpy() * (phi @ right.matrix().numpy().T))
    close(sum_blocks([made, block(kind)]).features(), phi + features(kind))
    close(stack_blocks([made, block(kind)]).features(), np.concatenate([phi, features(kind)]))
    close(made.map(dtype=torch.float32).map(dtype=torch.float64).features() - made.features(), 0 * phi, atol=1e-4)
    held = sum(part.numel() * 8 for summand in made.summands for part in tensors_of(summand))
    assert made.bytes == held
    if kind in ("outer", "lookup", "moved lookup", "flipped", "tied table"):
        assert made.kind == "factored"
        assert made.positions == block(kind).positions
        assert made.bytes == block(kind).bytes + GAINS.nbytes


@every_kind
@pytest.mark.parametrize(
    "other", ["outer", "lookup", "moved lookup", "flipped", "dense", "tied table", "weighted", "all"]
)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_kernels_between_blocks_of_any_kinds_are_those_of_the_features(kind: str, other: str, outputs: str) -> None:
    a, b = block(kind), block(other).map(index=slice(0, 3))
    for left, right, symmetric in ((a, b, False), (a, a, True)):
        n, m = left.samples, right.samples
        kernel = kernel_layout.empty_kernel(n, m, C, outputs, draw(1))  # type: ignore[arg-type]
        step = plans.plan_block(
            left,
            right,
            n,
            m,
            C,
            outputs,
            symmetric=symmetric,
            budget=10**9,
            itemsize=8,  # type: ignore[arg-type]
        )
        contraction.accumulate(
            kernel,
            left,
            right,
            outputs,
            route=step.route,
            symmetric=symmetric,
            budget=step.working_bytes,  # type: ignore[arg-type]
        )
        if symmetric:
            kernel_layout.mirror(kernel)
        phis = [features(kind).reshape(N, C, -1), features(other if not symmetric else kind).reshape(N, C, -1)[:m]]
        close(kernel_layout.finish(kernel, n, m, C, outputs), reference.kernel(*phis, outputs))  # type: ignore[arg-type]


def test_a_side_by_modes_is_the_kronecker_product_of_its_factors() -> None:
    modal = Modal((2, 3), (Matrix(draw(2, 2)), LowRank(torch.eye(3, dtype=torch.float64)[:, :1], draw(1))))
    whole = np.eye(7)
    whole[:6, :6] = np.kron(draw(2, 2).numpy(), np.diag([float(draw(1)), 1, 1]))
    close(modal.apply(draw(4, 7)), draw(4, 7).numpy() @ whole.T)
    close(modal.matrix(), whole[:6, :6])
    close(Modal((2, 3), (None, None)).apply(draw(4, 7)), draw(4, 7).numpy())


def test_the_matrix_of_modes_is_the_product_of_theirs_whichever_are_absent() -> None:
    one, other = Matrix(draw(2, 2)), Matrix(draw(3, 3).mT)
    for first, second in ((one, other), (None, other), (one, None)):
        modal = Modal((2, 3), (first, second))
        parts = [np.eye(2) if first is None else one.values, np.eye(3) if second is None else other.values]
        assert modal.matrix().dtype == torch.float64
        close(modal.matrix(), np.kron(*(np.asarray(part) for part in parts)))
    assert torch.equal(Modal((2, 3), (None, None)).matrix(), torch.eye(6))


def test_modes_of_a_convolution_are_its_input_channels_and_its_window() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, (2, 3), groups=2), nn.Flatten(), nn.Linear(6 * 9, 2)).double()
    feats = at.tangent_features(model, normal(3, 4, 4, 5)[..., :5])
    assert feats.blocks["0"].modes == (("in", 2), ("spatial", 6))
    assert feats.blocks["2"].modes == ()
    sizes = tuple(size for _, size in feats.blocks["0"].modes)
    moved = feats.transformed({"0": at.features.transforms.Sides(right=Modal(sizes, (Matrix(draw(2, 2)), None)))})
    weights = feats.blocks["0"].features()[..., :-1].reshape(3, 2, 6, 2, 6)
    expected = torch.einsum("ij,ncojs->ncois", draw(2, 2), weights).reshape(3, 2, 6, 12)
    close(moved.blocks["0"].features()[..., :-1], expected.numpy())
    close(moved.blocks["0"].features()[..., -1], feats.blocks["0"].features()[..., -1].numpy())


@pytest.mark.parametrize(
    "name", ["convolutions", "tokens", "a convolution called twice", "ResNet-18", "a layer called twice"]
)
def test_summing_positions_where_that_takes_less_room_changes_no_number(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = by_name[name] if name in by_name else next(c for key, c in by_name.items() if "resnet" in key.lower())
    model, x = case.build()
    feats = at.tangent_features(model, x, wrt=case.wrt, output_fn=case.output_fn)
    monkeypatch.setattr(blocks, "_WORTH_SUMMING", 1)
    small = at.tangent_features(model, x, wrt=case.wrt, output_fn=case.output_fn)
    assert small.bytes <= feats.bytes
    if name != "a layer called twice":
        assert any(block.kind == "summed" for block in small.blocks.values())
    assert all(b.kind != "materialized" or feats.blocks[k].kind == "materialized" for k, b in small.blocks.items())
    torch.testing.assert_close(small.dense(), feats.dense(), rtol=0, atol=1e-10)
    torch.testing.assert_close(small.kernel(), feats.kernel(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        small.kernel(feats, outputs="trace"), feats.kernel(feats, outputs="trace"), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "name", ["Tanh", "convolutions", "embedding of indices", "LSTM", "control flow by item()", "tokens first"]
)
def test_passes_over_a_few_samples_at_a_time_give_the_same_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = by_name[name].build()
    feats = at.tangent_features(model, x)
    monkeypatch.setattr(capture, "PASS_BYTES", 1)
    parts = at.tangent_features(model, x)
    torch.testing.assert_close(parts.dense(), feats.dense(), rtol=0, atol=1e-12)
    assert {k: (b.kind, b.shape) for k, b in parts.blocks.items()} == {
        k: (b.kind, b.shape) for k, b in feats.blocks.items()
    }


def test_embeddings_are_never_one_hot() -> None:
    """For a table of a million rows, the features hold only the rows looked up."""
    model = Forward(lambda m, x: m.out(m.table(x).mean(1)), table=nn.Embedding(1_000_000, 4), out=nn.Linear(4, 2))
    index = torch.randint(1_000_000, (6, 5), generator=torch.Generator().manual_seed(0))
    index[3] = index[0]
    feats = at.tangent_features(model, index)
    assert feats.bytes < 10_000
    assert feats.blocks["table"].shape == (4, 1_000_000)
    assert float(feats.kernel(outputs="trace", by_block=True)["table"].abs().sum()) > 0
    narrow = Forward(lambda m, x: m.out(m.table(x).mean(1)), table=nn.Embedding(30, 4), out=nn.Linear(4, 2))
    kept, small = torch.unique(index, return_inverse=True)
    narrow.table.weight.data[: len(kept)] = model.table.weight.data[kept]
    narrow.out.load_state_dict(model.out.state_dict())
    torch.testing.assert_close(feats.kernel(), at.tangent_features(narrow, small).kernel(), rtol=1e-12, atol=1e-12)


def test_plans_say_how_long_a_kernel_will_take() -> None:
    model, x = by_name["convolutions"].build()
    plan = at.tangent_features(model, x).plan()
    assert plan.seconds == pytest.approx(sum(block.seconds for block in plan.blocks))
    assert 0 < plan.seconds < 60
    assert "seconds" in str(plan)
    assert " s" in str(plan).splitlines()[-1]
    twice = replace(plan.blocks[0], operations=2 * plan.blocks[0].operations)
    assert twice.seconds == pytest.approx(2 * plan.blocks[0].seconds)

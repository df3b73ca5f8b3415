"""Every case of the registry keeps every promise, checked against dense autograd features."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from adaptive_tangents.capture.batches import take
from adaptive_tangents.features import contraction, kernel_layout
from adaptive_tangents.features.blocks import Block, sum_blocks
from adaptive_tangents.features.summands import Dense, Outer
from adaptive_tangents.features.transforms import Entrywise, Joint, LowRank, Matrix, Sides, squared, transform_matrices
from cases import Case, Forward, mlp, normal
from prepared import OUTPUTS, draw, every_case, every_case_and, over, prepare, slots
from registry import CASES, by_name

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
every_outputs = pytest.mark.parametrize("outputs", OUTPUTS)


# Features and their products.


@every_case
def test_dense_features_equal_autograd(case: Case) -> None:
    p = prepare(case)
    assert p.agrees(p.feats.dense(), p.phi)
    assert p.agrees(p.other.dense(), p.other_phi)


@over([case for case in CASES if case.tolerance is None])
def test_features_in_single_precision_are_those_in_double(case: Case) -> None:
    p = prepare(case)
    model, x = case.build()
    model, x = model.float(), convert(x)
    feats = at.tangent_features(model, x, wrt=case.wrt, output_fn=case.output_fn)
    assert feats.dtype == torch.float32
    p = replace(p, tolerance=1e-4)
    assert p.agrees(feats.dense(), p.phi)
    for outputs in OUTPUTS:
        assert p.agrees(feats.kernel(outputs=outputs), reference.kernel(p.phi, p.phi, outputs))


def convert(x: Any) -> Any:
    """A batch in single precision; indices stay unchanged."""
    if isinstance(x, Mapping):
        return {name: convert(tensor) for name, tensor in x.items()}
    if isinstance(x, tuple):
        return tuple(convert(tensor) for tensor in x)
    return x.detach().float() if x.is_floating_point() else x


@every_case
def test_blocks_are_in_factors_exactly_where_layers_allow_it(case: Case) -> None:
    factored = {name: block for name, block in prepare(case).feats.blocks.items() if block.kind == "factored"}
    if case.may_be_whole is None:
        assert tuple(factored) == case.factored
        return
    parts = [name for block in factored.values() for name in slots(block)]
    whole = [name for name, shape in prepare(case).feats.parameters.items() if len(shape) > 1 and name not in parts]
    assert [name for name in whole if not any(fnmatchcase(name, known) for known in case.may_be_whole)] == []


@every_case
def test_every_selected_parameter_is_in_exactly_one_block_and_vectors_split_into_blocks_and_join_again(
    case: Case,
) -> None:
    p = prepare(case)
    named = dict(p.model.named_parameters())
    chosen = [name for name, v in named.items() if (v.requires_grad if case.names is None else name in case.names)]
    chosen = [name for name in chosen if named[name].numel()]  # an empty parameter has no features
    assert list(p.feats.parameters.items()) == [(name, tuple(named[name].shape)) for name in chosen]
    assert sorted(name for block in p.feats.blocks.values() for name in slots(block)) == sorted(chosen)
    assert (p.feats.n, p.feats.c, p.feats.p) == p.phi.shape
    for block in p.feats.blocks.values():
        assert (block.samples, block.outputs) == p.phi.shape[:2]
        assert block.features().shape == (*p.phi.shape[:2], *block.shape)
        assert sum(slot.width for slot in block.slots) == block.shape[1]
    vector = draw(p.feats.p)
    matrices = p.feats.split(vector)
    shapes = {name: block.shape for name, block in p.feats.blocks.items()}
    assert {name: tuple(matrix.shape) for name, matrix in matrices.items()} == shapes
    assert torch.equal(p.feats.join(matrices), vector)


@every_case
def test_products_with_features_are_those_of_the_dense_ones_and_adjoint(case: Case) -> None:
    p = prepare(case)
    v, a = draw(p.feats.p).to(p.feats.dtype), draw(p.feats.n, p.feats.c, seed=1).to(p.feats.dtype)
    forward, back = p.feats.matvec(v), p.feats.rmatvec(a)
    assert p.agrees(forward, p.phi @ v.double().numpy(), scale=float(np.abs(p.phi).sum()))
    assert p.agrees(back, np.tensordot(a.double().numpy(), p.phi, 2), scale=float(np.abs(p.phi).sum()))
    gap = float((forward * a).sum() - (back * v).sum())
    assert abs(gap) <= p.tolerance * float(np.abs(p.phi).sum())


def test_a_block_matrix_is_the_weight_with_the_bias_as_its_last_column() -> None:
    model, x = by_name["Tanh"].build()
    feats = at.tangent_features(model, x)
    matrices = feats.split(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(matrices["2"], torch.cat([model[2].weight, model[2].bias[:, None]], 1))


@every_case
def test_selected_samples_have_the_features_of_those_samples(case: Case) -> None:
    p = prepare(case)
    for index in (slice(0, 1), slice(p.feats.n // 2, None), torch.tensor([p.feats.n - 1, 0, 0])):
        part = p.feats[index]
        assert part.n == len(p.phi[index])
        assert p.agrees(part.dense(), p.phi[index], scale=float(np.abs(p.phi).max()))
        assert p.agrees(part.kernel(p.feats), reference.kernel(p.phi[index], p.phi))


@every_case
def test_converted_features_are_the_same_to_rounding(case: Case) -> None:
    p = prepare(case)
    single = p.feats.to(torch.float32)
    assert single.dtype == torch.float32
    assert single.dense().dtype == torch.float32
    gap = float((single.dense().double() - p.feats.dense().double()).abs().max())
    assert gap <= max(1e-6, case.tolerance or 0) * np.abs(p.phi).max()
    assert single.to(torch.float64).kernel().dtype == torch.float64


# Kernels.


@every_case
def test_kernel_equals_that_of_the_dense_features(case: Case) -> None:
    """Whole and by block, with blocks adding up; with itself, exactly symmetric; and with another batch."""
    p = prepare(case)
    scale = float(np.abs(p.phi).max() ** 2 * 100)
    for outputs, (partner, other) in product(OUTPUTS, ((None, p.phi), (p.other, p.other_phi))):
        where = f"outputs {outputs}, {'one batch' if partner is None else 'two batches'}"
        whole, expected = p.feats.kernel(partner, outputs=outputs), reference.kernel(p.phi, other, outputs)
        kernels = p.feats.kernel(partner, outputs=outputs, by_block=True)
        assert list(kernels) == list(p.feats.blocks)
        assert p.agrees(whole, expected), f"the whole kernel, {where}"
        assert p.agrees(sum(kernels.values()), expected), f"the sum of blocks, {where}"
        for name, kernel in kernels.items():
            parts = [reference.restricted(z, p.feats.parameters, slots(p.feats.blocks[name])) for z in (p.phi, other)]
            assert p.agrees(kernel, reference.kernel(*parts, outputs), scale=scale), f"block {name}, {where}"
        for name, kernel in {"whole": whole, **kernels}.items() if partner is None else ():
            mirrored = kernel.permute(2, 3, 0, 1) if outputs == "full" else kernel.transpose(0, 1)
            assert torch.equal(kernel, mirrored), f"symmetry of {name}, {where}"


@every_case
def test_features_of_one_sample_go_with_features_of_many(case: Case) -> None:
    p = prepare(case)
    alone = at.tangent_features(p.model, take(p.x, slice(0, 1)), wrt=case.wrt, output_fn=case.output_fn)
    assert p.agrees(alone.kernel(p.feats), reference.kernel(p.phi[:1], p.phi))


@every_case_and("limited", (("full", 150), ("trace", 400), ("full", 4000), ("diagonal", 900), ("trace", 10**9)))
def test_all_routes_give_the_same_kernel_under_any_budget(case: Case, limited: tuple[str, int]) -> None:
    p, (outputs, budget) = prepare(case), limited
    feats, other = (f.to(kernel_layout.working_dtype(f.dtype)) for f in (p.feats, p.other))
    n, m, c = p.feats.n, p.other.n, p.feats.c
    for route in ("gram", "materialize", "nested")[: 3 if outputs == "full" else 2]:
        square = kernel_layout.empty_kernel(n, n, c, outputs, feats._like)
        wide, tall = (kernel_layout.empty_kernel(*shape, c, outputs, feats._like) for shape in ((n, m), (m, n)))
        for name, a in feats.blocks.items():
            b = other.blocks[name]
            contraction.accumulate(square, a, a, outputs, route=route, symmetric=True, budget=budget)
            contraction.accumulate(wide, a, b, outputs, route=route, symmetric=False, budget=budget)
            contraction.accumulate(tall, b, a, outputs, route=route, symmetric=False, budget=budget)
        kernel_layout.mirror(square)
        made = [
            kernel_layout.finish(kernel, *shape, c, outputs)
            for kernel, shape in ((square, (n, n)), (wide, (n, m)), (tall, (m, n)))
        ]
        assert p.agrees(made[0], reference.kernel(p.phi, p.phi, outputs))
        assert p.agrees(made[1], reference.kernel(p.phi, p.other_phi, outputs))
        assert p.agrees(made[2], reference.kernel(p.other_phi, p.phi, outputs))


@every_outputs
@pytest.mark.parametrize("route", ["gram", "nested", "materialize"])
@pytest.mark.parametrize("positions", [1, 3])
def test_large_symmetric_kernels_are_made_in_panels_without_a_gap(outputs: str, route: str, positions: int) -> None:
    if route == "nested" and outputs != "full":
        pytest.skip("the nested route is for full kernels")
    n, c, o, i = 531, 2, 3, 2
    outer = Outer(draw(n, positions, c, o), draw(n, positions, i, seed=1))
    block = Block("a", (o, i), (), outer=outer)
    phi = np.einsum("ntco,nti->ncoi", outer.backward.numpy(), outer.inputs.numpy()).reshape(n, c, o * i)
    expected = reference.kernel(phi, phi, outputs)
    for budget in (40_000, 10**8):
        kernel = kernel_layout.empty_kernel(n, n, c, outputs, outer.inputs)
        contraction.accumulate(kernel, block, block, outputs, route=route, symmetric=True, budget=budget)
        kernel_layout.mirror(kernel)
        made = kernel_layout.finish(kernel, n, n, c, outputs).numpy()
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_a_budget_below_a_single_entry_still_gives_the_kernel() -> None:
    test_all_routes_give_the_same_kernel_under_any_budget(
        by_name["a layer called on tokens and on their mean"], ("full", 1)
    )


def test_the_plan_takes_the_route_with_fewer_operations() -> None:
    wide, deep = (
        at.tangent_features(
            Forward(lambda m, x: m.fc(x).tanh().mean(1), fc=nn.Linear(width, 2)), normal(6, tokens, width)
        )
        for width, tokens in ((50, 1), (1, 12))
    )
    assert [step.route for step in wide.plan().blocks] == ["gram"]
    assert [step.route for step in deep.plan().blocks] == ["materialize"]
    printed = str(wide.plan(outputs="trace"))
    assert "gram" in printed
    assert "kernel 288 bytes" in printed  # 6 · 6 entries of 8 bytes


def test_a_kernel_of_bfloat16_features_is_made_in_float32() -> None:
    model, x = by_name["Tanh"].build()
    feats = at.tangent_features(model.bfloat16(), x.bfloat16())
    phi = feats.dense()
    assert phi.dtype == torch.bfloat16
    for outputs in OUTPUTS:
        kernel = feats.kernel(outputs=outputs)
        assert kernel.dtype == torch.float32
        exact = feats.to(torch.float64).kernel(outputs=outputs)
        assert float((kernel.double() - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
    assert at.tangent_kernel(model, x.bfloat16(), tile=2).dtype == torch.float32


# Transforms: adapted features are features of the explicitly transformed Jacobian.


def adapted(case: Case, kind: str, seed: int = 3) -> tuple[at.TangentFeatures, at.TangentFeatures, list[np.ndarray]]:
    """Features of both batches with one kind of transform, and their dense references."""
    p = prepare(case)
    feats, phis = [p.feats, p.other], [p.phi, p.other_phi]
    for step in kind.split(" then "):
        seed += 1
        if step == "joint":
            vector = draw(p.feats.p, seed=seed) / draw(p.feats.p, seed=seed).norm()
            transform = Joint(p.feats.split(vector), 1.7)
            transforms = dict.fromkeys(p.feats.blocks, transform)
            phis = [reference.joint(phi, vector.numpy(), 1.7) for phi in phis]
        elif step == "entrywise":
            vector = 1 + draw(p.feats.p, seed=seed) ** 2
            transforms = {name: Entrywise(gains) for name, gains in p.feats.split(vector).items()}
            phis = [phi * vector.numpy() for phi in phis]
        else:
            transforms = {}
            for k, (name, block) in enumerate(p.feats.blocks.items()):
                o, i = block.shape
                left = draw(o, o, seed=seed + k) if step in ("left", "both") else None
                right = draw(i, i, seed=seed + k + 100) if step in ("right", "both") else None
                scale = 1.5 + k if step in ("scale", "both") else 1.0
                transforms[name] = Sides(*(None if side is None else Matrix(side) for side in (left, right)), scale)
                arrays = {"left": left, "right": right}
                known = {role: None if side is None else side.numpy() for role, side in arrays.items()}
                phis = [
                    reference.sided(
                        phi,
                        p.feats.parameters,
                        slots(block),
                        scale=scale,
                        inputs_first=block.slots[0].transposed,
                        **known,
                    )
                    if block.shape[0] * block.shape[1]
                    else phi
                    for phi in phis
                ]
        feats = [f.transformed(transforms) for f in feats]
    return feats[0], feats[1], phis


RICH = ("joint then both then joint", "scale then entrywise then joint then entrywise then left")


@every_case_and("kind", (RICH[0], "left", RICH[1], "right then right", *RICH, "scale then joint", RICH[0], "entrywise"))
def test_adapted_features_and_kernels_equal_explicitly_transformed_ones(case: Case, kind: str) -> None:
    feats, other, (phi, other_phi) = adapted(case, kind)
    p = prepare(case)
    p = replace(p, tolerance=1e-9 if feats.dtype == torch.float64 else max(2e-3, p.tolerance))
    assert p.agrees(feats.dense(), phi)
    scale = float(np.abs(phi).max() * max(np.abs(other_phi).max(), np.abs(phi).max()) * phi.shape[-1])
    for outputs in OUTPUTS:
        assert p.agrees(feats.kernel(outputs=outputs), reference.kernel(phi, phi, outputs), scale=scale)
        assert p.agrees(feats.kernel(other, outputs=outputs), reference.kernel(phi, other_phi, outputs), scale=scale)
    assert p.agrees(sum(feats.kernel(by_block=True).values()), reference.kernel(phi, phi), scale=scale)
    v = draw(feats.p).to(feats.dtype)
    assert p.agrees(feats.matvec(v), phi @ v.double().numpy(), scale=float(np.abs(phi).sum()))
    a = draw(feats.n, feats.c).to(feats.dtype)
    assert p.agrees(feats.rmatvec(a), np.tensordot(a.double().numpy(), phi, 2), scale=float(np.abs(phi).sum()))
    part = feats[torch.tensor([feats.n - 1])]
    assert p.agrees(part.kernel(other), reference.kernel(phi[-1:], other_phi), scale=scale)


def test_a_kernel_of_adapted_features_with_plain_ones_is_their_inner_product() -> None:
    p = prepare(by_name["LayerNorm"])
    feats, _, (phi, _) = adapted(by_name["LayerNorm"], "joint")
    assert p.agrees(feats.kernel(p.other), reference.kernel(phi, p.other_phi))
    assert p.agrees(p.other.kernel(feats), reference.kernel(p.other_phi, phi))


def test_a_low_rank_side_is_its_matrix() -> None:
    directions, _ = torch.linalg.qr(draw(7, 3))
    side = LowRank(directions, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    by_hand = np.eye(7) + directions.numpy() @ np.diag([0.0, 1.0, 4.0]) @ directions.numpy().T
    rows = draw(4, 5, 7)
    for made, expected in (
        (side.matrix(), by_hand),
        (side.squared().matrix(), by_hand.T @ by_hand),
        (side.inverse().matrix(), np.linalg.inv(by_hand)),
        (side.apply(rows), rows.numpy() @ by_hand.T),
        (Matrix(side.matrix()).apply(rows), rows.numpy() @ by_hand.T),
        (squared({"w": Sides(left=side)})["w"].left.matrix(), by_hand @ by_hand),
        (squared({"w": Sides(right=Matrix(side.matrix()))})["w"].right.matrix(), by_hand @ by_hand),
    ):
        np.testing.assert_allclose(made.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["both", "joint"])
def test_matrices_are_transformed_as_features_are(kind: str) -> None:
    p = prepare(by_name["Tanh"])
    o, i = p.feats.blocks["2"].shape
    vector = draw(p.feats.p)
    transforms = {
        "both": {"2": Sides(Matrix(draw(o, o)), Matrix(draw(i, i, seed=1)), 1.3)},
        "joint": dict.fromkeys(p.feats.blocks, Joint(p.feats.split(vector / vector.norm()), 2.5)),
    }[kind]
    moved = p.feats.transformed(transforms)[slice(0, 1)].dense()[0, 0]
    by_matrix = p.feats.join(transform_matrices(p.feats.split(p.feats.dense()[0, 0]), transforms))
    torch.testing.assert_close(moved, by_matrix, rtol=1e-10, atol=1e-12)


def test_a_block_without_a_transform_stays_as_it_is() -> None:
    p = prepare(by_name["Tanh"])
    moved = p.feats.transformed({"2": Sides(scale=2.0)})
    assert moved.blocks["0"] is p.feats.blocks["0"]
    assert torch.equal(moved.blocks["2"].features(), 2 * p.feats.blocks["2"].features())


def test_a_sum_of_blocks_has_the_sum_of_their_features_whatever_their_kinds() -> None:
    one, two = adapted(by_name["convolutions"], "joint"), adapted(by_name["convolutions"], "joint", seed=9)
    for name, block in one[0].blocks.items():
        parts = [block, two[0].blocks[name], prepare(by_name["convolutions"]).feats.blocks[name]]
        total = sum_blocks([*parts, replace(parts[2], outer=None, dense=Dense(parts[2].features()))])
        expected = sum(part.features() for part in parts) + parts[2].features()
        torch.testing.assert_close(total.features(), expected, rtol=1e-10, atol=1e-12)
        feats = replace(one[0], blocks={name: total})
        phi = expected.flatten(2).numpy()
        np.testing.assert_allclose(feats.kernel().numpy(), reference.kernel(phi, phi), rtol=1e-9, atol=1e-9)


# Linear algebra of features for networks of any shape.


@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    n=st.integers(1, 5),
    tokens=st.integers(0, 3),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_kernels_of_any_network_are_positive_and_commute_with_transforms(
    widths: list[int], n: int, tokens: int, bias: bool, seed: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = mlp(nn.Tanh, bias=bias, widths=tuple(widths))
        model = Forward(lambda m, x: m.body(x).mean(1) if tokens else m.body(x), body=body)
        x = normal(n, tokens, widths[0]) if tokens else normal(n, widths[0])
        y = normal(2, *x.shape[1:])
    feats, other = at.tangent_features(model, x), at.tangent_features(model, y)
    phi = reference.jacobian(model, x)
    kernel = feats.kernel().flatten(2).flatten(0, 1)
    scale = float(kernel.abs().max()) + 1e-12
    np.testing.assert_allclose(kernel.numpy(), phi.reshape(len(kernel), -1) @ phi.reshape(len(kernel), -1).T, atol=1e-9)
    assert float(torch.linalg.eigvalsh(kernel)[0]) >= -1e-10 * scale
    transforms = {
        name: Sides(Matrix(draw(block.shape[0], block.shape[0])), Matrix(draw(block.shape[1], block.shape[1])))
        for name, block in feats.blocks.items()
    }
    moved, other = feats.transformed(transforms), other.transformed(transforms)
    dense = [f.dense().flatten(0, 1) for f in (moved, other)]
    expected = (dense[0] @ dense[1].mT).reshape(n, feats.c, 2, feats.c)
    torch.testing.assert_close(moved.kernel(other), expected, rtol=1e-9, atol=1e-9 * (1 + float(expected.abs().max())))
    v = draw(feats.p)
    torch.testing.assert_close(moved.matvec(v), feats.inner(adjoint(feats, transforms, v)), rtol=1e-9, atol=1e-9)


def adjoint(feats: at.TangentFeatures, transforms: dict[str, Sides], v: Tensor) -> dict[str, Tensor]:
    """Mᵀ on coefficients: B = M_Lᵀ Θ M_R."""
    return {
        name: transforms[name].left.matrix().mT @ matrix @ transforms[name].right.matrix()
        for name, matrix in feats.split(v).items()
    }


# Refusals.


def tanh_features(**keywords: object) -> at.TangentFeatures:
    model, x = by_name["Tanh"].build()
    return at.tangent_features(model, x, **keywords)


def test_dense_is_refused_above_the_memory_limit() -> None:
    feats = replace(tanh_features(), limit=10_000)
    with pytest.raises(at.TangentError, match=r"dense: needs .* limit is 10 kB; use kernel, matvec or rmatvec, which"):
        feats.dense()


def test_a_kernel_is_refused_above_the_memory_limit_before_anything_is_made() -> None:
    feats = replace(tanh_features(), limit=2_000)
    message = r"kernel: needs 2.59 kB .* 2 kB; use outputs='trace' or 'diagonal', tangent_kernel, or fewer samples"
    with pytest.raises(at.TangentError, match=message):
        feats.kernel()
    assert feats.kernel(outputs="trace").shape == (6, 6)


def test_unknown_outputs_are_refused_by_name() -> None:
    feats = tanh_features()
    unchecked = type(feats).kernel.__wrapped__ if hasattr(type(feats).kernel, "__wrapped__") else type(feats).kernel
    with pytest.raises(at.TangentError, match="kernel: outputs is 'full', 'trace' or 'diagonal', got 'sum'"):
        unchecked(feats, outputs="sum")


def test_vectors_of_another_size_are_refused() -> None:
    feats = tanh_features()
    with pytest.raises(at.TangentError, match=r"matvec: expected shape \(83,\), got \(82,\)"):
        feats.matvec(draw(82))
    with pytest.raises(at.TangentError, match=r"rmatvec: expected shape \(6, 3\), got \(3, 6\)"):
        feats.rmatvec(draw(3, 6))
    with pytest.raises(at.TangentError, match=r"split: expected a vector of p = 83 entries, got shape \(5,\)"):
        feats.split(draw(5))


def test_vectors_of_another_dtype_or_device_are_refused() -> None:
    feats = tanh_features()
    with pytest.raises(
        at.TangentError, match=r"matvec: features are torch.float64 on cpu, got torch.float32 on cpu; conv"
    ):
        feats.matvec(draw(83).float())
    with pytest.raises(
        at.TangentError, match=r"rmatvec: features are .* on cpu, got torch.float64 on meta; convert one"
    ):
        feats.rmatvec(draw(6, 3).to("meta"))


def test_features_of_different_models_are_refused_as_partners() -> None:
    model, x = by_name["GELU"].build()
    other = at.tangent_features(model, x, wrt="2.*")
    with pytest.raises(
        at.TangentError, match=r"kernel: the two features differ: blocks .* make both from the same model"
    ):
        tanh_features().kernel(other)


def test_partners_of_another_dtype_or_device_are_refused() -> None:
    feats = tanh_features()
    message = r"kernel: features are torch.float64 on cpu and torch.float32 on cpu; convert one with .to"
    with pytest.raises(at.TangentError, match=message):
        feats.kernel(feats.to(torch.float32))
    away = {
        name: replace(block, outer=Outer(block.outer.backward.to("meta"), block.outer.inputs.to("meta")))
        for name, block in feats.blocks.items()
    }
    with pytest.raises(at.TangentError, match=r"kernel: features are torch.float64 on cpu and torch.float64 on meta"):
        feats.kernel(replace(feats, blocks=away))


def test_a_transform_of_an_unknown_block_is_refused() -> None:
    with pytest.raises(at.TangentError, match=r"transformed: there is no block 'fc'; blocks are 0, 2, 4"):
        tanh_features().transformed({"fc": Sides()})


def test_features_print_their_size_and_blocks() -> None:
    assert (
        repr(tanh_features()) == "TangentFeatures(n=6, c=3, p=83, {0: 6×5 factored, 2: 5×7 factored, 4: 3×6 factored})"
    )

"""Precision of kernels: rounding errors of each contraction, bounded and compared with float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.features.kernel_layout import Outputs, Precision, check_precision
from adaptive_tangents.features.summands import Dense, Lookup, Outer

UNIT = 2.0**-8  # half the distance of bfloat16 from 1 to the next number
# Errors relative to √(K(x, x) K(x′, x′)), as stated in docs/precision.md.
STATED: dict[Precision, float] = {"float32": 1e-5, "mixed": 1e-6, "bfloat16": 4e-3}


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)]
    return nn.Sequential(*layers), torch.randn(6, 3, 8, 8)


def dense() -> tuple[nn.Module, Tensor]:
    layers = [layer for _ in range(5) for layer in (nn.Linear(40, 40), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(40, 3)), torch.randn(9, 40)


def words() -> tuple[nn.Module, Tensor]:
    layers = [nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Flatten(), nn.Linear(96, 2)]
    return nn.Sequential(*layers), torch.randint(20, (7, 6))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "convolutions": convolutions,
    "dense": dense,
    "words": words,
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name]()


def entries(K: Tensor) -> Tensor:
    return K.double().flatten(2).flatten(0, 1)


def sizes(K: Tensor) -> Tensor:
    """√(K(x, x) K(x′, x′)) for every entry."""
    diagonal = entries(K).diagonal().sqrt()
    return torch.outer(diagonal, diagonal)


def reference(feats: at.TangentFeatures) -> Tensor:
    """The kernel of the given features, as one product of dense float64 arrays."""
    phi = feats.to(torch.float64).dense().flatten(0, 1)
    return phi @ phi.mT


@pytest.mark.parametrize("precision", STATED)
@pytest.mark.parametrize("name", NETWORKS)
def test_errors_stay_within_what_is_stated(name: str, precision: Precision) -> None:
    model, x = made(name)
    feats = at.tangent_features(model, x)
    exact = reference(feats)
    off = (entries(feats.kernel(precision=precision)) - exact).abs()
    diagonal = exact.diagonal().sqrt()
    assert float((off / torch.outer(diagonal, diagonal)).max()) < STATED[precision]
    assert float(off.max()) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_rounding_factors_to_bfloat16_errs_by_no_more_than_the_bound(name: str) -> None:
    """|ΔK(x, x′)| ≤ ((1 + u)⁴ − 1) Σ_ℓ a_ℓ(x) a_ℓ(x′), a_ℓ = Σ_t |δ_t||h_t|: each of four vectors is off by a share u."""
    model, x = made(name)
    feats = at.tangent_features(model.double(), x.double() if x.is_floating_point() else x)
    bound = torch.zeros(feats.n * feats.c, feats.n * feats.c, dtype=torch.float64)
    for block in feats.blocks.values():
        (part,) = block.summands
        if isinstance(part, Dense):
            size = part.values.flatten(2).norm(dim=2)
        else:
            assert isinstance(part, Outer | Lookup)
            inputs = part.inputs.norm(dim=2) if isinstance(part, Outer) else part.weights.abs()
            size = (part.backward.norm(dim=3) * inputs[..., None]).sum(1)
        bound += torch.outer(size.flatten(), size.flatten())
    off = (entries(feats.to(torch.bfloat16).to(torch.float64).kernel()) - entries(feats.kernel())).abs()
    assert bool((off <= ((1 + UNIT) ** 4 - 1) * bound).all())
    assert torch.equal(feats.to(torch.bfloat16).kernel(), feats.to(torch.bfloat16).kernel(precision="bfloat16"))


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_adds_blocks_in_float64_and_nothing_else(name: str, outputs: Outputs) -> None:
    model, x = made(name)
    feats = at.tangent_features(model, x)
    blocks = feats.kernel(outputs=outputs, by_block=True)
    assert {kernel.dtype for kernel in blocks.values()} == {torch.float32}
    total = torch.zeros_like(next(iter(blocks.values())), dtype=torch.float64)
    for kernel in blocks.values():
        total += kernel
    mixed = feats.kernel(outputs=outputs, precision="mixed")
    assert mixed.dtype == torch.float64
    assert torch.equal(mixed, total)
    by_block = feats.kernel(outputs=outputs, by_block=True, precision="mixed")
    assert all(torch.equal(by_block[key], kernel.double()) for key, kernel in blocks.items())


def test_small_blocks_are_not_lost_beside_a_large_one() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(40)])
    with torch.no_grad():
        for k, layer in enumerate(model):
            # Features are f/w: the first is of size 1e4, all others of size 1.
            layer.weight.fill_(1e-4 if k == 0 else 1.0)
        model[1].weight.fill_(1e4)
    feats = at.tangent_features(model, torch.ones(1, 1))
    exact = float(reference(feats))
    errors = {p: abs(float(feats.kernel(precision=p)) - exact) for p in ("float32", "mixed", "float64")}
    assert errors["float64"] <= errors["mixed"] < 1e-9 * exact < 1e-7 * exact < 30 * errors["float32"]


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_contracts_in_float64_whatever_the_features_are(name: str) -> None:
    model, x = made(name)
    feats = at.tangent_features(model, x)
    found = feats.kernel(precision="float64")
    assert torch.equal(found, feats.to(torch.float64).kernel())
    assert float(((entries(found) - reference(feats)).abs() / sizes(found)).max()) < 1e-14
    other = feats[:2].kernel(feats[3:], precision="float64")
    assert torch.allclose(other, found[:2, :, 3:], rtol=1e-12, atol=1e-12)


def test_features_in_float64_are_never_contracted_in_less_unless_rounded() -> None:
    model, x = made("dense")
    feats = at.tangent_features(model.double(), x.double())
    for precision in ("float32", "mixed", "float64"):
        assert torch.equal(feats.kernel(precision=precision), feats.kernel())
    assert feats.kernel(precision="bfloat16").dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "mixed", "float64", "bfloat16"])
def test_kernels_of_any_precision_are_exactly_symmetric(precision: Precision) -> None:
    model, x = made("dense")
    found = entries(at.tangent_features(model, x).kernel(precision=precision))
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("precision", ["float32", "mixed", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_tiling_stays_within_the_bound_and_the_same_tile_gives_the_same_bits(
    name: str, precision: Precision
) -> None:
    model, x = made(name)
    exact = entries(at.tangent_kernel(model, x, precision="float64"))
    for tile in (3, None):
        found = at.tangent_kernel(model, x, tile=tile, precision=precision)
        assert torch.equal(found, at.tangent_kernel(model, x, tile=tile, precision=precision))
        # The passes that make features of other tiles also round differently.
        bound = STATED.get(precision, STATED["mixed"])
        assert float(((entries(found) - exact).abs() / sizes(found)).max()) < bound


def test_by_block_in_tiles_keeps_its_precision() -> None:
    model, x = made("convolutions")
    found = at.tangent_kernel(model, x, tile=4, by_block=True, precision="float64")
    whole = at.tangent_features(model, x).kernel(by_block=True, precision="float64")
    for name, kernel in found.items():
        assert kernel.dtype == torch.float64
        assert torch.allclose(kernel, whole[name], rtol=1e-5, atol=1e-5)


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(
        at.TangentError, match=r"^kernel: precision is 'float32', 'mixed', 'float64' or 'bfloat16', got"
    ):
        check_precision("kernel", "half")


def test_memory_for_other_dtypes_is_counted_before_it_is_taken() -> None:
    model, x = made("dense")
    feats = at.tangent_features(model, x)
    plans = {p: feats._plan(None, "full", kernels=1, precision=p) for p in ("float32", "mixed", "float64")}
    size = (feats.n * feats.c) ** 2
    assert {p: plan.kernel_bytes for p, plan in plans.items()} == {
        "float32": 4 * size,
        "mixed": 12 * size,
        "float64": 8 * size,
    }
    assert plans["float64"].feature_bytes == feats.bytes + 2 * max(block.bytes for block in feats.blocks.values())
    limited = at.TangentFeatures(feats.n, feats.c, feats.blocks, feats.parameters, 10 * size)
    limited.kernel(precision="float64")
    with pytest.raises(at.TangentError, match=r"kernel: needs .* of memory"):
        limited.kernel(precision="mixed")

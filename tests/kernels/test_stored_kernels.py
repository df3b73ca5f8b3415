"""Kernels on disk give the same numbers as in memory and are never loaded whole."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from scipy.sparse.linalg import cg
from torch import Tensor, nn

import adaptive_tangents as at
import theory_reference as reference
from adaptive_tangents.kernels import derived_kernels as views
from adaptive_tangents.kernels import tiles as tiled
from adaptive_tangents.kernels.operators import KernelOperator, kernel_operator
from forked import code_of, fork
from stored_twin import Twin, twin

N, TILE = 23, 7
Stores = Mapping[str, at.storage.KernelStore]


def network(c: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, c)).double()


def inputs(n: int = N, seed: int = 1) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(*shape: int, seed: int = 2) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def stores(folder: Path) -> Stores:
    """Stores on disk, by ``outputs``, and the features that they were made from."""
    model, x = network(), inputs()
    made = {
        outputs: at.kernel_to_store(model, x, folder / outputs, outputs=outputs, tile=TILE)
        for outputs in ("full", "trace", "diagonal")
    }
    made["by block"] = at.kernel_to_store(model, x, folder / "blocks", outputs="full", by_block=True, tile=TILE)
    made["others"] = at.kernel_to_store(model, inputs(9, 5), folder / "others", x2=x, outputs="full", tile=TILE)
    made["float32"] = at.kernel_to_store(model, x, folder / "float32", outputs="trace", tile=TILE, dtype=torch.float32)
    return made


def dense(outputs: str, *, c: int = 2) -> Tensor:
    return at.tangent_features(network(c), inputs()).kernel(outputs=outputs)


def matrix(kernel: Tensor) -> np.ndarray:
    """A kernel (n, c, m, c), (n, m) or (n, m, c) as a matrix acting on vectors of (m, c)."""
    if kernel.ndim == 3:
        kernel = torch.einsum("kla,ab->kalb", kernel, torch.eye(kernel.shape[2], dtype=kernel.dtype))
    return (kernel.flatten(2).flatten(0, 1) if kernel.ndim == 4 else kernel).numpy()


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal", "others"])
@pytest.mark.parametrize("columns", [None, 3])
def test_products_with_a_store_are_those_with_its_matrix(stores: Stores, outputs: str, columns: int | None) -> None:
    store = stores[outputs]
    whole = matrix(store.read())
    ridge = 0.0 if outputs == "others" else 0.3
    operator = kernel_operator(store, ridge=ridge)
    assert operator.shape == whole.shape
    x = targets(whole.shape[1], *([columns] if columns else [])).numpy()
    expected = whole @ x + (ridge * x if ridge else 0)
    np.testing.assert_allclose(operator @ x, expected, rtol=1e-12)
    np.testing.assert_allclose(operator.apply(torch.from_numpy(x)).numpy(), expected, rtol=1e-12)
    y = targets(whole.shape[0], *([columns] if columns else [])).numpy()
    np.testing.assert_allclose(operator.H @ y, whole.T @ y + (ridge * y if ridge else 0), rtol=1e-12)


def test_scipy_solves_with_the_operator(stores: Stores) -> None:
    store, b = stores["trace"], targets(N).numpy()
    found, failed = cg(kernel_operator(store, ridge=1.0), b, rtol=1e-12)
    assert not failed
    np.testing.assert_allclose(found, np.linalg.solve(matrix(store.read()) + np.eye(N), b), rtol=1e-8)


def test_a_block_is_a_kernel_of_its_own_and_blocks_add_up_to_the_whole(stores: Stores) -> None:
    store, x = stores["by block"], targets(2 * N)
    parts = [kernel_operator(at.kernels.KernelBlock(store, name)).apply(x) for name in store.blocks]
    for name, part in zip(store.blocks, parts, strict=True):
        np.testing.assert_allclose(part.numpy(), matrix(store.read(block=name)) @ x.numpy(), rtol=1e-12)
    whole = kernel_operator(store).apply(x)
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, kernel_operator(stores["full"]).apply(x), rtol=1e-10, atol=1e-10)


def test_tiles_are_read_once_where_memory_allows_and_again_where_it_does_not() -> None:
    kernel, x = dense("trace"), targets(N)
    tiles = 10  # of the triangle of 4 × 4
    for limit, kept in ((10**6, 10), (3 * 8 * TILE**2, 3)):
        store = twin(kernel, TILE)
        operator = kernel_operator(store, memory_limit=limit)
        for _ in range(3):
            operator.apply(x)
        assert len(store.reads) == tiles + 2 * (tiles - kept)


@pytest.mark.parametrize("c", [None, 2])
def test_columns_diagonal_and_matrix_of_tiles_are_those_of_the_kernel(c: int | None) -> None:
    kernel = dense("trace" if c is None else "full")
    whole, w = torch.from_numpy(matrix(kernel)), c or 1
    for K in (kernel, twin(kernel, TILE), twin(kernel, TILE, most=TILE)):
        operator = kernel_operator(K)
        chosen = torch.tensor([20, 3, 8])
        wanted = (chosen[:, None] * w + torch.arange(w)).flatten()
        torch.testing.assert_close(operator.columns(chosen), whole[:, wanted])
        torch.testing.assert_close(operator.entries(), whole.diagonal())
        torch.testing.assert_close(operator.rounded(), whole.float())
        torch.testing.assert_close(operator.kernel.dense(), kernel)


# ------------------------------------------------------------------------------------------------------------- measures


MEASURES: Mapping[str, Callable[[object, object, Tensor], list[float]]] = {
    "alignment": lambda K, K0, y: [at.alignment(K, y)],
    "centered alignment": lambda K, K0, y: [at.alignment(K, y, centered=True)],
    "CKA": lambda K, K0, y: [at.cka(K, K0), at.cka(K0, K)],
    "decomposition": lambda K, K0, y: [
        (found := at.decompose(K, K0, y)).initial_weight,
        found.target_weight,
        found.explained,
    ],
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_measures_of_a_store_are_those_of_its_kernel(stores: Stores, outputs: str, measure: str) -> None:
    store, y = stores[outputs], targets(N, 2)
    other = at.tangent_features(network(), inputs(), wrt="0.*").kernel(outputs=outputs)
    expected = MEASURES[measure](store.read(), other, y)
    for K0 in (other, twin(other, TILE), twin(other, 5)):
        assert MEASURES[measure](store, K0, y) == pytest.approx(expected, rel=1e-10)
        assert MEASURES[measure](twin(store.read(), TILE, most=TILE), K0, y) == pytest.approx(expected, rel=1e-10)


def test_measures_of_kernels_in_memory_do_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, other, y = dense("full"), at.tangent_features(network(), inputs(), wrt="0.*").kernel(), targets(N, 2)
    expected = [measure(kernel, other, y) for measure in MEASURES.values()]
    monkeypatch.setattr(tiled, "_HELD_TILE", 10)
    for found, whole in zip((measure(kernel, other, y) for measure in MEASURES.values()), expected, strict=True):
        assert found == pytest.approx(whole, rel=1e-11)


def test_unbiased_cka_of_stores_is_that_of_their_kernels(stores: Stores) -> None:
    store, other = stores["trace"], dense("trace") ** 2
    expected = reference.unbiased_cka(store.read()[:9, :9].numpy(), other[:9, :9].numpy())
    a, b = twin(store.read()[:9, :9], 4, most=4), twin(other[:9, :9], 4)
    assert at.cka(a, b, unbiased=True) == pytest.approx(expected, rel=1e-7)
    whole = at.cka(store.read(), other, unbiased=True)
    for K in (twin(other, TILE), twin(other, 5), other):
        assert at.cka(store, K, unbiased=True) == pytest.approx(whole, rel=1e-10)
        assert at.cka(K, store, unbiased=True) == pytest.approx(whole, rel=1e-10)


def test_a_kernel_that_is_constant_up_to_rounding_is_refused_by_tiles_too() -> None:
    flat = twin(torch.full((9, 9), 0.1, dtype=torch.float64))
    for unbiased in (False, True):
        with pytest.raises(at.TangentError, match=r"cka: a kernel (is zero|has no unbiased variance)"):
            at.cka(flat, twin(torch.eye(9)), unbiased=unbiased)


def test_measures_read_a_tile_at_a_time_and_twice_at_most(stores: Stores) -> None:
    y = targets(N, 2)
    for measure, passes in (("alignment", 1), ("centered alignment", 2), ("decomposition", 2)):
        store = twin(stores["full"].read(), TILE, most=TILE)
        MEASURES[measure](store, twin(dense("full"), TILE), y) if measure != "decomposition" else at.decompose(
            store, twin(dense("full") ** 2, TILE), y
        )
        assert len(store.reads) == passes * 10, measure


def test_the_residual_of_a_stored_decomposition_is_a_kernel_by_tiles(stores: Stores) -> None:
    kernel, y = stores["full"].read(), targets(N, 2)
    other = at.tangent_features(network(), inputs(), wrt="0.*").kernel()
    expected = at.decompose(kernel, other, y).residual
    found = at.decompose(stores["full"], twin(other, TILE), y).residual
    assert isinstance(found, tiled.Tiled)
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-10)
    diagonal = torch.einsum("kaka->ka", expected)
    torch.testing.assert_close(found.diagonal(), diagonal, rtol=0, atol=1e-10)
    # A measure accepts the store directly.
    assert at.alignment(found, y) == pytest.approx(at.alignment(expected, y), abs=1e-9)
    with pytest.raises(
        at.TangentError, match=r"dense: needs 16.9 kB .*; read some samples at a time, or ask for tiles"
    ):
        found.dense(memory_limit=1000)


def test_centring_by_tiles_is_centring_with_an_explicit_h() -> None:
    kernel = dense("full")
    whole = reference.center(kernel.numpy())
    for K in (kernel, twin(kernel, 5)):
        view = views.CenteredKernel(tiled.tiled(tiled.Request("test"), K))
        np.testing.assert_allclose(view.dense().numpy(), whole, atol=1e-11)
    rows = torch.randn(5, 2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # not symmetric
    np.testing.assert_allclose(
        views.CenteredKernel(tiled.tiled(tiled.Request("test"), rows)).dense().numpy(),
        reference.center(rows.numpy()),
        atol=1e-12,
    )


@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_representability_by_products_is_that_by_eigenvectors(stores: Stores, outputs: str) -> None:
    store = stores[outputs]
    r = targets(N, 2) if outputs == "full" else targets(N)
    expected = at.representability(store.read(), r, jitter=1e-4)
    same = at.representability(store, r, jitter=1e-4)
    assert same.rkhs_norm == pytest.approx(expected.rkhs_norm, rel=1e-10)
    torch.testing.assert_close(same.leave_one_out, expected.leave_one_out, rtol=1e-8, atol=1e-8)
    found = at.representability(store, r, jitter=1e-4, form="matrix-free", top=6)
    assert found.rkhs_norm == pytest.approx(expected.rkhs_norm, rel=1e-9)
    torch.testing.assert_close(found.energy, expected.energy[:6], rtol=1e-9, atol=1e-9)
    assert (found.leave_one_out, found.jitter) == (None, pytest.approx(expected.jitter, rel=1e-12))
    assert found.residual < 1e-10
    with pytest.raises(at.TangentError, match="leave_one_out_rmse: residuals need the diagonal of K₀⁻¹"):
        _ = found.leave_one_out_rmse
    # If memory does not hold the eigenvectors, products are used.
    assert at.representability(store, r, jitter=1e-4, top=3, memory_limit=8_000).leave_one_out is None
    with pytest.raises(at.TangentError, match=r"representability: needs .*; use form='matrix-free'"):
        at.representability(store, r, form="dense", memory_limit=2_000)


def test_a_norm_that_products_do_not_find_is_warned_of() -> None:
    kernel = torch.diag(torch.logspace(0, -14, 60, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with pytest.warns(
        at.TangentWarning, match=r"representability: solving with K₀ \+ jitter stopped at .* raise jitter"
    ):
        at.representability(twin(turn @ kernel @ turn.mT), targets(60), jitter=1e-17, form="matrix-free", top=3)


# ---------------------------------------------------------------------------------------------------------- eigenvalues


def spectrum(n: int, seed: int = 0) -> Tensor:
    rows = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows * torch.logspace(0, -3, n, dtype=torch.float64)) @ rows.mT


def test_lanczos_on_tiles_finds_the_largest_eigenvalues() -> None:
    kernel = spectrum(450)
    values, vectors = torch.linalg.eigh(kernel)
    for K in (kernel, twin(kernel, 100, most=100)):
        found = at.kernels.kernel_eigen(K, 6)
        assert (found.form, found.products > 6, found.residual < 1e-10) == ("lanczos", True, True)
        torch.testing.assert_close(found.values, values[-6:].flip(0), rtol=1e-10, atol=0)
        torch.testing.assert_close((found.vectors.mT @ vectors[:, -6:].flip(1)).abs(), torch.eye(6).double())
        assert found.trace == pytest.approx(float(kernel.trace()), rel=1e-12)


def test_small_kernels_and_most_eigenvalues_come_from_the_matrix(stores: Stores) -> None:
    found = at.kernels.kernel_eigen(stores["full"], 2 * N)
    torch.testing.assert_close(
        found.values, torch.linalg.eigvalsh(torch.from_numpy(matrix(stores["full"].read()))).flip(0)
    )
    assert (found.form, found.products) == ("dense", 0)
    assert found.residual < 1e-13
    with pytest.raises(
        at.TangentError, match=r"kernel_eigen: needs .*; ask for fewer eigenvalues than the kernel has rows"
    ):
        at.kernels.kernel_eigen(stores["full"], 2 * N, memory_limit=10_000)
    some = at.kernels.kernel_eigen(stores["full"], 20, memory_limit=10_000)
    assert some.form == "lanczos"
    torch.testing.assert_close(some.values, found.values[:20])


# ----------------------------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("form", ["dense", "matrix-free"])
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_regression_on_a_store_solves_its_system(stores: Stores, outputs: str, form: str, ridge: float) -> None:
    store, r = stores[outputs], targets(N, 2)
    found = at.kernel_regression(store, r, ridge=ridge, form=form)
    whole = matrix(store.read())
    system = whole + ridge * np.eye(len(whole))
    right = r.numpy() if outputs == "trace" else r.numpy().reshape(-1)
    expected = np.linalg.solve(system, right)
    np.testing.assert_allclose(found.dual.numpy(), expected.reshape(N, 2), rtol=1e-6, atol=1e-6)
    missing = system @ found.dual.numpy().reshape(expected.shape) - right
    assert found.residual == pytest.approx(np.linalg.norm(missing) / np.linalg.norm(right), abs=2e-12)
    assert found.objective == pytest.approx(float((expected * right).sum()), rel=1e-8)
    fitted = whole @ found.dual.numpy().reshape(expected.shape)
    assert found.feasibility == pytest.approx(np.linalg.norm(fitted - right) / np.linalg.norm(right), abs=1e-12)
    assert (found.form, found.converged, found.steps > 0) == (form, True, form == "matrix-free")
    in_memory = at.kernel_regression(store.read(), r, ridge=ridge, form=form)
    torch.testing.assert_close(in_memory.dual, found.dual, rtol=1e-7, atol=1e-7)


def test_regression_is_the_fit_of_fixed_features(stores: Stores, folder: Path) -> None:
    feats, r = at.tangent_features(network(), inputs()), targets(N, 2)
    fit = at.fit(feats, r, structure=at.Fixed(), ridge=0.1)
    found = at.kernel_regression(stores["full"], r, ridge=0.1)
    torch.testing.assert_close(found.dual, fit.dual, rtol=1e-8, atol=1e-8)
    assert found.objective == pytest.approx(fit.objective, rel=1e-10)
    others = at.tangent_features(network(), inputs(9, 5))
    for K in (stores["others"], others.kernel(feats)):
        torch.testing.assert_close(found.predict(K), fit.predict(others), rtol=1e-8, atol=1e-8)
    # One kernel shared by all outputs, and one per output.
    for outputs in ("trace", "diagonal"):
        one = at.kernel_regression(stores[outputs], r, ridge=0.1)
        K = others.kernel(feats, outputs=outputs)
        expected = torch.einsum("kl,lc->kc" if outputs == "trace" else "klc,lc->kc", K, one.dual)
        torch.testing.assert_close(one.predict(K), expected)


def test_one_preconditioner_of_columns_and_one_in_float32_lead_to_the_same_solution() -> None:
    kernel = spectrum(150)
    store, r = twin(kernel, 40, most=40), targets(150, 3)
    rounded = at.kernel_regression(store, r, ridge=1e-3, form="matrix-free")
    sketched = at.kernel_regression(store, r, ridge=1e-3, form="matrix-free", memory_limit=200_000)
    plain = np.linalg.solve(kernel.numpy() + 1e-3 * np.eye(150), r.numpy())
    for found in (rounded, sketched):
        np.testing.assert_allclose(found.dual.numpy(), plain, rtol=1e-6, atol=1e-7 * np.abs(plain).max())
    assert rounded.steps < 10 < sketched.steps


def test_memory_decides_the_form_and_a_form_that_does_not_fit_is_refused() -> None:
    store, r = twin(spectrum(100), 30, most=30), targets(100)
    assert at.kernel_regression(store, r, ridge=0.1, memory_limit=400_000).form == "dense"
    assert at.kernel_regression(store, r, ridge=0.1, memory_limit=200_000).form == "matrix-free"
    with pytest.raises(
        at.TangentError, match=r"kernel_regression: needs 320 kB .* 200 kB; use form='matrix-free', or fewer samples"
    ):
        at.kernel_regression(store, r, ridge=0.1, form="dense", memory_limit=200_000)


def test_a_kernel_that_single_precision_cannot_factorize_is_preconditioned_by_columns() -> None:
    turn, _ = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = torch.linspace(1, 2, 60, dtype=torch.float64)
    values[0] = -1.0  # not a kernel: no multiple of rounding makes it positive
    kernel = (turn * values) @ turn.mT
    operator = kernel_operator(kernel)
    near = operators_near(operator)
    assert bool(torch.isfinite(near(targets(60))).all())


def operators_near(operator: KernelOperator) -> Callable[[Tensor], Tensor]:
    from adaptive_tangents.kernels.regression import preconditioner

    return preconditioner(operator, 10**9)


def test_a_regression_that_stops_short_says_so() -> None:
    store, r = twin(spectrum(100), 30), targets(100)
    with pytest.warns(at.TangentWarning, match=r"kernel_regression did not converge: residual .* raise max_steps"):
        found = at.kernel_regression(store, r, ridge=1e-3, form="matrix-free", max_steps=2, memory_limit=100_000)
    assert not found.converged
    assert found.residual > 1e-10
    u = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    with pytest.warns(at.TangentWarning, match=r"residual .*, jitter .*; use a positive ridge or raise tol"):
        found = at.kernel_regression(torch.outer(u, u), torch.tensor([1.0, 0.0, 0.0]))
    assert found.jitter > 0


# ------------------------------------------------------------------------------------------------------------------ fit


STRUCTURES: Mapping[str, at.structures.Structure | Mapping[str, at.structures.Structure]] = {
    "Fixed": at.Fixed(),
    "Full": at.Full(at.Quadratic(0.3)),
    "LayerScale": at.LayerScale(at.Quadratic(0.1)),
    "LayerScale, not convex": at.LayerScale(at.Absolute(0.05)),
    "LayerScale, two penalties": at.LayerScale(at.Quadratic(1.0).compose(at.Quadratic(2.0))),
    "LayerScale, a user's penalty": at.LayerScale(at.Penalty(lambda z: (z - 1) ** 2 + 0.5 * (z - 1) ** 4)),
    "scale invariant": at.LayerScale(at.Quadratic(1.0), scale_invariant=True),
    "mixed": {"0": at.Fixed(), "2": at.LayerScale(at.Quadratic(1.0)), "*": at.Full(at.Quadratic(2.0))},
}


@pytest.mark.parametrize(
    ("name", "ridge", "form", "stored"),
    [
        ("Fixed", 0.0, "dense", True),
        ("Full", 0.3, "matrix-free", True),
        ("LayerScale", 0.0, "matrix-free", False),
        ("LayerScale", 0.3, "dense", True),
        ("LayerScale, not convex", 0.3, "dense", False),
        ("LayerScale, two penalties", 0.0, "dense", False),
        ("LayerScale, a user's penalty", 0.3, "matrix-free", False),
        ("scale invariant", 0.3, "auto", True),
        ("mixed", 0.0, "auto", False),
    ],
)
def test_a_fit_to_kernels_is_the_fit_to_features(
    stores: Stores, name: str, ridge: float, form: str, stored: bool
) -> None:
    feats, r, structure = at.tangent_features(network(), inputs()), targets(N, 2) / 10, STRUCTURES[name]
    in_memory = at.fit(feats, r, structure=structure, ridge=ridge, tol=1e-11)
    K = stores["by block"] if stored else feats.kernel(by_block=True)
    found = at.fit(K, r, structure=structure, ridge=ridge, form=form, tol=1e-11)
    assert found.converged, found.reason
    assert found.objective == pytest.approx(in_memory.objective, rel=1e-9)
    assert found.stationarity < 1e-5
    assert found.feasibility == pytest.approx(in_memory.feasibility, rel=1e-4, abs=1e-9)
    assert (found.lower_bound is None) == (in_memory.lower_bound is None)
    if found.lower_bound is not None:
        assert found.lower_bound == pytest.approx(in_memory.lower_bound, rel=1e-8)
        assert found.gap == pytest.approx(0, abs=1e-8)
    # The certificates equal those computed from the coefficients.
    coefficients = {k: found.gains[k] ** 2 * x for k, x in feats.combine(found.dual).items()}
    certified = at.certify(feats, r, coefficients=coefficients, structure=structure, ridge=ridge)
    assert certified.objective == pytest.approx(found.objective, rel=1e-9)
    assert certified.stationarity == pytest.approx(found.stationarity, abs=1e-6)
    others = at.tangent_features(network(), inputs(9, 5))
    new = found.predict(others.kernel(feats, by_block=True))
    torch.testing.assert_close(new, in_memory.predict(others), rtol=1e-4, atol=1e-4)


def test_structures_of_the_whole_need_no_blocks(stores: Stores) -> None:
    feats, r = at.tangent_features(network(), inputs()), targets(N, 2) / 10
    others = at.tangent_features(network(), inputs(9, 5))
    for structure in (at.Fixed(), at.Full(at.Quadratic(0.3))):
        expected = at.fit(feats, r, structure=structure, ridge=0.2, tol=1e-10)
        for K in (stores["full"], stores["full"].read()):
            found = at.fit(K, r, structure=structure, ridge=0.2, tol=1e-10)
            assert found.objective == pytest.approx(expected.objective, rel=1e-9)
            torch.testing.assert_close(found.predict(stores["others"]), expected.predict(others), rtol=1e-4, atol=1e-4)


def test_the_alternation_comes_to_the_same_point_in_more_rounds(stores: Stores) -> None:
    r, structure = targets(N, 2) / 10, at.LayerScale(at.Quadratic(1.0))
    newton = at.fit(stores["by block"], r, structure=structure, ridge=0.3)
    plain = at.fit(stores["by block"], r, structure=structure, ridge=0.3, solver="alternation", max_rounds=2000)
    assert plain.objective == pytest.approx(newton.objective, rel=1e-7)
    assert plain.rounds > newton.rounds
    objectives = [entry.objective for entry in plain.history if entry.temper == 1.0]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(objectives))


def test_the_dual_equation_of_the_kernel_fit(stores: Stores) -> None:
    """Σ z_ℓ²K_ℓ α + ρα = r, and half of ω̃′ at ‖B_ℓ‖ is √(αᵀK_ℓα)."""
    store, r, penalty = stores["by block"], targets(N, 2) / 10, at.Quadratic(1.0)
    found = at.fit(store, r, structure=at.LayerScale(penalty), ridge=0.3, tol=1e-13)
    alpha = found.dual.flatten().numpy()
    kernels = {name: matrix(store.read(block=name)) for name in store.blocks}
    whole = sum(found.gains[name] ** 2 * kernels[name] for name in kernels)
    np.testing.assert_allclose(whole @ alpha + 0.3 * alpha, r.flatten().numpy(), atol=1e-9)
    for name, kernel in kernels.items():
        slope = float(penalty.induced().derivative(torch.tensor(found.norms[name], dtype=torch.float64)))
        assert slope / 2 == pytest.approx(math.sqrt(alpha @ kernel @ alpha), rel=1e-7)


def test_constraints_that_follow_are_left_out_and_those_that_contradict_are_named() -> None:
    x = torch.cat([inputs(8), inputs(8)[:2]])
    feats = at.tangent_features(network(1), x)
    r = targets(10, 1) / 10
    r[8:] = r[:2]
    store = twin(feats.kernel(by_block=True), 4)
    structure = at.LayerScale(at.Quadratic(0.1))
    expected = at.fit(feats, r, structure=structure)
    found = at.fit(store, r, structure=structure)
    assert (found.dropped, expected.dropped) == (2, 2)
    assert found.objective == pytest.approx(expected.objective, rel=1e-8)
    r[9] += 1
    with pytest.raises(at.TangentError, match=r"fit: 2 of 10 constraints .* samples 1, 9"):
        at.fit(store, r, structure=structure)


def test_targets_of_zero_need_nothing(stores: Stores) -> None:
    found = at.fit(stores["by block"], torch.zeros(N, 2), structure=at.LayerScale())
    assert (found.objective, found.stationarity, found.lower_bound, found.converged) == (0.0, 0.0, 0.0, True)
    assert not found.dual.any()


def test_a_kernel_fit_that_runs_out_of_rounds_says_so(stores: Stores) -> None:
    with pytest.warns(at.TangentWarning, match="fit did not converge: stopped after 2 rounds"):
        found = at.fit(stores["by block"], targets(N, 2), structure=at.LayerScale(at.Quadratic(0.01)), max_rounds=2)
    assert not found.converged
    assert found.history[-1].temper >= 1.0
    certified = found.objective - (found.lower_bound or 0.0)
    assert certified > 0


def test_the_fit_to_features_takes_a_memory_limit() -> None:
    feats, r = at.tangent_features(network(), inputs()), targets(N, 2)
    assert at.fit(feats, r, structure=at.Fixed(), ridge=0.1, memory_limit=50_000).form == "matrix-free"
    store = twin(feats.kernel(by_block=True), TILE)
    assert at.fit(store, r, structure=at.Fixed(), ridge=0.1, memory_limit=50_000).form == "matrix-free"
    with pytest.raises(at.TangentError, match=r"fit: needs 102 kB .* 50 kB; use form='matrix-free'"):
        at.fit(store, r, structure=at.Fixed(), ridge=0.1, form="dense", memory_limit=50_000)


def test_a_fit_holds_tiles_of_a_store_only() -> None:
    feats, r = at.tangent_features(network(), inputs()), targets(N, 2)
    store = twin(feats.kernel(by_block=True), TILE, most=TILE)
    found = at.fit(store, r, structure=at.Full(at.Quadratic(30.0)), ridge=0.5, memory_limit=30_000)
    assert (found.form, found.converged, store.reads != []) == ("matrix-free", True, True)


# ------------------------------------------------------------------------------------------------------- several processes


def share(rank: int, folder: Path, blocks: Mapping[str, Tensor], x: Tensor, r: Tensor) -> None:
    """One of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    K = at.kernels.SharedKernel(blocks)
    fit = at.fit(K, r, structure=at.LayerScale(at.Quadratic(1.0)), ridge=0.3, form="matrix-free")
    store = at.kernels.SharedKernel(at.open_kernel(folder / "K.zarr"))
    solved = at.kernel_regression(store, r, ridge=0.3, form="matrix-free")
    found = {
        "product": kernel_operator(K).apply(x), "dual": fit.dual, "objective": fit.objective, "solved": solved.dual,
        "alignment": at.alignment(store, r), "centered": at.alignment(store, r, centered=True),
        "cka": at.cka(store, store.kernel),
        "read": len(tiled.share(tiled.tiled(tiled.Request("t"), store).grid, torch.distributed.group.WORLD)),
        "eigen": at.kernels.kernel_eigen(store, 3).values,
    }  # fmt: skip
    torch.save(found, folder / f"found{rank}.pt")
    torch.distributed.barrier()


def test_two_processes_share_the_tiles_and_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feats, r, x = at.tangent_features(network(), inputs()), targets(N, 2) / 10, targets(2 * N, 3)
    blocks = feats.kernel(by_block=True)
    store = at.kernel_to_store(network(), inputs(), tmp_path / "K.zarr", outputs="full", tile=TILE)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    workers = [fork(lambda rank=rank: share(rank, tmp_path, blocks, x, r)) for rank in (0, 1)]
    assert [code_of(pid) for pid in workers] == [0, 0]
    fit = at.fit(blocks, r, structure=at.LayerScale(at.Quadratic(1.0)), ridge=0.3, form="matrix-free")
    solved = at.kernel_regression(store, r, ridge=0.3, form="matrix-free")
    both = [torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in (0, 1)]
    for found in both:
        torch.testing.assert_close(found["product"], kernel_operator(blocks).apply(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["dual"], fit.dual, rtol=1e-8, atol=1e-8)
        assert found["objective"] == pytest.approx(fit.objective, rel=1e-10)
        torch.testing.assert_close(found["solved"], solved.dual, rtol=1e-8, atol=1e-8)
        assert found["alignment"] == pytest.approx(at.alignment(store, r), rel=1e-12)
        assert found["centered"] == pytest.approx(at.alignment(store, r, centered=True), rel=1e-12)
        assert found["cka"] == pytest.approx(1, rel=1e-12)
        torch.testing.assert_close(found["eigen"], at.kernels.kernel_eigen(store, 3).values)
    assert [found["read"] for found in both] == [5, 5]  # of 10 tiles
    assert torch.equal(both[0]["dual"], both[1]["dual"])  # so that no rank stops before another


def test_tiles_are_shared_only_where_processes_can_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        at.TangentError, match=r"SharedKernel: torch.distributed is not initialized; run under torchrun"
    ):
        at.kernels.SharedKernel(torch.eye(3))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group=None: "nccl")
    with pytest.raises(at.TangentError, match=r"which the nccl backend does not move; make a group .*backend='gloo'"):
        at.kernels.SharedKernel(torch.eye(3))


# ---------------------------------------------------------------------------------------------------------------- input


K, R = torch.eye(6, dtype=torch.float64) + 1, torch.arange(6.0)


def rectangular() -> Twin:
    return twin(torch.ones(6, 4), 3, symmetric=False)


def incomplete() -> Twin:
    return twin(K, 3, complete=False)


def spoilt() -> Twin:
    kernel = K.clone()
    kernel[4, 5] = torch.inf
    return twin(kernel, 2)


def of_traces() -> Twin:
    return twin(K, 3, c=2)


def of_each_output() -> Twin:
    return twin(torch.ones(6, 6, 2).double(), 3, outputs="diagonal")


REFUSED: Mapping[str, tuple[Callable[[], object], str]] = {
    **{
        f"incomplete: {name}": (call, rf"{name}: the store is not complete; finish it with kernel_to_store")
        for name, call in {
            "alignment": lambda: at.alignment(incomplete(), R),
            "cka": lambda: at.cka(K, incomplete()),
            "decompose": lambda: at.decompose(incomplete(), K, R),
            "representability": lambda: at.representability(incomplete(), R),
            "kernel_operator": lambda: kernel_operator(incomplete()),
            "kernel_eigen": lambda: at.kernels.kernel_eigen(incomplete(), 2),
            "kernel_regression": lambda: at.kernel_regression(incomplete(), R),
            "fit": lambda: at.fit(incomplete(), R, structure=at.Fixed()),
        }.items()
    },
    **{
        f"of other samples: {name}": (call, rf"{name}: the store is of 6 samples with 4 others; .* made without x2")
        for name, call in {
            "alignment": lambda: at.alignment(rectangular(), R),
            "cka": lambda: at.cka(rectangular(), K),
            "decompose": lambda: at.decompose(K, rectangular(), R),
            "representability": lambda: at.representability(rectangular(), R),
            "kernel_eigen": lambda: at.kernels.kernel_eigen(rectangular(), 2),
            "kernel_regression": lambda: at.kernel_regression(rectangular(), R),
            "fit": lambda: at.fit(rectangular(), R, structure=at.Fixed()),
        }.items()
    },
    **{
        f"of each output: {name}": (call, rf"{name}: the store holds the kernel of each output by itself .*'full' or")
        for name, call in {
            "alignment": lambda: at.alignment(of_each_output(), R),
            "kernel_eigen": lambda: at.kernels.kernel_eigen(of_each_output(), 2),
            "fit": lambda: at.fit(of_each_output(), torch.ones(6, 2), structure=at.Fixed()),
        }.items()
    },
    "a ridge of a rectangle": (
        lambda: kernel_operator(rectangular(), ridge=1.0),
        r"kernel_operator: a ridge is for a kernel of samples with themselves, this is of 6 with 4",
    ),
    "a rectangle in memory": (
        lambda: at.kernel_regression(torch.ones(3, 4), R[:3]),
        r"kernel_regression: a kernel has shape \(n, n\) or \(n, c, n, c\), got \(3, 4\)",
    ),
    "no kernel": (
        lambda: kernel_operator(torch.ones(3)),
        r"kernel_operator: a kernel has shape \(n, m\) or \(n, c, m, c\), got \(3,\)",
    ),
    "entries not finite": (lambda: at.alignment(spoilt(), R), r"alignment: the value of sample 4 is not finite; make"),
    "targets of others": (
        lambda: at.alignment(twin(K), R[:4]),
        r"alignment: targets of shape \(4,\) do not fit a kernel of shape \(6, 6\)",
    ),
    "regression targets of others": (
        lambda: at.kernel_regression(twin(K), R[:4]),
        r"kernel_regression: targets have shape \(4,\), the kernel is of n = 6 samples",
    ),
    "regression targets of other outputs": (
        lambda: at.kernel_regression(twin(dense("full")), targets(N, 3)),
        r"kernel_regression: targets have shape \(23, 3\), the kernel is of n = 23 samples, c = 2 outputs",
    ),
    "integer targets": (
        lambda: at.kernel_regression(twin(K), torch.arange(6)),
        r"kernel_regression: targets are torch.int64; give real residuals",
    ),
    "targets not finite": (
        lambda: at.kernel_regression(twin(K), R / 0),
        r"kernel_regression: the target of sample 0 is not finite",
    ),
    "a negative ridge": (
        lambda: at.kernel_regression(twin(K), R, ridge=-1.0),
        r"kernel_regression: the ridge ρ is zero \(interpolation\) or positive, got -1.0",
    ),
    "no tolerance": (
        lambda: at.kernel_regression(twin(K), R, tol=0.0),
        r"kernel_regression: tol and the steps allowed are positive, got 0.0 and 2000",
    ),
    "an indefinite kernel": (
        lambda: at.kernel_regression(-K, R),
        r"kernel_regression: the kernel is not positive definite even with a jitter of 1e-8 .*; use a positive ridge",
    ),
    "no eigenvalue": (lambda: at.kernels.kernel_eigen(twin(K), 0), r"kernel_eigen: k is from 1 to 6, .* got 0"),
    "too many eigenvalues": (lambda: at.kernels.kernel_eigen(twin(K), 7), r"kernel_eigen: k is from 1 to 6, .* got 7"),
    "a block of no store": (
        lambda: at.kernels.KernelBlock(K, "0"),
        r"KernelBlock: expects a store made with by_block=True, got Tensor",
    ),
    "a block that is not there": (
        lambda: at.kernels.KernelBlock(twin({"a": K, "b": K}), "c"),
        r"KernelBlock: there is no block 'c'; the blocks are a, b",
    ),
    "a block of a store of the whole": (
        lambda: at.kernels.KernelBlock(twin(K), "a"),
        r"KernelBlock: there is no block 'a'; the blocks are none: the store was made without by_block",
    ),
    "a structure that needs features": (
        lambda: at.fit(twin({"a": K}), R, structure=at.TwoSided()),
        r"fit: TwoSided\(.*\) depends on more than norms of blocks, and kernels give no more; fit it to tangent_features",
    ),
    "no structure": (lambda: at.fit(twin({"a": K}), R), r"fit: TwoSided\(.* kernels give no more"),
    "a mixture that needs features": (
        lambda: at.fit(twin({"a": K, "b": K}), R, structure={"a": at.Rows(), "*": at.Fixed()}),
        r"fit: Mixed\(.* kernels give no more",
    ),
    "a structure that needs blocks": (
        lambda: at.fit(twin(K), R, structure=at.LayerScale()),
        r"fit: LayerScale\(.*\) needs the kernel of every block; make the store with by_block=True",
    ),
    "a mixture that needs blocks": (
        lambda: at.fit(twin(K), R, structure={"*": at.Fixed()}),
        r"fit: Mixed\(.*\) needs the kernel of every block",
    ),
    "a trace of several outputs": (
        lambda: at.fit(of_traces(), R, structure=at.Fixed()),
        r"fit: the store holds the trace of the kernel over c = 2 outputs, .* make it with outputs='full'",
    ),
    "several outputs of one kernel": (
        lambda: at.fit(K, torch.ones(6, 2), structure=at.Fixed()),
        r"fit: targets have c = 2 outputs and the kernel is \(n, n\); use one made with outputs='full'",
    ),
    "cross-entropy": (
        lambda: at.fit(twin(K), torch.ones(6).long(), structure=at.Fixed(), loss="cross-entropy", ridge=1.0),
        r"fit: loss='cross-entropy' needs features, and this is a kernel; fit to tangent_features",
    ),
    "an offset": (
        lambda: at.fit(twin(K), R, structure=at.Fixed(), offset=torch.ones(6, 1)),
        r"fit: offset needs features",
    ),
    "a solver of features": (
        lambda: at.fit(twin(K), R, structure=at.Fixed(), solver="anderson"),
        r"fit: solver is one of newton, alternation, got 'anderson'",
    ),
    "a form of features": (
        lambda: at.fit(twin(K), R, structure=at.Fixed(), form="primal"),
        r"fit: form is one of auto, dense, matrix-free, got 'primal'",
    ),
    "prediction of others": (
        lambda: at.kernel_regression(K, R, ridge=1.0).predict(torch.ones(2, 5)),
        r"predict: the kernel is of 2 samples with 5 others, c = 1; the regression was of n = 6 samples, c = 1",
    ),
    "prediction by a fit of others": (
        lambda: at.fit(K, R, structure=at.Fixed(), ridge=1.0).predict(torch.ones(2, 5)),
        r"predict: the kernel is of 2 samples with 5 others, c = 1; the fit was of n = 6 samples, c = 1",
    ),
    "prediction by other blocks": (
        lambda: at.fit({"a": K}, R, structure=at.Fixed(), ridge=1.0).predict({"b": torch.ones(2, 6)}),
        r"predict: the kernels are of blocks \['b'\], the fit was of \['a'\]; make them by block",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_of_a_stored_kernel_without_an_answer_are_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(at.TangentError, match=words):
        call()


def test_a_start_is_for_features() -> None:
    feats, r = at.tangent_features(network(), inputs()), targets(N, 2)
    fit = at.fit(feats, r, structure=at.Fixed(), ridge=0.1)
    with pytest.raises(at.TangentError, match="fit: start needs features"):
        at.fit(feats.kernel(), r, structure=at.Fixed(), ridge=0.1, start=fit)


def test_an_incomplete_store_on_disk_is_refused(stores: Stores) -> None:
    store = replace(stores["trace"], meta={**stores["trace"].meta, "complete": False})
    with pytest.raises(at.TangentError, match="alignment: the store is not complete"):
        at.alignment(store, targets(N))


def test_lanczos_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise scipy.sparse.linalg.ArpackNoConvergence("no", np.zeros(2), np.zeros((450, 2)))

    monkeypatch.setattr("scipy.sparse.linalg.eigsh", failing)
    with pytest.raises(at.TangentError, match="kernel_eigen: Lanczos found 2 of 5 eigenvalues to 1e-10; ask for fewer"):
        at.kernels.kernel_eigen(spectrum(450), 5)


def test_float32_stores_are_computed_with_in_float64(stores: Stores) -> None:
    store, y = stores["float32"], targets(N)
    kernel = store.read()
    assert kernel.dtype == torch.float32
    assert at.alignment(store, y) == pytest.approx(at.alignment(kernel.double(), y), rel=1e-12)
    found = at.kernel_regression(store, y, ridge=0.1, form="matrix-free")
    expected = np.linalg.solve(kernel.double().numpy() + 0.1 * np.eye(N), y.numpy())
    np.testing.assert_allclose(found.dual[:, 0].numpy(), expected, rtol=1e-8)

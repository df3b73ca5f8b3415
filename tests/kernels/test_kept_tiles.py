"""Tiles of stored kernels that a fit keeps in memory: as many as its limit holds, of the sum over blocks first."""

from pathlib import Path

import pytest
import torch
from torch import nn

import adaptive_tangents as at
from adaptive_tangents.kernels.products import KernelProducts, cache_shares
from adaptive_tangents.kernels.tiles import Request, Sum, TensorKernel
from adaptive_tangents.storage.store import KernelStore

N = 24
COUNTED: dict[str, int] = {}


@pytest.fixture
def stored(tmp_path: Path) -> KernelStore:
    torch.manual_seed(0)
    x = torch.randn(N, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return at.kernel_to_store(model, x, tmp_path / "K.zarr", by_block=True, tile=8)


def fitted(
    store: KernelStore, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[at.solvers.KernelFit, int, int]:
    """The fit, the tiles read from disk, and the products with the kernel."""
    COUNTED.update(reads=0, products=0)
    decoded, apply = KernelStore._decoded, KernelProducts.apply

    def read(self: KernelStore, *place: object) -> torch.Tensor:
        COUNTED["reads"] += 1
        return decoded(self, *place)  # type: ignore[arg-type]

    def product(self: KernelProducts, x: torch.Tensor, **options: bool) -> torch.Tensor:
        COUNTED["products"] += 1
        return apply(self, x, **options)

    with monkeypatch.context() as patched:
        patched.setattr(KernelStore, "_decoded", read)
        patched.setattr(KernelProducts, "apply", product)
        r = torch.linspace(-1, 1, N, dtype=torch.float64)[:, None]
        found = at.fit(store, r, structure=at.LayerScale(at.Quadratic(1.0)), ridge=1.0, memory_limit=limit, tol=1e-4)
    return found, COUNTED["reads"], COUNTED["products"]


def test_a_fit_under_a_small_limit_reads_tiles_by_stage_and_not_by_product(
    stored: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, once, _ = fitted(stored, None, monkeypatch)
    small, reads, products = fitted(
        stored, 14 * N**2, monkeypatch
    )  # the sum takes 5.3 N² of the half that is for tiles
    tiles = 6 * len(stored.blocks)
    assert once <= 3 * tiles
    assert products > 80
    assert reads < products * tiles / 4, (reads, products)
    assert small.objective == pytest.approx(whole.objective, rel=1e-8)
    assert small.gains == pytest.approx(whole.gains, rel=1e-6)


def part(n: int, dtype: torch.dtype = torch.float64) -> TensorKernel:
    return TensorKernel(Request("test"), torch.zeros(n, n, dtype=dtype))


def test_the_sum_of_kernels_comes_first_where_not_all_of_them_fit() -> None:
    parts = [part(10), part(10), part(10)]
    assert cache_shares(parts, 2400, dense=False) == (800, 0)  # all fit
    assert cache_shares(parts, 2399, dense=False) == (533, 800)  # the sum, and a share of what is left for each
    assert cache_shares(parts, 500, dense=False) == (0, 500)
    assert cache_shares(parts, 500, dense=True) == (166, 0)  # the sum is formed whole
    assert cache_shares(parts[:1], 500, dense=False) == (500, 0)
    narrow = [part(10, torch.float32), part(10, torch.float32)]
    assert cache_shares(narrow, 800, dense=False) == (400, 0)
    assert cache_shares([Sum([each]) for each in narrow], 800, dense=False) == (0, 800)

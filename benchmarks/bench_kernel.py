"""Full tangent kernel of an MLP 784-1024×4-10 on 100 samples, float32, beside other ways to make it.

``vmap(jacrev)`` is the contraction of PyTorch's tutorial on neural tangent kernels. The two rows of matrix products are what
the arithmetic alone takes on this machine: the same products, and as many operations in the shape that runs best.
"""

from itertools import pairwise

import torch
from torch import nn

import adaptive_tangents as at
from common import best_of, contend

N, WIDTH, OUTPUTS = 100, 1024, 10


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    widths = [784, WIDTH, WIDTH, WIDTH, WIDTH]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, OUTPUTS)), torch.randn(N, 784)


def ours() -> dict[str, object]:
    model, x = network()
    kernel = at.tangent_kernel(model, x)
    seconds = best_of(lambda: at.tangent_kernel(model, x), repeats=10, warm=2)
    return {"seconds": seconds, "GFLOP": operations() / 1e9, "checksum": float(kernel.double().norm())}


def operations() -> float:
    """Forward for N samples, backward for N·c, and the contraction as planned."""
    model, x = network()
    weights = [m.weight.numel() for m in model if isinstance(m, nn.Linear)]
    forward, backward = 2 * N * sum(weights), 2 * N * OUTPUTS * sum(weights[1:])
    return float(forward + backward + at.tangent_features(model, x).plan().operations)


def products() -> dict[str, object]:
    """The same products, one after the other: forward, backward for every output, four panels of each layer's triangle."""
    model, _ = network()
    weights = [m.weight.detach() for m in model if isinstance(m, nn.Linear)]
    inputs = [torch.randn(N, w.shape[1]) for w in weights]
    signals = [torch.randn(N * OUTPUTS, w.shape[0]) for w in weights]
    quarter = N * OUTPUTS // 4

    def run() -> None:
        for w, h, d in zip(weights, inputs, signals, strict=True):
            h @ w.mT
            h @ h.mT
            for k in range(4):
                d[k * quarter : (k + 1) * quarter] @ d[k * quarter :].mT
        for w, d in zip(weights[1:], signals[1:], strict=True):
            d @ w

    return {"seconds": best_of(run, repeats=10, warm=2), "GFLOP": operations() / 1e9}


def one_shape() -> dict[str, object]:
    a, b = torch.randn(N * OUTPUTS, WIDTH), torch.randn(WIDTH, WIDTH)
    count = operations() / (2 * N * OUTPUTS * WIDTH * WIDTH)

    def run() -> None:
        for _ in range(round(count)):
            a @ b

    return {"seconds": best_of(run, repeats=10, warm=2), "GFLOP": operations() / 1e9}


def tutorial() -> dict[str, object]:
    model, x = network()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(params: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, params, (sample.unsqueeze(0),)).squeeze(0)

    def kernel() -> torch.Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0))(params, x)
        flat = [j.flatten(2) for j in jacobian.values()]
        return torch.stack([torch.einsum("Naf,Mbf->NMab", j, j) for j in flat]).sum(0)

    found: list[torch.Tensor] = []
    seconds = best_of(lambda: found.append(kernel()), repeats=1, warm=0)
    return {"seconds": seconds, "checksum": float(found[0].double().norm())}


def with_nngeometry() -> dict[str, object]:
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import FMatDense
    from torch.utils.data import DataLoader, TensorDataset

    model, x = network()
    loader = DataLoader(TensorDataset(x, torch.zeros(N)), batch_size=N)
    collection = LayerCollection.from_model(model)
    found: list[torch.Tensor] = []

    def kernel() -> None:
        gram = GramMatrix(model=model, loader=loader, representation=FMatDense, layer_collection=collection)
        found.append(gram.to_torch())

    return {"seconds": best_of(kernel, repeats=3), "checksum": float(found[-1].detach().double().norm())}


contenders = {
    "adaptive-tangents": ours,
    "the same matrix products": products,
    "as many operations in one shape": one_shape,
    "nngeometry": with_nngeometry,
    "torch.func vmap(jacrev)": tutorial,
}

if __name__ == "__main__":
    contend(
        __file__, contenders, f"full tangent kernel, MLP 784-{WIDTH}×4-{OUTPUTS}, n = {N}, float32",
        ("seconds", "GFLOP", "peak GB", "checksum"),
    )  # fmt: skip

"""Full tangent kernel of an MLP 784-1024×4-10 on 100 samples, float32, beside other ways to make it.

The row of matrix products is what the arithmetic alone takes on this machine, in the shapes that it comes in.
"""

import torch
from torch import nn

import recipes
from common import best_of, contend
from networks import OUTPUTS, made, mlp


def products() -> dict[str, object]:
    """The same products, one after the other: forward, backward for every output, four panels of each layer's triangle."""
    model, x = made(mlp)
    n = len(x)
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(n, w.shape[1]) for w in weights]
    signals = [torch.randn(n * OUTPUTS, w.shape[0]) for w in weights]
    quarter = n * OUTPUTS // 4

    def run() -> None:
        for w, h, d in zip(weights, inputs, signals, strict=True):
            h @ w.mT
            h @ h.mT
            for k in range(4):
                d[k * quarter : (k + 1) * quarter] @ d[k * quarter :].mT
        for w, d in zip(weights[1:], signals[1:], strict=True):
            d @ w

    return {"seconds": best_of(run, repeats=10, warm=2)}


contenders = {
    "MLP: adaptive-tangents": lambda: recipes.ours(made(mlp), repeats=10),
    "MLP: the same matrix products": products,
    **recipes.by_implementation("MLP", lambda: made(mlp)),
    "MLP: nngeometry": lambda: recipes.nngeometry(made(mlp)),
    "MLP: asdfghjkl": lambda: recipes.asdl(made(mlp)),
    "MLP: curvlinops": lambda: recipes.curvlinops(made(mlp)),
    "MLP: torch.func": lambda: recipes.torch_func(made(mlp)),
}

if __name__ == "__main__":
    contend(__file__, contenders, "full tangent kernel, MLP 784-1024×4-10, n = 100, float32", recipes.COLUMNS)

"""No route may be slower than ``vmap(jacrev)``: a dozen architectures, ours beside the ``torch.func`` recipe, float32."""

import recipes
from common import contend
from networks import made
from small_networks import SMALL

contenders = {
    f"{name}: {contender}": lambda make=make, run=run: run(made(make))
    for name, make in SMALL.items()
    for contender, run in (
        ("adaptive-tangents", lambda network: recipes.ours(network, details=False)),
        ("torch.func", lambda network: recipes.torch_func(network, repeats=3, warm=1)),
    )
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "full tangent kernels of a dozen architectures, c = 10, float32",
        ("seconds", "× ours", "peak GB", "difference", "note"),
    )  # fmt: skip

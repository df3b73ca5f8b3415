"""Rounding errors of full kernels in each ``precision``, as a part of √(K(x, x) K(x′, x′)), and the seconds they take.

"Contraction" compares with float64 on the same features, "whole" with the network in float64 from the inputs on.
"""

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

import adaptive_tangents as at
from common import best_of, contend
from networks import Gpt, Network, cnn, made, mlp, resnet18, vit

NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP": lambda: mlp(40),
    "CNN": lambda: cnn(20),
    "ResNet-18": lambda: resnet18(4),
    "ViT": lambda: vit(6),
    "GPT": lambda: (Gpt(width=128, depth=4, tokens=64), torch.randint(1000, (8, 64))),
}


@cache
def reference(name: str) -> Tensor:
    model, x = made(NETWORKS[name])
    doubled = x.double() if x.is_floating_point() else x
    return at.tangent_kernel(copy.deepcopy(model).double(), doubled).flatten(2).flatten(0, 1)


def measure(name: str, precision: str) -> dict[str, object]:
    feats = at.tangent_features(*made(NETWORKS[name]))
    found = feats.kernel(precision=precision).double().flatten(2).flatten(0, 1)
    row: dict[str, object] = {"seconds": best_of(lambda: feats.kernel(precision=precision), repeats=3)}
    sizes = reference(name).diagonal().sqrt()
    for what, wanted in (
        ("contraction", feats.kernel(precision="float64").flatten(2).flatten(0, 1)),
        ("whole", reference(name)),
    ):
        off = (found - wanted) / torch.outer(sizes, sizes)
        row |= {
            f"{what}, most": f"{float(off.abs().max()):.1e}",
            f"{what}, rms": f"{float((off**2).mean().sqrt()):.1e}",
        }
    return row


contenders = {
    f"{name}: {precision}": lambda name=name, precision=precision: measure(name, precision)
    for name in NETWORKS
    for precision in ("float32", "mixed", "float64", "bfloat16")
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "rounding errors of full kernels",
        ("contraction, most", "contraction, rms", "whole, most", "whole, rms", "seconds"),
    )  # fmt: skip

"""Operations that a full kernel takes, and the rate at which this machine multiplies matrices."""

import time

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted_operations(model: nn.Module, x: Tensor) -> int:
    """Forward of all samples, and backward of every output to what comes out of each layer with parameters.

    Attention is counted as the products that it is; gradients of parameters are not formed, so not counted.
    """
    kept: list[Tensor] = []
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(lambda module, args, out: kept.append(out)) for layer in layers]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as forward:
                out = model(x)
            wanted = [y for y in flattened(kept) if y.requires_grad]
            with FlopCounterMode(display=False) as backward:
                torch.autograd.grad(out[:, 0].sum(), wanted, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return forward.get_total_flops() + out.shape[1] * backward.get_total_flops()


def flattened(values: object) -> list[Tensor]:
    """The tensors of nested tuples and lists."""
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in flattened(value)] if isinstance(values, tuple | list) else []


def peak_rate(size: int = 2048, repeats: int = 7) -> float:
    """Operations a second of one product of square matrices, the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out, best = torch.empty(size, size), float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best

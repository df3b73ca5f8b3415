"""Ways to project factors beside each other: error of trace kernels and of an alignment at equal dimension, and seconds.

Every block gets 4096 / (number of blocks) coordinates, smaller ones are exact. Errors in units of the mean diagonal entry.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Generator, Tensor

import adaptive_tangents as at
from adaptive_tangents.features.summands import Dense, Lookup, Outer
from adaptive_tangents.linalg.hadamard import padded, paired_rows
from common import contend
from networks import Gpt, Network, cnn, made, mlp

DIM, SAMPLES, SEEDS = 4096, 16, 10
NETWORKS: dict[str, Callable[[], Network]] = {
    "GPT": lambda: (Gpt(width=64, depth=2, tokens=32), torch.randint(1000, (SAMPLES, 32))),
    "MLP": lambda: mlp(SAMPLES),
    "CNN": lambda: cnn(SAMPLES),
}


def factors(block: at.Block) -> tuple[Tensor, Tensor]:
    """δ (n, t, c, o) and h (n, t, i) of a block, unit vectors where it has none."""
    (part,) = block.summands
    if isinstance(part, Outer):
        return part.backward, part.inputs
    if isinstance(part, Lookup):
        used, place = torch.unique(part.index, return_inverse=True)
        return part.backward, torch.eye(len(used))[place] * part.weights[..., None]
    assert isinstance(part, Dense)
    n, _, _, i = part.values.shape
    return part.values.permute(0, 3, 1, 2), torch.eye(i).expand(n, i, i)


def gaussian(k: int, size: int, generator: Generator) -> Tensor:
    return torch.randn(k, size, generator=generator)


def signs(k: int, size: int, generator: Generator) -> Tensor:
    return torch.randint(2, (k, size), generator=generator) * 2.0 - 1


def kronecker(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """S_o Φ S_iᵀ with √k rows of either side."""

    def project(d: Tensor, h: Tensor, k: int, generator: Generator) -> Tensor:
        o, i = d.shape[-1], h.shape[-1]
        rows = min(o, math.isqrt(k))
        columns = min(i, k // rows)
        left = torch.eye(o) if rows == o else draw(rows, o, generator) / math.sqrt(rows)
        right = torch.eye(i) if columns == i else draw(columns, i, generator) / math.sqrt(columns)
        return torch.einsum("ntca,ntb->ncab", d @ left.mT, h @ right.mT).flatten(2)

    return project


def pairs(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """s_jᵀΦr_j for independent s_j and r_j."""

    def project(d: Tensor, h: Tensor, k: int, generator: Generator) -> Tensor:
        left, right = (draw(k, x.shape[-1], generator) for x in (d, h))
        return ((d @ left.mT) * (h @ right.mT)[:, :, None]).sum(1) / math.sqrt(k)

    return project


def tensor_sketch(d: Tensor, h: Tensor, k: int, generator: Generator) -> Tensor:
    """Pham & Pagh, KDD 2013: count sketches of both sides, convolved."""
    made = []
    for x in (d, h):
        size = x.shape[-1]
        place, sign = torch.randint(k, (size,), generator=generator), signs(1, size, generator)[0]
        made.append(torch.fft.rfft(x.new_zeros(*x.shape[:-1], k).index_add_(x.ndim - 1, place, x * sign)))
    return torch.fft.irfft((made[0] * made[1][:, :, None]).sum(1), n=k)


def hadamard_pairs(d: Tensor, h: Tensor, k: int, generator: Generator) -> Tensor:
    """Rows of Hadamard matrices, paired without order (Ahle et al., SODA 2020)."""
    o, i = d.shape[-1], h.shape[-1]
    seed = int(torch.randint(2**31, (1,), generator=generator))
    left, right = paired_rows((seed, "", 0), (o, i), padded(o) * padded(i))
    some = torch.randperm(padded(o) * padded(i), generator=generator)[:k]
    return (
        (type(left)(left.signs, left.chosen[some]).apply(d))
        * type(right)(right.signs, right.chosen[some]).apply(h)[:, :, None]
    ).sum(1) / math.sqrt(k)


def ours(d: Tensor, h: Tensor, k: int, generator: Generator) -> Tensor:
    left, right = paired_rows(
        (int(torch.randint(2**31, (1,), generator=generator)), "", 0), (d.shape[-1], h.shape[-1]), k
    )
    return (left.apply(d) * right.apply(h)[:, :, None]).sum(1) / math.sqrt(k)


def unstructured(d: Tensor, h: Tensor, k: int, generator: Generator) -> Tensor:
    """TRAK: Gaussian rows of o·i entries on features written out."""
    phi = torch.einsum("ntco,nti->ncoi", d, h).flatten(2)
    return phi @ gaussian(k, phi.shape[-1], generator).mT / math.sqrt(k)


KINDS: dict[str, Callable[..., Tensor]] = {
    "ours, balanced Hadamard pairs": ours, "Hadamard pairs": hadamard_pairs, "pairs of signs": pairs(signs),
    "pairs, Gaussian": pairs(gaussian), "TensorSketch": tensor_sketch, "Kronecker, signs": kronecker(signs),
    "Kronecker, Gaussian": kronecker(gaussian), "unstructured, Gaussian": unstructured,
}  # fmt: skip


def measure(name: str, kind: str) -> dict[str, object]:
    feats = at.tangent_features(*made(NETWORKS[name]))[:SAMPLES]
    exact = feats.kernel(outputs="trace", by_block=True)
    whole = sum(exact.values(), torch.zeros(()))
    y = torch.linalg.eigh(whole.double())[1][:, -2:].sum(1)
    size, off, aligned, seconds = DIM // len(exact), [], [], 0.0
    for seed in range(SEEDS):
        generator, kernel = torch.Generator().manual_seed(seed), torch.zeros_like(whole)
        for key, block in feats.blocks.items():
            if block.shape[0] * block.shape[1] <= size:
                kernel = kernel + exact[key]
                continue
            started = time.process_time()
            rows = KINDS[kind](*factors(block), size, generator).flatten(1)
            seconds += time.process_time() - started
            kernel = kernel + rows @ rows.mT
        off.append(float(((kernel - whole) ** 2).mean()))
        aligned.append(at.alignment(kernel, y))
    gap = torch.tensor(aligned, dtype=torch.float64) - at.alignment(whole, y)
    return {
        "error": math.sqrt(sum(off) / SEEDS) / float(whole.diagonal().mean()),
        "alignment off": float((gap**2).mean().sqrt()),
        "ms a sample": 1000 * seconds / SEEDS / SAMPLES,
    }


contenders = {
    f"{name}: {kind}": lambda name=name, kind=kind: measure(name, kind)
    for name in NETWORKS
    for kind in KINDS
    if kind != "unstructured, Gaussian" or name == "GPT"
}

if __name__ == "__main__":
    contend(__file__, contenders, f"projections of dimension {DIM}", ("error", "alignment off", "ms a sample"))

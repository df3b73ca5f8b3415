"""Agreement of two transforms of one side of a layer, against chance: cosine of M − I, principal angles of subspaces."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# The smallest singular value of M − I that counts as a direction, relative to the largest.
_SMALL = 1e-6


@dataclass(frozen=True)
class Match:
    """Agreement of a measured side with a predicted one.

    ``cosine`` is that of the two M − I, ``expected_cosine`` its mean if the predicted side is rotated at random. ``overlap``
    is the mean squared cosine of the principal angles between the k input directions that each changes most; ``angles`` are
    those angles in degrees, smallest first. ``written`` is the same overlap of output directions. ``expected`` is k/d, the
    mean overlap of random subspaces, and ``beyond`` their 95th percentile.
    """

    cosine: float
    expected_cosine: float
    overlap: float
    angles: list[float]
    written: float
    expected: float
    beyond: float


def directions(side: Float[Tensor, "d d"], k: int) -> Float[Tensor, "d j"]:
    """The input directions, at most k, that M − I changes most: its first right singular vectors.

    >>> directions(torch.diag(torch.tensor([1.0, 4.0, 1.0])), 2).abs()
    tensor([[0.],
            [1.],
            [0.]])
    """
    _, values, vectors = torch.linalg.svd(side - torch.eye(len(side)).to(side))
    count = int((values > _SMALL * values[:1]).sum()) if float(values[0]) > 0 else 0
    found: Tensor = vectors[: min(k, count)].mT
    return found


def match(
    measured: Float[Tensor, "d d"], predicted: Float[Tensor, "d d"], *, k: int, draws: int, seed: int
) -> Match | None:
    """The agreement of two sides, and that by chance; None if one of them is the identity."""
    first, second = directions(measured, k), directions(predicted, k)
    size = min(first.shape[1], second.shape[1])
    if size == 0:
        return None
    first, second = first[:, :size], second[:, :size]
    d, generator = len(measured), torch.Generator().manual_seed(seed)
    eye = torch.eye(d).to(measured)
    a, b = measured - eye, predicted - eye
    turned = torch.linalg.qr(torch.randn(draws, d, size, generator=generator, dtype=torch.float64)).Q.to(first)
    random = (first.mT @ turned).square().sum((1, 2)) / size
    cosines = torch.linalg.svdvals(first.mT @ second).clamp(max=1)
    writes = directions(measured.mT, size).mT @ directions(predicted.mT, size)
    return Match(
        cosine=float((a * b).sum() / (a.norm() * b.norm())),
        # The mean of QBQᵀ over rotations Q is tr(B)/d times the identity.
        expected_cosine=float(a.trace() * b.trace() / (d * a.norm() * b.norm())),
        overlap=float(cosines.square().mean()),
        angles=[float(angle) for angle in cosines.arccos().rad2deg()],
        written=float(writes.square().sum() / size),
        expected=size / d,
        beyond=float(random.quantile(0.95)),
    )

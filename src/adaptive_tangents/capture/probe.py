"""What a few samples of a batch, or all of a small one, show of its features before these are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptive_tangents.capture.block_sources import Choice
from adaptive_tangents.capture.graph import GraphForm
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import Flipped, Lookup, Outer

PROBED = 7
"""Samples of the probe, spread over a batch. A prime: network dimensions that are a multiple of it, and could be taken for
the samples, are rare."""
LEAST_PROBED = 3  # if there is no memory for more
PROBE_SHARE = 12  # a probe's memory per sample over what autograd keeps of the sample; twice what convolutions take
_WHOLE = 16_000_000  # bytes that autograd keeps of a batch that is captured at once
_COMPARED = 20_000_000  # samples times parameters


@dataclass(frozen=True)
class Probe:
    """What a few samples of a batch show: outputs, bytes per sample, and where the features of each block come from.

    ``factors`` and ``dense`` are the bytes per sample of each block's factors and of its materialized features;
    ``pass_bytes`` is what a pass needs besides. ``index`` and ``out`` are the samples and their outputs,
    ``least`` is the coarsest dtype on the way to them, float32 or ``dtype``. ``whole`` names the parameters whose features
    are made sample by sample. ``form`` describes the operations, ``projections`` has one number per sample of each block's
    features, and ``spreads`` the squared scales of their rounding errors.
    """

    c: int
    dtype: torch.dtype
    least: torch.dtype
    device: torch.device
    factors: Mapping[str, int]
    dense: Mapping[str, int]
    pass_bytes: int
    whole: tuple[str, ...]
    choices: Mapping[str, Choice]
    refuted: frozenset[str]
    index: Tensor
    out: Tensor
    form: GraphForm | None = None
    projections: Mapping[str, Tensor] = field(default_factory=dict)
    spreads: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.dense)

    def held_bytes(self, copies: int = 1) -> int:
        """Bytes for the features of one sample; positions of ``copies`` passes are held side by side if that is less."""
        return sum(min(copies * self.factors.get(name, size), size) for name, size in self.dense.items())

    @property
    def largest_bytes(self) -> int:
        """Bytes for the features of one sample in the largest block that has factors."""
        return max((min(self.factors[name], self.dense[name]) for name in self.factors), default=0)

    @property
    def whole_bytes(self) -> int:
        """The part of these bytes that is always materialized."""
        return sum(size for name, size in self.dense.items() if name not in self.factors)


def spread_over(n: int, count: int) -> Tensor:
    """The indices of ``count`` of n samples: out of order between first and last, so that sorting a batch changes it."""
    spread = torch.linspace(0, n - 1, count, device="cpu").long()
    return torch.cat([spread[:1], spread[1:-1].flip(0), spread[-1:]])


def at_once(n: int, c: int, saved: int, limit: int, numbers: int) -> bool:
    """Whether a batch is so small that its features are made at once, rather than after a probe.

    Autograd keeps ``saved`` bytes of a sample, so that a probe with c outputs takes (12 + c) times as many. ``numbers`` are
    those of the parameters: their gradients are compared on all samples, not on those of a probe.
    """
    cheap = n <= 2 * PROBED or (n * saved <= _WHOLE and n * numbers <= _COMPARED)
    return cheap and n * saved * (PROBE_SHARE + c) <= limit // 4


def factor_bytes(block: Block, c: int) -> int:
    """Bytes that one sample's factors take with c outputs."""
    total = 0
    for part in block.summands:
        if isinstance(part, Outer | Lookup | Flipped):
            total += c * part.backward[0].nbytes // part.backward.shape[2]
            total += sum(t[0].nbytes for name, t in vars(part).items() if name not in ("backward", "directions"))
    return total

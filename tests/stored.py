"""Helpers for tests of stored kernels: a small network and its data, and stores compared file by file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cases import mlp, normal

LIMIT = 200_000_000  # bytes; fixed, so that no layout depends on free memory


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(nn.Tanh, widths=(6, 8, 3)).eval()


def data(n: int = 11, seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return normal(n, 6)


def files(path: Path) -> Mapping[str, bytes]:
    """Every file of a store, by path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}

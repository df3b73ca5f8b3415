"""Random coordinates y_j = s_jᵀΦr_j of a matrix, computed from its factors; s and r are rows of Hadamard matrices.

HD is a Hadamard matrix with random signs on its columns. Its rows are orthogonal, and each is a vector of random signs.
Pairs of rows (s_j, r_j) are drawn so that every row of either side appears equally often and no pair appears twice. The
mean over j of y_j y′_j then has expectation ⟨Φ, Φ′⟩ over the signs and the order of the rows, and equals it if all pairs
are used. Signs and orders come from SHAKE-256 of a key. They are the same on every machine and in every version, so they
need not be stored.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptive_tangents.linalg.factor_products import times

_JOINED_BYTES = 64_000_000  # of a matrix of rows that is held as a whole
_ALONE = 4  # single rows are made up to this multiple of the fast transform's cost for one column; then all at once


@dataclass(frozen=True)
class SignRows:
    """Some rows of HD, each a vector of signs (d,), drawn in pairs with rows of the other side."""

    signs: Float[Tensor, " d"]
    chosen: Int[Tensor, " k"]

    def apply(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """sᵀx for each row s."""
        if not self.fast:
            return times(x, self.matrix(x))
        size, signs = padded(len(self.signs)), self.signs.to(x)
        height, width = _split(size)
        chosen = self.chosen.to(x.device)
        whole = torch.nn.functional.pad(x * signs, (0, size - len(signs))).reshape(-1, height, width)
        left, right = (
            hadamard(torch.arange(k, device="cpu"), torch.arange(k, device="cpu")).to(x) for k in (height, width)
        )
        made: Tensor = (left @ (whole @ right)).reshape(*x.shape[:-1], size)
        return made[..., chosen]

    @property
    def fast(self) -> bool:
        """Whether the fast transform, of all rows at once, takes fewer operations than the chosen rows alone."""
        size = padded(len(self.signs))
        return len(self.chosen) > min(size, _ALONE * sum(_split(size)))

    def matrix(self, like: Tensor) -> Float[Tensor, "d k"]:
        """The rows as columns of a matrix, in the dtype and on the device of a tensor."""
        columns = torch.arange(len(self.signs), device=like.device)
        return (hadamard(self.chosen.to(like.device), columns).to(like) * self.signs.to(like)).mT

    def of_units(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch k"]:
        """sᵀe for unit vectors e."""
        used, place = torch.unique(index, return_inverse=True)
        chosen, signs = self.chosen.to(index.device), self.signs.to(index.device)
        return (hadamard(used, chosen).to(signs) * signs[used, None])[place]


@dataclass(frozen=True)
class JoinedRows:
    """The rows of several draws side by side, (r·k): one product for all of them instead of one each."""

    draws: tuple[SignRows, ...]

    def apply(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch rk"]:
        """sᵀx for each row s."""
        matrices = self._matrices
        if matrices is None:
            return torch.cat([rows.apply(x) for rows in self.draws], -1)
        return times(x, matrices.to(x))

    def of_units(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch rk"]:
        """sᵀe for unit vectors e."""
        return torch.cat([rows.of_units(index) for rows in self.draws], -1)

    @cached_property
    def _matrices(self) -> Float[Tensor, "d rk"] | None:
        """The rows as columns of a matrix, unless it is large or a fast transform takes fewer operations."""
        count = sum(len(rows.chosen) for rows in self.draws)
        if any(rows.fast for rows in self.draws) or 4 * count * len(self.draws[0].signs) > _JOINED_BYTES:
            return None
        return torch.cat([rows.matrix(rows.signs) for rows in self.draws], 1)


@dataclass(frozen=True)
class Row:
    """A single vector of signs (d,), with the methods of `SignRows`."""

    values: Float[Tensor, " d"]

    def apply(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """sᵀx."""
        return times(x, self.values.to(x)[:, None])

    def of_units(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch 1"]:
        """sᵀe for unit vectors e."""
        return self.values.to(index.device)[index][..., None]


Rows = SignRows | JoinedRows | Row


def paired_rows(key: tuple[int | str, ...], shape: tuple[int, int], count: int) -> tuple[SignRows, SignRows]:
    """The rows of both sides of a block (o, i) for ``count`` coordinates; they depend on the key alone."""
    left, right = pairs(padded(shape[0]), padded(shape[1]), count)
    sides = zip(("left", "right"), shape, (left, right), strict=True)
    made = [
        SignRows(_signs((*key, side), size), torch.from_numpy(_order((*key, side), padded(size))[places]))
        for side, size, places in sides
    ]
    return made[0], made[1]


def pairs(o: int, i: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` different pairs out of o × i, both powers of two; every row and every column appears equally often.

    Pairs follow one diagonal after another, each wrapped around the shorter side.
    """
    places = np.arange(count)
    turn = places // max(o, i)
    return ((places + turn) % o, places % i) if o > i else (places % o, (places + turn) % i)


def projection_variance(a: Float[Tensor, "o i"], b: Float[Tensor, "o i"], count: int) -> float:
    r"""Variance of (1/k) Σ_j (s_jᵀAr_j)(s_jᵀBr_j), an unbiased estimate of ⟨A, B⟩ from k = ``count`` coordinates.

    If k is a multiple of both sides, it is about (‖A‖²‖B‖² + ⟨A, B⟩² + ‖AᵀB‖² + ‖ABᵀ‖²)/k, at most 4‖A‖²‖B‖²/k. A
    projection without structure, by k Gaussian vectors of o·i entries, has (‖A‖²‖B‖² + ⟨A, B⟩²)/k. Derived in
    docs/theory.md, §8.

    >>> A = torch.ones(2, 4)
    >>> projection_variance(A, A, 8)  # all coordinates: exact
    0.0
    """
    a, b = a.double(), b.double()
    o, i = padded(a.shape[0]), padded(a.shape[1])
    mean = float((a * b).sum())
    left, right = _spread(a @ b.mT), _spread(a.mT @ b)
    rest = _mean_square(a, b) - mean**2 - left - right
    rows, columns = pairs(o, i, count)
    same = [float((np.bincount(places) ** 2).sum()) for places in (rows, columns)]
    main = sum(
        spread * (size * again - count**2) / (size - 1)
        for spread, size, again in ((left, o, same[0]), (right, i, same[1]))
        if size > 1
    )
    if min(o, i) > 1:
        apart = count**2 - same[0] - same[1] + count
        main += rest * (count - (same[0] - count) / (i - 1) - (same[1] - count) / (o - 1) + apart / ((o - 1) * (i - 1)))
    return main / count**2


def _spread(gram: Float[Tensor, "d d"]) -> float:
    """The variance of sᵀGs over random signs s."""
    off = gram - torch.diag(gram.diagonal())
    return float((off**2).sum() + (off * off.mT).sum())


def _mean_square(a: Float[Tensor, "o i"], b: Float[Tensor, "o i"]) -> float:
    """The mean of (sᵀAr)²(sᵀBr)² over random signs s and r."""
    by_column = [(x**2).sum(0) for x in (a, b, a * b)]
    by_row = [(x**2).sum(1) for x in (a, b)]
    cross, dots = a @ b.mT, (a * b).sum(0)
    norms = float(by_row[0].sum() * by_row[1].sum() + 2 * ((a.mT @ b) ** 2).sum() - 2 * (by_row[0] * by_row[1]).sum())
    products = float(
        cross.trace() ** 2 + (cross**2).sum() + (cross * cross.mT).sum() - 2 * (cross.diagonal() ** 2).sum()
    )
    columns = float((by_column[0] * by_column[1] + 2 * dots**2 - 2 * by_column[2]).sum())
    return norms + 2 * products - 2 * columns


def padded(size: int) -> int:
    """The least power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def hadamard(rows: Int[Tensor, " k"], columns: Int[Tensor, " d"]) -> Int[Tensor, "k d"]:
    """Entries ±1 of the Hadamard matrix, H_ab = (−1)^(number of binary ones that a and b share)."""
    common = rows[:, None] & columns[None]
    for shift in (32, 16, 8, 4, 2, 1):
        common = common ^ (common >> shift)
    return 1 - 2 * (common & 1)


def _split(size: int) -> tuple[int, int]:
    """Two sizes: the Hadamard matrix is the Kronecker product of Hadamard matrices of these."""
    height = 1 << ((size.bit_length() - 1) // 2)
    return height, size // height


def _bytes(key: tuple[int | str, ...], what: str, count: int) -> np.ndarray:
    """Pseudorandom bytes that depend on the key alone."""
    return np.frombuffer(hashlib.shake_256(json.dumps([*key, what]).encode()).digest(count), dtype=np.uint8)


def _signs(key: tuple[int | str, ...], size: int) -> Float[Tensor, " d"]:
    bits = np.unpackbits(_bytes(key, "signs", -(-size // 8)))[:size]
    return 1 - 2 * torch.from_numpy(bits.astype(np.float32))


def _order(key: tuple[int | str, ...], size: int) -> np.ndarray:
    """A random permutation of ``size`` indices."""
    return np.argsort(_bytes(key, "order", 8 * size).view("<u8"), kind="stable")

"""The projection of one block by pairs of Hadamard rows, and which transforms act on the projected block."""

import math

import torch

from adaptive_tangents.features.blocks import Block, Slot
from adaptive_tangents.features.plans import WORKING_BYTES
from adaptive_tangents.features.summands import Dense, sum_tensors, tensors_of
from adaptive_tangents.features.transforms import Joint, Sides, Transform
from adaptive_tangents.linalg.hadamard import JoinedRows, SignRows
from adaptive_tangents.runtime.chunks import ranges


def projected(block: Block, repetitions: tuple[tuple[SignRows, SignRows], ...]) -> Block:
    """The block of Σ_t (s·δ_t)(r·h_t) for the rows of every repetition: a matrix (repetitions, coordinates)."""
    size = len(repetitions[0][0].chosen)
    shape = (len(repetitions), size)
    left, right = (JoinedRows(draws) for draws in zip(*repetitions, strict=True))
    made = []
    for part in ranges(block.samples, WORKING_BYTES // _bytes_per_sample(block, size * len(repetitions))):
        rows = sum_tensors([s.coordinates(left, right) for s in block.map(index=part).summands])
        made.append(rows.reshape(*rows.shape[:2], *shape) / math.sqrt(size * len(repetitions)))
    dense = Dense(made[0] if len(made) == 1 else torch.cat(made))
    return Block(block.name, shape, (Slot(block.name, shape, 0, size),), dense=dense)


def _bytes_per_sample(block: Block, size: int) -> int:
    """Working memory for one sample and ``size`` rows: its projected signals, and their products with the inputs."""
    factored = block.dense is None and block.weighted is None and block.shared is None
    positions = max(1, block.positions if factored else min(block.shape))
    # With signals on the output side, the width of the input side (a table of words, for example) does not count.
    width = block.shape[0] if factored and block.flipped is None else max(block.shape)
    return positions * block.outputs * (2 * size + 2 * width) * tensors_of(block.summands[0])[0].element_size()


def acts_on(transform: Transform, block: Block) -> bool:
    """Whether a transform acts on the coordinates of a sketched block as it acts on the block."""
    if isinstance(transform, Joint):
        return tuple(transform.direction[block.name].shape) == block.shape
    return isinstance(transform, Sides) and transform.left is None and transform.right is None

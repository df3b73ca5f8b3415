"""What the parts of a fit cost, in multiply-adds of a large product: all choices of ``fit`` between routes compare these.

Costs follow from shapes alone, so the same problem is always solved by the same steps.
"""

from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.summands import factors_of
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.linalg.factor_products import pixels_innermost

_ENTRY = 3.0  # an entry of a matrix that multiplies one vector: it is read from memory
_FACTORED = 1.5  # a multiply-add in the small products of factors
_CALL = 50_000.0  # what starts an operation, however small
_PRODUCT_CALLS = 20  # operations of φx and φᵀa of one block of factors
_STEP_CALLS = 30  # operations of the curvature and the transform of one block
_FACTORIZED = 2.0  # a multiply-add of a Cholesky factor
_ROUNDED = 0.5  # of the work, in single precision
_INSIDE = 6  # products of the inner conjugate gradients, where no system is factorized in float64
_WORTH = 0.3  # a system is remade if that costs less than this share of a step's products: later steps gain as well
_WORTH_CURVED = 0.14  # the same where the system is made from the curvature: it saves more
_CURVED = 4.0  # such systems are made where that costs up to so many times as much as from a held transform
_COLUMNS = 5  # copies of the features held as columns, while their columns of C are made
_CONTRACTED = 120.0  # an entry of what CCᵀ is made of from factors: a pair of outputs and a direction
_LEAST = 3  # products that a step with a new system takes


def dense_product(block: Block) -> float:
    """φx and φᵀa of one block, held as columns of a matrix."""
    return 2 * _ENTRY * block.samples * block.outputs * block.shape[0] * block.shape[1]


def factored_product(block: Block) -> float:
    """φx and φᵀa of one block, from its summands."""
    (o, i), n, c = block.shape, block.samples, block.outputs
    total = _PRODUCT_CALLS * _CALL
    for part in block.summands:
        parts = factors_of(part)
        total += 0.0 if parts else 2 * _ENTRY * n * c * o * i
        for factors in parts:
            t = factors.backward.shape[1]
            total += 2 * _FACTORED * n * t * o * (i + c)
            total += n * _CALL if pixels_innermost(factors.backward) else 0.0
    return total


def patience(feats: TangentFeatures, form: str, products: float, curved: float | None = None) -> tuple[float, float]:
    """How many products with the curvature a step may take before its kernel is remade, and before it is factorized again.

    ``products`` is the cost of φx and φᵀa; ``curved`` that of a kernel made from the curvature, None where it is not.
    """
    size, shapes = feats.n * feats.c, [block.shape for block in feats.blocks.values()]
    p = sum(o * i for o, i in shapes)
    step = products + sum(2 * o * i * (o + i) for o, i in shapes) + _STEP_CALLS * _CALL * len(shapes)
    kernel = _held_kernel(feats) if curved is None else curved
    factor = _FACTORIZED * size**3 / 6
    if form == "primal":
        kernel, factor = 0.0, size * p**2 / 2 + _FACTORIZED * p**3 / 6
        step += _ENTRY * (2 * size * p + p**2)
    elif form == "dense":
        step += 2 * _ENTRY * size**2
    else:
        kernel, factor = _ROUNDED * kernel, _ROUNDED * factor
        step += _INSIDE * (products + _ROUNDED * _ENTRY * size**2)
    worth = _WORTH if curved is None else _WORTH_CURVED
    return max(_LEAST, worth * (kernel + factor) / step), max(_LEAST, factor / step)


def curved_kernel(n: int, c: int, columns: int, sides: list[int]) -> float:
    """A kernel made from the curvature, with features as so many columns, and as factors whose smaller sides are given."""
    return (n * c) ** 2 * columns / 2 + n**2 * c * sum(side * (side + _CONTRACTED) for side in sides) / 2


def curved(feats: TangentFeatures, form: str, room: float, columns: int, kernel: float) -> bool:
    """Whether systems are made from the curvature, at this cost of a kernel, in so many bytes."""
    size = feats.n * feats.c
    if form != "dense" or 8 * size * (_COLUMNS * columns + size) > room:
        return False
    return kernel <= _CURVED * (_held_kernel(feats) + _FACTORIZED * size**3 / 6)


def _held_kernel(feats: TangentFeatures) -> float:
    """K_M of a held transform, in the dense form."""
    transformed = sum(
        block.samples * block.positions * (block.outputs * block.shape[0] ** 2 + block.shape[1] ** 2)
        for block in feats.blocks.values()
    )
    return sum(part.effort for part in feats.plan().blocks) / 2 + transformed

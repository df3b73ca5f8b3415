"""How a network's outputs are judged by labels: decided once, from those of all samples, so that no draw changes it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from adaptive_tangents.checks import class_columns
from adaptive_tangents.loading import Data, inner

ACCURACY, BINARY, SQUARED, LOSS = "accuracy", "bce", "mse", "loss"
KINDS = (ACCURACY, BINARY, SQUARED, LOSS)
WORDS = {BINARY: "binary cross-entropy", SQUARED: "mean squared error"}


@dataclass(frozen=True)
class Judge:
    """What outputs are judged by, if anything, and with one output the two class numbers below and above zero."""

    kind: str | None
    pair: tuple[int, int] | None = None

    def performance(self, outputs: Float[Tensor, "n c"], y: Tensor | None) -> dict[str, float] | None:
        """Accuracy of class numbers, binary cross-entropy of rows of 0 and 1, squared error, or the mean of losses."""
        wide = outputs.double()
        if self.kind == LOSS:
            return {LOSS: float(wide.mean())}
        if self.kind is None or y is None:
            return None
        if self.kind == ACCURACY:
            return {ACCURACY: float((self.predicted(outputs) == y).double().mean())}
        goal = (y[:, None] if y.ndim == 1 else y).to(wide)
        if self.kind == BINARY:
            return {BINARY: float(functional.binary_cross_entropy_with_logits(wide, goal))}
        return {SQUARED: float((wide - goal).square().mean())}

    def predicted(self, outputs: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        """The class numbers that outputs stand for, where they are judged by accuracy."""
        if self.pair is None:
            return outputs.argmax(1)
        return torch.tensor(self.pair, device=outputs.device)[(outputs[:, 0] > 0).long()]


def judge_of(data: Data, model: nn.Module, c: int) -> Judge:
    """How c outputs are judged by the labels of all samples, trained on and held out.

    Raises TangentError if there is one output and class numbers of more than two.
    """
    if data.loss:
        return Judge(LOSS)
    y = data.y
    if y is None:
        return Judge(None)
    if data.labels is not None:
        pair = two_classes(y) if c == 1 else None
        if c == 1 and pair is None:
            class_columns("inspect", y, 1)
        return Judge(ACCURACY, pair)
    rows = y[:, None] if y.ndim == 1 else y
    if tuple(rows.shape[1:]) != (c,):
        return Judge(None)
    return Judge(BINARY if _several_labels(y, model) else SQUARED)


def two_classes(y: Int[Tensor, " n"]) -> tuple[int, int] | None:
    """The two class numbers that labels are of, also where one of 0 and 1 does not occur; None if there are others.

    >>> two_classes(torch.tensor([1, 1])), two_classes(torch.tensor([6, 1, 6])), two_classes(torch.tensor([0, 1, 2]))
    ((0, 1), (1, 6), None)
    """
    kinds = torch.unique(y).tolist()
    for pair in ((0, 1), (-1, 1)):
        if set(kinds) <= set(pair):
            return pair
    return (kinds[0], kinds[1]) if len(kinds) == 2 else None


def _several_labels(y: Tensor, model: nn.Module) -> bool:
    """Whether targets are rows of 0 and 1 that say which labels a sample has.

    Real rows with a single 1 may be classes of a regression, unless the network says that they are labels.
    """
    if y.ndim != 2 or not bool(((y == 0) | (y == 1)).all()):
        return False
    if not y.is_floating_point() or _says_so(model):
        return True
    return y.shape[1] > 1 and not bool((y.sum(1) == 1).all())


def _says_so(model: nn.Module) -> bool:
    config = getattr(inner(model), "config", None)
    return getattr(config, "problem_type", None) == "multi_label_classification"

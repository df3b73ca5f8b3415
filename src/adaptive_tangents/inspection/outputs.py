"""Reduce a network's outputs to the few whose features are measured, and find the targets for them.

The cost of features grows with the number of outputs, so a classifier's c logits are reduced. The default is the one
direction in output space along which training separated the samples most. It is the same for all samples, so labels cannot
leak into the kernel. They do leak with a margin, whose sign depends on each sample's label.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, samples, take
from adaptive_tangents.capture.complex_parameters import as_real
from adaptive_tangents.capture.lease import LOCK
from adaptive_tangents.capture.network import Network, OutputFn
from adaptive_tangents.checks import class_columns
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection.judged import two_classes
from adaptive_tangents.inspection.names import told_apart
from adaptive_tangents.loading.outputs import pick
from adaptive_tangents.loading.reduced import LOSS, Reduced, Target

_CHUNK = 100


def network_outputs(model: nn.Module, state: Mapping[str, Tensor], x: Batch) -> Float[Tensor, "n c"]:
    """f(x; θ) of all samples, computed in parts."""
    with LOCK:
        parameters = {name: as_real(state.get(name, p).detach()) for name, p in model.named_parameters()}
        buffers = {name: state.get(name, b).detach() for name, b in model.named_buffers()}
    net = Network(model, parameters, buffers, (), pick, "inspect")
    with torch.no_grad():
        return torch.cat([net(take(x, slice(k, k + _CHUNK)), {}) for k in range(0, samples(x), _CHUNK)])


@dataclass(frozen=True)
class Reduction:
    """The outputs measured: their names, a sentence about them, and weights (c, k), or (n, c) per sample for a margin.

    ``share`` is their part of ‖f_T − f₀‖², without the change that all samples, or all logits, have in common.
    """

    kind: str
    names: tuple[str, ...]
    sentence: str
    weights: Tensor
    share: float

    def apply(self, outputs: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
        """The reduced outputs, from the network's outputs."""
        if self.kind == "margin":
            return (outputs * self.weights.to(outputs)).sum(1, keepdim=True)
        return outputs @ self.weights.to(outputs)

    def arrange(self, model: nn.Module, x: Batch) -> tuple[nn.Module, Batch, OutputFn]:
        """The model, batch and `output_fn=` for these outputs' features."""
        if self.kind != "margin":
            weights = self.weights
            return model, x, lambda out: pick(out) @ weights.to(pick(out))
        margins = Reduced(model, LOSS, Target("weighted sum", given=True))
        return margins, margins.with_targets(x, self.weights), pick


def reduce_outputs(
    how: str, change: Float[Tensor, "n c"], labels: Tensor | None, classes: tuple[str, ...] | None
) -> Reduction:
    """What `--outputs` means for a network whose outputs changed by f_T − f₀ (n, c).

    "auto": a single output as it is, else "main"; "main" or "main:k": the k directions of largest variance of the change
    over samples (for logits, orthogonal to all-ones); "margin": the label's logit minus the mean of the others; "all"; or
    outputs by number or class name, separated by commas.

    >>> reduce_outputs("auto", torch.tensor([[1.0], [2.0]]), None, None).names
    ('output',)
    """
    c = change.shape[1]
    logits = labels is not None and c > 1
    if logits and labels is not None and int(labels.max()) >= c:
        raise TangentError(
            f"inspect: y holds the label {int(labels.max())}, but the network has {c} outputs; number the classes from 0, "
            "or give real targets as floats"
        )
    if logits and labels is not None and int(labels.min()) < 0:
        raise TangentError(f"inspect: y holds the label {int(labels.min())}; number the classes from 0")
    titles = (
        told_apart(classes) if classes is not None and len(classes) == c else tuple(f"output {j}" for j in range(c))
    )
    titles = ("output",) if c == 1 else titles
    how = ("all" if c == 1 else "main") if how == "auto" else how
    eye = torch.eye(c, dtype=change.dtype, device=change.device)
    moved = change.double() - change.double().mean(0)
    moved = moved - moved.mean(1, keepdim=True) if logits else moved
    total = float(moved.square().sum())
    if how == "all":
        sentence = (
            "The network has one output." if c == 1 else f"All {c} outputs are measured; kernels are summed over them."
        )
        return Reduction("all", titles, sentence, eye, 1.0)
    if found := re.fullmatch(r"main(?::(\d+))?", how):
        k = int(found[1] or 1)
        most = c - logits
        if not 1 <= k <= most:
            raise TangentError(f"inspect: --outputs {how}: the number of directions must be 1 to {most}, or use all")
        values, vectors = torch.linalg.eigh(moved.mT @ moved)
        top = vectors[:, -k:].flip(1)
        top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
        share = float(values[-k:].clamp_min(0).sum() / values.clamp_min(0).sum().clamp_min(1e-300))
        names = ("main direction",) if k == 1 else tuple(f"direction {j + 1}" for j in range(k))
        sentence = (
            f"The network has {c} outputs. Features are of {'the direction' if k == 1 else f'the {k} directions'} in output "
            f"space along which training separated the samples most: {100 * share:.0f} % of the variance of the change."
        )
        return Reduction("main", names, sentence, top.to(change), share)
    if how == "margin":
        if labels is None or c < 2:
            raise TangentError(
                "inspect: --outputs margin needs integer labels y and at least two outputs; use main or all"
            )
        weights = eye[labels] - (1 - eye[labels]) / (c - 1)
        sentence = (
            "Features are of each sample's margin: the logit of its label minus the mean of the others. The margin's sign "
            "depends on the label, so its kernel cannot be compared to label kernels; its label target is +1 everywhere."
        )
        share = float((moved * weights.double()).sum(1).square().sum() / (c / (c - 1)) / max(total, 1e-300))
        return Reduction("margin", ("margin",), sentence, weights, min(share, 1.0))
    chosen = [_index(word, titles) for word in _words(how, titles)]
    share = float(moved[:, chosen].square().sum()) / max(total, 1e-300)
    names = tuple(titles[j] for j in chosen)
    return Reduction("some", names, f"Features are of {', '.join(names)}, out of {c} outputs.", eye[:, chosen], share)


def _words(how: str, titles: tuple[str, ...]) -> list[str]:
    """Numbers and names that commas separate; names may hold commas themselves.

    >>> _words("tench, Tinca, 2", ("tench, Tinca", "goldfish"))
    ['tench, Tinca', '2']
    """
    parts, found = how.split(","), list[str]()
    while parts:
        joined = (",".join(parts[:k]).strip() for k in range(len(parts), 1, -1))
        word = next((name for name in joined if name in titles), parts[0].strip())
        found.append(word)
        parts = parts[word.count(",") + 1 :]
    return found


def _index(word: str, titles: tuple[str, ...]) -> int:
    places = [j for j, title in enumerate(titles) if title in (word, f"{word} ({j})")]  # see `told_apart`
    if len(places) > 1:
        raise TangentError(
            f"inspect: --outputs: {word!r} is the name of several outputs, {', '.join(map(str, places))}; give their numbers"
        )
    if places:
        return places[0]
    if word.isdigit() and int(word) < len(titles):
        return int(word)
    raise TangentError(
        f"inspect: --outputs has no {word!r}; give all, main, main:k, margin, numbers 0 to {len(titles) - 1} or names among "
        f"{', '.join(titles[:12])}"
    )


def targets(
    reduction: Reduction, y: Tensor | None, c: int, pair: tuple[int, int] | None = None
) -> tuple[Float[Tensor, "n k"] | None, str]:
    """The labels as targets of the reduced outputs, and a description: one-hot centered, ±1, or real.

    ``pair`` are the two class numbers of all samples, which some may lack; None are those of ``y``.
    """
    if y is None:
        return None, "no labels were given"
    like = reduction.weights.double()  # a network in bfloat16 would round amounts
    if reduction.kind == "margin":
        return torch.ones(len(y), 1, dtype=like.dtype, device=like.device), "+1 for every margin"
    if not y.is_floating_point() and y.ndim == 1:
        if c > 1:
            onehot = torch.nn.functional.one_hot(y, c).to(like)
            return (onehot - onehot.mean(0)) @ like, "one-hot labels, centered, along the outputs measured"
        pair = two_classes(y) if pair is None else pair
        if pair is not None:
            signs = torch.where(y == pair[0], -1.0, 1.0).to(like)[:, None]
            return signs, f"−1 for label {pair[0]}, +1 for {pair[1]}"
    y = class_columns("inspect", y, 1 if y.ndim == 1 else None)
    real = (y[:, None] if y.ndim == 1 else y).to(like)
    if real.shape[1] != c:
        raise TangentError(
            f"inspect: y has {real.shape[1]} target(s) per sample and the network {c} output(s); give y of shape (n, {c}) "
            "or integer labels (n,)"
        )
    return real @ like, "the targets"

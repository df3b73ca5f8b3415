"""The ranks that adapters of low rank (LoRA) need to hold a change of weights, layer by layer.

Rank r of a layer holds Σ_{k≤r} g_k/Σ_k g_k of its change. The gains g_k are the squared singular values of Δθ, or, with
features at hand, those of the change weighed by what it does to the outputs.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from adaptive_tangents.errors import TangentError
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.measures.lora_layers import CALL, Layer, Layers, layers_of, selected, weighed

SHARE = 0.9
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class LoraLayer:
    """The advice for one layer.

    Attributes:
        module: its name in the model.
        shape: (o, i) of its weight; a convolution's kernel counts to i.
        rank: of its adapter; 0 if it gets none.
        share: of the layer's own change, which that rank holds.
        change: the layer's share of the change of all layers.
        parameters: of the adapter, rank·(o + i).
    """

    module: str
    shape: tuple[int, int]
    rank: int
    share: float
    change: float
    parameters: int


@dataclass(frozen=True)
class LoraAdvice:
    """Ranks for adapters, as PEFT takes them: ``LoraConfig(**advice.config)``.

    Attributes:
        layers: the advice for each layer, in the order of the source.
        whole: modules to train whole: an adapter of the rank that they need is no smaller than they are, or they were named.
        left_out: what has no adapters, with the reason.
        scaling: α/r, which is the same in all layers.
        weighed: whether the change is weighed by what it does to the outputs.
        gains: of every layer, without matrices, from which ``again`` makes other ranks.
    """

    layers: tuple[LoraLayer, ...]
    whole: tuple[str, ...]
    left_out: Mapping[str, str] = field(repr=False)
    scaling: float
    weighed: bool
    gains: Layers = field(repr=False, compare=False)

    def again(self, *, share: float | None = None, uniform_rank: int | None = None) -> "LoraAdvice":
        """Advice from the same change for another share or budget.

        Args:
            share: of each layer's own change, as for ``lora_advice``.
            uniform_rank: the budget, as for ``lora_advice``; by default neither, which is a share of 0.9.

        Raises:
            TangentError: if both are given, or one is out of range.
        """
        return _advised(self.gains, _goal(share, uniform_rank), self.scaling, self.weighed)

    @property
    def adapted(self) -> tuple[LoraLayer, ...]:
        """The layers that get adapters."""
        return tuple(layer for layer in self.layers if layer.rank)

    @property
    def parameters(self) -> int:
        """Parameters of all adapters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def share(self) -> float:
        """What the adapters hold of the change of all layers."""
        return sum(layer.share * layer.change for layer in self.layers)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The rank of each layer, for ``LoraConfig``."""
        return {self._pattern(layer.module): layer.rank for layer in self._longest_first()}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """The α of each layer, so that α/r is ``scaling`` in all of them."""
        return {self._pattern(layer.module): _whole(self.scaling * layer.rank) for layer in self._longest_first()}

    @property
    def target_modules(self) -> list[str] | str:
        """The names of the layers, or a regular expression where a name would match another layer too."""
        names = [layer.module for layer in self.adapted]
        others = [layer.module for layer in self.layers if not layer.rank] + [*self.whole, *self.left_out]
        if any(other.endswith(f".{name}") for name in names for other in others):
            return "|".join(map(re.escape, names))
        return names

    @property
    def config(self) -> dict[str, Any]:
        """Arguments for ``peft.LoraConfig``: r, lora_alpha, target_modules, rank_pattern, alpha_pattern, modules_to_save."""
        rank = Counter(layer.rank for layer in self.adapted).most_common(1)[0][0] if self.adapted else 1
        made: dict[str, Any] = {
            "r": rank,
            "lora_alpha": _whole(self.scaling * rank),
            "target_modules": self.target_modules,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        return made | ({"modules_to_save": list(self.whole)} if self.whole else {})

    def to_json(self) -> str:
        """``config`` as JSON: ``LoraConfig(**json.loads(text))``."""
        return json.dumps(self.config, indent=2, ensure_ascii=False)

    def table(self, most: int = 20) -> str:
        """The layers as text, those with the largest adapters first.

        Args:
            most: of the layers to show.
        """
        rows = sorted(self.layers, key=lambda layer: (-layer.parameters, -layer.change))
        width = max((len(row.module) for row in rows[:most]), default=len("layer"))
        lines = [f"{'layer':<{width}}  {'rank':>9}  holds  of the change  parameters"]
        for row in rows[:most]:
            ranks = f"{row.rank} of {min(row.shape)}"
            lines.append(
                f"{row.module:<{width}}  {ranks:>9}  {100 * row.share:3.0f} %  {100 * row.change:11.1f} %  "
                f"{row.parameters:10,}"
            )
        if len(rows) > most:
            lines.append(f"… and {len(rows) - most} more")
        return "\n".join(lines)

    def sentence(self) -> str:
        """The advice in words."""
        of = "of what the layers' change does to the outputs" if self.weighed else "of the layers' change of weights"
        ranks = sorted({layer.rank for layer in self.adapted})
        rest = (
            f" {', '.join(self.whole)} {'is' if len(self.whole) == 1 else 'are'} trained whole." if self.whole else ""
        )
        if not ranks:
            return f"No layer needs an adapter of low rank.{rest}"
        whole = sum(math.prod(layer.shape) for layer in self.adapted)
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return (
            f"LoRA adapters of {span} in {len(self.adapted)} layers ({self.parameters:,} parameters, "
            f"{100 * self.parameters / whole:.1f} % of these layers) hold {100 * self.share:.0f} % {of}.{rest}"
        )

    def __str__(self) -> str:
        return f"{self.sentence()}\n{self.table()}"

    def _longest_first(self) -> list[LoraLayer]:
        # PEFT takes the first pattern that matches the end of a name, so "block.0" has to come before "0".
        return sorted(self.adapted, key=lambda layer: (-len(layer.module), layer.module))

    def _pattern(self, module: str) -> str:
        # PEFT reads patterns as regular expressions; a plain name is one, and only its dots are not taken literally.
        if re.fullmatch(r"[\w.-]*", module) is None:
            return re.escape(module)
        mistaken = any(other.module != module and re.fullmatch(module, other.module) for other in self.layers)
        return re.escape(module) if mistaken else module


def lora_advice(
    source: object,
    *,
    share: float | None = None,
    uniform_rank: int | None = None,
    wrt: str | tuple[str, ...] | None = None,
    whole: str | tuple[str, ...] | None = None,
    features: TangentFeatures | None = None,
    model: nn.Module | None = None,
    scaling: float = 1.0,
) -> LoraAdvice:
    """The rank that each layer's adapter needs: least r with Σ_{k≤r} g_k ≥ share·Σ_k g_k, or the best use of a budget.

    Args:
        source: what changed: a pair of state dicts (start, end), a mapping from layers to matrices Δθ (o, i), a Forecast
            (its end minus its start), or anything with the ``results`` and ``arrays`` of an inspection, where a bias counts
            as a column of its layer.
        share: of each layer's own change that its adapter holds, above 0, at most 1; None is 0.9.
        uniform_rank: instead of a share: as many parameters as this rank takes in every layer, spread over layers and
            directions by the gain per parameter, g_k/(o + i). Layers that gain little get none.
        wrt: the layers that may have adapters, by a pattern of names or several; None is all with a weight matrix. Embeddings
            are left out: by type if there is a model, else by name.
        whole: layers to be trained whole, by pattern, such as a new head; None is those whose adapters would be no smaller.
        features: of all these layers, at the start, at the end or averaged. The gains are then by what a direction does to
            the outputs: the squared singular values of G^½ Δθ H^½, with G = ΣΦΦᵀ, H = ΣΦᵀΦ of the weight's own features Φ
            (without a bias), scaled to add up to ‖ΦΔθ‖². None: squared singular values of Δθ.
        model: tells which modules are layers that adapters can change; None goes by the shapes and names of weights.
        scaling: α/r of the adapters.

    Raises:
        TangentError: if the source is none of these, nothing changed, or an option is out of range.

    >>> import torch
    >>> change = torch.diag(torch.tensor([4.0, 1.0, 0.1, 0.0]))
    >>> advice = lora_advice({"encoder.0.query": torch.kron(change, torch.ones(8, 8))})
    >>> advice.rank_pattern
    {'encoder.0.query': 1}
    """
    goal = _goal(share, uniform_rank)
    scale = _positive("scaling", scaling)
    layers = selected(layers_of(source, model), wrt)
    if features is not None:
        layers = weighed(layers, features)
    if not any(float(layer.gains.sum()) > 0 for layer in layers.found.values()):
        raise TangentError(f"{CALL}: no layer changed; give states before and after training")
    found = {name: replace(layer, change=None) for name, layer in layers.found.items()}
    plain = Layers(found, layers.left_out, frozenset(_named(layers, whole)))
    return _advised(plain, goal, scale, features is not None)


def _advised(layers: Layers, goal: float | int, scaling: float, by_outputs: bool) -> LoraAdvice:
    kept = set(layers.whole)
    rest = {name: layer for name, layer in layers.found.items() if name not in kept}
    if isinstance(goal, int):
        ranks = _spread(rest, goal)
    else:
        ranks = {name: _rank(layer, goal) for name, layer in rest.items()}
    kept |= {name for name, layer in rest.items() if ranks[name] > 0 and ranks[name] > _most(layer)}
    rest = {name: layer for name, layer in rest.items() if name not in kept}
    total = sum(float(layer.gains.sum()) for layer in rest.values())
    rows = tuple(_row(name, layer, ranks[name], total) for name, layer in rest.items())
    whole = tuple(name for name in layers.found if name in kept)
    return LoraAdvice(rows, whole, layers.left_out, scaling, by_outputs, layers)


def _goal(share: float | None, uniform_rank: int | None) -> float | int:
    if share is not None and uniform_rank is not None:
        raise TangentError(f"{CALL}: give share or uniform_rank, not both")
    if uniform_rank is not None:
        if isinstance(uniform_rank, bool) or not isinstance(uniform_rank, int) or uniform_rank < 1:
            raise TangentError(f"{CALL}: uniform_rank is a positive whole number, got {uniform_rank!r}")
        return uniform_rank
    value = SHARE if share is None else share
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise TangentError(f"{CALL}: share is above 0 and at most 1, got {share!r}")
    return float(value)


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TangentError(f"{CALL}: {name} is a positive, finite number, got {value!r}")
    return float(value)


def _named(layers: Layers, whole: str | tuple[str, ...] | None) -> set[str]:
    """The layers that are to be trained whole."""
    if whole is None:
        return set()
    patterns = (whole,) if isinstance(whole, str) else tuple(whole)
    kept = {name for name in layers.found if any(fnmatchcase(name, p) for p in patterns)}
    if not kept:
        raise TangentError(f"{CALL}: whole = {whole!r} names none of the layers; use a pattern such as 'classifier*'")
    return kept


def _most(layer: Layer) -> int:
    """The largest rank whose adapter is smaller than the layer."""
    o, i = layer.shape
    return (o * i - 1) // (o + i)


def _rank(layer: Layer, share: float) -> int:
    """The least rank that holds a share of the layer's change."""
    total = float(layer.gains.sum())
    if total == 0:
        return 0
    held = layer.gains.cumsum(0) >= (share - _TOLERANCE) * total
    return int(held.long().argmax()) + 1


def _spread(layers: Mapping[str, Layer], uniform: int) -> dict[str, int]:
    """Ranks by greatest gain per parameter, with no more parameters than a uniform rank takes."""
    able = {name: layer for name, layer in layers.items() if _most(layer)}
    left = sum(min(uniform, _most(layer)) * sum(layer.shape) for layer in able.values())
    steps = [
        (-float(gain) / sum(layer.shape), order, k, name)
        for order, (name, layer) in enumerate(able.items())
        for k, gain in enumerate(layer.gains[: _most(layer)])
        if gain > 0
    ]
    # A layer that changed but whose adapter is never smaller than itself is trained whole.
    ranks = {name: min(layer.shape) if name not in able and bool(layer.gains.sum() > 0) else 0
             for name, layer in layers.items()}  # fmt: skip
    for _, _, k, name in sorted(steps):
        cost = sum(able[name].shape)
        if cost <= left and ranks[name] == k:
            ranks[name], left = k + 1, left - cost
    return ranks


def _row(name: str, layer: Layer, rank: int, total: float) -> LoraLayer:
    own: Tensor = layer.gains.sum()
    share = float(layer.gains[:rank].sum() / own) if float(own) > 0 else 1.0
    return LoraLayer(name, layer.shape, rank, share, float(own) / total if total else 0.0, rank * sum(layer.shape))


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value

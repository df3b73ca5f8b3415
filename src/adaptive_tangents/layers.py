"""For each torch layer: its input-side and output-side factors. The only file that knows layer types.

A rule says how a layer's weight gradient is a sum of outer products over positions, given what went in and the gradient
of an output with respect to what came out. To support a layer type, add its rule here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerRule:
    """How one layer type factors: ∂f/∂W = Σ_t δ_t h_tᵀ and ∂f/∂b = Σ_t δ_t.

    ``inputs(module, x)`` gives h (n, t, i) from the layer's input; ``backward(module, g)`` gives δ (n, t, c, o) from
    the gradients g (c, n, ...) of the c outputs with respect to the layer's output; ``matrix(module)`` is (o, i).
    """

    layer: type[nn.Module]
    weight: str
    bias: str
    matrix: Callable[[nn.Module], tuple[int, int]]
    inputs: Callable[[nn.Module, Tensor], Float[Tensor, "n t i"]]
    backward: Callable[[nn.Module, Tensor], Float[Tensor, "n t c o"]]


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that describes ``module``'s forward exactly, or None: a subclass or object with a forward of its own."""
    for rule in RULES:
        if (
            isinstance(module, rule.layer)
            and type(module).forward is rule.layer.forward
            and "forward" not in vars(module)
        ):
            return rule
    return None


def _linear_inputs(module: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _linear_backward(module: nn.Module, gradient: Tensor) -> Tensor:
    c, n, *_, o = gradient.shape
    return gradient.reshape(c, n, -1, o).permute(1, 2, 0, 3).contiguous()


def _linear_matrix(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[0], module.weight.shape[1]


RULES: tuple[LayerRule, ...] = (
    LayerRule(nn.Linear, "weight", "bias", _linear_matrix, _linear_inputs, _linear_backward),
)


def bias_inputs(like: Float[Tensor, "n t i"]) -> Float[Tensor, "n t 1"]:
    """The input that a bias sees at every position."""
    return torch.ones_like(like[..., :1])

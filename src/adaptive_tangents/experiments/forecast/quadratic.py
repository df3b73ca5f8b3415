"""The second-order model of a network at θ₀, trained as the network is."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SecondOrder(nn.Module):
    """f(x;θ₀) + f′[Δ] + ½ f″[Δ, Δ] with parameters Δ, by forward derivatives of s ↦ f(x; θ₀ + sΔ) at 0.

    >>> model = SecondOrder(nn.Linear(2, 1))
    >>> bool((model(torch.ones(3, 2)) == model.network(torch.ones(3, 2))).all())
    True
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.held = [network]  # in a list, so that its parameters are not this module's
        self.start = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.change = nn.ParameterList(torch.zeros_like(value) for value in self.start.values())

    @property
    def network(self) -> nn.Module:
        """The network at θ₀."""
        return self.held[0]

    def moved(self) -> Mapping[str, Tensor]:
        """θ₀ + Δ."""
        return {name: value + self.change[k].detach() for k, (name, value) in enumerate(self.start.items())}

    def forward(self, x: Tensor) -> Tensor:
        deltas = list(self.change)

        def along(s: Tensor) -> Tensor:
            values = {name: value + s * delta for (name, value), delta in zip(self.start.items(), deltas, strict=True)}
            found: Tensor = torch.func.functional_call(self.network, values, (x,))
            return found

        def slope(s: Tensor) -> tuple[Tensor, Tensor]:
            value, first = torch.func.jvp(along, (s,), (torch.ones_like(s),))[:2]
            return value, first

        zero = torch.zeros((), dtype=deltas[0].dtype, device=deltas[0].device)
        both, rates = torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))[:2]
        found: Tensor = both[0] + both[1] + rates[1] / 2
        return found

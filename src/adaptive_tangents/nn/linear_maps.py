"""A network at θ₀ with its derivative there as two linear maps, φ(x)β in forward mode and φ(x)ᵀg in reverse mode."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adaptive_tangents.capture.batches import Batch, samples, take, tensors
from adaptive_tangents.capture.derivatives import saved_copies
from adaptive_tangents.capture.differences import graph_of, verify
from adaptive_tangents.capture.interaction import check_interaction
from adaptive_tangents.capture.network import Network
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.nn.forward_mode import forward_attention, forward_lookups

_TRIED = 3  # batches on which forward mode is checked
Way = Literal["forward", "backward", "features"]


@dataclass
class Ways:
    """How φβ is computed, once known, on how many batches that was checked, and whether samples were found independent."""

    chosen: Way | None = None
    tried: int = 0
    apart: bool = False


class LinearMaps:
    """The network at θ₀, with its derivative there as two linear maps."""

    def __init__(self, network: Network, ways: "Ways", features: Callable[[Batch], TangentFeatures]) -> None:
        self.network, self.ways, self.features = network, ways, features
        self.selected = {name: network.parameters[name] for name in network.selected}

    def __call__(self, x: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.network(x, parameters)

    def along(self, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """f(x; θ₀) and φ(x)β."""
        found: tuple[Tensor, Tensor] = self.network.lend(partial(getattr(self, f"_{self.way(x)}"), x, tangents))
        return found

    def recorded(self, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, "_Graph | None"]:
        """f(x; θ₀) and φ(x)β, with the graph of f if it was recorded."""
        if self.way(x) != "forward":
            with torch.no_grad():
                return (*self.along(x, tangents), None)

        return self.network.lend(lambda: self._recorded(x, tangents))

    def _recorded(self, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, "_Graph"]:
        leaves = self.network.leaves()
        with torch.enable_grad(), forward_attention():
            outputs, change = self._forward(x, tangents, leaves)
        return outputs.detach(), change.detach(), (outputs, tuple(leaves.values()))

    def way(self, x: Batch) -> Way:
        """How φβ is computed: the way that was right for the first batches.

        More than one is tried, as TorchScript computes a function in other ways when it has seen some calls.
        """
        ways = self.ways
        if ways.chosen is None:
            self.network.lend(partial(self._verify, take(x, slice(0, 1))))
        if not ways.apart and samples(x) > 1:
            self.network.lend(partial(self._check_interaction, x))
            ways.apart = True
        if ways.chosen is None or (ways.chosen == "forward" and ways.tried < _TRIED):
            ways.tried += 1
            ways.chosen = self._first_right(x)
        return ways.chosen

    def _verify(self, x: Batch) -> None:
        with torch.enable_grad():
            leaves = self.network.leaves()
            try:
                out = self(x, leaves)
            except Exception:
                return  # a model that does not run on one sample is not judged
            with suppress(RuntimeError, AssertionError):  # nor one without a backward pass
                verify(self.network, x, out, leaves)

    def _check_interaction(self, x: Batch) -> None:
        with torch.enable_grad():
            try:
                first = self(take(x, slice(0, 1)), self.network.leaves())
            except Exception:
                return  # as above
            least = graph_of(first).dtype if first.requires_grad else first.dtype
        with torch.no_grad():
            together = self(x, {})
        check_interaction(self.network, x, together, first.detach()[0], least)

    def _first_right(self, x: Batch) -> Way:
        """The first way that is adjoint to ``against``: some operations have no forward mode, or a wrong one."""
        generator = torch.Generator().manual_seed(0)

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device="cpu").to(like)

        tangents = tuple(draw(value) for value in self.selected.values())
        ways: tuple[Way, ...] = get_args(Way)
        for way in ways:
            with torch.no_grad(), suppress(Exception):  # no derivative of this kind, or not of this model
                outputs, change = self.network.lend(partial(getattr(self, f"_{way}"), x, tangents))
                recorded = [self.network.lend(partial(self._recorded, x, tangents))[1]] if way == "forward" else []
                signal = draw(outputs)
                back = self.against(x, signal)
                found = [float((signal * made).double().sum()) for made in [change, *recorded]]
                wanted = sum(float((b * t).double().sum()) for b, t in zip(back, tangents, strict=True))
                size = float(signal.double().norm() * change.double().norm())
                if max(abs(value - wanted) for value in found) <= torch.finfo(outputs.dtype).eps ** 0.5 * size:
                    return way
        return "features"

    def _forward(
        self, x: Batch, tangents: tuple[Tensor, ...], leaves: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level(), forward_lookups():
            moved = {
                name: forward_ad.make_dual(value, tangent.contiguous())  # type: ignore[no-untyped-call]
                for (name, value), tangent in zip((leaves or self.selected).items(), tangents, strict=True)
            }
            outputs, change = forward_ad.unpack_dual(self(x, moved))  # type: ignore[no-untyped-call]
        return outputs, torch.zeros_like(outputs) if change is None else change

    def _backward(self, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """φβ is the derivative of ⟨φᵀg, β⟩ in g."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = self.network.leaves()
            out = self(x, leaves)
            signal = torch.zeros_like(out, requires_grad=True)
            back = torch.autograd.grad(out, list(leaves.values()), signal, create_graph=True, materialize_grads=True)
        along = [(b, t) for b, t in zip(back, tangents, strict=True) if b.requires_grad]
        columns, values = [b for b, _ in along], [t for _, t in along]
        (change,) = torch.autograd.grad(columns, [signal], values, create_graph=again)
        return out if again else out.detach(), change

    def _features(self, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """φβ from the features themselves works for every network."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors(x)):
            raise TangentError(
                "TangentModule: an operation of this model has neither forward mode nor second derivatives, so there is no "
                "derivative with respect to the inputs; detach them"
            )
        with raised_as("TangentModule", "tangent_features"):
            feats = self.features(x)
        named = dict(zip(self.selected, tangents, strict=True))
        matrices = {name: block.join(named).to(feats.dtype) for name, block in feats.blocks.items()}
        outputs = self(x, {})
        return outputs.detach(), feats.inner(matrices).to(outputs.dtype)

    def against(self, x: Batch, signal: Tensor, graph: "_Graph | None" = None) -> tuple[Tensor, ...]:
        """φ(x)ᵀg, shaped as the selected parameters."""
        try:
            return self.network.lend(lambda: self._against(x, signal, graph))
        except RuntimeError:  # a saved tensor was overwritten later
            with saved_copies():
                return self.network.lend(lambda: self._against(x, signal, None))

    def _against(self, x: Batch, signal: Tensor, graph: "_Graph | None") -> tuple[Tensor, ...]:
        # Forward mode, which a model may use itself, is off within a Function.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            if graph is None:
                leaves = self.network.leaves()
                graph = self(x, leaves), tuple(leaves.values())
            else:  # a backward pass may run modules again
                self.network.put(dict(zip(self.selected, graph[1], strict=True)))
            found = torch.autograd.grad(*graph, signal, materialize_grads=True)
            return tuple(gradient.to_dense() if gradient.is_sparse else gradient for gradient in found)


_Graph = tuple[Tensor, tuple[Tensor, ...]]  # outputs f and the parameters they depend on, for one backward pass


def along(network: LinearMaps, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Outputs f and φβ, the second with φᵀ as its derivative."""
    # Compute it here: forward mode is off within an autograd.Function's forward.
    still = tuple(tangent.detach() for tangent in tangents)
    if torch.is_grad_enabled():
        initial, change, graph = network.recorded(x, still)
    else:
        (initial, change), graph = network.along(x, still), None
    made: Tensor = _Along.apply(network, x, change, graph, *tangents)  # type: ignore[no-untyped-call]
    return initial, made


class _Along(torch.autograd.Function):
    """β ↦ φβ, with φβ already computed."""

    @staticmethod
    def forward(
        ctx: Any, network: LinearMaps, x: Batch, change: Tensor, graph: _Graph | None, *tangents: Tensor
    ) -> Tensor:
        ctx.network, ctx.x, ctx.graph = network, x, graph
        return change.view_as(change)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Any, ...]:
        graph, ctx.graph = ctx.graph, None
        found = _Against.apply(ctx.network, ctx.x, graph, signal)  # type: ignore[no-untyped-call]
        return (None, None, None, None, *found)


class _Against(torch.autograd.Function):
    """G ↦ φᵀg, with φ as its derivative."""

    @staticmethod
    def forward(ctx: Any, network: LinearMaps, x: Batch, graph: _Graph | None, signal: Tensor) -> tuple[Tensor, ...]:
        ctx.network, ctx.x = network, x
        return network.against(x, signal, graph)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Any, ...]:
        return None, None, None, along(ctx.network, ctx.x, tangents)[1]

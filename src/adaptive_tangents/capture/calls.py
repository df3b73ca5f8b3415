"""The calls of layers with a rule, recorded by hooks during a forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adaptive_tangents.capture.layers import LayerRule, rule_for
from adaptive_tangents.capture.live_positions import at_positions
from adaptive_tangents.capture.sample_layouts import SampleLayout, layouts


@dataclass(frozen=True)
class Use:
    """One call of a layer with a rule: its input, and the edge of the graph where its output enters."""

    module: nn.Module
    rule: LayerRule
    inputs: Tensor
    version: int
    edge: GradientEdge

    def layouts(self, n: int) -> tuple[SampleLayout, ...]:
        """The possible layouts of the samples in the input."""
        ways = layouts(tuple(self.inputs.shape), n)
        before_last = self.inputs.ndim > 2 or not self.inputs.is_floating_point()
        return ways if self.rule.tokens and before_last else tuple(way for way in ways if way != "second")

    def has_positions(self, n: int) -> bool:
        """Whether input and output are (n, *positions, units), or (n, *positions) of a table."""
        shape, made = self.inputs.shape, self.edge.node._input_metadata[self.edge.output_nr].shape
        positions = shape[1:] if self.rule.table else shape[1:-1]
        return self.rule.tokens and len(positions) > 0 and tuple(made[:-1]) == (n, *positions)

    def at(self, live: Int[Tensor, "n s"] | None) -> "Use":
        """The same at some positions of each sample; None is all."""
        if live is None:
            return self
        positions = self.inputs.ndim - (1 if self.rule.table else 2)
        return replace(self, inputs=at_positions(self.inputs, live, positions))


def _is_special(tensor: Tensor) -> bool:
    """Whether a tensor is inside a functional transform, ragged or sparse, so that no rule of a layer holds."""
    inside = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return bool(inside) or tensor.is_nested or tensor.layout != torch.strided


@contextmanager
def recorded_calls(model: nn.Module, uses: list[Use], *, copy: bool, hold: Callable[[Any], None]) -> Iterator[None]:
    """Record every call of a layer that has a rule, and ``hold`` its node; all hooks are removed afterwards."""

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        rule = rule_for(module)
        x = arguments[0] if arguments else keywords.get("input")
        if rule is not None and rule.alone and len(arguments) + len(keywords) > 1:
            return
        if rule is None or not isinstance(x, Tensor) or not isinstance(out, Tensor) or not out.requires_grad:
            return
        if _is_special(x) or _is_special(out):
            return
        if not rule.accepts(module, x):
            return
        kept = rule.keep(module, x.detach())
        kept = kept.clone() if copy else kept
        edge = get_gradient_edge(out)
        hold(edge.node)
        uses.append(Use(module, rule, kept, kept._version, edge))

    handles = []
    try:
        for module in model.modules():
            if rule_for(module) is not None:
                # Before the model's own hooks, so that what they do to the output counts as downstream of the layer.
                handles.append(module.register_forward_hook(record, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()

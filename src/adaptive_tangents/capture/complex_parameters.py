"""Complex parameters as pairs of real ones: features of the real and of the imaginary part, in a last dimension of two."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def as_real(value: Tensor) -> Tensor:
    """A complex tensor as a real one (*shape, 2); a real tensor unchanged."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def as_given(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state for the model itself, in which tensors that are complex in the model are complex again."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    pairs = {name for name, tensor in own if tensor.is_complex()} & state.keys()
    made = {name: torch.view_as_complex(state[name]) for name in pairs if not state[name].is_complex()}
    return {**state, **made} if made else dict(state)

"""Copies of a model whose parameters are buffers, so that nothing trains them, and back."""

from collections.abc import Mapping

from torch import Tensor, nn

from adaptive_tangents.capture.belongings import copied


def places_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter in a model."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[str, ...]] = dict.fromkeys(names.values(), ())
    for name, p in model.named_parameters(remove_duplicate=False):
        found[names[id(p)]] += (name,)
    return found


def frozen(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with parameters as buffers, and values from a state."""
    found = copied("TangentModule", model).eval()
    for name, tensor in [*found.named_parameters(), *found.named_buffers()]:
        tensor.requires_grad_(False)
        if name in state:
            tensor.data = state[name].detach().clone()
    freeze(found)
    return found


def freeze(model: nn.Module) -> None:
    """Make buffers of all parameters."""
    for module in model.modules():
        for name in [name for name, parameter in module._parameters.items() if parameter is not None]:
            module._buffers[name] = module._parameters.pop(name).requires_grad_(False)  # type: ignore[union-attr]


def tie(model: nn.Module, places: Mapping[str, tuple[str, ...]]) -> None:
    """Let the names of what was one parameter hold one tensor again, the first's."""
    for first, *aliases in places.values():
        for alias in aliases:
            path, _, name = alias.rpartition(".")
            model.get_submodule(path)._buffers[name] = model.get_buffer(first)


def thawed(model: nn.Module, places: Mapping[str, tuple[str, ...]]) -> nn.Module:
    """A copy of a frozen model, its buffers turned back into parameters."""
    found = copied("TangentModule", model)
    for aliases in places.values():
        parameter = None
        for alias in aliases:
            path, _, name = alias.rpartition(".")
            module = found.get_submodule(path)
            buffer = module._buffers.pop(name)
            if parameter is None:
                parameter = buffer if isinstance(buffer, nn.Parameter) else nn.Parameter(buffer)  # type: ignore[arg-type]
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            module.register_parameter(name, parameter)
    return found

"""The adaptive tangent model as a module to be trained: f(x;θ₀) + φ(x)Mᵀθ, features never formed.

φ(x)β is a derivative of the network along β, one forward pass in forward mode; φᵀg one backward pass. Both are linear maps
at the frozen θ₀, each the other's derivative, so training needs no second derivatives of the network.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from adaptive_tangents.blocks import Block
from adaptive_tangents.capture import tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.factors import factors
from adaptive_tangents.features import TangentFeatures
from adaptive_tangents.fits import Fit
from adaptive_tangents.inputs import (
    Batch,
    Network,
    Output,
    Selection,
    check_mode,
    check_model,
    overlay,
    select,
    tensors,
)
from adaptive_tangents.mixed import as_structure
from adaptive_tangents.recording import parameter_groups
from adaptive_tangents.structures import Fixed, Structure
from adaptive_tangents.transforms import Transform


class TangentModule(nn.Module):
    r"""f(x;θ₀) + φ(x)Mᵀθ as a module: the network linearised at θ₀ with features Mφ that are learnt too.

    ``structure`` says what M may be: ``Fixed`` trains θ = β alone, the linearised network; the others θ and the factors of M,
    started at θ = 0 and M = I, where the output is the network's and gradients of θ flow. ``rank`` limits M − I of every side
    that is a matrix to a rank. ``params``, ``wrt`` and ``output`` as in ``tangent_features``; the model is copied, in
    evaluation mode, and its θ₀ are buffers: they move with ``.to``, are in the state dict, and no optimiser sees them. Takes
    a batch as ``tangent_features`` does, gives (n, c). Source: LeJeune & Alemohammad, CPAL 2024, §2.

    Raises TangentError for models that ``tangent_features`` refuses and structures whose factors are not known.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> adaptive = at.TangentModule(model, at.TwoSided(at.Quadratic(0.1)))
    >>> torch.allclose(adaptive(x), model(x))
    True
    >>> optimiser, losses = torch.optim.Adam(adaptive.parameters(), lr=1e-3), []
    >>> for _ in range(20):
    ...     optimiser.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(adaptive(x), y)
    ...     loss.backward()
    ...     optimiser.step()
    ...     losses.append(loss.item())
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure | Mapping[str, Structure] | None = None,
        *,
        params: Mapping[str, Tensor] | None = None,
        wrt: Selection | None = None,
        output: Output | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        call = "TangentModule"
        if rank is not None and rank < 1:
            raise TangentError(f"{call}: rank is positive, got {rank}")
        check_model(call, model)
        check_mode(call, model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = {name: b.detach() for name, b in model.named_buffers()}
        selected = select(call, model, wrt)
        if params is not None:
            parameters, buffers = overlay(call, model, params)
        network = Network(model, parameters, buffers, selected, output, call)
        groups = parameter_groups(network)
        self.structure = Fixed() if structure is None else as_structure(structure)
        self.output, self.selected = output, selected
        self.blocks = {g.name: Block(g.name, g.matrix, g.slots, modes=g.modes) for g in groups}
        self._places = _places(model)
        self.model = _frozen(model, {**parameters, **buffers})
        like = parameters[selected[0]]
        self.inner = nn.ParameterDict({_key(g.name): torch.zeros(g.matrix) for g in groups})
        shapes, modes = {g.name: g.matrix for g in groups}, {g.name: g.modes for g in groups}
        self.factors = nn.ModuleList(factors(self.structure, shapes, modes, rank))
        self.inner.to(like)
        self.factors.to(like)
        self.eval()

    def train(self, mode: bool = True) -> "TangentModule":
        """As for any module; the frozen network stays in evaluation mode, where its features are defined."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, x: Batch) -> Float[Tensor, "n c"]:
        """f(x;θ₀) + φ(x)Mᵀθ."""
        out: Tensor = self._outputs(x, self._parameters_of(self._coefficients()))
        return out

    def initial(self, x: Batch) -> Float[Tensor, "n c"]:
        """f(x;θ₀), without a gradient."""
        with torch.no_grad():
            out: Tensor = self._network()(x, {})
            return out

    def effective_coefficients(self) -> dict[str, Float[Tensor, "_o _i"]]:
        """β = Mᵀθ, one matrix a block."""
        return {name: matrix.detach().clone() for name, matrix in self._coefficients().items()}

    def inner_coefficients(self) -> dict[str, Float[Tensor, "_o _i"]]:
        """θ, one matrix a block."""
        return {name: self.inner[_key(name)].detach().clone() for name in self.blocks}

    def transforms(self) -> dict[str, Transform]:
        """M as it is now, as a transform of features."""
        inner = self.inner_coefficients()
        return {name: t for factor in self.factors for name, t in factor.transforms(inner).items()}  # type: ignore[operator]

    def adapted_features(self, x: Batch, *, memory_limit: int | None = None) -> TangentFeatures:
        """Mφ(x): their kernel is the adapted kernel, their product with θ what the output changes by."""
        return self.features(x, memory_limit=memory_limit).transformed(self.transforms())

    def features(self, x: Batch, *, memory_limit: int | None = None) -> TangentFeatures:
        """φ(x) at θ₀."""
        model = _thawed(self.model, self._places)
        return tangent_features(model, x, wrt=self.selected, output=self.output, memory_limit=memory_limit)

    def regulariser(self) -> Float[Tensor, ""]:
        """‖θ‖² + Ω(M): with Σ‖y_k − f(x_k)‖²/ρ beside it, the joint objective (J) whose minimum ``fit`` finds."""
        size = torch.stack([(matrix**2).sum() for matrix in self.inner.values()]).sum()
        return size + torch.stack([factor.penalty().to(size) for factor in self.factors]).sum()  # type: ignore[operator]

    def load_fit(self, fit: Fit) -> "TangentModule":
        """Take over β and M of a fit to features of the same blocks; returns the module itself.

        Raises TangentError where blocks differ, or a side of the fit moves more directions than ``rank``.
        """
        found = {name: tuple(matrix.shape) for name, matrix in fit.coefficients.items()}
        wanted = {name: block.shape for name, block in self.blocks.items()}
        if found != wanted:
            raise TangentError(f"TangentModule: the fit has blocks {found}, this module {wanted}")
        with torch.no_grad():
            for factor in self.factors:
                for name, matrix in factor.take(fit.transforms, fit.coefficients).items():  # type: ignore[operator]
                    self.inner[_key(name)].copy_(matrix)
        return self

    def _coefficients(self) -> dict[str, Tensor]:
        inner = {name: self.inner[_key(name)] for name in self.blocks}
        return {name: m for factor in self.factors for name, m in factor.coefficients(inner).items()}  # type: ignore[operator]

    def _parameters_of(self, matrices: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """One matrix a block as the selected parameters, in their order."""
        split = {k: v for name, block in self.blocks.items() for k, v in block.split(matrices[name]).items()}
        return tuple(split[name] for name in self.selected)

    def _network(self) -> "_At":
        state = {name: value.detach() for name, value in self.model.named_buffers(remove_duplicate=False)}
        parameters = {name: state[name] for name in self._places}
        rest = {name: value for name, value in state.items() if name not in _all(self._places)}
        network = Network(self.model, parameters, rest, self.selected, self.output, "TangentModule")
        return _At(network, self._places)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _outputs(self, x: Batch, tangents: tuple[Tensor, ...]) -> Tensor:
        network = self._network()
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors(x)):
            initial, change = network.along(x, tangents)
        else:
            initial, change = _along(network, x, tangents)
        total: Tensor = initial + change
        return total


class _At:
    """A network at its θ₀ with the two linear maps of its derivative there."""

    def __init__(self, network: Network, places: Mapping[str, tuple[str, ...]]) -> None:
        self.network, self.places = network, places

    def __call__(self, x: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        state = {**self.network.parameters, **parameters}
        return self.network(x, {alias: state[name] for name, aliases in self.places.items() for alias in aliases})

    @property
    def selected(self) -> dict[str, Tensor]:
        return {name: self.network.parameters[name] for name in self.network.selected}

    def along(self, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """f(x;θ₀) and φ(x)β."""
        with forward_ad.dual_level():
            moved = {
                name: forward_ad.make_dual(value, tangent.contiguous())  # type: ignore[no-untyped-call]
                for (name, value), tangent in zip(self.selected.items(), tangents, strict=True)
            }
            outputs, change = forward_ad.unpack_dual(self(x, moved))  # type: ignore[no-untyped-call]
        return outputs, torch.zeros_like(outputs) if change is None else change

    def against(self, x: Batch, signal: Tensor) -> tuple[Tensor, ...]:
        """φ(x)ᵀg, as the selected parameters."""
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_(True) for name, value in self.selected.items()}
            out = self(x, leaves)
            return torch.autograd.grad(out, list(leaves.values()), signal, materialize_grads=True)


def _along(network: _At, x: Batch, tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """f and φβ, the second with φᵀ as its derivative."""
    # Made here: forward mode is off within the forward of a function of one's own.
    with torch.no_grad():
        initial, change = network.along(x, tangents)
    made: Tensor = _Along.apply(network, x, change, *tangents)  # type: ignore[no-untyped-call]
    return initial, made


class _Along(torch.autograd.Function):
    """β ↦ φβ, given already."""

    @staticmethod
    def forward(ctx: Any, network: _At, x: Batch, change: Tensor, *tangents: Tensor) -> Tensor:
        ctx.network, ctx.x = network, x
        return change.view_as(change)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *_Against.apply(ctx.network, ctx.x, signal))  # type: ignore[no-untyped-call]


class _Against(torch.autograd.Function):
    """G ↦ φᵀg, with φ as its derivative."""

    @staticmethod
    def forward(ctx: Any, network: _At, x: Batch, signal: Tensor) -> tuple[Tensor, ...]:
        ctx.network, ctx.x = network, x
        return network.against(x, signal)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Any, ...]:
        return None, None, _along(ctx.network, ctx.x, tangents)[1]


def _key(name: str) -> str:
    """A block's name as that of a parameter, where a point is not allowed."""
    return name.replace(".", "/")


def _places(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All the names under which each parameter is found in a model."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[str, ...]] = dict.fromkeys(names.values(), ())
    for name, p in model.named_parameters(remove_duplicate=False):
        found[names[id(p)]] += (name,)
    return found


def _all(places: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {alias for aliases in places.values() for alias in aliases}


def _frozen(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model in which parameters are buffers, with values from a state."""
    aliases = {alias: name for name, held in _places(model).items() for alias in held}
    found = copy.deepcopy(model).eval()
    made: dict[str, Tensor] = {}
    for path, module in found.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                first = aliases[f"{path}.{name}" if path else name]
                made.setdefault(first, state[first].detach().clone())
                del module._parameters[name]
                module.register_buffer(name, made[first])
        for name, buffer in module._buffers.items():
            whole = f"{path}.{name}" if path else name
            if buffer is not None and whole in state and whole not in aliases:
                module._buffers[name] = state[whole].detach().clone()
    return found


def _thawed(model: nn.Module, places: Mapping[str, tuple[str, ...]]) -> nn.Module:
    """A copy of a frozen model with its parameters parameters again."""
    found = copy.deepcopy(model)
    for aliases in places.values():
        parameter = None
        for alias in aliases:
            path, _, name = alias.rpartition(".")
            module = found.get_submodule(path)
            buffer = module._buffers.pop(name)
            parameter = nn.Parameter(buffer) if parameter is None else parameter  # type: ignore[arg-type]
            module.register_parameter(name, parameter)
    return found

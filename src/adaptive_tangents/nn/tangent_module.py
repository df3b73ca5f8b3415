"""The adaptive tangent model as a trainable module: f(x; θ₀) + φ(x)Mᵀθ, without forming features.

φ(x)β is one pass in forward mode, φᵀg one backward pass. Both are linear maps at the frozen θ₀, and each is the other's
derivative, so training needs no second derivatives of the network.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, check_form, tensors
from adaptive_tangents.capture.belongings import copied
from adaptive_tangents.capture.capture import tangent_features
from adaptive_tangents.capture.complex_parameters import as_given, as_real
from adaptive_tangents.capture.failures import worded
from adaptive_tangents.capture.groups import parameter_groups
from adaptive_tangents.capture.lease import LOCK, keep_private
from adaptive_tangents.capture.network import Network, OutputFn, Selection, values_at
from adaptive_tangents.capture.refusals import check_copies
from adaptive_tangents.capture.state_names import Params
from adaptive_tangents.checks import Values
from adaptive_tangents.errors import TangentError, raised_as
from adaptive_tangents.features.blocks import Block
from adaptive_tangents.features.tangent_features import TangentFeatures
from adaptive_tangents.features.transforms import Transform
from adaptive_tangents.nn.frozen_copies import freeze, frozen, places_of, thawed, tie
from adaptive_tangents.nn.linear_maps import LinearMaps, Ways, along
from adaptive_tangents.nn.trained_transforms import factors
from adaptive_tangents.runtime.cleanup import import_whole
from adaptive_tangents.runtime.recursion import room_for, roomy
from adaptive_tangents.solvers.fit import certify
from adaptive_tangents.solvers.losses import LossName
from adaptive_tangents.solvers.results import Fit
from adaptive_tangents.structures.base import Structure
from adaptive_tangents.structures.mixed import as_structure
from adaptive_tangents.structures.spectral import TWO_SIDED


class TangentModule(nn.Module):
    r"""f(x; θ₀) + φ(x)Mᵀθ as a module: the network linearized at θ₀, with features Mφ that are learned too.

    It trains θ and the factors of M, from θ = 0 and M = I. The model is copied in evaluation mode, with θ₀ as buffers.

    Args:
        model: the network f; it is left as it was.
        structure: which transforms M are allowed; a mapping gives structures by patterns of block names, as in ``Mixed``.
        params: a state dict with θ₀; None is the model's own values.
        wrt: the parameters θ: a name pattern, a parameter, or several of these; None is all that require a gradient.
        output_fn: picks a tensor (n, c) from what the model returns; None takes that itself, or its `logits`.
        rank: limits the rank of M − I for each side that is a matrix; None sets no limit.

    Raises:
        TangentError: for models that ``tangent_features`` refuses, and structures without trainable factors.

    Source: LeJeune & Alemohammad, CPAL 2024, §2.

    >>> import torch, adaptive_tangents as at
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> adaptive = at.TangentModule(model, at.TwoSided(at.Quadratic(0.1)))
    >>> torch.allclose(adaptive(x), model(x))
    True
    >>> optimizer, losses = torch.optim.Adam(adaptive.parameters(), lr=1e-3), []
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(adaptive(x), y)
    ...     loss.backward()
    ...     optimizer.step()
    ...     losses.append(loss.item())
    >>> losses[-1] < losses[0]
    True
    """

    def __new__(cls, *_: Any, **__: Any) -> "TangentModule":
        _keep_out_of_graphs()
        return super().__new__(cls)

    @torch.inference_mode(False)  # it is trained outside of that mode, too
    @roomy("TangentModule")
    def __init__(
        self, model: nn.Module, structure: Structure | Mapping[str, Structure] = TWO_SIDED, *,
        params: Params | None = None, wrt: Selection | None = None, output_fn: OutputFn | None = None,
        rank: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        call = "TangentModule"
        if rank is not None and rank < 1:
            raise TangentError(f"{call}: rank is positive, got {rank}")
        with LOCK:
            parameters, buffers, selected = values_at(call, model, params, wrt)
            check_copies(call, model)
            network = Network(model, parameters, buffers, selected, output_fn, call)
            groups = parameter_groups(network)
            self._places = places_of(model)
            self.model = frozen(model, as_given(model, {**parameters, **buffers}))
        self.structure = as_structure("TangentModule", structure)
        self.output_fn, self.selected = output_fn, selected
        self.blocks = {g.name: Block(g.name, g.matrix, g.slots, modes=g.modes) for g in groups}
        self._aliases = frozenset(alias for aliases in self._places.values() for alias in aliases)
        dtype = parameters[selected[0]].dtype
        for name in selected:
            dtype = torch.promote_types(dtype, parameters[name].dtype)
        self.inner = nn.ParameterDict({_key(g.name): torch.zeros(g.matrix, device="cpu") for g in groups})
        shapes, modes = {g.name: g.matrix for g in groups}, {g.name: g.modes for g in groups}
        self.factors = nn.ModuleList(factors(self.structure, shapes, modes, rank))
        self.to(parameters[selected[0]].device)
        self.inner.to(dtype)
        self.factors.to(dtype)
        self._ways = Ways()
        self.register_load_state_dict_post_hook(_settled)  # type: ignore[no-untyped-call]
        self.eval()
        keep_private(self.model)

    def train(self, mode: bool = True) -> "TangentModule":
        super().train(mode)
        self.model.eval()  # features are defined in evaluation mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "TangentModule":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tie(self.model, self._places)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TangentModule":
        with LOCK:
            memo[id(self.model)] = copied("TangentModule", self.model)
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def forward(self, x: Batch) -> Float[Tensor, "n c"]:
        """f(x; θ₀) + φ(x)Mᵀθ.

        Args:
            x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        """
        check_form("TangentModule", x)
        if torch._C._functorch.get_dynamic_layer_stack_depth() > 0:
            raise TangentError(
                "TangentModule: it takes derivatives itself, and cannot run within torch.func (vmap, grad, jvp) or what uses "
                "it, such as tangent_features; use autograd, and adapted_features for its kernel"
            )

        def made() -> Tensor:
            network = self._network()
            tangents = self._parameters_of(self._coefficients(), network)
            with worded(network.network, x):
                if torch.is_grad_enabled() and any(t.requires_grad for t in tensors(x)):
                    initial, change = network.along(x, tangents)
                else:
                    initial, change = along(network, x, tangents)
            return initial + change

        return room_for("TangentModule", made)

    def initial(self, x: Batch) -> Float[Tensor, "n c"]:
        """f(x; θ₀), without a gradient.

        Args:
            x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
        """
        check_form("TangentModule", x)

        def evaluated() -> Tensor:
            network = self._network()
            with torch.no_grad(), worded(network.network, x):
                return network(x, {})

        return room_for("TangentModule", evaluated)

    def effective_coefficients(self) -> dict[str, Float[Tensor, "_o _i"]]:
        """β = Mᵀθ, one matrix for each block."""
        return {name: matrix.detach().clone() for name, matrix in self._coefficients().items()}

    def inner_coefficients(self) -> dict[str, Float[Tensor, "_o _i"]]:
        """θ, one matrix for each block."""
        return {name: self.inner[_key(name)].detach().clone() for name in self.blocks}

    def transforms(self) -> dict[str, Transform]:
        """The current M, as transforms of features."""
        inner = self.inner_coefficients()
        return {name: t for factor in self.factors for name, t in factor.transforms(inner).items()}  # type: ignore[operator]

    def adapted_features(self, x: Batch, *, memory_limit: int | None = None) -> TangentFeatures:
        """Mφ(x): their kernel is the adapted kernel, and their product with θ is the change of the output.

        Args:
            x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
            memory_limit: bytes that may be used; None is half of what is free.
        """
        return self.features(x, memory_limit=memory_limit).transformed(self.transforms())

    def features(self, x: Batch, *, memory_limit: int | None = None) -> TangentFeatures:
        """φ(x) at θ₀.

        Args:
            x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
            memory_limit: bytes that may be used; None is half of what is free.
        """
        with LOCK:
            model = thawed(self.model, self._places)
        return tangent_features(model, x, wrt=self.selected, output_fn=self.output_fn, memory_limit=memory_limit)

    def regularizer(self) -> Float[Tensor, ""]:
        """‖θ‖² + Ω(M). With Σ‖y_k − f(x_k)‖²/ρ added, it is the joint objective (J) that ``fit`` minimizes."""
        size = torch.stack([(matrix**2).sum() for matrix in self.inner.values()]).sum()
        return size + torch.stack([factor.penalty().to(size) for factor in self.factors]).sum()  # type: ignore[operator]

    def load_fit(self, fit: Fit) -> "TangentModule":
        """Load β and M of a fit; returns the module itself.

        Args:
            fit: a fit on features of the same blocks.

        Raises:
            TangentError: when blocks differ, or ``structure`` or ``rank`` excludes the fit's M; nothing is loaded then.
        """
        found = {name: tuple(matrix.shape) for name, matrix in fit.coefficients.items()}
        wanted = {name: block.shape for name, block in self.blocks.items()}
        if found != wanted:
            raise TangentError(f"TangentModule: the fit has blocks {found}, this module {wanted}")
        before = {name: value.clone() for name, value in self.factors.state_dict().items()}
        inner: dict[str, Tensor] = {}
        try:
            for factor in self.factors:
                inner |= factor.take(fit.transforms, fit.coefficients)  # type: ignore[operator]
        except TangentError:
            self.factors.load_state_dict(before)
            raise
        with torch.no_grad():
            for name, matrix in inner.items():
                self.inner[_key(name)].copy_(matrix)
        return self

    def as_fit(
        self, x: Batch, r: Values, *, loss: LossName = "squared", offset: Values | None = None, ridge: float = 0.0
    ) -> Fit:
        """β as a ``Fit`` to a batch, with the best M for it and all certificates: ``certify`` at φ(x).

        Args:
            x: samples first, (n, ...): a tensor, or a tuple, list, dict or dataclass of tensors, flags and None.
            r: targets minus f(x; θ₀), (n, c), or (n,) where c = 1; for cross-entropy integer labels (n,), 0 or 1 where c = 1.
            loss: "squared" or "cross-entropy" (logistic where c = 1).
            offset: f(x; θ₀), (n, c), for cross-entropy only.
            ridge: ρ ≥ 0; 0 interpolates. Cross-entropy needs ρ > 0.
        """
        with raised_as("as_fit", "certify"):
            return certify(
                self.features(x), r, coefficients=self.effective_coefficients(), structure=self.structure, loss=loss,
                offset=offset, ridge=ridge,
            )  # fmt: skip

    def _coefficients(self) -> dict[str, Tensor]:
        inner = {name: self.inner[_key(name)] for name in self.blocks}
        return {name: m for factor in self.factors for name, m in factor.coefficients(inner).items()}  # type: ignore[operator]

    def _parameters_of(self, matrices: Mapping[str, Tensor], network: LinearMaps) -> tuple[Tensor, ...]:
        """One matrix for each block as the selected parameters, in their order."""
        split = {k: v for name, block in self.blocks.items() for k, v in block.split(matrices[name]).items()}
        return tuple(split[name].to(value.dtype) for name, value in network.selected.items())

    def _network(self) -> LinearMaps:
        with LOCK:
            state = {name: value.detach() for name, value in self.model.named_buffers(remove_duplicate=False)}
        parameters = {name: as_real(state[name]) for name in self._places}
        rest = {name: value for name, value in state.items() if name not in self._aliases}
        network = Network(self.model, parameters, rest, self.selected, self.output_fn, "TangentModule")
        return LinearMaps(network, self._ways, self.features)


@cache
def _keep_out_of_graphs() -> None:
    # Derivatives cannot be traced. Not a decorator: importing the compiler takes as long as the rest of torch.
    import_whole("torch._dynamo")
    TangentModule.forward = torch.compiler.disable(TangentModule.forward)  # type: ignore[method-assign, no-untyped-call]


def _settled(module: TangentModule, _: Any) -> None:
    """Freeze the network again: ``load_state_dict`` with ``assign=True`` makes parameters of buffers, and unties them."""
    freeze(module.model)
    tie(module.model, module._places)


def _key(name: str) -> str:
    """A block's name as a parameter's: without dots, and unlike any attribute of the dictionary."""
    return "block:" + name.replace(".", "/")

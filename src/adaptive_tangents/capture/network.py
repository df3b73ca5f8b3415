"""The user's model with its parameters, selection and output function, checked before any work."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptive_tangents.capture.batches import Batch, arguments, check_batch, samples, take
from adaptive_tangents.capture.complex_parameters import as_real
from adaptive_tangents.capture.lease import Loan, current, on_loan
from adaptive_tangents.capture.recording import needing_gradients, recorded_if_needed
from adaptive_tangents.capture.refusals import check_is_module, check_parameters, check_tensors
from adaptive_tangents.capture.returned import found_output, held
from adaptive_tangents.capture.state_names import Params, fitted, misfit
from adaptive_tangents.checks import listed
from adaptive_tangents.errors import TangentError, UnfitOutput

OutputFn = Callable[[Any], Tensor]
Selection = str | nn.Parameter | Iterable[str | nn.Parameter]
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Network:
    """A model with the parameters and buffers to evaluate it at; the model itself is never changed."""

    model: nn.Module
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    selected: tuple[str, ...]
    output_fn: OutputFn | None
    call: str
    copied_from: Mapping[str, Tensor] | None = None

    def __call__(self, x: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        """f(x; θ), shape (n, c), with some parameters replaced; the model gets a copy of x, which it may overwrite."""

        def evaluated() -> Tensor:
            self.put(parameters)
            return self.run(x)

        return self.lend(evaluated)

    def lend(self, body: Callable[[], _Made]) -> _Made:
        """``body()``, which may put tensors in force; the model and the process are as before afterwards."""
        return on_loan(self.model, lambda loan: body())

    def leaves(self) -> dict[str, Tensor]:
        """The selected parameters to differentiate by, during a loan: the model's own, where autograd can use these.

        It cannot use complex ones, which are pairs of real ones here, nor those made in inference mode.
        """
        own, apart = self._loan.tensors, self._loan.without_versions
        return {
            name: (
                self.parameters[name].detach() if own[name].is_complex() or name in apart else own[name]
            ).requires_grad_()
            for name in self.selected
        }

    def put(self, parameters: Mapping[str, Tensor], *, recorded: bool = False) -> None:
        """During a loan, bring the network's parameters and copies of its buffers in force, some parameters replaced.

        With ``recorded``, all parameters ask for gradients, as a model may expect that takes derivatives itself.
        """
        loan = self._loan
        moved = {k: b for k, b in self.buffers.items() if torch._C._functorch.is_functorch_wrapped_tensor(b)}
        plain = {**self.parameters, **{k: b for k, b in self.buffers.items() if k not in moved}}
        moved |= {name: plain.pop(name).clone() for name in loan.without_versions if name in plain}
        for name in self.parameters:
            own, needed = loan.tensors[name], recorded or name in self.selected
            if own.requires_grad != needed and (own.is_floating_point() or own.is_complex()):
                own.requires_grad_(needed)
        parameters = needing_gradients(parameters) if recorded else parameters
        loan.put(plain, {**moved, **parameters})
        loan.hidden([*self.parameters, *parameters])

    def run(self, x: Batch) -> Tensor:
        """f(x), shape (n, c), during a loan and with what is in force; the model gets a copy of x."""
        replaced = {name: value for name, value in self._loan.instead.items() if name not in self.buffers}

        def passed(recorded: bool) -> Any:
            if recorded:
                self.put(replaced, recorded=True)
            given, keywords = arguments(self.model, take(x, None))
            return self._picked(self.model(*given, **keywords))

        return self._checked(recorded_if_needed(passed), samples(x))

    def _picked(self, out: Any) -> Any:
        if self.output_fn is None:
            return found_output(out)
        try:
            return self.output_fn(out)
        except (AttributeError, LookupError, TypeError) as error:
            raise UnfitOutput(
                f"{self.call}: output_fn fails on the {type(out).__name__} that the model returned "
                f"({type(error).__name__}: {error}); pass a function of it that gives a tensor (n, c)"
            ) from error

    def check_unwritten(self, *, thoroughly: bool = False) -> None:
        """Raise TangentError if the model, on loan, wrote to a parameter or replaced it when it was last called.

        Autograd counts most writes; a thorough check compares values, and sees those through ``.data``, too.
        """
        name = self._loan.written(self.parameters)
        if name is None and thoroughly:
            held = {name: as_real(self._loan.tensors[name].data) for name in self.parameters}
            name = next((k for k, value in held.items() if not _equal(value, self.sources[k])), None)
        if name is not None:
            raise TangentError(
                f"{self.call}: the model changes its parameter {name!r} whenever it is called (it rescales, renormalizes "
                "or replaces it), which no derivative shows; change it once, before the call, and leave it alone in forward"
            )

    def check_fresh(self, nodes: Container[Any]) -> None:
        """Raise TangentError if the outputs, made by some nodes of a graph, depend on what an earlier call left behind."""
        if any(tensor.grad_fn in nodes for tensor in self._loan.derived):
            raise TangentError(
                f"{self.call}: the model uses a tensor that was computed from its parameters before this call and kept, such "
                "as a cache; empty it first, so that the model computes it again"
            )

    def check_returned(self) -> None:
        """Raise TangentError if a backward pass of the model, on loan, added to gradients instead of returning them."""
        if self._loan.accumulated:
            raise TangentError(
                f"{self.call}: a backward pass of the model adds to .grad of its parameters (it calls .backward()), so "
                "autograd.grad does not see these gradients; let the Function take the parameters as arguments and return "
                "their gradients"
            )

    @property
    def holds_derived(self) -> bool:
        """Whether the model, on loan, holds tensors that an earlier call computed."""
        return bool(self._loan.derived)

    @property
    def sources(self) -> Mapping[str, Tensor]:
        """Where the parameters were copied from."""
        return self.copied_from or self.parameters

    @property
    def _loan(self) -> Loan:
        loan = current(self.model)
        assert loan is not None
        return loan

    def _checked(self, out: Any, n: int) -> Tensor:
        pick = "pass output_fn=, a function of what the model returns that gives a tensor (n, c)"
        if not isinstance(out, Tensor):
            raise UnfitOutput(f"{self.call}: the model returned {type(out).__name__}, not a tensor; {pick}{held(out)}")
        if out.ndim != 2 or out.shape[0] != n:
            raise UnfitOutput(
                f"{self.call}: the output has shape {tuple(out.shape)}, expected ({n}, c), one row a sample; {pick}"
            )
        if out.shape[1] == 0:
            raise UnfitOutput(f"{self.call}: the output has shape {tuple(out.shape)}, no outputs at all; {pick}")
        if out.is_complex():
            raise UnfitOutput(
                f"{self.call}: the output is {out.dtype}, and features are of real outputs; pass output_fn=, such as "
                "lambda out: torch.view_as_real(out).flatten(1)"
            )
        if not out.is_floating_point():
            raise UnfitOutput(f"{self.call}: the output is {out.dtype}, which has no derivative; {pick}")
        return out


def values_at(
    call: str, model: nn.Module, params: Params | None, wrt: Selection | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Parameters, buffers and the names selected of a model at a state dict, after checking that they fit together."""
    check_model(call, model)
    parameters = real_parameters(model)
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    selected = select(call, model, wrt)
    check_parameters(call, model, selected)
    if params is not None:
        parameters, buffers = overlay(call, model, params)
    check_mode(call, model)
    return parameters, buffers, selected


def network(
    call: str,
    model: Any,
    x: Any,
    params: Params | None,
    wrt: Selection | None,
    output_fn: OutputFn | None,
) -> Network:
    """The model at ``params`` with the parameters selected by ``wrt``, after checking that everything fits together."""
    parameters, buffers, selected = values_at(call, model, params, wrt)
    check_batch(call, x, parameters)
    # Copies: what a model writes in place must not reach its owner's memory, nor the caller's state dict.
    with torch.inference_mode(False):
        copies = {name: p.clone() for name, p in parameters.items()}
        buffers = {name: b.clone() for name, b in buffers.items()}
    return Network(model, copies, buffers, selected, output_fn, call, parameters)


def recordable(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors that autograd may save: those made in inference mode are copied."""
    if not any(tensor.is_inference() for tensor in tensors.values()):
        return tensors
    with torch.inference_mode(False):
        return {name: tensor.clone() if tensor.is_inference() else tensor for name, tensor in tensors.items()}


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.layout != torch.strided:
        one, two = one.to_dense(), two.to_dense()
    return torch.equal(one, two) or bool(((one == two) | (one != one)).all())


def real_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The values of the model's parameters, complex ones as pairs of real ones."""
    return {
        name: as_real(p.detach().clone() if p.is_inference() else p.detach()) for name, p in model.named_parameters()
    }


def check_model(call: str, model: Any) -> None:
    """Raise TangentError for models that cannot be evaluated at other parameters, or that have no true derivative."""
    check_is_module(call, model)
    if next(model.parameters(), None) is None:
        raise TangentError(f"{call}: the model has no parameters")
    check_tensors(call, model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            what = f"{call}: {type(module).__name__} {name!r}"
            if module.max_norm is not None:
                raise TangentError(
                    f"{what} has max_norm, which changes the table whenever it is used; renormalize it once and set "
                    "max_norm=None"
                )
            if module.scale_grad_by_freq:
                raise TangentError(
                    f"{what} has scale_grad_by_freq, so what autograd calls its gradient is no derivative; set it to False"
                )


def select(call: str, model: nn.Module, wrt: Selection | None) -> tuple[str, ...]:
    """Names of the parameters that ``wrt`` selects, in the model's order; None selects those that require a gradient.

    A parameter without entries, as in a layer of width zero, has no features and is left out.
    """
    named = {name: p for name, p in model.named_parameters() if p.numel()}
    if not named:
        raise TangentError(f"{call}: the model's parameters have no entries")
    if wrt is None:
        chosen = {name for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise TangentError(f"{call}: no parameter requires a gradient; name the ones you want, e.g. wrt='*'")
        return tuple(name for name in named if name in chosen)
    chosen = set()
    for item in [wrt] if isinstance(wrt, str | Tensor) else wrt:
        if isinstance(item, str):
            found = {name for name in named if fnmatchcase(name, item)}
        else:
            found = {name for name, p in named.items() if p is item}
        if not found:
            what = repr(item) if isinstance(item, str) else f"a tensor of shape {tuple(item.shape)}"
            raise TangentError(f"{call}: wrt {what} matches no parameter; the parameters are {listed(named)}")
        chosen |= found
    if not chosen:
        raise TangentError(f"{call}: wrt is empty; the parameters are {listed(named)}")
    return tuple(name for name in named if name in chosen)


def overlay(call: str, model: nn.Module, params: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's parameters and buffers, replaced by those of a state dict."""
    parameters: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    aliases = set(dict(model.named_parameters(remove_duplicate=False))) | set(model.state_dict(keep_vars=True))
    params = fitted(call, params, model)
    unknown = [name for name in params if name not in parameters and name not in buffers and name not in aliases]
    missing = [name for name in parameters if name not in params]
    problems = misfit(params, {**parameters, **buffers}, missing, unknown)
    if problems:
        raise TangentError(
            f"{call}: the state dict does not fit the model: {problems}; pass a state dict of this architecture"
        )
    firsts = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    shared = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for alias, tensor in shared:
        first = firsts[id(tensor)]
        if alias != first and alias in params and first in params and not torch.equal(params[alias], params[first]):
            raise TangentError(
                f"{call}: the state dict holds different values for {first!r} and {alias!r}, which are one tensor of the "
                "model; use a model with two tensors, or remove one of them from the state dict"
            )
    for name, old in {**parameters, **buffers}.items():
        new = params.get(name)
        if new is not None and (new.dtype, new.device) != (old.dtype, old.device):
            raise TangentError(
                f"{call}: the state dict has {name!r} as {new.dtype} on {new.device}, the model as {old.dtype} on "
                f"{old.device}; convert the state dict or the model"
            )
        bad = new is not None and (new.is_floating_point() or new.is_complex()) and not bool(torch.isfinite(new).all())
        if bad:
            raise TangentError(f"{call}: the state dict holds a non-finite value in {name!r}; use another checkpoint")
    return (
        {name: as_real(params[name].detach()) for name in parameters},
        {name: params.get(name, old).detach() for name, old in buffers.items()},
    )


def check_mode(call: str, model: nn.Module) -> None:
    """Raise TangentError for modules whose outputs, in their present mode, are random or depend on the batch."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and not module.training and module.running_mean is None:
            raise TangentError(
                f"{call}: {kind} {name!r} keeps no running statistics, so samples of a batch influence each other in "
                "evaluation mode too; make it with track_running_stats=True"
            )
        if not module.training:
            continue
        if norm:
            raise TangentError(
                f"{call}: {kind} {name!r} is in training mode, so samples of a batch influence each other; "
                "call model.eval() first"
            )
        rates = [getattr(module, rate, 0.0) for rate in ("p", "dropout")]
        random = isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention | nn.RNNBase | nn.RReLU)
        if random and (isinstance(module, nn.RReLU) or any(isinstance(rate, float) and rate > 0 for rate in rates)):
            raise TangentError(
                f"{call}: {kind} {name!r} is in training mode, so outputs are random; call model.eval() first"
            )

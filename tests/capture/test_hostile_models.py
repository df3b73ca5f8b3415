"""Models that play tricks: right numbers or a worded error, and nothing of the user's is changed."""

import contextlib
import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from hostile_case import Case, close, difference, other_state, parameters, scale, times, truth
from hostile_models import CASES, FAILS_TODAY
from snapshots import Snapshot, contained, shared_state

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
Made = TypeVar("Made")


def every_case(promise: str, *, only: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """A test for each case; one that fails today is a strict xfail."""
    listed = []
    for case in filter(only, CASES):
        promises, reason = FAILS_TODAY.get(case.name, ("", ""))
        strict = promise in promises.split()
        fails = [pytest.mark.xfail(reason=reason, strict=strict)] if strict or f"{promise}?" in promises.split() else []
        marks = [pytest.mark.xdist_group(case.name), *fails]
        listed.append(pytest.param(case, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", listed)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with contained():
        yield


@contextlib.contextmanager
def as_promised(case: Case) -> Iterator[None]:
    """Expect the error or the warning of a case."""
    if case.error is not None:
        with pytest.raises(at.TangentError, match=f"(?s)^\\w+: .*(?:{case.error})"):
            yield
    elif case.warns is not None:
        with pytest.warns(at.TangentWarning, match=f"(?s)(?:{case.warns})"):
            yield
    elif case.or_error is not None:
        message = ""
        try:
            yield
        except at.TangentError as error:
            message = str(error)
        assert not message or re.search(f"(?s)^\\w+: .*(?:{case.or_error})", message), message
    else:
        yield


def check_features(case: Case, feats: at.TangentFeatures, *, elsewhere: bool = False) -> None:
    true, named = truth(case, elsewhere=elsewhere), parameters(case)
    if case.complex:
        expected = torch.einsum("ncp,mdp->ncmd", true.jacobian, true.jacobian)
        assert close(feats.kernel(outputs="full"), expected, case.gap)
        return
    dense, size = feats.dense(), scale(true.along)
    for along, expected in true.along if case.warns is None else ():
        gap = float((times(dense, along, named) - expected).abs().max()) / max(size, 1e-300)
        assert gap <= case.gap, f"{list(along)}: {gap:.1e} of the largest derivative off the central difference"
    if true.jacobian is not None or case.warns:
        assert true.autograd is not None
        assert close(dense, true.autograd, case.tolerance)


def capture(case: Case, model: nn.Module, x: Any, **options: Any) -> at.TangentFeatures:
    return at.tangent_features(model, x, output_fn=case.output_fn, **options)


@every_case("features")
def test_features_are_the_derivative(case: Case) -> None:
    first = used(case).first
    with as_promised(case):
        check_features(case, first())


@every_case("gradient", only=lambda case: case.warns is not None)
def test_what_is_warned_of_is_so(case: Case) -> None:
    true = truth(case)
    assert true.autograd is not None
    assert true.jacobian is None


@every_case("params")
def test_features_at_other_parameters_are_the_derivative_there(case: Case) -> None:
    here, twin = used(case), other_state(case)
    try:
        with as_promised(case):
            check_features(case, here.elsewhere(), elsewhere=True)
    finally:
        assert here.given_changes == []
        assert all(torch.equal(here.given[name], twin[name]) for name in twin)


@every_case("kernel")
def test_the_kernel_is_made_of_the_derivatives(case: Case) -> None:
    kernel = used(case).kernel
    with as_promised(case):
        made = kernel()
        true = truth(case)
        phi = true.autograd if case.warns else true.jacobian
        if phi is None:
            units = [
                {k: unit.view(p.shape)} for k, p in parameters(case).items() for unit in torch.eye(p.numel()).to(p)
            ]
            phi = torch.stack([difference(case, None, unit) for unit in units], -1)
        expected = torch.einsum("ncp,mdp->ncmd", phi, phi)
        assert close(made, expected, case.gap if true.jacobian is None or case.complex else 2 * case.tolerance)


def came_of(call: Callable[[], Made]) -> Callable[[], Made]:
    """What comes of a call now, to be had as often as wanted: the result, the error, and the warnings."""
    made: list[Made] = []
    error: Exception | None = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            made.append(call())
        except Exception as refused:
            error = refused

    def again() -> Made:
        for warning in told:
            if issubclass(warning.category, at.TangentWarning):
                warnings.warn(warning.message, stacklevel=2)
        if error is not None:
            raise error
        return made[0]

    return again


@dataclass(frozen=True)
class Used:
    """A model on which everything was called, and what was found before and after."""

    model: nn.Module
    x: Any
    first: Callable[[], at.TangentFeatures]
    elsewhere: Callable[[], at.TangentFeatures]  # at the parameters given
    kernel: Callable[[], Tensor]
    changes: list[str]
    shared: list[str]
    given: dict[str, Tensor]
    given_changes: list[str]


@functools.cache
def used(case: Case) -> Used:
    model, x = case.build()
    given = other_state(case)
    before, of_given, shared = Snapshot(model, x), Snapshot(given), shared_state()
    first = came_of(lambda: capture(case, model, x))
    elsewhere = came_of(lambda: capture(case, model, x, params=given))
    kernel = came_of(lambda: at.tangent_kernel(model, x, output_fn=case.output_fn, outputs="full", tile=2))
    now = shared_state()
    changed = [name for name in shared if shared[name] != now[name]]
    changes, given_changes = before.changes(Snapshot(model, x)), of_given.changes(Snapshot(given))
    return Used(model, x, first, elsewhere, kernel, changes, changed, given, given_changes)


@every_case("left")
def test_everything_of_the_users_is_left_as_found(case: Case) -> None:
    assert used(case).changes == []


@every_case("shared")
def test_what_the_process_shares_is_left_as_found(case: Case) -> None:
    assert used(case).shared == []


TAKE_KERNELS = {case.name for case in CASES[::2]}  # while they train; the others take features


def trained(case: Case, *, captured: bool) -> list[Any]:
    """Losses, parameters and buffers over some steps; captures fall between forward and backward passes."""
    model, x = case.build()
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizers = torch.optim.SGD(chosen, lr=0.01, momentum=0.9), torch.optim.Adam(chosen, lr=0.01)
    record: list[Any] = []
    for step in range(3):
        torch.manual_seed(step)
        loss, failed = None, None
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
            loss = case.run(model, _copied(x)).square().sum()
        if captured and step == 1:
            before = Snapshot(model, x)
            if case.name in TAKE_KERNELS:
                options = {"output_fn": case.output_fn, "outputs": "trace", "tile": 2, "params": other_state(case)}
                came_of(lambda given=options: at.tangent_kernel(model, x, **given))
            else:
                came_of(lambda: capture(case, model, x))
            assert before.changes(Snapshot(model, x)) == []
        if loss is not None:
            try:
                loss.backward()
            except (RuntimeError, AssertionError) as error:
                failed = type(error)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        record.append((None if loss is None else loss.item(), failed))
    return [*record, *[p.detach() for p in model.parameters()], *[b.detach() for b in model.buffers()]]


def _copied(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    if hasattr(x, "items"):
        return {name: _copied(value) for name, value in x.items()}
    return type(x)(map(_copied, x)) if isinstance(x, tuple | list) else x


@every_case("training")
def test_training_goes_on_as_that_of_an_untouched_twin(case: Case) -> None:
    with contained():
        twin = trained(case, captured=False)
    with contained():
        made = trained(case, captured=True)
    assert len(twin) == len(made)
    same = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(made, twin, strict=True)]
    assert all(same), f"{same}: {made[:4]} and not {twin[:4]}"


@every_case("copy")
def test_a_deep_copy_works_as_before(case: Case) -> None:
    twin, x = case.build()
    try:
        expected = case.run(copy.deepcopy(twin), _copied(x)).detach()
    except RuntimeError as error:
        pytest.skip(f"cannot be copied before either: {error}")
    copies = [copy.deepcopy(used(case).model) for _ in range(2)]  # both first: a copy's hook may write to the original
    for made, given in zip(copies, (x, used(case).x), strict=True):
        assert torch.equal(case.run(made, _copied(given)).detach(), expected)


@every_case("module", only=lambda case: case.module and not (case.error or case.warns or case.complex))
def test_the_tangent_module_is_the_derivative_and_stays(case: Case) -> None:
    model, x = case.build()
    twin, _ = case.build()
    expected = case.run(twin, _copied(x)).detach()
    before = Snapshot(model, x)
    with as_promised(case):
        adaptive = at.TangentModule(model, at.Fixed(), output_fn=case.output_fn)
        assert close(adaptive.initial(x), expected, case.tolerance)
        generator = torch.Generator().manual_seed(2)
        for parameter in adaptive.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        named = parameters(case)
        beta = {name: torch.zeros_like(p) for name, p in named.items()}
        for name, matrix in adaptive.effective_coefficients().items():
            beta |= adaptive.blocks[name].split(matrix)
        out = adaptive(x)
        change = difference(case, None, beta)
        assert close(out - expected, change, 2 * case.gap)
        signal = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        found = torch.autograd.grad(out, list(adaptive.parameters()), signal)
        pulled = sum(float((g * p.detach()).double().sum()) for g, p in zip(found, adaptive.parameters(), strict=True))
        against = float((signal * change).double().sum())
        assert abs(pulled - against) <= 2 * case.gap * float((signal * change).abs().sum())
        assert before.changes(Snapshot(model, x)) == []
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        assert torch.equal(adaptive(x).detach(), out.detach())
        assert close(adaptive.initial(x), expected, case.tolerance)


def test_counts_whose_update_adds_are_put_back_and_copied_as_they_are() -> None:
    model, x = next(case for case in CASES if case.name == "logs of every kind").build()
    model(x), model(x)
    at.tangent_kernel(model, x, tile=2)
    adaptive = at.TangentModule(model)
    for held in (model, *(each for each in adaptive.modules() if hasattr(each, "total"))):
        assert held.total == held.sums == {"calls": 2}
        assert list(held.ordered) == list(model.ordered)

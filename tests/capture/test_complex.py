"""Complex parameters are pairs of real ones: features of the real and of the imaginary part, in a last dimension of two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import reference
from cases import Forward, normal
from finite_differences import derivative

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def phases(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128)


def spectral(m: nn.Module, x: Tensor) -> Tensor:
    """A Fourier layer, as in neural operators."""
    modes = torch.einsum("nci,coi->noi", torch.fft.rfft(m.lift(x))[..., :3], m.w)
    return m.head(torch.fft.irfft(modes, n=x.shape[-1]).tanh().mean(2))


def branched(m: nn.Module, x: Tensor) -> Tensor:
    """Every sample takes its own branch, so vmap cannot run it."""
    return torch.stack([(r @ m.w).abs() if float(r[0].real) > 0 else (r @ m.w).angle() for r in x + 0j])


def layered(m: nn.Module, x: Tensor) -> Tensor:
    return torch.view_as_real(m.layers(x + 0j).flatten(1)).flatten(1).tanh()


def over(function: Callable[..., Any], x: Callable[[], Any], **parts: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = Forward(function)
        for name, part in parts.items():
            made = part()
            setattr(model, name, nn.Parameter(made) if isinstance(made, Tensor) else made)
        return model.eval(), x()

    return build


def in_dtype(layer: type[nn.Module], *arguments: int) -> Callable[[], nn.Module]:
    return lambda: layer(*arguments, dtype=torch.complex128)


def real(layer: type[nn.Module], *arguments: int) -> Callable[[], nn.Module]:
    return lambda: layer(*arguments, dtype=torch.float64)


CASES = {
    "phase": over(lambda m, x: (m.fc(x) * m.w).real, lambda: normal(5, 3), fc=real(nn.Linear, 3, 2), w=lambda: phases(2)),
    "scalar": over(lambda m, x: (m.fc(x) * m.w).abs(), lambda: normal(5, 3), fc=real(nn.Linear, 3, 2), w=phases),
    "spectral": over(spectral, lambda: normal(5, 1, 8), lift=real(nn.Conv1d, 1, 3, 1), w=lambda: phases(3, 2, 3),
        head=real(nn.Linear, 2, 2)),
    "linear layers": over(layered, lambda: normal(5, 3),
        layers=lambda: nn.Sequential(in_dtype(nn.Linear, 3, 4)(), nn.Tanh(), in_dtype(nn.Linear, 4, 1)())),
    "convolution": over(layered, lambda: normal(5, 1, 4), layers=in_dtype(nn.Conv1d, 1, 2, 3)),
    "lookup": over(lambda m, i: m.w[i].sum(1).abs(), lambda: torch.randint(6, (5, 3)), w=lambda: phases(6, 2)),
    "used twice": over(lambda m, x: (((x + 0j) @ m.w).square() @ m.w.mH).abs(), lambda: normal(5, 3), w=lambda: phases(3, 2)),
    "complex batch": over(lambda m, x: m.fc(x).abs(), lambda: phases(5, 3).conj(), fc=in_dtype(nn.Linear, 3, 2)),
    "branches": over(branched, lambda: normal(5, 3), w=lambda: phases(3, 2)),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def jacobian(model: nn.Module, x: Any) -> reference.Array:
    """∂f/∂(Re θ, Im θ) by autograd, sample by sample: torch's gradient of a complex parameter holds both."""
    rows = []
    for k in range(len(x)):
        for value in model(x[k : k + 1])[0]:
            found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([parts(g).flatten() for g in found]))
    return torch.stack(rows).reshape(len(x), -1, rows[0].numel()).numpy()


def parts(value: Tensor) -> Tensor:
    return torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach()


def moved(state: dict[str, Tensor], direction: Tensor, t: float) -> dict[str, Tensor]:
    """A state with its real numbers moved along a direction."""
    found, place = {}, 0
    for name, value in state.items():
        flat = parts(value)
        step = direction[place : place + flat.numel()].reshape(flat.shape)
        place += flat.numel()
        found[name] = torch.view_as_complex(flat + t * step) if value.is_complex() else value + t * step
    return found


def close(found: Tensor, expected: reference.Array) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@every_case
def test_features_are_the_derivatives_by_real_and_imaginary_parts(name: str) -> None:
    model, x = CASES[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    feats = at.tangent_features(model, x)
    shapes = {k: (*p.shape, 2) if p.is_complex() else tuple(p.shape) for k, p in model.named_parameters()}
    assert feats.parameters == shapes
    close(feats.dense(), jacobian(model, x))
    for seed in range(3):
        v = torch.randn(feats.p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

        def at_step(t: Tensor, v: Tensor = v) -> Tensor:
            return torch.func.functional_call(model, moved(before, v, float(t)), (x,)).detach()

        derivative(at_step, 1e-3).check(feats.matvec(v))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@every_case
def test_kernels_averages_and_the_linearized_module_agree_with_the_parts(name: str, tmp_path: Path) -> None:
    model, x = CASES[name]()
    phi = jacobian(model, x)
    close(at.tangent_kernel(model, x, x, tile=3), reference.kernel(phi, phi))
    close(at.kernel_to_store(model, x, tmp_path / "k").read(), reference.kernel(phi, phi))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    v = torch.randn(phi.shape[2], dtype=torch.float64)
    end = moved(start, v, 0.01)
    close(at.tangent_features(model, x, params=end).dense(), jacobian(loaded(model, end), x))
    model.load_state_dict(start)
    average = at.average_features(model, start, end, x, tol=1e-6)
    assert average.error <= 1e-6
    module = at.TangentModule(model, at.Fixed())
    for matrix in module.inner.values():
        matrix.data = torch.randn_like(matrix)
    beta = module.features(x).join(module.effective_coefficients())
    close(module(x) - module.initial(x), phi @ beta.numpy())
    module(x).square().sum().backward()
    assert all(matrix.grad is not None for matrix in module.inner.values())


def loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model


def test_wrt_takes_complex_parameters_by_name_and_by_tensor() -> None:
    model, x = CASES["phase"]()
    alone = at.tangent_features(model, x, wrt=model.w)
    assert alone.parameters == {"w": (2, 2)}
    close(alone.dense(), at.tangent_features(model, x).dense()[:, :, :4].numpy())


def test_a_store_in_another_dtype_keeps_imaginary_parts(tmp_path: Path) -> None:
    model, x = CASES["complex batch"]()
    phi = jacobian(model, x)
    made = at.kernel_to_store(model, x, tmp_path / "k", dtype=torch.float32).read()
    expected = reference.kernel(phi, phi)
    assert made.dtype == torch.float32
    np.testing.assert_allclose(made.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_fits_adapt_both_parts() -> None:
    model, x = CASES["phase"]()
    feats = at.tangent_features(model, x)
    y = normal(5, 2)
    fit = at.fit(feats, y, ridge=0.1)
    assert fit.converged
    assert fit.coefficients["w"].shape == (2, 2)


def test_complex_buffers_move_along_the_path() -> None:
    torch.manual_seed(0)
    model = Forward(lambda m, x: (m.fc(x) * m.turn).real.tanh(), fc=nn.Linear(3, 2))
    model.register_buffer("turn", phases(2))
    x, start = normal(5, 3), {k: v.clone() for k, v in model.state_dict().items()}
    end = {k: v + 0.1 for k, v in start.items()}
    with pytest.raises(at.TangentError, match="buffer 'turn' differs between start and end"):
        at.average_features(model, start, end, x)
    assert at.average_features(model, start, end, x, buffers="path", tol=1e-6).error <= 1e-6


def test_words_for_what_has_no_real_derivative() -> None:
    model, x = CASES["complex batch"]()
    model.function = lambda m, x: m.fc(x)
    with pytest.raises(
        at.TangentError, match=r"the output is torch\.complex128, .*torch\.view_as_real\(out\)\.flatten\(1\)"
    ):
        at.tangent_features(model, x)
    feats = at.tangent_features(model, x, output_fn=lambda out: torch.view_as_real(out).flatten(1))
    assert feats.c == 4
    state = model.state_dict()
    state["fc.bias"] = state["fc.bias"].clone()
    state["fc.bias"].imag[0] = float("nan")
    with pytest.raises(at.TangentError, match=r"non-finite value in 'fc\.bias'"):
        at.tangent_features(model, x, params=state)

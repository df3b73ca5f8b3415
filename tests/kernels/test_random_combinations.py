"""Random combinations of outputs: what a kernel of one pass says of the trace kernel of c passes."""

import itertools

import torch
from torch import nn

import adaptive_tangents as at
from cases import mlp, normal

C = 4


def test_a_random_combination_of_outputs_has_the_trace_kernel_on_average_and_the_variance_of_the_formula() -> None:
    model, x = mlp(nn.Tanh, widths=(5, 7, C)), normal(3, 5)
    full = at.tangent_kernel(model, x)
    trace = at.tangent_kernel(model, x, outputs="trace")
    every = [torch.tensor(signs, dtype=x.dtype) for signs in itertools.product((-1.0, 1.0), repeat=C)]
    found = torch.stack(
        [at.tangent_kernel(model, x, outputs="trace", output_fn=lambda f, s=s: f @ s[:, None]) for s in every]
    )
    assert torch.allclose(found.mean(0), trace, rtol=1e-10)
    pairs = full.permute(0, 2, 1, 3)  # (n, n, c, c)
    off = (pairs + pairs.mT) * (1 - torch.eye(C, dtype=x.dtype))
    variance = off.square().sum((2, 3)) / 2
    assert torch.allclose(found.var(0, correction=0), variance, rtol=1e-8, atol=1e-12)
    assert bool((found.var(0, correction=0).diagonal() <= 2 * trace.diagonal() ** 2).all())


def test_the_mean_of_draws_varies_as_one_over_their_number_and_each_is_the_diagonal_of_their_kernel() -> None:
    model, x = mlp(nn.Tanh, widths=(5, 7, 2)), normal(3, 5)
    signs = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]], dtype=x.dtype)
    draws = at.tangent_kernel(model, x, outputs="diagonal", output_fn=lambda f: f @ signs)
    for k, s in enumerate(signs.mT):
        alone = at.tangent_kernel(model, x, outputs="trace", output_fn=lambda f, s=s: f @ s[:, None])
        assert torch.allclose(draws[..., k], alone, rtol=1e-10)
    full = at.tangent_kernel(model, x)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=x.dtype)
    one = torch.einsum("si,aibj,sj->sab", every, full, every)
    two = (one[:, None] + one[None]).flatten(0, 1) / 2
    assert torch.allclose(two.var(0, correction=0), one.var(0, correction=0) / 2, rtol=1e-10)

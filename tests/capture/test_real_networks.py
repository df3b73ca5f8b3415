"""Realistic networks beyond the conformity tests: paths, compilation, attributes, unusual states."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adaptive_tangents as at
import reference
from cases import Case, Forward, mlp, normal
from integration_cases import CASES as INTEGRATIONS
from prepared import fingerprint
from real_cases import CASES as REAL
from real_cases import gpt, losses
from rearranged_cases import CASES as REARRANGED

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def moved(model: nn.Module, step: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state, and one whose trained parameters differ from it."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seeded = torch.Generator().manual_seed(3)
    moves = {id(p): step * torch.randn(p.shape, generator=seeded).to(p) for p in model.parameters() if p.requires_grad}
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            moves[id(module.weight)][padding] = 0  # autograd treats padding as constant
    named = dict(model.named_parameters(remove_duplicate=False))
    return start, {k: v + moves[id(named[k])] if id(named.get(k)) in moves else v for k, v in start.items()}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in (*REAL, *REARRANGED, *INTEGRATIONS) if case.tolerance is None],
)
def test_averages_along_a_path_are_exact_and_obey_the_identity(case: Case) -> None:
    model, x = case.build()
    start, end = moved(model, 3e-5)  # short enough that kinks and the order of tokens stay in place
    average = at.average_features(model, start, end, x, nodes=2, output_fn=case.output_fn)
    phis = [
        reference.jacobian(
            model, x, output_fn=case.output_fn, state=reference.between(start, end, (1 + sign / 3**0.5) / 2)
        )
        for sign in (-1, 1)
    ]
    phi = (phis[0] + phis[1]) / 2
    np.testing.assert_allclose(average.dense().numpy(), phi, rtol=0, atol=1e-9 * np.abs(phi).max())
    assert average.error <= 1e-4
    kernel = average.kernel(outputs="trace").numpy()
    expected = reference.kernel(phi, phi, "trace")
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("backend", "whole"),
    [
        ("eager", False),
        ("aot_eager", True),
    ],
)
def test_compiled_models_have_the_features_of_what_was_compiled(backend: str, whole: bool) -> None:
    torch.compiler.reset()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2)).double()
        x = normal(5, 4)
    expected = reference.jacobian(plain, x)
    if whole:
        model = torch.compile(plain, backend=backend)
    else:
        model = nn.Sequential(torch.compile(plain[:3], backend=backend), plain[3])
    before = fingerprint(model, x)
    with torch.no_grad():
        model(x)  # compiled models have usually run before
    feats = at.tangent_features(model, x)
    np.testing.assert_allclose(feats.dense().numpy(), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    assert [block.kind for block in feats.blocks.values()].count("factored") == 2
    np.testing.assert_allclose(
        at.tangent_kernel(model, x, tile=3).numpy(), reference.kernel(expected, expected), rtol=0, atol=1e-9
    )
    assert fingerprint(model, x) == before


def test_a_model_fresh_from_training_is_left_as_found() -> None:
    """Old hooks hold the last step's weights with their graph, and parameters hold gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(5, 2)))
    x = normal(6, 4).float()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    before = fingerprint(model, x)
    feats = at.tangent_features(model, x)
    assert fingerprint(model, x) == before
    # The last step's gradients belong to other weights; autograd on the current model agrees with the features.
    out = model(x)
    found = torch.autograd.grad(out[3, 1], list(model.parameters()))
    torch.testing.assert_close(feats.dense()[3, 1], torch.cat([g.flatten() for g in found]), rtol=1e-4, atol=1e-6)


def test_a_tensor_that_a_module_keeps_for_itself_is_put_back() -> None:
    def caching(m: nn.Module, x: Tensor) -> Tensor:
        m.last = m.fc(x).tanh()
        return m.last

    model, x = Forward(caching, fc=nn.Linear(4, 2)), normal(5, 4)
    before = fingerprint(model, x)
    at.tangent_features(model, x)
    assert fingerprint(model, x) == before


def test_losses_of_samples_are_an_output_whose_kernel_is_that_of_gradients() -> None:
    case = next(case for case in REAL if case.name == "losses of samples as output")
    model, x = case.build()
    gradients = []
    for k in range(5):
        value = losses(model(**reference.sample(x, k))).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    phi = torch.stack(gradients)
    made = at.tangent_kernel(model, x, output_fn=losses, outputs="trace")
    torch.testing.assert_close(made, phi @ phi.mT, rtol=1e-9, atol=1e-12)


def test_checkpointing_does_not_change_features() -> None:
    def build(*, checkpointed: bool) -> nn.Module:
        body = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        run = (lambda m, x: m.out(checkpoint(m.body, x, use_reentrant=False))) if checkpointed else (
            lambda m, x: m.out(m.body(x)))  # fmt: skip
        return Forward(run, body=body, out=nn.Linear(4, 2))

    x = normal(5, 4)
    one, two = build(checkpointed=True), build(checkpointed=False)
    two.load_state_dict(one.state_dict())
    made, expected = at.tangent_features(one, x), at.tangent_features(two, x)
    torch.testing.assert_close(made.dense(), expected.dense(), rtol=1e-12, atol=1e-14)
    assert {name: block.kind for name, block in made.blocks.items()} == {"body.0": "factored", "body.2": "factored",
        "out": "factored"}  # fmt: skip


def test_checkpointing_at_other_parameters() -> None:
    case = next(case for case in REAL if case.name == "activation checkpointing")
    model, x = case.build()
    state = case.build(seed=7)[0].state_dict()
    expected = reference.jacobian(model, x, state=state)
    made = at.tangent_features(model, x, params=state).dense().numpy()
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_a_gpt_trained_a_little_obeys_the_path_identity() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = gpt(tied=True)
        ids = torch.randint(9, (12, 5))
    model.eval()
    target = ids[:, 0] % 3
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids)[:, -1, :3], target).backward()
        optimizer.step()
    average = at.average_features(model, start, model.state_dict(), ids, output_fn=lambda out: out[:, -1, :3], tol=1e-6)
    assert average.error <= 1e-6
    initial = at.tangent_features(model, ids, params=start, output_fn=lambda out: out[:, -1, :3])
    assert set(at.explain(initial, average, at.TwoSided()).r2) == set(initial.blocks)


def test_a_model_in_single_precision_gives_the_loss_of_one_sample_as_autograd_does() -> None:
    model, x = mlp(nn.SiLU).float(), normal(3, 4).float()
    out = model(x).logsumexp(1)[1]
    found = torch.cat([g.flatten() for g in torch.autograd.grad(out, list(model.parameters()))])
    made = at.tangent_features(model, x, output_fn=lambda out: out.logsumexp(1)[:, None]).dense()[1, 0]
    torch.testing.assert_close(made, found, rtol=1e-4, atol=1e-6)

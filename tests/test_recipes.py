"""Every recipe runs, prints what its page shows, and says what a second computation finds."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp
from torch.nn import functional
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents.cli import app

PAGES = Path(__file__).parent.parent / "docs" / "recipes"
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?%?")
ROUNDING = 1e-6  # figures below are rounding, and differ between machines
digits = pytest.mark.skipif(
    not find_spec("sklearn"), reason="scikit-learn, whose data it uses, is in the extra 'report'"
)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def ran(name: str) -> dict[str, Any]:
    """What the code of a page leaves behind, after checks of what it prints."""
    page = (PAGES / f"{name}.md").read_text()
    made: dict[str, Any] = {"__name__": "recipe"}
    shown_in_all = ""
    for code, shown in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page, re.DOTALL):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"docs/recipes/{name}.md", "exec"), made)
        check_output(out.getvalue(), shown)
        shown_in_all += shown
    check_prose(page, shown_in_all)
    return made


def check_output(printed: str, shown: str) -> None:
    """Words are the page's, numbers are, within 2 % and the last figure; whole numbers are equal, percentages within 2."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for found, told in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert agree(found, told), f"printed {found}, the page shows {told}, in\n{printed}"


def agree(found: str, told: str) -> bool:
    a, b = (float(text.replace("−", "-").rstrip("%")) for text in (found, told))
    if told.endswith("%"):
        return abs(a - b) <= 2
    if max(abs(a), abs(b)) < ROUNDING:
        return True
    if not re.search(r"[.e]", told):
        return a == b
    last = 10.0 ** -len(re.sub(r"e.*", "", told).partition(".")[2]) * 10.0 ** float(
        (re.findall(r"e(.*)", told) or [0])[0]
    )
    return bool(abs(a - b) <= 0.02 * abs(b) + 1.01 * last)


def check_prose(page: str, shown: str) -> None:
    """Figures in the section that reads the output stand in the output."""
    _, _, reading = page.partition("## How to read it")
    reading = reading.partition("## Limits")[0]
    for figure in re.findall(r"\d+\.\d+|\d+%", reading):
        as_share = f"{int(figure[:-1]) / 100:.2f}" if figure.endswith("%") else figure
        assert figure in shown or as_share in shown, f"{figure} is not in the output"


def jacobian(model: nn.Module, function: Callable[[Callable[..., Tensor]], Tensor]) -> Tensor:
    """Derivatives (n, c, p) of function(call), where call is the model with given parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    parts = jacrev(lambda given: function(lambda *x: functional_call(model, given, x)))(parameters)
    return torch.cat([part.flatten(2) for part in parts.values()], 2)


def near(found: Tensor, true: Tensor, tol: float = 1e-9) -> bool:
    return found.shape == true.shape and float((found - true).detach().norm()) <= tol * float(true.detach().norm())


@digits
def test_one_logit_and_sums_are_the_kernels_that_the_page_says() -> None:
    made = ran("one_logit")
    x, model, signs = made["x"][:15], made["model"], made["signs"]
    exact, found = made["estimates"](x)
    phi = jacobian(model, lambda f: f(x))
    full = torch.einsum("kip,ljp->kilj", phi, phi)
    assert near(exact, torch.einsum("kili->kl", full))
    assert near(found["one logit, times 10"], 10 * full[:, 0, :, 0])
    assert near(found["sum of logits"], full.sum((1, 3)))
    draws = torch.einsum("is,kilj,js->kls", signs, full, signs)
    assert near(found["one draw of signs"], draws[:, :, 0])
    assert near(found["mean of 16 draws"], draws.mean(2))


def sequence_losses(model: nn.Module, tokens: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """The mean loss of the next tokens of each sequence alone, without its padding."""
    for row, length in zip(tokens, lengths, strict=True):
        logits = model(row[None, :length])[0, :-1].log_softmax(-1)
        yield -logits.gather(1, row[1:length, None]).mean()


@digits
def test_kernels_of_losses_are_inner_products_of_gradients(tmp_path: Path) -> None:
    made = ran("loss_kernels")
    model, x, y = made["model"], made["x"], made["y"]

    def gradients(model: nn.Module, losses: Iterator[Tensor]) -> Tensor:
        rows = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    each = gradients(model, (functional.cross_entropy(model(a[None]), b[None]) for a, b in zip(x, y, strict=True)))
    assert near(made["K_loss"], each @ each.T)
    lm, tokens = made["lm"], made["tokens"]
    each = gradients(lm, sequence_losses(lm, tokens, [5] + [9] * 11))
    assert near(made["K_lm"], each @ each.T)
    # the command's option makes the same kernel
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def factory():\n    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()\n"
    )
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    words = ["--output", "loss", "--outputs", "trace", "--weights", str(tmp_path / "w.safetensors"), "--float64"]
    where = [f"{tmp_path / 'net.py'}:factory", "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "K.zarr")]
    result = CliRunner().invoke(app, ["kernel", "--model", *where, *words])
    assert result.exit_code == 0, result.output
    assert near(at.open_kernel(tmp_path / "K.zarr").read(slice(None), slice(None)), made["K_loss"])


def without_each(phi: Tensor, new: Tensor, r: Tensor, ridge: float) -> Tensor:
    """By how much ridge regression on features (n, p) falls at a new sample (p,) without each sample, by n fits."""

    def predicted(rest: Tensor) -> Any:
        gram = phi[rest].T @ phi[rest] + ridge * torch.eye(phi.shape[1]).double()
        return new @ torch.linalg.solve(gram, phi[rest].T @ r[rest])

    n = len(phi)
    return torch.stack([predicted(torch.arange(n)) - predicted(torch.arange(n) != i) for i in range(0, n, 12)])


@digits
def test_contributions_sum_to_predictions_and_what_is_missing_is_what_fits_without_a_sample_show() -> None:
    made = ran("training_samples")
    model, x, hard, fit, ridge = (made[name] for name in ("model", "x", "hard", "fit", "ridge"))
    r = (made["y"] - made["start"])[:, 0]
    phi = jacobian(model, lambda f: f(x))[:, 0]
    phi_new = jacobian(model, lambda f: f(made["x_new"][[hard]]))[0, 0]
    adapted, adapted_new = fit.transform(made["feats"]), fit.transform(made["new"][hard : hard + 1])
    beta = fit.features.join(fit.coefficients)
    assert near(made["f_M"][hard] - made["start_new"][hard], phi_new[None] @ beta, 1e-6)
    assert near(made["k"][hard], phi @ phi_new)
    # M acts on the features as Mᵀ does on coefficients: the adapted kernel is that of the transformed features
    dense, dense_new = adapted.dense()[:, 0], adapted_new.dense()[0, 0]
    assert near(made["k_M"][hard], dense @ dense_new)
    for a, b, misses in ((phi, phi_new, made["misses"]), (dense, dense_new, made["misses_M"])):
        basis = torch.linalg.qr(torch.cat([a, b[None]]).T)[0]  # ridge regression does not leave the features' span
        assert near(misses[hard, ::12], without_each(a @ basis, b @ basis, r, ridge), 1e-6)
    assert float(made["f_M"][hard]) > 0 > float(made["y_new"][hard])  # a 4 is called a 9
    assert float(made["f_M"][hard]) < made["truth_M"][71]  # and would not be without #71
    shown = made["side"] * made["misses_M"][hard]
    assert shown.topk(5).indices.tolist() == [71, 49, 109, 104, 91]
    # with a ridge a hundred times larger, what samples add and what is missing without them rank alike
    made["ridge"] = 100 * ridge
    alpha = at.kernel_regression(made["K"], made["y"] - made["start"], ridge=100 * ridge).dual
    scores = torch.stack([made["missing"](made["K"], made["k"], alpha)[hard], (made["k"] * alpha[:, 0])[hard]])
    assert float(torch.corrcoef(scores.argsort(1).argsort(1).double())[0, 1]) > 0.9


@digits
def test_predictive_variance_is_that_of_a_gaussian_conditioned_on_the_targets_and_of_the_weights() -> None:
    made = ran("predictive_variance")
    ridge, scale = made["ridge"], made["scale"]
    n, m = len(made["K"]), 20
    K, k, own = (made[name].numpy() for name in ("K", "k", "own"))
    r = (made["y"] - made["f"]).numpy()
    # the joint covariance of targets and one new output, conditioned: the Schur complement
    for i in range(m):
        joint = np.block([[K + ridge * np.eye(n), k[i][:, None]], [k[i][None], own[i][None, None]]])
        precision = np.linalg.inv(joint)
        assert np.isclose(float(made["variance"][i]), scale / precision[n, n], rtol=1e-8)
        assert np.isclose(float(made["change"][i]), -(precision[n, :n] @ r)[0] / precision[n, n], rtol=1e-6)
    _, logdet = np.linalg.slogdet(K + ridge * np.eye(n))

    def likelihood(s2: float) -> float:
        return float(-(n * np.log(s2) + logdet + (r.T @ np.linalg.solve(K + ridge * np.eye(n), r))[0, 0] / s2) / 2)

    assert likelihood(scale) > max(likelihood(scale * 1.01), likelihood(scale / 1.01))
    check_laplace(made)


def check_laplace(made: Mapping[str, Any]) -> None:
    """The variance around trained weights is that of the weights' own posterior, at the minimum of its objective."""
    model, x, x_new, decay, noise = (made[name] for name in ("model", "x", "x_new", "decay", "noise"))
    phi = jacobian(model, lambda f: f(x))[:, 0]
    new = jacobian(model, lambda f: f(x_new[:20]))[:, 0]
    precision = (phi.T @ phi + decay * torch.eye(phi.shape[1]).double()) / noise
    assert near(made["variance1"][:20], (new @ torch.linalg.solve(precision, new.T)).diagonal())
    gram = phi.T @ phi
    fitted = torch.linalg.solve(gram + decay * torch.eye(len(gram)).double(), gram).trace()
    assert abs(float(fitted) - made["fitted"]) < 1e-6
    # the network is at the objective's minimum, up to what the optimizer leaves
    model.zero_grad()
    made["closure"]()
    left = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    data = 2 * (phi.T @ (made["y"] - model(x).detach())[:, 0]).norm()
    assert float(left) < 0.02 * float(data)


@digits
def test_task_vectors_add_exactly_in_tangent_space() -> None:
    made = ran("task_vectors")
    base, x = made["base"], made["transposed"][:30]
    weights = {"A": 0.7, "B": -0.4}
    module, network = made["edited"](weights)
    beta = {name: matrix.detach() for name, matrix in module.effective_coefficients().items()}
    feats = at.tangent_features(base, x)
    change = {name: feats.join(beta)[at_ : at_ + p.numel()].reshape(p.shape) for at_, name, p in places(base)}
    start = {name: p.detach() for name, p in base.named_parameters()}
    value, moved, *_ = jvp(lambda given: functional_call(base, given, (x,)), (start,), (change,))
    assert near(module(x).detach(), value + moved)
    for task, weight in weights.items():
        change = {name: part - weight * made["ordinary"][task][name] for name, part in network.state_dict().items()}
        network.load_state_dict(change)
    assert near(network(x), base(x))


def places(model: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
    start = 0
    for name, p in model.named_parameters():
        yield start, name, p
        start += p.numel()


def test_graphs_and_nodes_by_index_have_the_kernels_of_graphs_and_nodes() -> None:
    pytest.importorskip("torch_geometric", reason="PyTorch Geometric is in the extra dev")
    made = ran("graphs")
    network = made["network"]

    def alone(call: Callable[..., Tensor]) -> Tensor:
        return torch.cat([call(g.x, g.edge_index, torch.zeros(len(g.x)).long()) for g in made["graphs"]])

    phi = jacobian(network, alone)
    assert near(made["K"], torch.einsum("kip,ljp->kilj", phi, phi))
    nodes = made["nodes"]
    phi = jacobian(nodes, lambda f: f(made["members"]))
    assert near(made["K_nodes"], torch.einsum("kip,lip->kl", phi, phi))
    for given in ((made["together"],), made["graphs"]):
        with pytest.raises(at.TangentError, match="give the tensors that it holds"):
            at.tangent_kernel(network, given)


def test_the_kernel_of_residuals_is_that_of_derivatives_in_closed_form() -> None:
    made = ran("pinns")
    model, points, inside = made["model"], made["points"], made["inside"]

    def residuals(given: Mapping[str, Tensor]) -> Tensor:  # u = aᵀ tanh(wx + b) + d, and tanh″ = −2 tanh (1 − tanh²)
        w, b, a, d = given.values()
        h = torch.tanh(points @ w.T + b)
        second = (-2 * h * (1 - h**2) * w.T**2) @ a.T
        return torch.where(inside, second, h @ a.T + d)

    parts = jacrev(residuals)({name: p.detach() for name, p in model.named_parameters()})
    phi = torch.cat([part.flatten(1) for part in parts.values()], 1)
    assert near(made["K"], phi @ phi.T)
    # one step of gradient descent moves the residuals as (I − ηKΛ) says, up to second order
    weights, rate = made["balanced"], 1e-9
    start = {name: p.detach() for name, p in model.named_parameters()}
    r = residuals(start) - made["wanted"]
    slope = phi.T @ (weights * r)
    stepped = {name: p - rate * slope[at_ : at_ + p.numel(), 0].reshape(p.shape) for at_, name, p in places(model)}
    assert near(residuals(stepped) - made["wanted"] - r, -rate * (made["K"] * weights.T) @ r, 1e-3)


def in_numpy(params: Mapping[str, Mapping[str, np.ndarray]], images: np.ndarray) -> np.ndarray:
    """The page's network on arrays as JAX lays them out."""
    windows = np.lib.stride_tricks.sliding_window_view(images[..., 0], (3, 3), (1, 2))
    h = np.maximum(
        np.einsum("nhwij,ijc->nhwc", windows, params["Conv_0"]["kernel"][:, :, 0]) + params["Conv_0"]["bias"], 0
    )
    h = np.tanh(h.reshape(len(h), -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return np.asarray(h @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])


def test_a_network_from_jax_has_its_outputs_and_kernel() -> None:
    made = ran("jax")  # where JAX is installed, the page itself compares outputs and kernel with it
    params, images, x = made["params"], made["images"], made["x"]
    outputs = in_numpy(params, images)
    assert np.allclose(made["model"](x).detach().numpy(), outputs, rtol=1e-12)
    # the part of the kernel that comes from one array, by differences in JAX's layout
    step = 1e-6
    columns = []
    for k in np.ndindex(3, 3, 1, 4):
        moved = {name: dict(arrays) for name, arrays in params.items()}
        moved["Conv_0"]["kernel"] = params["Conv_0"]["kernel"].copy()
        moved["Conv_0"]["kernel"][k] += step
        columns.append((in_numpy(moved, images) - outputs).ravel() / step)
    phi = np.stack(columns, 1)
    part = at.tangent_kernel(made["model"], x, wrt="conv.weight").reshape(15, 15)
    assert near(part, torch.tensor(phi @ phi.T), 1e-4)


def test_the_tree_that_flax_makes_loads_and_gives_the_same_outputs() -> None:
    linen = pytest.importorskip("flax.linen", reason="Flax is not a dependency: pip install flax")
    jax = pytest.importorskip("jax", reason="Flax needs JAX")

    made = ran("jax")

    class Network(linen.Module):  # type: ignore[misc,name-defined]
        @linen.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            h = linen.relu(linen.Conv(4, (3, 3), padding="VALID")(x)).reshape(len(x), -1)
            h = jax.numpy.tanh(linen.Dense(16)(h))  # numbered in the order of their making
            return linen.Dense(3)(h)

    images = jax.numpy.asarray(made["images"], "float32")
    variables = Network().init(jax.random.key(0), images)
    state = made["state_dict"](
        jax.tree.map(np.asarray, variables["params"]), {"Conv_0": "conv", "Dense_0": "first", "Dense_1": "second"}
    )
    model = made["Network"]()
    model.load_state_dict(state)
    found, true = model(made["x"].float()).detach(), torch.tensor(np.asarray(Network().apply(variables, images)))
    assert near(found, true, 1e-5)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.name)
def test_a_recipe_is_listed_and_points_to_files_that_exist(page: Path) -> None:
    listed = re.findall(r"\]\((\w+\.md)\)", (PAGES / "index.md").read_text())
    assert page.name == "index.md" or listed.count(page.name) == 1
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(((?!http)[^)#]+)", prose):
        if target != "../comparison.md" or (PAGES / target).exists():
            assert (page.parent / target).exists(), target

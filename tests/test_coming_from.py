"""Recipes for users of other libraries: ours against torch.func, theirs where a peer is installed; figures as measured."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptive_tangents as at

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = (DOCS / "coming_from.md").read_text()
COMPARISON = (DOCS / "comparison.md").read_text()
BENCHMARKS = (DOCS / "benchmarks.md").read_text()
INTRODUCTION, *SECTIONS = re.split(r"^## ", RECIPES, flags=re.MULTILINE)
SECTION = {part.splitlines()[0]: part for part in SECTIONS}
# What a section's code imports, and how near the two come: TRAK keeps gradients in float32.
PEERS = {
    "torch.func": ("torch.func", 1e-12),
    "neural-tangents": ("neural_tangents", 1e-11),
    "nngeometry": ("nngeometry", 1e-12),
    "curvlinops": ("curvlinops", 1e-12),
    "Laplace": ("laplace", 1e-11),
    "TRAK": ("trak", 1e-4),
    "xRFM and the AGOP": ("xrfm", None),
    "scikit-learn": ("sklearn", 1e-11),
}


@pytest.fixture
def made() -> Iterator[dict[str, Any]]:
    """The network and samples that all recipes use."""
    names: dict[str, Any] = {"__name__": "docs"}
    before = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]):
            run(INTRODUCTION, names)
            yield names
    finally:
        torch.set_default_dtype(before)


def run(section: str, names: dict[str, Any], *, theirs: bool = False) -> None:
    """Our code of a section, with that of the peer before it where it stands if ``theirs``."""
    for language, code in re.findall(r"```(py|python)\n(.*?)```", section, re.DOTALL):
        if theirs or language == "python":
            exec(compile(code, "docs/coming_from.md", "exec"), names)


def listed(found: Any) -> list[Tensor]:
    return [torch.as_tensor(part).double() for part in (found if isinstance(found, list) else [found])]


def off(found: Any, wanted: Any) -> float:
    """The largest difference, as a part of the largest entry wanted."""
    pairs = list(zip(listed(found), listed(wanted), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def jacobian(model: torch.nn.Module, *x: Tensor) -> Tensor:
    """(n, c, p), sample by sample: the truth that no code of ours has touched."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, tuple(s[None] for s in sample))[0]

    found = [torch.func.jacrev(single)(params, *sample) for sample in zip(*x, strict=True)]
    return torch.stack([torch.cat([j.flatten(1) for j in one.values()], 1) for one in found])


def kernel(left: Tensor, right: Tensor | None = None) -> Tensor:
    return torch.einsum("ncp,mdp->ncmd", left, left if right is None else right)


def test_every_section_has_code_of_both(made: dict[str, Any]) -> None:
    assert list(SECTION) == list(PEERS)
    for section in SECTION.values():
        assert {"py", "python"} == set(re.findall(r"```(\w+)\n", section))
    assert (made["n"], made["c"], made["m"]) == (12, 3, 5)
    assert sum(p.numel() for p in made["model"].parameters()) == 323


@pytest.mark.parametrize("title", [title for title, (_, tolerance) in PEERS.items() if tolerance])
def test_the_peer_and_we_find_the_same_numbers(title: str, made: dict[str, Any]) -> None:
    module, tolerance = PEERS[title]
    pytest.importorskip(
        module, reason=f"{title} is no dependency of this project; the recipe runs where it is installed"
    )
    run(SECTION[title], made, theirs=True)
    assert tolerance is not None
    assert off(made["ours"], made["theirs"]) < tolerance


def test_for_torch_func_and_nngeometry_and_curvlinops_products_are_those_of_the_jacobian(made: dict[str, Any]) -> None:
    J, ones = jacobian(made["model"], made["x"]), torch.ones(323)
    n = len(J)
    run(SECTION["torch.func"], made)
    assert off(made["ours"], [kernel(J).transpose(1, 2), J, J @ ones]) < 1e-12
    run(SECTION["nngeometry"], made)
    assert off(made["ours"], [kernel(J), J, torch.einsum("ncp,ncq,q->p", J, J, ones) / n]) < 1e-12
    run(SECTION["curvlinops"], made)
    p = made["f"].softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("ncp,ncd,ndq,q->p", J, hessian, J, ones) / n
    assert off(made["ours"], [J @ ones, J.sum((0, 1)), kernel(J), ggn]) < 1e-12


def test_for_neural_tangents_kernels_regression_and_linearization_are_those_of_the_jacobian(
    made: dict[str, Any],
) -> None:
    J, J_test = jacobian(made["model"], made["x"]), jacobian(made["model"], made["x_test"])
    run(SECTION["neural-tangents"], made)
    K = kernel(J)
    r, step = (made["y"] - made["f"]).flatten(), torch.full((323,), 0.1)
    dual = torch.linalg.solve(K.reshape(36, 36) + 0.1 * torch.eye(36), r)
    regression = made["f_test"] + (kernel(J_test, J).reshape(15, 36) @ dual).reshape(5, 3)
    linear = made["f_test"] + J_test @ step
    trace, diagonal = torch.einsum("ncmc->nm", K), torch.einsum("ncmc->nmc", K)
    assert off(made["ours"], [K, trace, diagonal, regression, linear]) < 1e-11
    # One step of gradient descent from β = 0 goes along −Jᵀ∂L/∂f; the mean of squares has 36 terms.
    beta = -0.01 * torch.einsum("ncp,nc->p", J, 2 * (made["f"] - made["y"]) / 36)
    with torch.no_grad():
        assert off(made["linear"](made["x_test"]), made["f_test"] + J_test @ beta) < 1e-12


def test_for_laplace_variances_are_those_of_the_posterior_over_parameters(made: dict[str, Any]) -> None:
    run(SECTION["Laplace"], made)
    wanted = []
    for chosen in (slice(None), slice(224, None)):  # all parameters, and the 32·3 + 3 of the last layer
        J, J_test = (jacobian(made["model"], made[x])[..., chosen] for x in ("x", "x_test"))
        flat = J.flatten(0, 1)
        precision = flat.T @ flat / 0.3**2 + 2.0 * torch.eye(flat.shape[1])
        wanted.append(torch.einsum("mcp,pq,mdq->mcd", J_test, torch.linalg.inv(precision), J_test))
    assert off(made["ours"], wanted) < 1e-11


def test_for_trak_kernel_and_scores_are_those_of_the_margins_gradients(made: dict[str, Any]) -> None:
    run(SECTION["TRAK"], made)
    J = jacobian(made["margin"], made["x"], made["labels"])[:, 0]
    J_test = jacobian(made["margin"], made["x_test"], made["labels_test"])[:, 0]
    p = made["f"].softmax(1).gather(1, made["labels"][:, None])
    margin = made["margin"](made["x"], made["labels"]).detach()
    assert torch.allclose(margin, torch.log(p / (1 - p)))
    features = J @ torch.linalg.inv(J.T @ J + 0.01 * 323 * torch.eye(323))
    scores = features @ J_test.T * (1 - p)
    assert off(made["ours"], [J @ J.T, scores / scores.norm()]) < 1e-10
    projected, sketch = made["projected"], made["sketch"]
    told = at.tangent_kernel(made["margin"], (made["x"], made["labels"]), outputs="trace", sketch=sketch)
    assert torch.allclose(projected @ projected.T, told.kernel)
    assert 0 < told.relative_error < 0.1
    assert (told.kernel - J @ J.T).norm() < 3 * told.standard_error.norm()


def test_for_xrfm_the_first_layer_turns_to_the_two_inputs_and_the_agop_is_that_of_the_gradients(
    made: dict[str, Any],
) -> None:
    run(SECTION["xRFM and the AGOP"], made)
    assert set(made["ours"].topk(2).indices.tolist()) == {0, 1}
    assert made["fit"].converged
    gradient = torch.func.vmap(torch.func.grad(lambda s: made["net"](s[None])[0, 0]))(made["inputs"])
    assert off(made["agop"], gradient.T @ gradient / len(gradient)) < 1e-12


def test_xrfm_finds_the_two_inputs_too(made: dict[str, Any]) -> None:
    pytest.importorskip("xrfm", reason="xRFM is in the extra 'peers'")
    run(SECTION["xRFM and the AGOP"], made, theirs=True)
    assert set(made["theirs"].topk(2).indices.tolist()) == {0, 1}


def test_for_scikit_learn_the_prediction_is_ridge_regression_with_the_trace(made: dict[str, Any]) -> None:
    run(SECTION["scikit-learn"], made)
    J, J_test = jacobian(made["model"], made["x"]), jacobian(made["model"], made["x_test"])
    K, k = (torch.einsum("ncmc->nm", kernel(left, J)) for left in (J, J_test))
    dual = torch.linalg.solve(K + 0.1 * torch.eye(12), made["y"] - made["f"])
    assert off(made["ours"], made["f_test"] + k @ dual) < 1e-11


FASTEST = {"neural-tangents": "neural-tangents, structured"}  # of the implementations measured


def test_ratios_and_errors_are_those_of_the_benchmarks() -> None:
    cells = {row[0]: row for line in COMPARISON.splitlines() if line.startswith("|") for row in [_cells(line)]}
    measured = {row[0]: row for line in BENCHMARKS.splitlines() if line.startswith("|") for row in [_cells(line)]}
    compared = 0
    for title, peer in {"torch.func, `vmap(jacrev)`": "torch.func"}.items() | {(p, p) for p in (*PEERS, "asdfghjkl")}:
        for network, found in zip(("MLP", "CNN", "ResNet-18"), cells.get(title, [])[3:], strict=False):
            if found and "not run" not in found:
                told = measured[f"{network}: {FASTEST.get(peer, peer)}"]
                assert ("given up after 300 s" in told[1]) if "over" in found else (float(found) == approx(told[2]))
                compared += 1
    assert compared == 12
    memory = [measured[f"MLP: {name}"][3] for name in (FASTEST["neural-tangents"], "adaptive-tangents")]
    assert " GB against ".join(memory) in COMPARISON
    errors = [measured[f"small GPT: {kind}"][6] for kind in ("TRAK 4096", "dim 4096", "dim 4096, fitted")]
    assert [error for error in errors if error not in COMPARISON] == []


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def approx(told: str) -> Any:
    return pytest.approx(float(told), rel=5e-3)


def test_errors_beside_recursive_feature_machines_are_those_of_the_results() -> None:
    results = json.loads((DOCS / "results" / "low-rank-targets.json").read_text())
    targets = dict(part.split(": ", 1) for part in results["claims"]["beside.RFM"]["evidence"].split(" · "))
    page = " ".join(COMPARISON.split())
    for target, n, ours, theirs in (("product", 200, "0.20", "0.64"), ("four", 200, "0.49", "0.83")):
        assert f"n = {n}: {ours} against {theirs}" in targets[target]
        assert f"{ours} against {theirs}" in page
    assert "n = 800: 0.06 against 0.01" in targets["product"]
    assert "0.01 against 0.06 for the product" in page
    at_last = [re.search(r"n = 800: (\S+) against ([\d.]+)", told) for told in targets.values()]
    assert all(found is not None and float(found[2]) < float(found[1]) for found in at_last)

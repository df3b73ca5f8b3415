"""`inspect`: its numbers against direct computation, its refusals, its page, and the command end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.commands import inspect as inspect_command
from adaptive_tangents.commands.report import PAGES
from adaptive_tangents.inspection import InspectConfig, outputs, run
from adaptive_tangents.inspection import figures as inspection_figures
from adaptive_tangents.inspection import page as inspection_report
from adaptive_tangents.inspection.measures import singular_values
from adaptive_tangents.inspection.tangents import Cost, Tangents, collapsed, fitting_chunk
from adaptive_tangents.loading import Data
from adaptive_tangents.measures.explain import explain_operations
from adaptive_tangents.reporting import report
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.runs.results import write_results
from study_cases import explained_in_rounds, of_few_pixels, plain_figures

pytestmark = pytest.mark.xdist_group("inspect")

runner = CliRunner()
State = dict[str, Tensor]

NETWORKS = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()

def conv():
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*layers).double()

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.out = nn.Linear(5, 2)

    def forward(self, tokens, mask):
        pooled = (self.embed(tokens) * mask[..., None]).mean(1)
        return {"logits": self.out(torch.cat([pooled, mask[:, :1]], 1).tanh())}

def tokens():
    torch.manual_seed(0)
    return Tokens()
"""
space: dict[str, Any] = {}
exec(NETWORKS, space)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(model: nn.Module, *, step: float = 0.3, seed: int = 1) -> State:
    """The state after a random step of parameters and floating buffers."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        state[name] = value + step * (noise - 0.3).to(value) if value.is_floating_point() else value + 5
    return state


def problem(name: str) -> tuple[nn.Module, State, State, Data]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = space[name]().eval()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    if name == "conv":
        data = Data(normal(20, 3, 5, 5), torch.arange(20) % 3, ("cat", "dog", "eel"))
    else:
        data = Data(normal(20, 3), normal(20, seed=4))
    return model, start, moved(model), data


LIGHT = InspectConfig(samples=20, nodes=6)


@pytest.fixture(scope="module")
def found() -> dict[str, RunResult]:
    results = {}
    for name in ("mlp", "conv"):
        model, start, end, data = problem(name)
        between = {k: torch.lerp(v, end[k], 0.5) if v.is_floating_point() else v for k, v in start.items()}
        results[name] = run(model, {"start": start, "half": between, "end": end}, data, LIGHT)
    return results


def direct(name: str) -> tuple[dict[str, at.TangentFeatures], Tensor, Any]:
    """Initial, average and final features from public functions alone, and the change of the outputs."""
    model, start, end, data = problem(name)
    values = [torch.func.functional_call(model, s, (data.x,)).detach() for s in (start, end)]
    change, pick = values[1] - values[0], None
    if name == "conv":
        centered = change - change.mean(0)
        centered = centered - centered.mean(1, keepdim=True)
        direction = torch.linalg.svd(centered).Vh[0]
        direction = direction * direction[direction.abs().argmax()].sign()
        change, pick = change @ direction[:, None], lambda out: out @ direction[:, None]
    average = at.average_features(model, start, end, data.x, nodes=6, output_fn=pick, buffers="path")
    feats = {
        "initial": at.tangent_features(model, data.x, params=start, output_fn=pick),
        "average": average,
        "final": at.tangent_features(model, data.x, params=end, output_fn=pick),
    }
    return feats, change, average


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_numbers_are_those_of_the_public_functions(found: dict[str, RunResult], name: str) -> None:
    r, arrays = found[name].results, found[name].arrays
    feats, change, average = direct(name)
    kernels = {stage: f.kernel(outputs="trace") for stage, f in feats.items()}
    np.testing.assert_allclose(arrays["change"], change.numpy(), rtol=1e-9, atol=1e-12)
    for stage, kernel in kernels.items():
        np.testing.assert_allclose(arrays[f"kernel.{stage}"], kernel.numpy(), rtol=1e-4)
        assert r["alignment"]["change"][stage] == pytest.approx(at.alignment(kernel, change), rel=1e-8)
        assert r["alignment_centered"]["change"][stage] == pytest.approx(
            at.alignment(kernel, change, centered=True), rel=1e-8
        )
        np.testing.assert_allclose(
            arrays[f"spectrum.{stage}"],
            torch.linalg.eigvalsh(kernel).flip(0),
            rtol=1e-6,
            atol=1e-9 * float(kernel.norm()),
        )
    assert r["growth"]["final"] == pytest.approx(float(kernels["final"].trace() / kernels["initial"].trace()))
    assert r["growth"]["average"] == pytest.approx(float(kernels["average"].trace() / kernels["initial"].trace()))
    assert r["cka"]["final"] == pytest.approx(at.cka(kernels["initial"], kernels["final"]), rel=1e-8)
    parts = at.decompose(kernels["final"], kernels["initial"], change)
    assert r["decomposition"]["final"]["target_weight"] == pytest.approx(parts.target_weight, rel=1e-6)
    assert r["decomposition"]["final"]["explained"] == pytest.approx(parts.explained, rel=1e-8)
    turn, task = (kernels["final"] - kernels["initial"]).flatten(), (change @ change.mT).flatten()
    cosine = float(turn @ task / (turn.norm() * task.norm()))
    assert r["decomposition"]["final"]["change_along_target"] == pytest.approx(cosine**2, rel=1e-8)
    assert r["path"]["error"] == pytest.approx(average.error, rel=1e-4)
    assert r["path"]["nodes"] == 6


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_blocks_are_those_of_the_public_functions(found: dict[str, RunResult], name: str) -> None:
    r = found[name].results
    feats, change, _ = direct(name)
    kernels = {stage: f.kernel(outputs="trace", by_block=True) for stage, f in feats.items()}
    _, start, end, _ = problem(name)
    step = torch.cat([(end[k] - start[k]).flatten() for k in feats["initial"].parameters])
    matrices = feats["initial"].split(step)
    assert list(r["blocks"]) == list(kernels["initial"])
    for block, numbers in r["blocks"].items():
        total = sum(float(K.trace()) for K in kernels["final"].values())
        final, initial = kernels["final"][block], kernels["initial"][block]
        assert numbers["trace_share"]["final"] == pytest.approx(float(final.trace()) / total)
        assert numbers["growth"]["final"] == pytest.approx(float(final.trace() / initial.trace()))
        assert numbers["alignment"]["average"] == pytest.approx(
            at.alignment(kernels["average"][block], change), rel=1e-8
        )
        assert numbers["change_norm"] == pytest.approx(float(matrices[block].norm()))
        rank = at.effective_rank(matrices[block])
        assert numbers["effective_rank"]["participation"] == pytest.approx(rank.participation, rel=1e-6)
    explained = at.explain(feats["initial"], feats["average"], at.TwoSided())
    assert r["explain"]["two_sided"]["total"] == pytest.approx(explained.total, rel=1e-5)
    scaled = at.explain(feats["initial"], feats["average"], at.LayerScale())
    assert r["explain"]["two_sided"]["layer_scale_there"] == pytest.approx(scaled.total, rel=1e-6)


def test_models_are_fitted_to_the_networks_own_change(found: dict[str, RunResult]) -> None:
    r = found["mlp"].results
    feats, change, _ = direct("mlp")
    fixed = at.fit(feats["initial"], change, structure=at.Fixed())
    top = max(float(torch.linalg.svdvals(B)[0]) for B in fixed.coefficients.values())
    model = r["models"]["two_sided"]
    assert model["strength"] == pytest.approx(model["relative_strength"] * top**2, rel=1e-6)
    again = at.fit(feats["initial"], change, structure=at.TwoSided(at.Quadratic(model["strength"])), max_rounds=100)
    rank = at.effective_rank(again.coefficients["0"]).participation
    assert r["blocks"]["0"]["model_rank"]["two_sided"]["participation"] == pytest.approx(rank, rel=1e-3)
    assert model["alignment"] == pytest.approx(
        at.alignment(again.transform(feats["initial"]).kernel(), change), rel=1e-3
    )


def test_labels_are_one_hot_centered_along_the_outputs_measured(found: dict[str, RunResult]) -> None:
    arrays, r = found["conv"].arrays, found["conv"].results
    weights = np.array(list(r["outputs"]["weights"].values()))
    onehot = np.eye(3)[np.arange(20) % 3]
    expected = (onehot - onehot.mean(0)) @ weights
    np.testing.assert_allclose(arrays["target"][:, 0], expected, atol=1e-9)
    kernel = torch.as_tensor(arrays["kernel.final"])
    assert r["alignment"]["labels"]["final"] == pytest.approx(at.alignment(kernel, expected), rel=1e-4)
    assert list(r["outputs"]["weights"]) == ["cat", "dog", "eel"]
    assert weights.sum() == pytest.approx(0, abs=1e-9)


def test_the_share_that_went_through_the_buffers_is_told(found: dict[str, RunResult]) -> None:
    _, _, average = direct("conv")
    share = float((average.buffer_change * average.change).sum() / average.change.norm() ** 2)
    assert found["conv"].results["path"]["through_buffers"] == pytest.approx(share, rel=1e-5)
    assert abs(share) > 1e-3
    assert found["mlp"].results["path"]["through_buffers"] == 0


def test_checkpoints_in_between_are_measured_alike(found: dict[str, RunResult]) -> None:
    first, half, last = found["mlp"].results["trajectory"]
    assert (first["growth"], first["cka_start"], last["cka_end"]) == (1.0, pytest.approx(1.0), pytest.approx(1.0))
    model, start, end, data = problem("mlp")
    state = {k: torch.lerp(v, end[k], 0.5) for k, v in start.items()}
    _, change, _ = direct("mlp")
    kernel = at.tangent_kernel(model, data.x, params=state, outputs="trace")
    assert half["alignment"] == pytest.approx(at.alignment(kernel, change), rel=1e-8)
    assert (half["name"], last["growth"]) == ("half", pytest.approx(found["mlp"].results["growth"]["final"]))


def test_samples_are_drawn_by_the_seed_and_growth_is_of_the_diagonal() -> None:
    model, start, end, data = problem("mlp")
    config = InspectConfig(samples=8, nodes=2, seed=3, fit_operations=1)
    one, two = (run(model, {"a": start, "b": end}, data, config) for _ in range(2))
    assert one.results["metrics"] == two.results["metrics"]
    assert any("8 of the 20 samples, drawn with seed 3" in limit for limit in one.results["limits"])
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:8].sort().values
    np.testing.assert_array_equal(one.arrays["y"], data.y[chosen].numpy())
    diagonal = one.arrays["kernel.average"].diagonal() / one.arrays["kernel.initial"].diagonal()
    assert one.results["sample_growth"]["median"] == pytest.approx(float(np.sort(diagonal)[3]), rel=1e-4)


def test_models_that_pass_the_limit_are_left_out_and_told_and_no_block_is() -> None:
    model, start, end, data = problem("mlp")
    config = InspectConfig(samples=12, nodes=2, fit_operations=1)
    r = run(model, {"a": start, "b": end}, data, config).results
    assert any("exact adaptive model was not fitted: it may take" in limit for limit in r["limits"])
    assert list(r["models"]) == ["fixed"]
    for numbers in r["blocks"].values():
        assert all(value is not None for value in numbers["explain"].values())
    assert all(told["left_out"] == [] for told in r["explain"].values())


def test_new_norms_at_the_start_are_told(found: dict[str, RunResult]) -> None:
    assert any(
        "1 norms (first: 1) have the running statistics 0 and 1" in limit for limit in found["conv"].results["limits"]
    )
    assert not any("running statistics" in limit for limit in found["mlp"].results["limits"])


def test_dearer_blocks_are_counted_dearer() -> None:
    feats, _, _ = direct("conv")
    start, average = feats["initial"].blocks["3"], feats["average"].blocks["3"]
    costs = [explain_operations(start, average, s, 20) for s in (at.LayerScale(), at.Left(), at.Right(), at.TwoSided())]
    assert costs == sorted(costs)


def test_features_keep_the_smaller_form_and_are_the_same() -> None:
    model, start, _, data = problem("conv")
    feats = at.tangent_features(model, data.x, params=start)
    small = collapsed(feats)
    assert small.bytes <= feats.bytes
    assert {block.kind for block in feats.blocks.values()} == {"factored", "materialized"}
    torch.testing.assert_close(small.kernel(), feats.kernel())
    parts = Tangents(model, data.x, lambda out: out, None, chunk=7).at(start)
    torch.testing.assert_close(parts.kernel(), feats.kernel())


def test_samples_that_memory_does_not_hold_are_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _, data = problem("mlp")
    tangents = Tangents(model, data.x, lambda out: out, None)
    limit = "adaptive_tangents.inspection.tangents.limit_for"
    monkeypatch.setattr(limit, lambda *_: 10_000)
    assert fitting_chunk(tangents, Cost(1, 100, 350), 50)[1] < 50
    for size, wanted, advice in (
        (1000, 50, "8 samples; measure fewer outputs (--outputs main is one), lower --nodes, narrow --wrt, or use"),
        (180, 50, "8 samples; give --samples 6, measure fewer outputs"),
        (1000, 4, "4 samples; measure"),
    ):
        with pytest.raises(
            at.TangentError, match=rf"features of one sample take .* too little for {re.escape(advice)}"
        ):
            fitting_chunk(tangents, Cost(1, size, 7 * size // 2), wanted)


def test_the_nodes_are_found_on_as_few_samples_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start, end, data = problem("mlp")
    asked: list[int] = []
    whole = Tangents._average

    def watched(self: Tangents, part: torch.Tensor, *given: Any, **options: Any) -> Any:
        asked.append(len(part))
        return whole(self, part, *given, **options)

    monkeypatch.setattr(Tangents, "_average", watched)
    for free, count in ((10**12, 8), (350, 3), (1, 1)):
        monkeypatch.setattr(Tangents, "limit", property(lambda _, free=free: free))
        Tangents(model, data.x, lambda out: out, None, making=100).nodes(start, end, None, tol=0.01, most=8)
        assert asked[-1] == count


def test_a_network_too_large_is_refused_before_any_average_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start, end, data = problem("mlp")
    monkeypatch.setattr("adaptive_tangents.inspection.tangents.limit_for", lambda *_: 1000)
    monkeypatch.setattr(Tangents, "_average", None)
    with pytest.raises(at.TangentError, match="inspect: features of one sample take"):
        run(model, {"start": start, "end": end}, data, InspectConfig(samples=20))


def test_quick_keeps_nodes_that_are_given() -> None:
    assert (InspectConfig().quick().nodes, InspectConfig(nodes=2).quick().nodes) == (4, 2)


def test_chunks_shrink_where_memory_has_become_scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start, _, data = problem("mlp")
    free = iter([9, 9, 3, 0] + [9] * 20)
    monkeypatch.setattr("adaptive_tangents.inspection.tangents.limit_for", lambda *_: 100 * next(free))
    tangents = Tangents(model, data.x, lambda out: out, None, chunk=6, making=100)
    assert [len(part) for part, _ in tangents._parts()] == [6, 6, 3, 1, 4]
    assert tangents.at(start).n == 20


def test_singular_values_by_the_gram_matrix_are_those_of_the_matrix() -> None:
    for shape in ((4, 9), (9, 4)):
        matrix = normal(*shape)
        torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))


# the outputs measured


def test_the_main_direction_is_where_the_change_varies_most() -> None:
    change = normal(30, 4)
    change[:, 2] *= 10
    made = outputs.reduce_outputs("main", change, torch.arange(30) % 4, None)
    assert float(made.weights[2, 0]) > 0.8
    assert float(made.weights.sum()) == pytest.approx(0, abs=1e-9)
    assert 0.5 < made.share < 1
    both = outputs.reduce_outputs("main:2", change, None, None)
    torch.testing.assert_close(both.weights.mT @ both.weights, torch.eye(2, dtype=torch.float64))


def test_margin_features_are_those_of_each_samples_margin() -> None:
    model, start, end, data = problem("conv")
    config = InspectConfig(samples=20, nodes=2, outputs="margin", fit_operations=1)
    r = run(model, {"a": start, "b": end}, data, config)
    full = at.tangent_features(model, data.x, params=start).kernel()
    weights = torch.eye(3, dtype=torch.float64)[data.y] - (1 - torch.eye(3, dtype=torch.float64)[data.y]) / 2
    expected = torch.einsum("nc,ncmd,md->nm", weights, full, weights)
    np.testing.assert_allclose(r.arrays["kernel.initial"], expected.numpy(), rtol=1e-4, atol=1e-6)
    assert list(r.results["blocks"]) == ["0", "1.weight", "1.bias", "3", "5"]
    assert "singular_values.change.3" in r.arrays


def test_all_outputs_and_some_by_name_and_number() -> None:
    model, start, end, data = problem("conv")
    full = at.tangent_features(model, data.x, params=start).kernel(outputs="diagonal")
    for how, columns in (("all", [0, 1, 2]), ("dog", [1]), ("0, eel", [0, 2])):
        config = InspectConfig(samples=20, nodes=1, outputs=how, fit_operations=1)
        made = run(model, {"a": start, "b": end}, data, config).arrays["kernel.initial"]
        np.testing.assert_allclose(made, full[..., columns].sum(-1).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "labels", "message"),
    [
        (
            "cow",
            torch.zeros(6, dtype=torch.int64),
            "--outputs has no 'cow'; give all, main, main:k, margin, numbers 0 to 2",
        ),
        ("7", None, "--outputs has no '7'"),
        ("margin", None, "--outputs margin needs integer labels y and at least two outputs"),
        ("main:3", torch.zeros(6, dtype=torch.int64), "--outputs main:3: the number of directions must be 1 to 2"),
        ("main:0", None, "the number of directions must be 1 to 3"),
        ("auto", torch.full((6,), 3), "y holds the label 3, but the network has 3 outputs; number the classes from 0"),
        ("auto", torch.full((6,), -1), "y holds the label -1; number the classes from 0"),
    ],
)
def test_outputs_that_do_not_exist_are_refused(how: str, labels: Tensor | None, message: str) -> None:
    with pytest.raises(at.TangentError, match=f"^inspect: .*{message}"):
        outputs.reduce_outputs(how, normal(6, 3), labels, None)


def test_frozen_parameters_that_differ_between_checkpoints_are_told_of_as_that() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model[0].requires_grad_(False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: 1.5 * value for name, value in start.items()}
    data = Data(normal(6, 3))
    with pytest.raises(
        at.TangentError, match=r"^inspect: 0\.weight, 0\.bias change .*requires_grad=False.*let wrt be '\*'"
    ):
        run(model, {"start": start, "end": end}, data, InspectConfig(nodes=1))
    with pytest.raises(at.TangentError, match=r"^inspect: 2\.weight, 2\.bias change .*wrt leaves them out"):
        run(model, {"start": start, "end": end}, data, InspectConfig(nodes=1, wrt=("0.*",)))
    found = run(model, {"start": start, "end": end}, data, InspectConfig(nodes=1, wrt=("*",)))
    assert found.results["network"]["blocks"] == 2


def test_names_of_outputs_may_hold_commas_and_are_one_output_each() -> None:
    classes = ("tench, Tinca", "crane", "tench", "Tinca", "crane", "a,b")
    for how, columns in (
        ("tench, Tinca", [0]), ("tench, Tinca, 2", [0, 2]), ("Tinca, tench", [3, 2]),
        ("a,b,1,tench, Tinca", [5, 1, 0]), ("4", [4]),
    ):  # fmt: skip
        made = outputs.reduce_outputs(how, normal(8, 6), None, classes)
        assert torch.equal(made.weights, torch.eye(6, dtype=torch.float64)[:, columns])
        assert made.names == tuple(f"crane ({j})" if j in (1, 4) else classes[j] for j in columns)
    with pytest.raises(
        at.TangentError, match=r"^inspect: --outputs: 'crane' is the name of several outputs, 1, 4; give"
    ):
        outputs.reduce_outputs("a,b, crane", normal(8, 6), None, classes)


def test_outputs_are_found_in_what_networks_return() -> None:
    class Named:
        logits = torch.ones(2, 3)

    for out in (torch.ones(2, 3), {"logits": torch.ones(2, 3)}, Named(), (torch.ones(2, 3), None), [torch.ones(2, 3)]):
        assert outputs.pick(out).shape == (2, 3)
    assert outputs.pick(torch.ones(2)).shape == (2, 1)
    with pytest.raises(at.TangentError, match=r"output has shape \(2, 3, 4\), expected \(n, c\)"):
        outputs.pick(torch.ones(2, 3, 4))
    with pytest.raises(at.TangentError, match="the network returned str; write a factory"):
        outputs.pick("logits")


def test_two_labels_on_one_output_are_signs_and_targets_must_fit() -> None:
    one = outputs.reduce_outputs("auto", normal(4, 1), torch.tensor([0, 1, 1, 0]), None)
    target, words = outputs.targets(one, torch.tensor([0, 1, 1, 0]), 1)
    assert target is not None
    assert target[:, 0].tolist() == [-1, 1, 1, -1]
    assert words == "−1 for label 0, +1 for 1"
    assert outputs.targets(one, None, 1)[0] is None
    with pytest.raises(at.TangentError, match=r"y has 2 target\(s\) per sample and the network 1 output"):
        outputs.targets(one, normal(4, 2), 1)


def test_states_that_say_nothing_are_refused() -> None:
    model, start, end, data = problem("mlp")
    with pytest.raises(at.TangentError, match="two checkpoints are needed, start and end; got 1"):
        run(model, {"a": start}, data)
    with pytest.raises(at.TangentError, match="start and end give the same outputs on these samples"):
        run(model, {"a": start, "b": dict(start)}, data)
    big = {k: v * 1e200 for k, v in end.items()}
    with pytest.raises(at.TangentError, match="outputs at b are not finite"):
        run(model, {"a": start, "b": big | {"2.weight": big["2.weight"] * 1e200}}, data)
    with pytest.raises(at.TangentError, match="--samples must be at least 4, got 3"):
        InspectConfig(samples=3)
    with pytest.raises(at.TangentError, match="nodes and tol must be positive"):
        InspectConfig(nodes=0)


# the page


@pytest.fixture(scope="module")
def page(found: dict[str, RunResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    extra = {"command": "adaptive-tangents inspect", "model": "networks:conv", "data_file": "data.npz"}
    write_results(found["conv"].results | extra, found["conv"].arrays, folder)
    with of_few_pixels():
        report.build_report(folder, PAGES)
    return folder


def test_the_page_stands_alone(page: Path) -> None:
    text = (page / "report.html").read_text("utf-8")
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    (script,) = re.findall(r"<script>.*?</script>", text, flags=re.DOTALL)
    assert "<script" not in text.replace(script, "")
    assert not re.search(r"fetch|XMLHttp|WebSocket|import|eval|innerHTML|https?:|cookie|localStorage", script)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", text)
    plain = re.sub(r"<(style|svg|pre|script)\b.*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)
    assert re.findall(r"\b\w_\w\b|\w̄|\{\{|\bNone\b|\bnan\b", plain) == []
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(names) == len(set(names))


def test_every_figure_that_applies_is_on_the_page_with_how_to_read_it(page: Path) -> None:
    text = (page / "report.html").read_text("utf-8")
    figures = re.findall(r"<figure .*?</figure>", text, flags=re.DOTALL)
    assert len(figures) == len(inspection_report.PAGE.figures)
    assert all("Look for" in figure and re.search(r'aria-label="[^"]{20,}"', figure) for figure in figures)
    assert {path.stem for path in (page / "figures").iterdir()} == set(inspection_report.PAGE.figures)


def test_findings_are_sentences_with_the_numbers(found: dict[str, RunResult]) -> None:
    r = found["conv"].results
    told = " ".join(inspection_report.findings(r))
    for part in ("The kernel ", "sim ", "effective rank", "lies along the kernel of what was learned", "dB", "R² ="):
        assert part in told
    assert inspection_report.fixed(r["alignment"]["change"]["final"]) in told


def test_images_shown_are_those_that_grew_most_and_least(found: dict[str, RunResult]) -> None:
    arrays = found["conv"].arrays
    growth = inspection_figures.sample_growth(arrays)
    assert arrays["images"].shape == (20, 5, 5, 3)
    assert arrays["images"].dtype == np.uint8
    assert int(growth.argmax()) in arrays["images.index"]
    assert "images" not in found["mlp"].arrays
    assert not inspection_report.PAGE.applies(found["mlp"].results | {"data": found["mlp"].results["data"]}, "images")


# the command


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of networks, checkpoints in both formats, and data of three kinds."""
    (tmp_path / "networks_of_test.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    model, start, end, data = problem("conv")
    half = {k: torch.lerp(v, end[k], 0.5) if v.is_floating_point() else v for k, v in start.items()}
    for name, state in (("step_0", start), ("step_9", half), ("step_10", end)):
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / f"{name}.pt")
    np.savez(tmp_path / "images.npz", x=data.x, y=data.y, classes=np.array(data.classes))
    model, start, end, data = problem("mlp")
    save_file(start, tmp_path / "a.safetensors")
    save_file(end, tmp_path / "b.safetensors")
    np.savez(tmp_path / "table.npz", x=data.x.float(), y=data.y)
    model = space["tokens"]()
    torch.save(model.state_dict(), tmp_path / "words_0.pt")
    torch.save(moved(model), tmp_path / "words_1.pt")
    np.savez(tmp_path / "text.npz", tokens=np.arange(60).reshape(12, 5) % 9, mask=np.ones((12, 5)), y=np.arange(12) % 2)
    return tmp_path


def inspect(*arguments: str) -> Any:
    with explained_in_rounds(1):
        return runner.invoke(cli.app, ["inspect", "--quick", *arguments])


def test_a_trajectory_of_checkpoints_gives_a_page_with_images(files: Path) -> None:
    given = ["--model", "networks_of_test.py:conv", "--checkpoints", "step_*.pt", "--data", "images.npz"]
    with plain_figures("inspect", but="images"):
        done = inspect(*given, "--out", "run")
    assert done.exit_code == 0, done.output
    assert "• The kernel’s trace is " in done.output
    assert f"More on the page: {(files / 'run' / 'report.html').resolve()}" in done.output
    results = json.loads((files / "run" / "results.json").read_text())
    assert [point["name"] for point in results["trajectory"]] == ["step_0", "step_9", "step_10"]
    assert results["command"].startswith("adaptive-tangents")
    assert (files / "run" / "figures" / "images.png").stat().st_size > 1000
    with plain_figures("inspect"):
        again = runner.invoke(cli.app, ["report", "run"])
    assert again.exit_code == 0
    assert "• The kernel’s trace is " in again.output


# The command with empty figures, which are quick to draw.
PROCESS = """
import dataclasses, sys
from matplotlib.figure import Figure
from adaptive_tangents.cli import app
from adaptive_tangents.commands.report import PAGES
page = PAGES["inspect"]()
PAGES["inspect"] = lambda: dataclasses.replace(page, figures=dict.fromkeys(page.figures, lambda *_: Figure()))
app(sys.argv[1:])
"""


def test_the_command_runs_as_a_process_on_a_table(files: Path) -> None:
    command = [sys.executable, "-c", PROCESS, "inspect", "--quick", "--model", "networks_of_test:mlp", "--wrt", "0.*"]
    command += [
        "--wrt",
        "2.*",
        "--start",
        "a.safetensors",
        "--end",
        "b.safetensors",
        "--data",
        "table.npz",
        "--out",
        "run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=files)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem for path in (files / "run" / "figures").iterdir()}
    assert drawn == set(inspection_report.PAGE.figures) - {"images", "trajectory"}
    assert "mse" in (files / "run" / "results.json").read_text()


def test_tokens_by_argument_name_and_logits_in_a_dict(files: Path) -> None:
    arguments = ["--model", "networks_of_test.py:tokens", "--start", "words_0.pt", "--end", "words_1.pt"]
    with plain_figures("inspect"):
        done = inspect(*arguments, "--data", "text.npz", "--out", "run", "--outputs", "margin")
    assert done.exit_code == 0, done.output
    assert list(json.loads((files / "run" / "results.json").read_text())["blocks"]) == ["embed", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "a.safetensors"], "give either --start and --end, or --checkpoints 'run/*.pt'"),
        (
            ["--start", "a.safetensors", "--end", "b.safetensors", "--checkpoints", "*.pt"],
            "give either --start and --end, or",
        ),
        (["--start", "a.safetensors", "--end", "step_0.pt"], "does not fit the model: missing 2.weight"),
        (["--checkpoints", "none_*.pt"], "matches 0 files"),
        (
            ["--start", "a.safetensors", "--end", "b.safetensors", "--device", "tpu9"],
            "device 'tpu9' cannot be used here",
        ),
        (["--start", "a.safetensors", "--end", "b.safetensors", "--samples", "2"], "--samples must be at least 4"),
        (["--start", "a.safetensors", "--end", "b.safetensors", "--wrt", "9*"], "wrt '9*' matches no parameter"),
        (
            ["--start", "a.safetensors", "--end", "./a.safetensors"],
            "--start and --end are the same file, a.safetensors",
        ),
        (
            ["--start", "a.safetensors", "--end", "b.safetensors", "--out", "table.npz"],
            "--out must be a folder, but table.npz",
        ),
        (
            ["--start", "a.safetensors", "--end", "b.safetensors", "--out", "table.npz/deeper"],
            "but table.npz is a file",
        ),
        (
            ["--start", "a.safetensors", "--end", "b.safetensors", "--data", "wide.npz"],
            "the network cannot take the samples of wide.npz, each (9,) float64 (RuntimeError: mat1 and mat2 shapes cannot",
        ),
    ],
)
def test_refusals_are_one_line_of_words_and_write_nothing(files: Path, arguments: list[str], message: str) -> None:
    np.savez(files / "wide.npz", x=np.zeros((12, 9)))
    done = inspect("--model", "networks_of_test.py:mlp", "--data", "table.npz", "--out", "run", *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (files / "run").exists()


def test_interruption_says_that_nothing_was_written(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_command, "run_inspection", interrupt)
    arguments = ["--model", "networks_of_test.py:mlp", "--start", "a.safetensors", "--end", "b.safetensors"]
    done = inspect(*arguments, "--data", "table.npz", "--out", "run")
    assert done.exit_code == 130
    assert "interrupted; nothing was written" in done.output

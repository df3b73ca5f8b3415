"""`at.compare`: numbers against public functions, symmetry, what cannot be compared, and the command end to end."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.inspection import Comparison, Inspection, comparison_told, measures
from adaptive_tangents.inspection.places import by_layer, by_place, place_of
from adaptive_tangents.loading import Data
from study_cases import explained_in_rounds, of_few_pixels, plain_figures

pytestmark = pytest.mark.xdist_group("comparison")

runner = CliRunner()


class Adapted(nn.Module):
    """A layer with a low-rank adapter, with names as PEFT gives them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        raised: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return raised


def network(*, adapted: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
        for k in (0, 2) if adapted else ():
            made[k] = Adapted(made[k])  # type: ignore[arg-type]
    return made


def trained(model: nn.Module, seed: int, step: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: value + step * torch.randn(value.shape, generator=generator) if name in trains else value.clone()
        for name, value in model.state_dict().items()
    }


def start(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


X = torch.randn(14, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(14) % 3


def inspected(model: nn.Module, seed: int, x: Tensor = X, **options: Any) -> Inspection:
    # Labels that the network gives at the end, so that it got better.
    end = trained(model, seed)
    y = torch.func.functional_call(model, end, x).argmax(1)
    return at.inspect(model, start(model), end, (x, y), **{"outputs": "all", "nodes": 2, **options})


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, explained_in_rounds(1), of_few_pixels(), plain_figures("compare"):
        patch.setattr(measures, "fit_operations", lambda *_: 1e30)  # no exact models, which a comparison does not show
        yield


@pytest.fixture(scope="module")
def full(light: None) -> Inspection:
    return inspected(network(), 1)


@pytest.fixture(scope="module")
def other(light: None) -> Inspection:
    return inspected(network(), 2)


@pytest.fixture(scope="module")
def lora(light: None) -> Inspection:
    return inspected(network(adapted=True), 3)


@pytest.fixture(scope="module")
def seeds(full: Inspection, other: Inspection) -> Comparison:
    return at.compare(full, other)


def test_kernels_and_functions_are_compared_as_public_functions_do(seeds: Comparison) -> None:
    model = network()
    ends = [trained(model, seed) for seed in (1, 2)]
    K = [at.tangent_kernel(model, X, params=end, outputs="trace") for end in ends]
    before = at.tangent_kernel(model, X, params=start(model), outputs="trace")
    found = seeds.results["kernels"]
    assert found["end"]["cka"] == pytest.approx(at.cka(*K), abs=1e-5)
    assert found["change"]["cka"] == pytest.approx(at.cka(K[0] - before, K[1] - before), abs=1e-4)
    assert found["end"]["cosine"] == pytest.approx(float((K[0] * K[1]).sum() / (K[0].norm() * K[1].norm())), abs=1e-5)
    assert found["start"]["cka"] == pytest.approx(1)
    outputs = [torch.func.functional_call(model, end, X).detach() for end in ends]
    a, b = (out - model(X).detach() for out in outputs)
    functions = seeds.results["functions"]
    assert functions["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-5)
    size = ((a.square().sum() + b.square().sum()) / 2).sqrt()
    assert functions["distance"] == pytest.approx(float((outputs[0] - outputs[1]).norm() / size), abs=1e-5)
    assert functions["start_distance"] == 0
    same = float((outputs[0].argmax(1) == outputs[1].argmax(1)).double().mean())
    assert functions["same_prediction"] == pytest.approx(same)
    numbers = {row["number"]: (row["a"], row["b"]) for row in seeds.results["numbers"]}
    for k, gained in enumerate((a, b)):
        assert numbers["function_moved"][k] == pytest.approx(float(gained.norm()) / 14**0.5, rel=1e-5)
        assert numbers["kernel_change"][k] == pytest.approx(float((K[k] - before).norm() / before.norm()), rel=1e-4)
        assert numbers["kernel_moved"][k] == pytest.approx(float((K[k] - before).norm() / 14), rel=1e-4)


def test_an_inspection_is_the_same_as_itself(full: Inspection) -> None:
    found = at.compare(full, full, names=("one", "again"))
    assert all(value == pytest.approx(1) for pair in found.results["kernels"].values() for value in pair.values())
    functions = found.results["functions"]
    assert (functions["distance"], functions["same_prediction"]) == (0, 1)
    assert functions["cosine"] == pytest.approx(1)
    assert found.results["where"]["correlation"] == pytest.approx(1)
    assert set(found.table().column("difference")) <= {0.0, None}
    assert found.findings[0] == (
        "again changed the kernel as much as one, in the same layers (correlation 1.00 over 3); both changed the function in "
        "nearly the same direction (cosine 1.00)."
    )


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    turned = {"_a": "_b", "_b": "_a"}
    plain = {"a": "b", "b": "a"}
    return {plain.get(key, key[:-2] + turned[key[-2:]] if key[-2:] in turned else key): row[key] for key in row}


@pytest.mark.parametrize("pair", [("full", "other"), ("full", "lora")])
def test_the_order_of_the_two_does_not_matter(pair: tuple[str, str], request: pytest.FixtureRequest) -> None:
    one, two = (request.getfixturevalue(name) for name in pair)
    ahead, back = at.compare(one, two), at.compare(two, one, names=("B", "A"))
    assert ahead.results["kernels"] == {
        stage: {key: pytest.approx(value) for key, value in found.items()}
        for stage, found in back.results["kernels"].items()
    }
    assert ahead.results["functions"] == {key: pytest.approx(v) for key, v in back.results["functions"].items()}
    there, here = (found.results["where"] for found in (ahead, back))
    assert there | {"correlation": None} == here | {"correlation": None}
    assert there["correlation"] == pytest.approx(here["correlation"])
    for table in ("numbers", "places", "layers"):
        key = {"numbers": "number", "places": "place", "layers": "layer"}[table]
        rows = {row[key]: row for row in ahead.results[table]}
        assert {row[key]: swapped(row) for row in back.results[table]} == rows
    differences = dict(zip(back.table().names, back.table().column("difference"), strict=True))
    for name, difference in zip(ahead.table().names, ahead.table().column("difference"), strict=True):
        assert differences[name] == (None if difference is None else -difference)


def test_what_was_measured_on_other_samples_is_compared_by_numbers_alone(full: Inspection) -> None:
    found = at.compare(full, inspected(network(), 1, X.flip(0)))
    assert found.results["kernels"] is found.results["functions"] is None
    assert any("were measured on other samples" in sentence and "same seed" in sentence for sentence in found.findings)
    assert not any("CKA of one with the other" in sentence or "cosine" in sentence for sentence in found.findings)
    growth = found.table()["trace of K_T over that of K₀"]
    assert growth["A"] == pytest.approx(growth["B"], rel=1e-4)
    with pytest.raises(
        at.TangentError, match="no figure 'functions' of these results; the figures are kernels, layers"
    ):
        found.plot("functions")
    assert "on other samples" in repr(found)


def test_other_labels_of_the_same_samples_are_said(full: Inspection) -> None:
    y = full.arrays["y"].copy()
    y[:4] = (y[:4] + 1) % 3
    other, column = (Inspection(full.results, {**full.arrays, "y": each}) for each in (y, y[:, None] / 2))
    without = Inspection(full.results, {name: value for name, value in full.arrays.items() if name != "y"})
    for pair, words in (((full, other), "for 4 of 14 samples"), ((column, full), "in kind")):
        found = at.compare(*pair)
        assert found.results["same_samples"]
        assert any(f"The labels of the two differ {words}, so" in sentence for sentence in found.findings)
    for pair in ((full, full), (full, without), (without, full)):
        assert not any("labels of the two" in sentence for sentence in at.compare(*pair).findings)


def test_an_inspection_of_an_earlier_version_has_no_mark_of_its_samples(full: Inspection) -> None:
    data = {key: value for key, value in full.results["data"].items() if key != "fingerprint"}
    blocks = {
        name: {key: value for key, value in block.items() if key != "change_share"}
        for name, block in full.results["blocks"].items()
    }
    results = {key: value for key, value in full.results.items() if key != "layers"}
    old = Inspection({**results, "data": data, "blocks": blocks}, full.arrays)
    found = at.compare(old, full)
    assert any("An earlier version made one of the two" in sentence for sentence in found.findings)
    assert found.blocks["0"]["change_share_a"] is None
    assert found.results["where"]["correlation"] is None


def test_samples_held_out_are_compared_apart(full: Inspection, other: Inspection) -> None:
    pair = []
    for each, accuracy in ((full, 0.5), (other, 0.75)):
        side = {"performance": {"start": {"accuracy": 0.25}, "end": {"accuracy": accuracy}}, "growth": {"final": 2.0},
                "alignment_centered": {"change": {"initial": 0.1, "final": 0.4}}}  # fmt: skip
        pair.append(Inspection({**each.results, "held_out": {"trained": side, "held_out": side}}, each.arrays))
    found = at.compare(*pair)
    table = found.table()
    assert table["accuracy at the end, on samples held out"]["difference"] == 0.25
    assert table["centered sim of K_T with the network’s change, on samples held out"]["A"] == 0.4
    assert any(
        "Accuracy at the end: A 1.00, B 1.00; accuracy at the end, on samples held out: A 0.500, B 0.750" in s
        for s in found.findings
    )


def test_an_adapter_stands_at_the_layer_that_it_adapts(full: Inspection, lora: Inspection) -> None:
    found = at.compare(full, lora, names=("full", "LoRA"))
    assert found.blocks.names == ["0", "2", "4"]
    assert found.blocks.column("blocks_a") == [1, 1, 1]
    assert found.blocks.column("blocks_b") == [2, 2, 1]
    for side in "ab":
        assert sum(found.blocks.column(f"change_share_{side}")) == pytest.approx(1, abs=1e-9)
        assert sum(found.blocks.column(f"trace_share_{side}")) == pytest.approx(1, abs=1e-9)
    assert found.blocks["0"]["alignment_b"] is None
    assert found.blocks["4"]["alignment_b"] == lora.blocks["4"]["alignment_end"]
    whole = lora.results["growth"]["final"]
    model, ends = network(adapted=True), trained(network(adapted=True), 3)
    parts = [at.tangent_kernel(model, X, params=p, outputs="trace", by_block=True) for p in (start(model), ends)]
    names = [name for name in parts[0] if name.startswith("0.")]
    trace = [sum(float(part[name].trace()) for name in names) for part in parts]
    assert found.blocks["0"]["growth_b"] == pytest.approx(trace[1] / trace[0], rel=1e-4)
    assert whole > 0
    norm = sum(
        (ends[f"0.lora_{k}.default.weight"] - start(model)[f"0.lora_{k}.default.weight"]).square().sum() for k in "AB"
    )
    assert found.blocks["0"]["change_norm_b"] == pytest.approx(float(norm.sqrt()), rel=1e-5)


@given(st.lists(st.sampled_from(["encoder", "layer", "0", "11", "query", "key", "attention"]), min_size=1, max_size=5))
def test_names_of_adapters_lead_to_the_layer(parts: list[str]) -> None:
    name = ".".join(parts)
    for before in ("", "base_model.model.", "module.", "_orig_mod."):
        for after in ("", ".base_layer", ".lora_A.default", ".lora_B.default", ".lora_A", ".lora_embedding_B.mine"):
            assert place_of(before + name + after) == name
        assert place_of(f"{before}{name}.modules_to_save.default.dense") == f"{name}.dense"
    assert by_place([f"{name}.lora_A", f"{name}.lora_B", "head"]) == {
        name: [f"{name}.lora_A", f"{name}.lora_B"], "head": ["head"],
    }  # fmt: skip
    assert [place for layer in by_layer([name, "head"]).values() for place in layer] == [name, "head"]


def test_kernels_along_different_directions_of_outputs_are_told_apart(full: Inspection) -> None:
    one, two = (inspected(network(), seed, outputs="main") for seed in (1, 2))
    found = at.compare(one, two)
    a, b = (np.array([*each.results["outputs"]["weights"].values()]) for each in (one, two))
    cosine = abs(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    assert found.results["outputs"] == {"same": False, "direction": pytest.approx(cosine)}
    assert "are of different directions in output space" in found.findings[-1]
    weights = {name: -value for name, value in one.results["outputs"]["weights"].items()}
    turned = Inspection({**one.results, "outputs": one.results["outputs"] | {"weights": weights}}, one.arrays)
    assert at.compare(one, turned).results["outputs"]["same"], "a direction has no sign"
    assert at.compare(one, full).findings[-1].startswith("The kernels are of other outputs in the two")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.0, "as much"),
        (0.33, "a third as much"),
        (0.5, "half as much"),
        (2.05, "twice as much"),
        (0.7, "0.700 times as much"),
    ],
)
def test_a_ratio_is_told_in_words(ratio: float, words: str) -> None:
    assert comparison_told.times(ratio) == words


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([0.3, 0.1], "Both kernels turned, that of A further, toward"),
        ([0.1, 0.3], "Both kernels turned, that of B further, toward"),
        ([0.2, 0.21], "Both kernels turned, alike, toward"),
        ([0.2, -0.3], "Only the kernel of A turned toward"),
        ([0.0, 0.0], "Neither kernel turned toward"),
    ],
)
def test_turns_are_told_in_words(turns: list[float], words: str) -> None:
    assert comparison_told._turned(turns, ["A", "B"]) == words


def test_it_shows_itself_in_three_lines_in_notebooks_and_as_a_frame(seeds: Comparison) -> None:
    assert len(repr(seeds).splitlines()) == 3
    assert repr(seeds).startswith("Comparison of A and B: Sequential, on the same samples\n  B changed the kernel ")
    html = seeds._repr_html_()
    assert "data:image/png;base64," in html
    assert "<td>‖K_T − K₀‖/n, n samples</td>" in html
    assert len(seeds.plot().axes) == 6
    assert len(seeds.plot("blocks").axes) == 2
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert isinstance(seeds.to_frame(), pandas.DataFrame)
    assert list(seeds.to_frame().columns) == ["number", "A", "B", "difference"]
    assert seeds.layers.names == [row["layer"] for row in seeds.results["layers"]]


def test_without_what_draws_pages_numbers_are_compared(seeds: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("comparison_told", "comparison_page"):
        monkeypatch.delattr(sys.modules["adaptive_tangents.inspection"], name, raising=False)
        monkeypatch.setitem(sys.modules, f"adaptive_tangents.inspection.{name}", None)
    for call in (lambda: seeds.findings, seeds.plot):
        with pytest.raises(at.TangentError, match=r"is not installed; pip install 'adaptive-tangents\[report\]'"):
            call()
    assert "pip install" in repr(seeds)
    assert seeds.table()["parameters measured"]["difference"] == 0


@pytest.mark.parametrize("names", [("one",), ("same", "same"), ("", "b"), ("number", "b"), ("a", "b", "c")])
def test_names_that_cannot_head_a_table_are_refused(names: tuple[str, ...], full: Inspection) -> None:
    with pytest.raises(
        at.TangentError, match="compare: names are two different words, other than number and difference"
    ):
        at.compare(full, full, names=names)


def test_the_guide_to_inspections_in_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    with torch.random.fork_rng(devices=[]):
        exec(
            compile("\n".join(blocks).replace("range(300)", "range(60)"), "docs/inspect.md", "exec"),
            {"__name__": "docs"},
        )
    printed = capsys.readouterr().out
    assert printed.startswith("Inspection of Sequential, start → end: 3 blocks on 64 samples\n")
    assert "slow changed the kernel" in printed


# the command


@pytest.fixture
def folders(full: Inspection, lora: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    full.write(tmp_path / "full")
    lora.write(tmp_path / "lora")
    return tmp_path


def test_the_command_prints_the_findings_and_report_redraws_the_page(
    folders: Path, full: Inspection, lora: Inspection
) -> None:
    done = runner.invoke(cli.app, ["compare", "full", "lora", "--out", "both"])
    assert done.exit_code == 0, done.output
    found = at.compare(full, lora, names=("full", "lora"))
    assert " ".join(done.output.split()).startswith(found.findings[0])
    page = folders / "both" / "report.html"
    html = page.read_text()
    for part in ("full and lora side by side", "<pre>adaptive-tangents", "figure-kernels", "figure-functions"):
        assert part in html
    assert {path.name for path in (folders / "both" / "figures").iterdir()} == {
        f"{name}.{end}" for name in ("kernels", "layers", "blocks", "functions") for end in ("png", "svg")
    }
    again = runner.invoke(cli.app, ["report", "both"])
    assert again.exit_code == 0, again.output
    assert page.read_text() == html
    assert found.save(folders / "mine").read_text().count("<figure") == html.count("<figure")


def test_the_command_refuses_what_is_no_inspection_and_writes_nothing(folders: Path) -> None:
    (folders / "study").mkdir()
    (folders / "study" / "results.json").write_text('{"experiment": "penalties"}')
    np.savez(folders / "study" / "arrays.npz", x=np.ones(1))
    (folders / "taken").mkdir()
    (folders / "taken" / "report.html").write_text("<p>mine</p>")
    cases = {
        ("full", "none"): "compare: no folder none",
        ("full", "study"): "results of 'penalties', not an inspection; give a folder that adaptive-tangents inspect",
        ("full", "lora", "--out", "full"): "--out full is one of the inspections; give another folder",
        ("full", "lora", "--names", "one"): "--names is two words with a comma between, e.g. full,LoRA, got 'one'",
        ("full", "lora", "--out", "taken"): "report.html was not written by adaptive-tangents",
    }
    for arguments, message in cases.items():
        done = runner.invoke(cli.app, ["compare", *arguments])
        assert done.exit_code == 1
        assert message in done.stderr
    assert not (folders / "runs").exists()
    assert (folders / "taken" / "report.html").read_text() == "<p>mine</p>"
    named = runner.invoke(cli.app, ["compare", "full", "full", "--out", "both", "--names", "one, two"])
    assert named.exit_code == 0, named.output
    assert named.stdout.startswith("two changed the kernel as much as one")


NAMES = ("cat", "dog", "owl")


def of_classes(seed: int, order: list[int] | None = None, names: tuple[str, ...] = NAMES, **options: Any) -> Inspection:
    """An inspection whose head has its classes in this order, rows and names together; the network is the same."""
    model, order = network(), [0, 1, 2] if order is None else order
    end = trained(model, seed)
    y = torch.func.functional_call(model, end, X).argmax(1)
    turned = [
        {name: value[order] if name.startswith("4.") else value for name, value in state.items()}
        for state in (start(model), end)
    ]
    data = Data(X, torch.tensor(order).argsort()[y], tuple(names[k] for k in order))
    return at.inspect(model, *turned, data, nodes=2, **{"outputs": "all", **options})


@pytest.mark.parametrize("outputs", ["all", "main"])
def test_classes_are_known_by_name_whatever_their_order(outputs: str) -> None:
    orders = ((1, None), (1, [2, 0, 1]), (2, [1, 2, 0]))
    one, same, other = (of_classes(seed, order, outputs=outputs) for seed, order in orders)
    found = at.compare(one, same)
    functions = found.results["functions"]
    assert (functions["cosine"], functions["cosine_centered"]) == (pytest.approx(1), pytest.approx(1))
    assert functions["distance"] == pytest.approx(0, abs=1e-5)
    assert functions["same_prediction"] == 1
    assert found.results["outputs"]["same"]
    assert found.arrays["b.gained"] == pytest.approx(found.arrays["a.gained"], abs=1e-5)
    assert not any("labels of the two" in sentence for sentence in found.findings)
    plain, turned = at.compare(one, of_classes(2, outputs=outputs)).results, at.compare(one, other).results
    assert turned["functions"] == {name: pytest.approx(value, abs=1e-5) for name, value in plain["functions"].items()}
    assert turned["outputs"] == {name: pytest.approx(value, abs=1e-4) for name, value in plain["outputs"].items()}
    assert turned["functions"]["same_prediction"] < 1
    capitals = of_classes(1, [2, 0, 1], ("Cat", " DOG", "owl"), outputs=outputs)
    assert at.compare(one, capitals).results["functions"]["same_prediction"] == 1


def test_one_logit_of_two_classes_in_the_other_order_is_the_same_function() -> None:
    made = []
    for sign, names in ((1.0, ("no", "yes")), (-1.0, ("yes", "no"))):
        model = nn.Linear(3, 1)
        ends = [
            {"weight": sign * torch.tensor([[1.0, 2.0, 0.5]]) * k, "bias": sign * torch.ones(1)} for k in (0.1, 1.0)
        ]
        y = (torch.func.functional_call(model, ends[1], X)[:, 0] > 0).long()
        made.append(at.inspect(model, *ends, Data(X, y, names), nodes=1))
    found = at.compare(*made)
    assert found.results["functions"]["cosine"] == pytest.approx(1)
    assert (found.results["functions"]["distance"], found.results["functions"]["same_prediction"]) == (0, 1)
    assert not any("labels of the two" in sentence for sentence in found.findings)


@pytest.mark.parametrize("names", [("cat", "dog", "emu"), ("cat", "cat", "owl")])
def test_classes_with_other_names_are_not_compared_by_their_places(names: tuple[str, ...]) -> None:
    one, other = of_classes(1), of_classes(1, names=names)
    for pair in ((one, other), (other, one)):
        found = at.compare(*pair)
        assert found.results["functions"] is None
        assert found.results["kernels"]["end"]["cka"] == pytest.approx(1)
        assert any("The classes of the two have other names" in sentence for sentence in found.findings)
        assert not any("same prediction" in sentence or "labels of the two" in sentence for sentence in found.findings)
    again = at.compare(other, of_classes(1, names=names))
    assert again.results["functions"]["same_prediction"] == 1, "equal names in one order are the same classes"

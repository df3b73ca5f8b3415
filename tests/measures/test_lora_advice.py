"""Advice on adapters of low rank: ranks against plain SVDs, budgets against all allocations, and PEFT's own reading of it."""

import itertools
import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaptive_tangents import average_features, forecast, tangent_features
from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection import InspectConfig, run
from adaptive_tangents.loading import Data
from adaptive_tangents.measures import LoraAdvice, lora_advice
from adaptive_tangents.structures import Fixed

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(o: int, i: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    u, v = (torch.linalg.qr(normal(size, len(values), seed=seed + k)).Q for k, size in enumerate((o, i)))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


class Block(nn.Module):
    """A residual block with names as a transformer has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.up, self.norm = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.LayerNorm(width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + torch.tanh(self.query(x)))
        return x + self.down(torch.tanh(self.up(h)))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Tokens through two blocks to a head."""

    def __init__(self, width: int = 12, outputs: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.layer = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layer:
            x = block(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def net() -> tuple[Net, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A network, token ids, and states before and after a change of all its parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double().eval()
    ids = torch.randint(0, 9, (10, 4), generator=torch.Generator().manual_seed(1))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.2 * normal(*value.shape, seed=k) for k, (name, value) in enumerate(start.items())}
    return model, ids, start, end


def least_rank(matrix: Tensor, share: float) -> int:
    """The least rank whose best approximation leaves at most 1 − share of the squares."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    for r in range(len(s) + 1):
        missed = matrix.double() - u[:, :r] @ torch.diag(s[:r]) @ v[:r]
        if float((missed**2).sum()) <= (1 - share) * float((matrix**2).sum()) + 1e-12:
            return r
    raise AssertionError


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_rank_is_the_least_whose_best_approximation_leaves_no_more_than_the_rest(share: float) -> None:
    changes = {
        f"layer.{k}.dense": normal(20, 30, seed=k) @ torch.diag(0.7 ** torch.arange(30.0)).double() for k in range(3)
    }
    advice = lora_advice(changes, share=share)
    for layer in advice.layers:
        assert layer.rank == least_rank(changes[layer.module], share)
        assert layer.share >= share - 1e-9
        assert layer.parameters == layer.rank * 50
    assert advice.parameters == sum(layer.parameters for layer in advice.layers)


def test_shares_at_the_edge_take_no_more_ranks_than_they_need() -> None:
    change = {"a": of_rank(8, 9, [2.0, 1.0, 1.0, 1.0])}
    assert lora_advice(change, share=4 / 7).rank_pattern == {"a": 1}
    assert lora_advice(change, share=5 / 7).rank_pattern == {"a": 2}
    assert lora_advice(change, share=1.0).rank_pattern == {"a": 4}  # 4·17 parameters are fewer than the layer's 72
    assert lora_advice({"a": of_rank(8, 8, [2.0, 1.0, 1.0, 1.0])}, share=1.0).whole == ("a",)  # 4·16 are as many


def test_a_budget_is_spread_as_the_best_of_all_allocations_of_equal_layers() -> None:
    changes = {name: of_rank(8, 8, values, seed=3 * k) for k, (name, values) in enumerate(
        {"a": [5.0, 1.0, 0.5], "b": [2.0, 1.9, 1.8], "c": [0.1, 0.1]}.items())}  # fmt: skip
    advice = lora_advice(changes, uniform_rank=1)
    energies = {name: torch.linalg.svdvals(matrix) ** 2 for name, matrix in changes.items()}
    best = max(
        sum(float(energies[name][:r].sum()) for name, r in zip(changes, ranks, strict=True))
        for ranks in itertools.product(range(4), repeat=3)
        if sum(ranks) <= 3
    )
    held = sum(float(energies[layer.module][: layer.rank].sum()) for layer in advice.layers)
    assert held == pytest.approx(best, rel=1e-9)
    assert advice.rank_pattern == {"a": 1, "b": 2}
    assert advice.parameters == 3 * 16


def test_a_direction_is_worth_its_gain_per_parameter() -> None:
    changes = {"narrow": of_rank(10, 10, [1.0, 0.95, 0.9, 0.85, 0.8]), "wide": of_rank(10, 90, [1.2], seed=5)}
    assert lora_advice(changes, uniform_rank=1).rank_pattern == {"narrow": 4}
    changes["wide"] = of_rank(10, 90, [3.0], seed=5)
    assert lora_advice(changes, uniform_rank=1).rank_pattern == {"narrow": 1, "wide": 1}


@pytest.mark.parametrize("uniform", [1, 2, 3])
def test_a_budget_is_never_exceeded_and_left_by_less_than_the_largest_layer_costs(uniform: int) -> None:
    shapes = [(10, 12), (40, 12), (12, 40), (30, 30)]
    changes = {f"l{k}": normal(*shape, seed=k) for k, shape in enumerate(shapes)}
    advice = lora_advice(changes, uniform_rank=uniform)
    budget = uniform * sum(o + i for o, i in shapes)
    assert budget - 60 < advice.parameters <= budget
    assert not advice.whole


def test_states_give_what_their_difference_gives_and_leave_out_what_adapters_cannot_change() -> None:
    model, _, start, end = net()
    advice = lora_advice((start, end), whole="head")
    names = [f"layer.{k}.{part}" for k in range(2) for part in ("query", "up", "down")]
    changes = {name: end[f"{name}.weight"] - start[f"{name}.weight"] for name in names}
    assert [layer.module for layer in advice.layers if not layer.rank] == []
    assert {layer.module: layer.rank for layer in advice.layers} == {
        layer.module: layer.rank for layer in lora_advice(changes).layers
    }
    assert advice.whole[-1] == "head"
    assert advice.left_out == {
        "embed": "an embedding, by its name", "layer.0.norm": "no matrix", "layer.1.norm": "no matrix",
    }  # fmt: skip
    assert lora_advice((start, end), whole="head", model=model).left_out["embed"] == "an embedding"


def test_a_table_that_is_also_the_head_is_left_out_twice() -> None:
    table = normal(9, 6)
    start = {"wte.weight": table, "fc.weight": normal(8, 8), "lm_head.weight": table}
    moved = table + 1
    end = {"wte.weight": moved, "fc.weight": normal(8, 8, seed=1), "lm_head.weight": moved}
    assert lora_advice((start, end), share=0.1).left_out == {
        "wte": "an embedding, by its name",
        "lm_head": "tied to wte",
    }


class TiedHead(nn.Module):
    """A table that is also the head, registered before the head or after it."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        modules = {"embed": nn.Embedding(30, 16), "layer": nn.Linear(16, 16), "head": nn.Linear(16, 30, bias=False)}
        for name in sorted(modules, reverse=head_first):
            self.add_module(name, modules[name])
        modules["head"].weight = modules["embed"].weight


@pytest.mark.parametrize("states", ["live", "end copied", "both copied", "head saved once", "table saved once"])
@pytest.mark.parametrize("known", ["with the model", "by names"])
@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_is_left_out_in_any_order_and_after_any_copy(head_first: bool, known: str, states: str) -> None:
    model = TiedHead(head_first)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    if states != "both copied":
        start["head.weight"] = start["embed.weight"]
    with torch.no_grad():
        model.get_parameter("embed.weight").add_(of_rank(30, 16, [2.0, 1.0]))
        model.get_parameter("layer.weight").add_(of_rank(16, 16, [1.0]))
    end = (
        model.state_dict() if states == "live" else {name: value.clone() for name, value in model.state_dict().items()}
    )
    if states.endswith("once"):
        del end["head.weight" if states == "table saved once" else "embed.weight"]
    advice = lora_advice((start, end), model=model if known == "with the model" else None)
    assert advice.rank_pattern == {"layer": 1}
    assert not advice.whole
    assert advice.left_out["head"] == "tied to embed"


def test_a_tied_head_is_left_out_of_matrices_and_inspections_with_the_model() -> None:
    changes = {"head": of_rank(30, 16, [1.0]), "layer": of_rank(16, 16, [1.0])}
    results = {"blocks": {name: {"shape": list(change.shape)} for name, change in changes.items()}}
    arrays = {
        f"singular_values.change.{name}": torch.linalg.svdvals(change).numpy() for name, change in changes.items()
    }
    for source in (changes, Held(results, arrays)):
        advice = lora_advice(source, model=TiedHead(head_first=True))
        assert advice.rank_pattern == {"layer": 1}
        assert advice.left_out == {"head": "tied to embed"}


def test_layers_of_equal_values_that_did_not_change_are_not_called_tied() -> None:
    start = {"embed.weight": torch.zeros(9, 6), "head.weight": torch.zeros(9, 6), "layer.weight": torch.eye(6)}
    end = {name: value.clone() for name, value in start.items()} | {"layer.weight": torch.ones(6, 6)}
    assert lora_advice((start, end)).left_out == {"embed": "an embedding, by its name"}


def test_weights_of_one_state_alone_are_listed_as_left_out() -> None:
    start = {"a.weight": torch.eye(6), "old.weight": torch.eye(6)}
    end = {"a.weight": torch.ones(6, 6), "new.weight": torch.eye(6)}
    assert lora_advice((start, end)).left_out == {
        "old": "in the state at the start alone", "new": "in the state at the end alone",
    }  # fmt: skip


def test_a_kernel_of_a_convolution_is_a_matrix_of_its_filters() -> None:
    start = {"conv.weight": torch.zeros(8, 4, 3, 3, dtype=torch.float64)}
    end = {"conv.weight": of_rank(8, 36, [3.0, 2.0, 0.1]).reshape(8, 4, 3, 3)}
    (layer,) = lora_advice((start, end)).layers
    assert (layer.shape, layer.rank, layer.parameters) == ((8, 36), 2, 88)


def test_layers_whose_adapters_would_be_no_smaller_are_trained_whole() -> None:
    advice = lora_advice({"classifier": normal(2, 50), "encoder.q": of_rank(30, 30, [1.0])})
    assert advice.whole == ("classifier",)
    assert advice.config["modules_to_save"] == ["classifier"]
    assert lora_advice({"classifier": normal(1, 50), "q": normal(30, 30)}, uniform_rank=2).whole == ("classifier",)


def features_and_end() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    model, ids, start, end = net()
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith("layer") and name.endswith("weight") and "norm" not in name)
    end = {name: end[name] if value.requires_grad else start[name] for name, value in model.named_parameters()}
    return average_features(model, start, end, ids, nodes=3), start, end


def test_gains_by_outputs_add_up_to_what_each_layer_does_to_them() -> None:
    feats, start, end = features_and_end()
    advice = lora_advice((start, end), features=feats, share=0.3)
    own = {}
    blocks = {slot.parameter: block for block in feats.blocks.values() for slot in block.slots}
    for layer in advice.layers:
        if layer.module == "head":  # it did not change, and has no features
            own["head"] = 0.0
            continue
        phi = blocks[f"{layer.module}.weight"].features()
        change = end[f"{layer.module}.weight"] - start[f"{layer.module}.weight"]
        own[layer.module] = float((torch.einsum("ncoi,oi->nc", phi[..., : change.shape[1]], change) ** 2).sum())
    for layer in advice.layers:
        assert layer.change == pytest.approx(own[layer.module] / sum(own.values()), rel=1e-8)
    assert advice.weighed
    assert "outputs" in advice.sentence()


def test_directions_that_no_sample_uses_need_no_rank() -> None:
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 3)).double().eval()
    x = normal(30, 12)
    x[:, 6:] = 0
    start = {name: value.clone() for name, value in model.state_dict().items()}
    change = torch.cat([of_rank(10, 6, [1.0]), 5 * normal(10, 6, seed=5)], 1)
    end = start | {"0.weight": start["0.weight"] + change}
    feats = tangent_features(model, x, wrt="0.weight")
    (plain,) = lora_advice((start, end), wrt="0", share=0.8).layers or [None]
    (weighed,) = lora_advice((start, end), wrt="0", features=feats).layers
    assert plain is not None
    assert plain.rank > 1
    assert weighed.rank == 1


def test_moments_from_factors_are_those_of_the_features_themselves() -> None:
    from adaptive_tangents.measures.lora_layers import _moments

    feats, _, _ = features_and_end()
    for block in feats.blocks.values():
        for columns in (slice(0, block.shape[1]), slice(1, 4)):
            phi = block.features()[..., columns]
            left, right = _moments(block, columns)
            torch.testing.assert_close(left, torch.einsum("ncoi,ncpi->op", phi, phi), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(right, torch.einsum("ncoi,ncoj->ij", phi, phi), rtol=1e-9, atol=1e-12)


class Gated(nn.Module):
    """A layer whose outputs are weighted by inputs, so that many samples show its bias alone."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 6, batch_first=True) if recurrent else nn.Linear(8, 18)

    def forward(self, x: Tensor) -> Tensor:
        inside = x[:, :8]
        if isinstance(self.layer, nn.GRU):
            return self.layer(inside.reshape(-1, 2, 4))[0][:, -1] * x[:, 8:14]  # type: ignore[no-any-return]
        return self.layer(inside) * x[:, 8:]  # type: ignore[no-any-return]


@pytest.mark.parametrize("parameter", ["layer.weight", "layer.weight_ih_l0", "layer.weight_hh_l0"])
def test_a_layer_s_other_parameters_do_not_change_the_gains_of_its_weight(parameter: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gated(recurrent="_l0" in parameter).double().eval()
    x = normal(40, 26)
    x[20:, :8], x[:20, 10:] = 0, 0
    feats = tangent_features(model, x, wrt="layer.*")  # first: functional_call leaves a plain tensor in a GRU
    own = model.get_parameter(parameter).detach()
    change = normal(*own.shape, seed=3)

    def outputs(weight: Tensor, sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, {parameter: weight}, (sample[None],))[0]  # type: ignore[no-any-return]

    phi = torch.stack([torch.func.jacrev(outputs)(own, sample) for sample in x]).detach()
    roots = []
    for moment in (torch.einsum("ncoi,ncpi->op", phi, phi), torch.einsum("ncoi,ncoj->ij", phi, phi)):
        values, vectors = torch.linalg.eigh(moment)
        roots.append(vectors * values.clamp_min(0).sqrt())
    wanted = torch.linalg.svdvals(roots[0].T @ change @ roots[1]) ** 2
    wanted *= (torch.einsum("ncoi,oi->nc", phi, change) ** 2).sum() / wanted.sum()
    module = parameter.removesuffix(".weight")
    advice = lora_advice({module: change}, features=feats, share=0.5)
    torch.testing.assert_close(advice.gains.found[module].gains, wanted, rtol=1e-6, atol=1e-8 * float(wanted[0]))


def test_a_forecast_is_advice_before_training() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
    x = normal(30, 6).float()
    told = forecast(model, x, x[:, :1] * x[:, 1:2], structure=Fixed(), steps=1, validation=0.0)
    advice = lora_advice(told)
    assert {layer.module for layer in advice.layers} | set(advice.whole) == {"0", "2", "4"}
    assert advice.layers == lora_advice((told.start, told.params), model=model).layers


def test_an_inspection_gives_the_ranks_of_its_blocks_a_bias_being_a_column() -> None:
    model, ids, start, end = net()
    found = run(model, {"a": start, "b": end}, Data(ids), InspectConfig(nodes=2))
    advice = lora_advice(found, share=0.5)
    for layer in advice.layers:
        change = torch.cat([(end[f"{layer.module}.{part}"] - start[f"{layer.module}.{part}"]).reshape(layer.shape[0], -1)
                            for part in ("weight", "bias") if f"{layer.module}.{part}" in end], 1)  # fmt: skip
        assert layer.rank == least_rank(change, 0.5)
    assert len(advice.layers) + len(advice.whole) == 7
    assert "embed" in advice.left_out


@needs_peft
@pytest.mark.parametrize("budget", [{"share": 0.6}, {"uniform_rank": 2}])
def test_peft_makes_adapters_of_exactly_these_ranks_and_scalings(budget: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model, _, start, end = net()
    advice = lora_advice((start, end), model=model, whole="head", scaling=2.0, **budget)
    made = get_peft_model(model, LoraConfig(**json.loads(advice.to_json())))
    ranks = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): module.weight.shape[0]
             for name, module in made.named_modules() if name.endswith("lora_A.default")}  # fmt: skip
    assert ranks == {layer.module: layer.rank for layer in advice.adapted}
    scalings = {module.scaling["default"] for module in made.modules() if hasattr(module, "scaling")}
    assert scalings == {2.0}
    adapters = sum(p.numel() for name, p in made.named_parameters() if "lora_" in name)
    assert adapters == advice.parameters
    assert made.base_model.model.head.modules_to_save["default"].weight.requires_grad


class Twice(nn.Module):
    """Layers whose names end alike, or differ in one character where another has a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(20, 20), nn.ModuleDict({"fc": nn.Linear(20, 20), "fcX1": nn.Linear(20, 20)})
        self.inner["fc"].add_module("1", nn.Linear(20, 20))


@needs_peft
@pytest.mark.parametrize("wanted", [
    {"fc": 2, "inner.fcX1": 5, "inner.fc.1": 3}, {"inner.fc": 4, "fc": 2, "inner.fcX1": 5}, {"fc": 2, "inner.fc": 4},
])  # fmt: skip
def test_peft_tells_layers_apart_whose_names_end_alike(wanted: dict[str, int]) -> None:
    from peft import LoraConfig, get_peft_model

    changes = {name: of_rank(20, 20, [1.0] * wanted.get(name, 0)) if name in wanted else torch.zeros(20, 20)
               for name in ("fc", "inner.fcX1", "inner.fc.1", "inner.fc")}  # fmt: skip
    made = get_peft_model(Twice(), LoraConfig(**lora_advice(changes).config))
    ranks = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): module.weight.shape[0]
             for name, module in made.named_modules() if name.endswith("lora_A.default")}  # fmt: skip
    assert ranks == wanted


@needs_peft
def test_peft_adapts_convolutions_and_transposed_layers_with_these_ranks() -> None:
    pytest.importorskip("transformers")
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict(
        {"conv": nn.Conv2d(6, 8, 3), "c_attn": Conv1D(36, 12), "grouped": nn.Conv1d(4, 4, 3, groups=2)}
    )
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + normal(*value.shape).float() for name, value in start.items()}
    advice = lora_advice((start, end), share=0.5, model=model)
    made = get_peft_model(model, LoraConfig(**advice.config))  # type: ignore[arg-type]
    adapters = sum(p.numel() for name, p in made.named_parameters() if "lora_" in name)
    assert adapters == advice.parameters > 0
    assert advice.left_out == {"grouped": "a grouped convolution"}


def test_the_advice_is_told_in_words_and_as_a_table() -> None:
    advice = lora_advice(
        {"a.query": of_rank(30, 30, [3.0, 1.0]), "a.key": of_rank(30, 30, [1.0]), "a.value": torch.zeros(30, 30)}
    )
    assert advice.sentence() == (
        "LoRA adapters of rank 1 in 2 layers (120 parameters, 6.7 % of these layers) hold 91 % of the layers' change of "
        "weights."
    )
    assert [line.split()[0] for line in str(advice).splitlines()[1:]] == ["layer", "a.query", "a.key", "a.value"]
    assert "… and 2 more" in advice.table(1)
    assert "left_out" not in repr(advice)


@dataclass
class Held:
    results: Any
    arrays: Any


FLAT = {"a": torch.eye(6)}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no source": ("folder", {}, "source is a pair of state dicts"),
    "a mapping of lists": ({"a": [1.0]}, {}, "real tensors, got 'a': list"),
    "a share of 0": (FLAT, {"share": 0.0}, "share is above 0"),
    "a share that is True": (FLAT, {"share": True}, "share is above 0"),
    "rank 0": (FLAT, {"uniform_rank": 0}, "positive whole number, got 0"),
    "both": (FLAT, {"share": 0.5, "uniform_rank": 1}, "not both"),
    "scaling": (FLAT, {"scaling": math.inf}, "scaling is a positive"),
    "no change": ({"a": torch.zeros(6, 6)}, {}, "no layer changed"),
    "no finite change": ({"a": torch.full((6, 6), torch.nan)}, {}, "change of a is not finite"),
    "wrt": (FLAT, {"wrt": "*query*"}, r"names none of the layers; these are a;"),
    "whole": (FLAT, {"whole": "head"}, "whole = 'head' names none"),
    "vectors alone": ({"norm": torch.ones(6)}, {}, "left out: norm"),
    "other shapes": (({"a.weight": torch.eye(3)}, {"a.weight": torch.eye(4)}), {}, r"\(3, 3\) at the start and \(4, 4\)"),
    "nothing in common": (({"a.weight": torch.eye(3)}, {"b.weight": torch.eye(3)}), {}, "left out: a, b"),
    "features for values alone": (
        Held({"blocks": {"0": {"shape": [6, 6]}}}, {"singular_values.change.0": np.ones(6)}), {"features": True},
        "singular values alone",
    ),
    "features of another layer": ({"b": torch.eye(6)}, {"features": True}, "have no block of b"),
    "features of another shape": ({"0": torch.eye(5)}, {"features": True}, r"is \(5, 5\) and its features are \(6, 6\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_gives_no_advice_is_refused_in_words(case: str) -> None:
    source, options, words = REFUSED[case]
    if options.get("features"):
        options = options | {"features": tangent_features(nn.Sequential(nn.Linear(6, 6)).eval(), torch.randn(4, 6))}
    with pytest.raises(TangentError, match=words):
        lora_advice(source, **options)


def test_advice_again_is_what_the_source_gives_for_that_share_or_budget() -> None:
    changes = {f"l{k}": normal(20, 30, seed=k) for k in range(3)} | {"head": normal(2, 30)}
    first = lora_advice(changes, share=0.4, whole="head", scaling=2.0)
    assert first.again(uniform_rank=2) == lora_advice(changes, uniform_rank=2, whole="head", scaling=2.0)
    assert first.again(share=0.7) == lora_advice(changes, share=0.7, whole="head", scaling=2.0)
    assert first.again(share=0.4) == first
    with pytest.raises(TangentError, match="not both"):
        first.again(share=0.5, uniform_rank=1)


def test_advice_is_frozen() -> None:
    with pytest.raises(AttributeError):
        lora_advice(FLAT, share=0.5).scaling = 2.0  # type: ignore[misc]
    assert isinstance(lora_advice(FLAT, share=0.5), LoraAdvice)

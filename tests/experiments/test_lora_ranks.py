"""lora-ranks: its texts, its adapters, what is equal in all ways of training, and its verdicts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.experiments.lora_ranks import NAME, adapters, texts
from adaptive_tangents.experiments.lora_ranks.claims import ADVISED, claims, differences, standing
from adaptive_tangents.experiments.lora_ranks.page import verdict
from adaptive_tangents.experiments.lora_ranks.run import LoraRanksConfig, configured, run
from adaptive_tangents.experiments.study import Asked
from study_cases import SMALL, small_run

pytestmark = pytest.mark.xdist_group("lora-ranks")


def skipped_if_absent(*, pretrained: bool) -> None:
    if reason := adapters.absent(pretrained=pretrained):
        pytest.skip(reason)


# Asked within the tests: peft takes seconds to import, and every process collects all tests.
@pytest.fixture(scope="module")
def peft_there() -> None:
    skipped_if_absent(pretrained=False)


@pytest.fixture(scope="module")
def weights_there() -> None:
    skipped_if_absent(pretrained=True)


needs_peft = pytest.mark.usefixtures("peft_there")
needs_weights = pytest.mark.usefixtures("weights_there")


def test_sentences_are_prose_of_the_package_and_no_signature() -> None:
    for package in LoraRanksConfig.packages:
        found = texts.sentences(package)
        assert len(set(found)) == len(found) >= 54
        assert all(20 <= len(text) <= 200 and "(" not in text.split()[0] for text in found)


def test_a_draw_shares_no_sentence_between_training_and_test_and_follows_its_seed() -> None:
    first, y, rest, y_test = texts.drawn(NAME, ("stats", "linalg"), 10, 7, seed=3)
    assert not set(first) & set(rest)
    assert (y.tolist(), y_test.tolist()) == ([0] * 10 + [1] * 10, [0] * 7 + [1] * 7)
    assert set(first[:10]) <= set(texts.sentences("stats"))
    assert texts.drawn(NAME, ("stats", "linalg"), 10, 7, seed=3)[0] == first
    assert texts.drawn(NAME, ("stats", "linalg"), 10, 7, seed=4)[0] != first
    with pytest.raises(TangentError, match=r"sentences on linalg, fewer than train \+ test = 5007"):
        texts.drawn(NAME, ("linalg", "stats"), 5000, 7, seed=3)


@needs_peft
def test_adapters_have_their_ranks_and_start_as_the_model_itself() -> None:
    ids = texts.tokens(["one two three", "four five"], 5, pretrained=False)
    plain = adapters.encoder(3, 1, pretrained=False)
    before = plain(ids)
    state = torch.get_rng_state()
    ranks = {"body.encoder.layer.0.attention.self.query": 2, "body.encoder.layer.1.output.dense": 3}
    made = adapters.adapted(plain, ranks, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(made(ids), before)
    moving = {name: p for name, p in made.named_parameters() if p.requires_grad}
    count = sum(p.numel() for name, p in moving.items() if "lora_" in name)
    assert count == 2 * (16 + 16) + 3 * (16 + 32)
    assert all("lora_" in name or "readout" in name for name in moving)
    assert {m.scaling["default"] for m in made.modules() if hasattr(m, "lora_A")} == {1.0}


@needs_peft
def test_all_ways_have_as_many_parameters_but_for_less_than_a_layers_rank() -> None:
    results = small_run(NAME).result.results
    for each in results["seeds"]:
        for budget in results["config"]["budgets"]:
            counts = {arm: each["arms"][f"{arm}.{budget}"]["adapters"] for arm in ("uniform", *ADVISED)}
            assert counts["uniform"] == budget * 2 * (4 * 32 + 2 * 48)
            assert all(counts["uniform"] - 48 < counts[arm] <= counts["uniform"] for arm in ADVISED)


@needs_peft
def test_an_adapter_of_uniform_rank_is_trained_as_the_full_model_is() -> None:
    """An adapter's training is the gradient descent of its factors: one step of Adam moves B by the rate, A not at all."""
    config = replace(SMALL[NAME], epochs=1, batch=99)
    x = texts.tokens(["a b c", "d e"], 4, pretrained=False)
    task = adapters.Task(x, torch.tensor([0, 1]), x, torch.tensor([0, 1]))
    made = adapters.adapted(adapters.encoder(2, 0, pretrained=False), 1, 0)
    start = {name: p.detach().clone() for name, p in made.named_parameters()}
    adapters.trained(made, task, adapters.Way(0.01, config.epochs, config.batch), 0, lambda _: None)
    moved: dict[str, Tensor] = {name: (p.detach() - start[name]).abs().max() for name, p in made.named_parameters()}
    for name, by in moved.items():
        if "lora_B" in name:
            assert by == pytest.approx(0.01, rel=1e-2)
        elif "modules_to_save" not in name:
            assert by == pytest.approx(0.0, abs=1e-12)


def _seed(uniform: float, advised: float, ranks: list[int]) -> dict[str, Any]:
    numbers = {"accuracy": 0.5, "adapters": 10.0, "last_loss": 0.1}
    arms = {f"{arm}.1": numbers | {"loss": uniform if arm == "uniform" else advised} for arm in ("uniform", *ADVISED)}
    layers = {f"body.encoder.layer.{k}.q": rank for k, rank in enumerate(ranks)}
    kept = {f"{arm}.{goal}": layers for arm in ADVISED for goal in ("1", "share")}
    return {"full": numbers | {"loss": 0.3}, "layers": list(layers), "ranks": kept, "arms": arms}


def test_a_difference_counts_only_beyond_two_standard_errors() -> None:
    assert standing(np.array([0.1, 0.12, 0.11])) == "holds"
    assert standing(np.array([0.1, -0.09, 0.11])) == "does not hold"
    assert standing(np.array([-0.1, -0.12])) == "does not hold"
    assert standing(np.array([0.1])) == "does not hold"


def test_claims_tell_the_difference_of_each_seed_and_say_which_side_wins() -> None:
    seeds = [_seed(0.5, 0.4, [0, 1, 2]), _seed(0.6, 0.49, [0, 2, 1])]
    np.testing.assert_allclose(differences(seeds, "forecast", 1), [0.1, 0.11])
    found = claims(seeds, [1])
    assert found["lower.forecast.1"]["holds"]
    assert "difference 0.105 ± 0.007, lower in 2 of 2 seeds" in found["lower.forecast.1"]["evidence"]
    assert found["foretold.1"]["holds"]
    assert not found["fewer"]["holds"]
    worse = [_seed(0.4, 0.5, [1, 1, 1]), _seed(0.4, 0.6, [1, 1, 1])]
    assert claims(worse, [1])["lower.weights.1"]["why"] == "uniform rank has the lower loss"
    assert claims(worse, [1])["foretold.1"]["evidence"] == "the ranks of all layers are equal"
    page = {"seeds": worse, "config": {"budgets": [1]}, "skipped": {}}
    assert verdict(page) == "With the parameters of rank 1, uniform rank has the lowest mean held-out loss."


def test_without_peft_nothing_is_measured_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_tangents.experiments.lora_ranks.run.absent", lambda pretrained: "peft not installed")
    found = run(LoraRanksConfig())
    assert (found.results["skipped"], found.results["claims"], found.arrays) == (
        {"minilm": "peft not installed"},
        {},
        {},
    )
    assert verdict(found.results) == "Unanswered: peft not installed."


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = adapters.find_spec
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "peft" else there(name))
    assert adapters.absent(pretrained=False) == "peft not installed: pip install 'adaptive-tangents[integrations]'"


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"budgets": ()}, {"rates": (0.0,)}, {"packages": ("stats",)}])
def test_settings_that_measure_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TangentError, match="lora-ranks: "):
        LoraRanksConfig(**wrong)


def test_a_quick_run_trains_the_tiny_encoder() -> None:
    assert configured(Asked(size="quick")).encoder == "tiny"
    assert configured(Asked(size="quick")).seeds == 2
    assert configured(Asked(size="full")).budgets == (1, 2, 4)


@needs_weights
def test_the_pretrained_encoder_tells_sentences_apart_that_random_weights_do_not() -> None:
    pairs = ["Compute the matrix exponential.", "Exponential of a square matrix.", "Design a digital filter."]
    ids = texts.tokens(pairs, 16, pretrained=True)
    with torch.no_grad():
        body = adapters.encoder(2, 0, pretrained=True)
        mask = (ids != 0)[..., None]
        states = body.body(input_ids=ids, attention_mask=mask[..., 0].float()).last_hidden_state * mask
    unit = torch.nn.functional.normalize(states.sum(1) / mask.sum(1), dim=1)
    assert float(unit[0] @ unit[1]) > float(unit[0] @ unit[2]) + 0.3

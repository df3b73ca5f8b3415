"""Checkpoints as transformers' and peft's trainers leave them become a network and its states, or are refused in words."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli, loading
from adaptive_tangents.loading import Data, Series
from study_cases import explained_in_rounds, plain_figures
from training_cases import (
    TEXTS,
    bert,
    bert_config,
    encoded,
    library,
    lora,
    save_tokens,
    tokenizer,
    trained,
)

pytestmark = pytest.mark.xdist_group("trained checkpoints")
runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Trainer's run of all weights (`run`), a base, and a Trainer's run of adapters (`lora`)."""
    folder = tmp_path_factory.mktemp("trained")
    made = tokenizer(folder)
    tokens = encoded(made)
    save_tokens(folder / "data.npz", tokens)
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.requires_grad_(False)
    trained(folder / "run", model, tokens, made)
    bert(1).save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    torch.manual_seed(2)
    adapted = lora(bert(1))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    trained(folder / "lora", adapted, tokens, made)
    return folder


def opened(**options: Any) -> Series:
    return loading.open_series("inspect", **options)


def data(place: Path) -> Data:
    return loading.load_data(place / "data.npz")


def outputs(model: Any, state: dict[str, Tensor] | None, tokens: Any) -> Tensor:
    with torch.no_grad():
        out: Any = model(**tokens) if state is None else torch.func.functional_call(model, state, (), dict(tokens))
    logits: Tensor = out.logits
    return logits


def from_transformers(folder: Path) -> Any:
    return library("transformers").BertForSequenceClassification.from_pretrained(folder).eval()


def refused(message: str, **options: Any) -> None:
    with pytest.raises(at.TangentError, match=f"^inspect: .*{message}"):
        opened(**options)


def test_a_trainers_folder_is_one_series_in_order_of_steps(place: Path) -> None:
    series = opened(checkpoints=place / "run")
    assert list(series.states) == ["checkpoint-0", "checkpoint-2", "checkpoint-4"]
    assert list(opened(start=place / "run").states) == list(series.states)
    assert list(opened(checkpoints=str(place / "run" / "checkpoint-*")).states) == list(series.states)
    assert series.classes == ("bad", "good")
    assert not series.causal
    assert not series.model.training
    for title, state in series.states.items():
        wanted = outputs(from_transformers(place / "run" / title), None, data(place).x)
        torch.testing.assert_close(outputs(series.model, state, data(place).x), wanted, rtol=0, atol=1e-6)


def test_steps_in_a_folders_trainer_state_give_the_order(place: Path, tmp_path: Path) -> None:
    for name, source in (("z", "checkpoint-2"), ("b", "checkpoint-4")):
        shutil.copytree(place / "run" / source, tmp_path / name)
    series = opened(checkpoints=str(tmp_path / "*"))
    assert series.order is not None
    assert [path.name for path in series.order.paths] == ["z", "b"]
    assert series.order.basis == "the steps in trainer_state.json"
    assert series.order.places == ("2", "4")
    doubt = opened(start=tmp_path / "b", end=tmp_path / "z").doubts
    assert len(doubt) == 1
    assert "comes after" in doubt[0]


def test_sharded_and_torch_files_load_as_one_file_does(place: Path, tmp_path: Path) -> None:
    model = bert(3)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    shutil.copytree(place / "base", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    series = opened(start=tmp_path / "shards", end=tmp_path / "bin")
    for state in series.states.values():
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b"}}))
    refused("names .*b, outside its folder", start=tmp_path / "shards", end=tmp_path / "bin")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone"}}))
    refused("gone, which model.safetensors.index.json names, is missing", start=tmp_path / "shards")


def test_tied_weights_stored_once_are_filled_in(tmp_path: Path) -> None:
    transformers = library("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=9, n_positions=6, n_embd=4, n_layer=1, n_head=2)
    )
    model.eval().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    series = opened(start=tmp_path)
    assert series.causal
    assert series.classes is None
    tokens = {"input_ids": torch.arange(5)[None]}
    found = outputs(series.model, series.states[tmp_path.name], tokens)
    torch.testing.assert_close(found, outputs(model, None, tokens), rtol=0, atol=1e-6)


def test_names_of_an_older_library_are_read_by_transformers_itself(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "old")
    state = load_file(place / "base" / "model.safetensors")
    path = tmp_path / "old" / "model.safetensors"
    save_file({k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in state.items()}, path, {"format": "pt"})
    series = opened(start=place / "base", end=tmp_path / "old")
    one, other = series.states.values()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_tokenizer_gives_what_the_model_takes_cut_at_its_length(place: Path) -> None:
    series = opened(start=place / "run")
    assert series.tokenizer is not None
    found = series.tokenizer(list(TEXTS))
    wanted = data(place).x
    assert isinstance(wanted, dict)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert series.tokenizer(["a good film " * 30])["input_ids"].shape == (1, 16)
    assert series.tokenizer(["a good film"], max_length=4)["input_ids"].shape == (1, 4)
    pairs = series.tokenizer(["a film"], ["a book"])
    assert pairs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_missing_tokenizer_is_refused_only_when_texts_need_it(place: Path, tmp_path: Path) -> None:
    bert(1).save_pretrained(tmp_path / "a")
    tokenize = opened(start=tmp_path / "a").tokenizer
    assert tokenize is not None
    with pytest.raises(
        at.TangentError, match=r"no tokenizer in .*a, and texts need one; save it there with tokenizer\."
    ):
        tokenize(["a film"])


def test_adapters_are_measured_by_their_own_parameters(place: Path) -> None:
    series = opened(start=place / "lora" / "checkpoint-0", end=place / "lora" / "checkpoint-4")
    moving = [name for name, p in series.model.named_parameters() if p.requires_grad]
    assert len(moving) == 6
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in moving)
    peft = library("peft")
    for title, state in series.states.items():
        twin = peft.PeftModel.from_pretrained(from_transformers(place / "base"), place / "lora" / title).eval()
        wanted = outputs(twin, None, data(place).x)
        torch.testing.assert_close(outputs(series.model, state, data(place).x), wanted, rtol=0, atol=1e-6)


def test_patterns_match_short_names_and_long_ones(place: Path) -> None:
    series = opened(start=place / "lora" / "checkpoint-0")
    layer = "bert.encoder.layer.0.attention.self"
    both = tuple(f"{layer}.{kind}.lora_B.default.weight" for kind in ("query", "value"))
    assert series.selected(["*.lora_B.weight"]) == series.selected(["*.lora_B.default.weight"]) == both
    heads = tuple(f"classifier.modules_to_save.default.{part}" for part in ("weight", "bias"))
    assert series.selected(["classifier*"]) == heads
    assert series.selected(["nothing*"]) == ("nothing*",)
    assert series.selected(None) is None
    assert opened(start=place / "base").selected(["a*"]) == ("a*",)


def test_merged_adapters_are_the_base_plus_what_they_add(place: Path) -> None:
    series = opened(start=place / "base", end=place / "lora" / "checkpoint-4", merged=True)
    start, end = series.states.values()
    config = json.loads((place / "lora" / "checkpoint-4" / "adapter_config.json").read_text())
    held = load_file(place / "lora" / "checkpoint-4" / "adapter_model.safetensors")
    layer = "bert.encoder.layer.0.attention.self.value"
    a, b = (held[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    gained = end[f"{layer}.weight"] - start[f"{layer}.weight"]
    torch.testing.assert_close(gained, config["lora_alpha"] / config["r"] * b @ a, rtol=1e-4, atol=1e-6)
    assert set(end) == set(series.model.state_dict())
    assert torch.equal(end["classifier.weight"], held["base_model.model.classifier.weight"])
    assert torch.equal(start["classifier.weight"], bert(1).classifier.weight)


def test_the_base_as_the_start_is_the_adapter_before_training_and_is_said(place: Path) -> None:
    series = opened(start=place / "base", end=place / "lora" / "checkpoint-4")
    assert len(series.doubts) == 1
    assert "with B = 0, and with the A of the end" in series.doubts[0]
    start, end = series.states.values()
    sides = [name for name in start if "lora_A" in name]
    assert sides
    assert all(torch.equal(start[name], end[name]) for name in sides)
    wanted = outputs(from_transformers(place / "base"), None, data(place).x)
    torch.testing.assert_close(outputs(series.model, series.states["base"], data(place).x), wanted, rtol=0, atol=1e-6)
    refused(
        "checkpoint-2 is no adapter, but others are, and it is not the base",
        start=place / "run" / "checkpoint-2",
        end=place / "lora" / "checkpoint-4",
    )


def test_a_base_without_the_head_serves_adapters_that_bring_their_own(place: Path, tmp_path: Path) -> None:
    transformers = library("transformers")
    base = bert(1)
    transformers.BertModel(bert_config()).save_pretrained(tmp_path / "base")
    bare = {k.removeprefix("bert."): v for k, v in base.state_dict().items() if k.startswith("bert.")}
    save_file(bare, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = place / "lora" / "checkpoint-4"
    bared, full = opened(start=adapter, base=tmp_path / "base"), opened(start=adapter)
    one, other = bared.states["checkpoint-4"], full.states["checkpoint-4"]
    assert torch.equal(outputs(bared.model, one, data(place).x), outputs(full.model, other, data(place).x))


def test_a_network_that_peft_made_takes_adapters_and_is_left_as_it_was(place: Path) -> None:
    model = lora(bert(1)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    series = opened(model=model, start=place / "lora" / "checkpoint-0", end=place / "lora" / "checkpoint-4")
    fresh = opened(start=place / "lora" / "checkpoint-0", end=place / "lora" / "checkpoint-4")
    for title in series.states:
        assert all(torch.equal(value, series.states[title][name]) for name, value in fresh.states[title].items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("original" not in name for name in series.selected(["*classifier*"]) or ())
    own = library("peft").get_peft_model_state_dict(model)
    state = loading.as_state(own, model, "inspect")
    assert all(
        torch.equal(state[name], value) for name, value in loading.as_state(model, model.base_model.model, "i").items()
    )


def test_a_base_given_as_a_model_is_wrapped_and_left_as_it_was(place: Path) -> None:
    model = bert(1).eval()
    names = list(model.state_dict())
    series = opened(model=model, start=place / "lora" / "checkpoint-0", end=place / "lora" / "checkpoint-4")
    assert list(model.state_dict()) == names
    fresh = opened(start=place / "lora" / "checkpoint-0", end=place / "lora" / "checkpoint-4")
    assert all("original_module" not in name for name in fresh.states["checkpoint-4"])
    end = [each.states["checkpoint-4"] for each in (series, fresh)]
    assert all(torch.equal(value, end[1][name]) for name, value in end[0].items())


KINDS: dict[str, Any] = {
    "LoRA on the embeddings": lambda peft: peft.LoraConfig(r=2, target_modules=["query", "word_embeddings"]),
    "LoRA with biases": lambda peft: peft.LoraConfig(r=2, target_modules=["query"], bias="all"),
    "PiSSA": lambda peft: peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"),
    "DoRA": lambda peft: peft.LoraConfig(r=2, target_modules=["query"], use_dora=True),
    "IA3": lambda peft: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_starts_as_the_base_and_ends_as_trained(place: Path, tmp_path: Path, kind: str) -> None:
    peft = library("peft")
    config = KINDS[kind](peft)
    config.task_type = peft.TaskType.SEQ_CLS
    adapted = peft.get_peft_model(bert(1), config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(place / "base")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "end")
    for merged in (False, True):
        series = opened(start=place / "base", end=tmp_path / "end", merged=merged)
        found = [outputs(series.model, state, data(place).x) for state in series.states.values()]
        for network, out in zip((from_transformers(place / "base"), adapted), found, strict=True):
            torch.testing.assert_close(out, outputs(network, None, data(place).x), rtol=1e-5, atol=2e-6)


def test_prompts_are_measured_in_peft_s_own_network(place: Path, tmp_path: Path) -> None:
    peft = library("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    adapted = peft.get_peft_model(bert(1), config)
    adapted.peft_config["default"].base_model_name_or_path = str(place / "base")
    adapted.save_pretrained(tmp_path)
    series = opened(start=tmp_path)
    feats = at.tangent_features(
        series.model, data(place).x, params=series.states[tmp_path.name], output_fn=loading.pick
    )
    assert "prompt_encoder.default.embedding" in feats.blocks
    refused("adds to the inputs and cannot be merged; leave out --merged", start=tmp_path, merged=True)


def test_networks_in_memory_are_start_and_end() -> None:
    start, end = (torch.nn.Linear(2, 1) for _ in range(2))
    series = opened(start=start, end=end)
    assert series.model is end
    assert torch.equal(series.states["start"]["weight"], start.weight)
    refused("nothing says what network the weights are of; give --model", start=dict(start.state_dict()))


def altered(source: Path, to: Path, change: Any, file: str = "config.json") -> Path:
    shutil.copytree(source, to)
    content = json.loads((to / file).read_text())
    change(content)
    (to / file).write_text(json.dumps(content))
    return to


def test_folders_that_are_no_checkpoints_are_refused_with_what_they_hold(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    refused(
        "is no checkpoint: it holds neither config.json with weights, nor adapter_config.json, nor model.safetensors or "
        "pytorch_model.bin; it holds notes.txt; give the folder that save_pretrained",
        start=tmp_path, end=place / "base",
    )  # fmt: skip
    refused("is no checkpoint.*; give it as --checkpoints .*run", start=place / "run", end=place / "base")
    refused("there is no checkpoint .*gone", start=place / "gone", end=place / "base")
    (tmp_path / "one" / "checkpoint-3").mkdir(parents=True)
    refused("holds 1 checkpoint .*at least two are needed", checkpoints=tmp_path / "one")
    refused("start and end are the same", start=place / "base", end=place / "base")
    refused("give start and end, or checkpoints, not both", start=place / "base", checkpoints=place / "run")
    refused("at least two checkpoints are needed, start and end; got 1", checkpoints=[place / "base"])
    unchecked = getattr(loading.open_series, "__wrapped__", loading.open_series)
    with pytest.raises(at.TangentError, match="inspect: start is a int; give the path of a file or folder"):
        unchecked("inspect", start=3)


def unimportable(module: Any, name: str) -> Any:
    raise ModuleNotFoundError("no detectron")


def test_folders_that_do_not_say_their_network_are_refused_with_the_remedy(place: Path, tmp_path: Path) -> None:
    base = place / "base"
    bare = altered(base, tmp_path / "bare", lambda config: config.pop("architectures"))
    refused("names no architectures, so it does not say what network this is; give --model, a factory", start=bare)
    timm = altered(bare, tmp_path / "timm", lambda config: config.update(architecture="resnet10t", num_classes=3))
    refused(r"give --model 'timm:resnet10t\?num_classes=3'", start=timm)

    def remote(config: Any) -> None:
        config.update(architectures=["MyNet"], auto_map={"AutoModel": "modeling_mine.MyNet"})

    code = altered(base, tmp_path / "code", remote)
    (code / "modeling_mine.py").write_text("raise SystemExit('this code was run')")
    refused("is a MyNet, which needs code from its own folder .*never run; give --model, a factory", start=code)
    lacking = altered(base, tmp_path / "lacking", lambda config: config.update(architectures=["NoNetOfThisName"]))
    refused("is a NoNetOfThisName, which transformers lacks; give --model", start=lacking)
    broken = altered(base, tmp_path / "broken", lambda config: config.update(architectures=["BrokenNet"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(library("transformers")), "__getattr__", unimportable)
        refused("transformers cannot import BrokenNet, .*ModuleNotFoundError: no detectron.*mend that", start=broken)
    odd = altered(base, tmp_path / "odd", lambda config: config.update(num_attention_heads=3))
    refused("transformers cannot make the network of .*odd.*give --model", start=odd)
    packed = altered(
        base, tmp_path / "packed", lambda config: config.update(quantization_config={"load_in_4bit": True})
    )
    refused("are quantized, and have no derivatives", start=packed)
    (odd / "config.json").write_text("{")
    refused("config.json cannot be read", start=odd)
    (odd / "config.json").unlink()
    refused(r"odd does not say what network the weights are of; give --model package\.module:factory", start=odd)
    assert "bert.pooler.dense.bias" in opened(model=str(base), start=odd).states["odd"]


def test_a_start_without_the_new_head_is_refused_with_what_to_save(place: Path, tmp_path: Path) -> None:
    library("transformers").BertModel(bert_config()).save_pretrained(tmp_path / "pretrained")
    refused(
        r"pretrained does not fit the model: missing classifier.weight, classifier.bias; it is the base model, and the new "
        r"head \(classifier\) was made when training began.*trainer.save_model\('checkpoint-0'\).*the first checkpoint",
        start=tmp_path / "pretrained", end=place / "run" / "checkpoint-4",
    )  # fmt: skip


def test_a_base_with_another_head_is_refused_by_what_it_lacks(place: Path, tmp_path: Path) -> None:
    library("transformers").BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "mlm")
    refused(
        r"the new head \(bert.pooler, classifier\) was made", start=tmp_path / "mlm", end=place / "run" / "checkpoint-4"
    )
    refused(
        "mlm does not fit the model: missing bert.pooler.*; give the base that the adapter was trained on, with these",
        start=place / "lora" / "checkpoint-4", base=tmp_path / "mlm",
    )  # fmt: skip
    given = {"model": lora(bert(1)), "start": place / "lora" / "checkpoint-4"}
    refused("the model has an adapter already, so nothing is merged; give the base as the model", **given, merged=True)
    with pytest.raises(
        at.TangentError, match="checkpoint-4 is an adapter, and the BertForSequenceClassification has none"
    ):
        loading.as_state(place / "lora" / "checkpoint-4", bert(1), "inspect")


def test_pickled_objects_in_a_folder_are_never_loaded(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "a" / "pytorch_model.bin")
    refused("is not a checkpoint of tensors alone .*Linear.*pickles are never loaded", start=tmp_path / "a")


def test_adapters_without_their_base_or_of_another_are_refused(place: Path, tmp_path: Path) -> None:
    source, file = place / "lora" / "checkpoint-4", "adapter_config.json"
    gone = altered(source, tmp_path / "gone", lambda c: c.update(base_model_name_or_path="someone/else"), file)
    refused(
        "the base of the adapter .*gone is missing: adapter_config.json names 'someone/else', which is no folder here.*"
        "nothing is downloaded; give --base DIR",
        start=gone,
    )  # fmt: skip
    assert list(opened(start=gone, base=place / "base").states) == ["gone"]
    refused("the base .*run is no folder with config.json and weights", start=source, base=place / "run")
    refused("a base is for adapters, and none of the checkpoints is one", start=place / "base", base=place / "base")
    refused("were trained on different bases", start=gone, end=source)
    bare = altered(source, tmp_path / "bare", lambda config: None, file)
    (bare / "adapter_model.safetensors").unlink()
    refused("has adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin", start=bare)


def test_adapters_of_two_ranks_are_refused_unless_merged(place: Path, tmp_path: Path) -> None:
    model = lora(bert(1))
    model.peft_config["default"].base_model_name_or_path = str(place / "base")
    peft = library("peft")
    wide = peft.get_peft_model(
        bert(1), peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "key"], base_model_name_or_path="")
    )
    wide.peft_config["default"].base_model_name_or_path = str(place / "base")
    wide.save_pretrained(tmp_path / "wide")
    ends = {"start": place / "lora" / "checkpoint-4", "end": tmp_path / "wide"}
    refused("the adapter .*checkpoint-4 does not fit .*or --merged to compare the weights", **ends)
    assert len(opened(**ends, merged=True).states) == 2


def command(*arguments: Any) -> tuple[int, str]:
    done = runner.invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, done.output + (done.stderr if done.stderr_bytes else "")


@pytest.fixture(autouse=True, scope="module")
def quicker() -> Iterator[None]:
    """Commands do not depend on the figures, nor on how far transforms are fitted."""
    with explained_in_rounds(1), plain_figures("inspect"), plain_figures("foretold"):
        yield


def test_inspect_needs_no_model_for_a_trainers_folder(place: Path, tmp_path: Path) -> None:
    code, printed = command(
        "inspect", "--checkpoints", place / "run", "--data", place / "data.npz", "--out", tmp_path, "--nodes", 1,
        "--wrt", "bert.pooler*", "--wrt", "classifier*",
    )  # fmt: skip
    assert code == 0, printed
    assert "3 checkpoints, in the order of" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"] == f"BertForSequenceClassification of {place / 'run' / 'checkpoint-4'}"
    assert [point["name"] for point in results["trajectory"]] == ["checkpoint-0", "checkpoint-2", "checkpoint-4"]
    assert results["data"]["labels"] == "classes"


def test_inspect_tells_adapters_by_short_names_on_the_page(place: Path, tmp_path: Path) -> None:
    ends = ("--start", place / "base", "--end", place / "lora" / "checkpoint-4")
    code, printed = command("inspect", *ends, "--data", place / "data.npz", "--out", tmp_path, "--nodes", 1)
    assert code == 0, printed
    assert "warning: the start base is the base without an adapter" in printed
    results, layer = json.loads((tmp_path / "results.json").read_text()), "bert.encoder.layer.0.attention.self.query"
    assert list(results["blocks"])[:2] == [f"{layer}.lora_A", f"{layer}.lora_B"]
    assert list(results["blocks"])[-1] == "classifier"
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert arrays[f"diagonal.initial.{layer}.lora_A"].max() == 0  # B is zero before training
        assert arrays[f"diagonal.final.{layer}.lora_A"].max() > 0
        assert arrays[f"diagonal.initial.{layer}.lora_B"].min() > 0
    page = (tmp_path / "report.html").read_text()
    assert f"{layer}.lora_B" in page
    assert "with B = 0" in page
    for text in (page, json.dumps(results)):
        assert "lora_B.default" not in text
        assert "base_model.model." not in text


def test_kernel_and_forecast_take_folders(place: Path, tmp_path: Path) -> None:
    given = ("--weights", place / "lora" / "checkpoint-4", "--data")
    code, printed = command("kernel", *given, place / "data.npz", "--out", tmp_path / "K", "--outputs", "trace")
    assert code == 0, printed
    series, tokens = opened(start=place / "lora" / "checkpoint-4"), data(place).x
    wanted = at.tangent_kernel(
        series.model, tokens, outputs="trace", params=series.states["checkpoint-4"], output_fn=loading.pick
    )
    torch.testing.assert_close(at.open_kernel(tmp_path / "K").read(), wanted, rtol=1e-4, atol=1e-5)
    assert isinstance(tokens, dict)
    many = save_tokens(tmp_path / "many.npz", {name: value.repeat(4, 1) for name, value in tokens.items()})
    code, printed = command("forecast", *given, many, "--wrt", "class*", "--out", tmp_path / "told", "--steps", 1)
    assert code == 0, printed
    assert list(json.loads((tmp_path / "told" / "results.json").read_text())["blocks"]) == ["classifier"]

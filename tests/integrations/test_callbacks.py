"""Callbacks record what a tracker in a loop would, to the trainers' own loggers, and training does not notice them."""

import csv
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import adaptive_tangents as at
from adaptive_tangents.integrations.samples import samples_of

CURVE = ("step", "whole", "groups", "loss", "accuracy", "moved")


def curve(tracker: at.Tracker | None) -> list[tuple[Any, ...]]:
    assert tracker is not None
    return [tuple(getattr(record, name) for name in CURVE) for record in tracker.records]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's event files under a folder hold, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return found


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


# Hugging Face


def texts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 30, (40, 6), generator=torch.Generator().manual_seed(1))
    return ids, ids[:, 0] % 3


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set with a column that no model takes."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, k: int) -> dict[str, Any]:
        ids, labels = texts()
        return {"input_ids": ids[k].tolist(), "label": int(labels[k]), "text": "words"}


def classifier() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    made: nn.Module = transformers.BertForSequenceClassification(config)
    return made


def trainer(folder: Path, *callbacks: Any, model: nn.Module | None = None, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    defaults = {"max_steps": 6, "logging_steps": 1, "save_steps": 3, "report_to": [], "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, seed=3,
        **{**defaults, **options},
    )  # fmt: skip
    return transformers.Trainer(
        classifier() if model is None else model, arguments, train_dataset=Texts(), callbacks=list(callbacks)
    )


def test_a_hugging_face_training_logs_curves_and_is_bit_for_bit_that_without_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plain = trainer(tmp_path / "plain", save_strategy="no")
    plain.train()
    callback = at.integrations.HuggingFaceTracker(budget=None, every=2, samples=15)
    watched = trainer(tmp_path / "watched", callback, report_to=["tensorboard"])
    watched.train()
    assert same(plain.model, watched.model)
    history = watched.state.log_history
    steps = [entry["step"] for entry in history if "tangents/cka_start" in entry]
    assert steps == [0, 2, 4, 6]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6], "the loss is logged as before"
    assert callback.tracker is not None
    records = callback.tracker.records
    assert list(records[0].groups) == ["embeddings", "layer 0", "layer 1", "pooler", "head"]
    read = scalars(tmp_path / "watched")
    for name, of in (
        ("tangents/alignment_centered", lambda r: r.whole.alignment_centered),
        ("tangents/layer.1/trace", lambda r: r.groups["layer 1"].trace),
        ("tangents/loss", lambda r: r.loss),
    ):
        assert read[f"train/{name}"] == [(r.step, pytest.approx(of(r), rel=1e-6)) for r in records]
        assert [e[name] for e in history if name in e] == [of(r) for r in records]
    ids, labels = texts()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:15].sort().values
    direct = at.Tracker(watched.model, {"input_ids": ids[order]}, labels[order]).record()
    assert direct is not None
    assert direct.whole is not None
    assert records[-1].whole is not None
    assert records[-1].whole.trace == pytest.approx(direct.whole.trace, rel=1e-6)
    assert records[-1].accuracy == direct.accuracy


def test_a_hugging_face_training_that_is_resumed_goes_on_with_its_curves(tmp_path: Path) -> None:
    whole = at.integrations.HuggingFaceTracker(budget=None, every=2, samples=10, log_groups=False)
    trainer(tmp_path, whole).train()
    resumed = at.integrations.HuggingFaceTracker(budget=None, every=2, samples=10, log_groups=False)
    again = trainer(tmp_path, resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert curve(resumed.tracker) == curve(whole.tracker)
    assert [entry["step"] for entry in again.state.log_history if "tangents/trace" in entry] == [0, 2, 4, 6]
    assert not [name for entry in again.state.log_history for name in entry if name.startswith("tangents/layer")]
    (tmp_path / "checkpoint-3" / "tangents.safetensors").rename(tmp_path / "moved.safetensors")
    named = at.integrations.HuggingFaceTracker(budget=None, every=2, samples=10, resume=tmp_path / "moved.safetensors")
    trainer(tmp_path, named).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert curve(named.tracker) == curve(whole.tracker)
    late = at.integrations.HuggingFaceTracker(budget=None, samples=10)
    (tmp_path / "checkpoint-3" / "tangents.safetensors").unlink(missing_ok=True)
    with pytest.warns(
        at.TangentWarning, match=r"goes on at step 3, and .*checkpoint-3 holds no tangents.safetensors; the"
    ):
        trainer(tmp_path, late).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row[0] for row in curve(late.tracker)] == [3, 4, 5, 6]


def test_a_checkpoint_of_another_folder_brings_its_own_curves_not_those_of_the_trainers_folder(tmp_path: Path) -> None:
    first = at.integrations.HuggingFaceTracker(budget=None, samples=10)
    trainer(tmp_path / "first", first).train()
    other = classifier()
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    trainer(tmp_path / "second", at.integrations.HuggingFaceTracker(budget=None, samples=10), model=other).train()
    checkpoint = tmp_path / "first" / "checkpoint-3"
    resumed = at.integrations.HuggingFaceTracker(budget=None, samples=10)
    trainer(tmp_path / "second", resumed, save_strategy="no").train(resume_from_checkpoint=str(checkpoint))
    assert curve(resumed.tracker) == curve(first.tracker)
    (checkpoint / "tangents.safetensors").unlink()
    late = at.integrations.HuggingFaceTracker(budget=None, samples=10)
    with pytest.warns(at.TangentWarning, match=r"first.checkpoint-3 holds no tangents.safetensors"):
        trainer(tmp_path / "second", late, save_strategy="no").train(resume_from_checkpoint=str(checkpoint))
    assert [row[0] for row in curve(late.tracker)] == [3, 4, 5, 6]


def test_bfloat16_accumulated_gradients_and_a_batch_of_ones_own_in_a_hugging_face_trainer(tmp_path: Path) -> None:
    ids, labels = texts()
    options = {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 2, "save_strategy": "no"}
    plain = trainer(tmp_path / "a", **options)
    plain.train()
    callback = at.integrations.HuggingFaceTracker({"input_ids": ids[:9]}, labels[:9], prefix="k")
    watched = trainer(tmp_path / "b", callback, **options)
    watched.train()
    assert same(plain.model, watched.model)
    assert [e["step"] for e in watched.state.log_history if "k/trace" in e] == [0, 1, 2]
    assert "K of 9 samples" in callback.tracker.summary()


def test_where_training_stops_early_the_last_step_is_recorded_and_never_the_best_model_instead(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_training_stop = state.global_step == 3

    callback = at.integrations.HuggingFaceTracker(budget=None, every=2, samples=8)
    trainer(tmp_path, callback, Stop(), save_strategy="no").train()
    assert [row[0] for row in curve(callback.tracker)] == [0, 2, 3]


def test_where_the_trainer_is_not_found_the_history_still_gets_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["adaptive_tangents.integrations.hugging_face"]
    monkeypatch.setattr(module, "_training", lambda callback: iter(()))
    callback = at.integrations.HuggingFaceTracker(samples=8)
    made = trainer(tmp_path, callback, max_steps=1, save_strategy="no")
    with pytest.warns(at.TangentWarning, match=r"the Trainer that called is not found, so its loggers get no numbers"):
        made.train()
    assert [entry["step"] for entry in made.state.log_history if "tangents/trace" in entry] == [0, 1]


# Lightning


def numbers() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def lightning_module(*, own_forward: bool = True) -> Any:
    pl = pytest.importorskip("lightning.pytorch")

    class Net(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    if own_forward:
        Net.forward = lambda self, x: self.net(x)  # type: ignore[method-assign]
    return Net()


def lightning_fit(folder: Path, *callbacks: Any, epochs: int = 2, resume: Path | None = None, **options: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    own = options.pop("own_forward", True)
    loaders = options.pop("loaders", None)
    pl.seed_everything(5, verbose=False)
    module = lightning_module(own_forward=own)
    fitted = pl.Trainer(
        max_epochs=epochs, logger=[CSVLogger(folder), TensorBoardLogger(folder)], callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", log_every_n_steps=1, **options,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*numbers()), batch_size=8, shuffle=True)
    fitted.fit(module, loader if loaders is None else loaders, ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
class TestLightning:
    def test_training_logs_curves_and_is_bit_for_bit_that_without_them(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        plain = lightning_fit(tmp_path / "plain")
        callback = at.integrations.LightningTracker(budget=None, every=3)
        assert same(plain, lightning_fit(tmp_path / "watched", callback))
        assert callback.tracker is not None
        records = callback.tracker.records
        assert [record.step for record in records] == [0, 3, 6, 8]
        assert list(records[0].groups) == ["net.0", "net.1", "net.4"]
        read = scalars(tmp_path / "watched")
        assert read["tangents/net.4/cka_start"] == [
            (r.step, pytest.approx(r.groups["net.4"].cka_start, rel=1e-6)) for r in records
        ]
        (file,) = (tmp_path / "watched").rglob("metrics.csv")
        rows = list(csv.DictReader(file.open()))
        told = [(int(row["step"]), float(row["tangents/alignment_centered"])) for row in rows if row["tangents/trace"]]
        assert told == [(r.step, r.whole.alignment_centered) for r in records if r.whole is not None]
        assert sum(bool(row["loss"]) for row in rows) == 8

    def test_a_training_that_is_resumed_goes_on_with_its_curves(self, tmp_path: Path) -> None:
        first = at.integrations.LightningTracker(budget=None, every=2)
        lightning_fit(tmp_path / "first", first)
        (checkpoint,) = (tmp_path / "first").rglob("*.ckpt")
        assert "LightningTracker" in torch.load(checkpoint, weights_only=True)["callbacks"]
        second = at.integrations.LightningTracker(budget=None, every=2)
        lightning_fit(tmp_path / "second", second, epochs=3, resume=checkpoint)
        assert curve(second.tracker)[:5] == curve(first.tracker)
        assert [row[0] for row in curve(second.tracker)] == [0, 2, 4, 6, 8, 10, 12]
        waiting = at.integrations.LightningTracker()
        assert waiting.state_dict() == {}
        waiting.load_state_dict(second.state_dict())
        assert waiting.state_dict()["numbers"] == second.state_dict()["numbers"], (
            "a checkpoint before training keeps all"
        )

    def test_accumulated_gradients_and_samples_of_ones_own(self, tmp_path: Path) -> None:
        x, y = numbers()
        plain = lightning_fit(tmp_path / "a", accumulate_grad_batches=2)
        callback = at.integrations.LightningTracker((x[:9], y[:9]), budget=None)
        assert same(plain, lightning_fit(tmp_path / "b", callback, accumulate_grad_batches=2))
        assert [row[0] for row in curve(callback.tracker)] == [0, 1, 2, 3, 4]
        assert callback.tracker is not None
        assert "K of 9 samples" in callback.tracker.summary()
        drawn = at.integrations.LightningTracker(TensorDataset(x, y), samples=7)
        lightning_fit(tmp_path / "c", drawn, epochs=1)
        assert drawn.tracker is not None
        assert "K of 7 samples" in drawn.tracker.summary()

    def test_a_module_without_a_forward_of_its_own_names_its_network(self, tmp_path: Path) -> None:
        with pytest.raises(at.TangentError, match=r"Net has no forward that gives outputs; .*such as module='net'"):
            lightning_fit(tmp_path, at.integrations.LightningTracker(), own_forward=False)
        with pytest.raises(at.TangentError, match=r"LightningTracker: Net holds no module 'network'; it holds net"):
            lightning_fit(tmp_path, at.integrations.LightningTracker(module="network"), own_forward=False)
        named = at.integrations.LightningTracker(module="net")
        lightning_fit(tmp_path, named, own_forward=False, epochs=1)
        assert named.tracker is not None
        assert list(named.tracker.records[0].groups) == ["layer 0", "layer 1", "layer 4"]

    def test_several_loaders_need_a_batch(self, tmp_path: Path) -> None:
        loader = DataLoader(TensorDataset(*numbers()), batch_size=8)
        with pytest.raises(
            at.TangentError, match=r"no single DataLoader to draw samples from; give a batch x and labels"
        ):
            lightning_fit(tmp_path, at.integrations.LightningTracker(), loaders={"a": loader, "b": loader})


# both


@pytest.mark.parametrize(
    ("name", "library"), [("HuggingFaceTracker", "transformers"), ("LightningTracker", "lightning")]
)
def test_options_that_a_tracker_does_not_take_are_named(name: str, library: str) -> None:
    pytest.importorskip(library)
    for option in ("sample", "log"):
        with pytest.raises(
            at.TangentError, match=rf"{name}: there is no option '{option}'; at.Tracker takes samples, every"
        ):
            getattr(at.integrations, name)(**{option: 3})


def drawn(data: Any, y: Any = None, columns: frozenset[str] | None = None) -> tuple[Any, Any]:
    return samples_of("f", data, y, collate=None, count=4, seed=0, columns=columns)


def test_samples_come_from_data_sets_loaders_and_batches_with_their_labels() -> None:
    x, y = numbers()
    index = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:4].sort().values
    for data in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)):
        draws = torch.get_rng_state()
        found, labels = drawn(data)
        assert torch.equal(found, x[index])
        assert torch.equal(labels, y[index])
        assert torch.equal(torch.get_rng_state(), draws)
    assert drawn(x, y) == (x, y)
    assert drawn([x, y]) == (x, y)
    assert drawn((x, x), y) == ((x, x), y)
    inputs, labels = drawn({"a": x, "labels": y, "note": "text", "other": x}, columns=frozenset({"a", "labels"}))
    assert list(inputs) == ["a"]
    assert labels is y
    assert drawn({"a": x, "labels": torch.zeros(32, 7, dtype=torch.long)})[1] is None, "labels of tokens are no targets"
    found, labels = drawn([{"a": x[k], "label": y[k]} for k in range(32)])
    assert torch.equal(found["a"], x[index])
    assert torch.equal(labels, y[index])


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_data_sets_that_give_no_batch_are_errors_that_ask_for_one() -> None:
    with pytest.raises(
        at.TangentError, match=r"f: Endless has no length, so samples cannot be drawn from it; give a batch"
    ):
        drawn(Endless())
    with pytest.raises(at.TangentError, match=r"f: the data set holds no samples"):
        drawn(TensorDataset(torch.zeros(0, 3)))
    with pytest.raises(at.TangentError, match=r"f: 2 samples of the list do not make a batch \(.*\); give a batch x"):
        drawn([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}])
    pytest.importorskip("transformers")
    callback = at.integrations.HuggingFaceTracker()
    with pytest.raises(
        at.TangentError, match=r"HuggingFaceTracker: the Trainer has no training set to draw samples from"
    ):
        callback._made(nn.Linear(2, 1), None)

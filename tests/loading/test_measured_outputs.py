"""What is measured of a network: its logits, the loss of each sample, the last token, or a function of its output."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import adaptive_tangents as at
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import Data, inner, output_of, pick
from snapshots import Snapshot

WIDTH = 5


class Tiny(nn.Module):
    """Logits of every token (n, t, 5): by earlier tokens alone if ``causal``, and a padded token is seen by none."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.table, self.head = nn.Embedding(WIDTH, 4), nn.Linear(4, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        t = input_ids.shape[1]
        seen = torch.ones(t, t).tril() if self.causal else torch.ones(t, t)
        weights = seen.to(self.scale) * (1 if attention_mask is None else attention_mask[:, None, :])
        places = 0.1 * torch.arange(t).to(self.scale)[:, None]
        mixed = torch.tanh((weights @ self.table(input_ids)) * self.scale + places)
        return SimpleNamespace(logits=self.head(mixed))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WIDTH, n_positions=9, n_embd=4, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None,
            loss_type="ForCausalLM",
        )
    )  # fmt: skip
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"tiny": Tiny, "GPT-2": gpt2}


def made(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def sequences(side: str) -> dict[str, Tensor]:
    ids = torch.randint(1, WIDTH, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 4, 2, 3)):
        padding = slice(length, None) if side == "right" else slice(None, 7 - length)
        ids[row, padding], mask[row, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(model: nn.Module, batch: dict[str, Tensor], row: int, labels: Tensor | None) -> Tensor:
    """The mean cross-entropy of one sequence, token by token."""
    one = {name: value[row : row + 1] for name, value in batch.items()}
    logits = model(**one).logits[0]
    each = []
    for t in range(1, logits.shape[0]):
        if labels is None:
            if one["attention_mask"][0, t] and one["attention_mask"][0, t - 1]:
                each.append(-logits[t - 1].log_softmax(0)[one["input_ids"][0, t]])
        elif labels[row, t] != -100:
            each.append(-logits[t - 1].log_softmax(0)[labels[row, t]])
    return torch.stack(each).mean()


def agree(model: nn.Module, feats: at.features.TangentFeatures, losses: Callable[[int], Tensor]) -> None:
    """Features of one output are the gradient of each sample's loss."""
    dense = feats.dense()
    assert dense.shape[1] == 1
    for row in range(len(dense)):
        gradient = torch.autograd.grad(losses(row), list(model.parameters()))
        torch.testing.assert_close(
            dense[row, 0], torch.cat([part.flatten() for part in gradient]), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_features_of_a_language_models_loss_are_the_gradients_of_each_sequences_loss(name: str, side: str) -> None:
    model, batch = made(MODELS[name]()), sequences(side)
    network, data = output_of(None, model, Data(batch))
    assert data.loss
    assert all(torch.equal(batch[name], sequences(side)[name]) for name in batch)
    assert any("loss of each sample" in note for note in data.notes)
    agree(model, at.tangent_features(network, data.x), lambda row: loss_of(model, batch, row, None))


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_of_tokens_are_respected_as_in_training(side: str) -> None:
    model, batch = made(Tiny()), sequences(side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :3] = -100
    network, data = output_of("loss", model, Data(batch, labels))
    agree(model, at.tangent_features(network, data.x), lambda row: loss_of(model, batch, row, labels))


def test_the_loss_of_gpt_2_is_its_own() -> None:
    model, batch = made(gpt2()), sequences("right")
    network, data = output_of(None, model, Data(batch))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row in range(4):
        own = model(**{name: value[row : row + 1] for name, value in batch.items()}, labels=labels[row : row + 1]).loss
        torch.testing.assert_close(network(**data.x)[row, 0].float(), own.float(), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_token_is_the_last_that_is_no_padding(side: str) -> None:
    model, batch = made(Tiny()), sequences(side)
    network, data = output_of("last-token", model, Data(batch))
    out = network(**data.x)  # type: ignore[arg-type]
    logits = model(**batch).logits
    lasts = [int(mask.nonzero()[-1]) for mask in batch["attention_mask"]]
    assert torch.equal(out, torch.stack([logits[row, last] for row, last in enumerate(lasts)]))
    plain, _ = output_of("last-token", model, Data(batch["input_ids"]))
    assert torch.equal(plain(batch["input_ids"]), model(batch["input_ids"]).logits[:, -1])


def mlp(outputs: int) -> nn.Module:
    return made(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).double()
LOSSES: dict[str, tuple[int, Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "classes": (4, torch.tensor([0, 3, 1, 2, 2, 0]), lambda f, y: -f.log_softmax(0)[y]),
    "two classes": (1, torch.tensor([0, 1, 1, 0, 1, 0]), lambda f, y: (1 + (-f[0] * (2 * y - 1)).exp()).log()),
    "one target": (1, torch.linspace(-1, 1, 6).double(), lambda f, y: (f[0] - y) ** 2),
    "targets": (2, torch.linspace(-1, 1, 12).double().reshape(6, 2), lambda f, y: ((f - y) ** 2).mean()),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_features_of_the_loss_are_the_gradients_of_each_samples_loss(kind: str) -> None:
    outputs, y, loss = LOSSES[kind]
    model = mlp(outputs)
    network, data = output_of("loss", model, Data(X, y))
    assert data.y is None
    agree(model, at.tangent_features(network, data.x), lambda row: loss(model(X[row : row + 1])[0], y[row]))


def test_the_loss_of_tokens_counts_those_with_labels() -> None:
    model, batch = made(Tiny(causal=False)), sequences("right")
    labels = torch.where(batch["attention_mask"] == 1, (batch["input_ids"] + 1) % WIDTH, -100)
    network, data = output_of("loss", model, Data(batch, labels))

    def loss(row: int) -> Tensor:
        logits = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits[0]
        return functional.cross_entropy(logits, labels[row], ignore_index=-100)

    agree(model, at.tangent_features(network, data.x), loss)


def test_parameters_keep_their_names_and_the_model_is_left_as_it_was() -> None:
    model, batch = made(Tiny()), sequences("right")
    before = Snapshot(model)
    network, data = output_of(None, model, Data(batch))
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert list(network.state_dict()) == list(model.state_dict())
    assert inner(network) is model
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    moved = at.tangent_features(network, data.x, params=state)
    average = at.average_features(network, model.state_dict(), state, data.x, nodes=8)
    assert average.error < 1e-3
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    agree(twin, moved, lambda row: loss_of(twin, batch, row, None))
    network.train()
    assert model.training
    network.eval()
    assert not model.training
    assert before.changes(Snapshot(model)) == []


def test_a_function_of_the_output_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def first(out):\n    return out.logits[:, 0, :2]\ndef wrong(out):\n    return out.nothing\n"
    )
    model, batch = made(Tiny()), sequences("right")
    for name in (f"{tmp_path / 'mine.py'}:first", lambda out: out.logits[:, 0, :2]):
        network, data = output_of(name, model, Data(batch))
        assert torch.equal(network(**data.x), model(**batch).logits[:, 0, :2])  # type: ignore[arg-type]
    one, _ = output_of(lambda out: out.logits[:, 0, 0], model, Data(batch))
    assert one(**batch).shape == (4, 1)
    for name, words in (
        ("wrong", "AttributeError: .*nothing"),
        ("absent", "has no function 'absent'; it holds first, wrong"),
    ):
        with pytest.raises(TangentError, match=words):
            output_of(f"{tmp_path / 'mine.py'}:{name}", model, Data(batch))


def test_logits_are_found_by_themselves_in_every_call() -> None:
    model, batch = made(Tiny()), sequences("right")

    class Classifier(nn.Module):
        def __init__(self, form: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.fc, self.form = nn.Linear(3, 2).double(), form

        def forward(self, x: Tensor) -> Any:
            return self.form(self.fc(x))

    torch.manual_seed(0)
    for form in (lambda f: SimpleNamespace(logits=f), lambda f: {"loss": f.sum(), "logits": f}):
        network = made(Classifier(form))
        wanted = at.tangent_features(network, X, output_fn=lambda out: pick(out)).dense()
        assert torch.equal(at.tangent_features(network, X).dense(), wanted)
        assert at.tangent_kernel(network, X, outputs="trace").shape == (6, 6)
        end = {name: 2 * value for name, value in network.state_dict().items()}
        assert at.average_features(network, network.state_dict(), end, X).error < 1e-6
        assert at.TangentModule(network)(X).shape == (6, 2)
    with pytest.raises(TangentError, match=r"output has shape \(4, 7, 5\), expected \(4, c\)"):
        at.tangent_features(model, batch)
    with pytest.raises(
        TangentError, match=r"returned dict, not a tensor; pass output_fn=.*; it holds a \(6, 2\), b \(6,\)"
    ):
        at.tangent_features(Classifier(lambda f: {"a": f, "b": f[:, 0]}).eval(), X)


def batch_of(**changes: Any) -> dict[str, Tensor]:
    return {**sequences("right"), **changes}


CLASSES = LOSSES["classes"][1]
ALONE = torch.zeros(4, 7, dtype=torch.long).index_fill(1, torch.tensor([0]), 1)
REFUSED: dict[str, tuple[Callable[[], nn.Module], Data, Any, str]] = {
    "a name that is none": (Tiny, Data(batch_of()), "logits", "--output is loss, last-token, module:function"),
    "a loss without labels": (lambda: mlp(2), Data(X), "loss", "takes labels, and the data have none"),
    "a label beyond the outputs": (lambda: mlp(2), Data(X, CLASSES), "loss", "the label 3, but the network has 2"),
    "classes for one logit": (lambda: mlp(1), Data(X, CLASSES), "loss", "one output and y holds class numbers up to 3"),
    "targets of another number": (lambda: mlp(3), Data(X, LOSSES["targets"][1]), "loss", "per sample and the network 3"),
    "the last token of a vector": (lambda: mlp(2), Data(X), "last-token", r"is of networks that give logits of every token"),
    "a masked model": (lambda: Tiny(causal=False), Data(batch_of()), None, "they depend on later tokens"),
    "one label for many tokens": (lambda: Tiny(causal=False), Data(batch_of(), torch.tensor([0, 1, 1, 0])), "loss",
        "give a label for every token"),
    "one token": (Tiny, Data(batch_of(attention_mask=ALONE)), None, "sample 0 .* has no token whose loss"),
    "labels of another length": (Tiny, Data(batch_of(), torch.ones(4, 3).long()), "loss", "labels of tokens are"),
    "a function that sums": (lambda: mlp(2), Data(X), lambda out: out.sum(), "for 2 samples; it must give real numbers"),
    "a function of integers": (lambda: mlp(2), Data(X), lambda out: out.argmax(1), "it must give real numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_outputs_that_do_not_fit_are_refused_in_words(case: str) -> None:
    make, data, name, words = REFUSED[case]
    with pytest.raises(TangentError, match=words):
        output_of(name, made(make()), data)

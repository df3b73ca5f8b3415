"""What the configuration of a transformers network says of its texts and labels is heeded."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import as_data, check_runs, fit_data, load_data, load_tokenizer, open_series, output_of
from training_cases import TEXTS, bert_config, library, tokenizer

runner = CliRunner()
LONG = "a good film " * 9  # 29 tokens with those at both ends; the network takes 16


def network(folder: Path, **options: Any) -> Any:
    """A network for sequences, saved with its tokenizer."""
    transformers = library("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(bert_config(**options)).eval()
    model.save_pretrained(folder / "net")
    tokenizer(folder).save_pretrained(folder / "net")
    return model


def table(path: Path, texts: Sequence[str], labels: Sequence[Any], name: str = "label") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", name), *zip(texts, labels, strict=True)])
    return path


def test_texts_cut_at_the_networks_own_limit_are_told(tmp_path: Path) -> None:
    network(tmp_path)
    series = open_series("inspect", start=tmp_path / "net")
    path = table(tmp_path / "a.csv", ["fine", LONG, LONG], ["good", "bad", "bad"])
    for tokens in (series.tokenizer, load_tokenizer(tmp_path / "net", "inspect", 16)):
        data = load_data(path, tokenizer=tokens, classes=series.classes)
        assert isinstance(data.x, dict)
        assert data.x["input_ids"].shape == (3, 16)
        assert "2 of the 3 texts reach 16 tokens, and what comes after is cut." in data.notes
    data = load_data(path, tokenizer=series.tokenizer, classes=series.classes, max_length=5)
    assert "2 of the 3 texts reach 5 tokens, and what comes after is cut." in data.notes
    short = load_data(table(tmp_path / "b.csv", TEXTS, ["good"] * 8), tokenizer=series.tokenizer)
    assert not any("reach" in note for note in short.notes)


def test_a_length_beyond_the_networks_positions_is_refused(tmp_path: Path) -> None:
    network(tmp_path)
    path = table(tmp_path / "a.csv", ["fine", LONG], ["good", "bad"])
    words = "--max-length 17 is more than the 16 tokens that the network has positions for; give at most that many"
    series = open_series("inspect", start=tmp_path / "net")
    with pytest.raises(TangentError, match=words):
        load_data(path, tokenizer=series.tokenizer, max_length=17)
    given = ["kernel", "--weights", str(tmp_path / "net"), "--data", str(path), "--out", str(tmp_path / "K.zarr")]
    for more in ([], ["--tokenizer", str(tmp_path / "net")]):
        done = runner.invoke(cli.app, [*given, *more, "--max-length", "17"])
        assert done.exit_code == 1
        assert words in " ".join(done.output.replace("│", " ").split())


STARS = (1, 2, 3, 4, 5, 1, 2, 3)


@pytest.mark.parametrize(
    ("problem", "scores", "labels", "told"),
    [
        (
            "regression",
            STARS,
            "real targets",
            "The network is for regression, so the numbers in 'score' are real targets.",
        ),
        ("regression", (0, 1) * 4, "real targets", "The network is for regression"),
        (None, STARS, "real targets", "The network has one output, so labels, which are more than two whole numbers,"),
        (None, (0, 1) * 4, "classes", None),
    ],
)
def test_whole_scores_are_real_targets_of_a_network_for_regression(
    problem: str | None, scores: Sequence[int], labels: str, told: str | None, tmp_path: Path
) -> None:
    model = network(tmp_path, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0}, problem_type=problem)
    with torch.no_grad():
        model.classifier.weight.mul_(3)
    model.save_pretrained(tmp_path / "end")
    path = table(tmp_path / "a.csv", TEXTS, scores, "score")
    found = at.inspect(str(tmp_path / "net"), tmp_path / "net", tmp_path / "end", data=path, nodes=1)
    assert found.results["data"]["labels"] == labels
    assert told is None or any(told in limit for limit in found.results["limits"])
    if labels == "real targets":
        y = np.array(scores, dtype=float)
        assert np.array_equal(found.arrays["target"][:, 0], y)
        out = found.arrays["outputs.end"][:, 0].astype(float)
        assert found.results["performance"]["end"]["mse"] == pytest.approx(np.mean((out - y) ** 2), rel=1e-5)
    else:
        assert np.array_equal(found.arrays["target"][:, 0], 2 * np.array(scores) - 1)


def test_regression_takes_numbers_alone_whatever_they_are_kept_in(tmp_path: Path) -> None:
    network(tmp_path, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0}, problem_type="regression")
    tokens = open_series("inspect", start=tmp_path / "net").tokenizer
    words = r"the label 'good' at line 3 of .*a\.csv is no number, and the network is for regression .*; give numbers"
    mixed = table(tmp_path / "a.csv", ["fine", "poor"], ["1", "good"])
    with pytest.raises(TangentError, match=words):
        load_data(mixed, tokenizer=tokens, amounts=True)
    assert_real(as_data((torch.ones(3, 2), torch.tensor([1, 0, 1])), amounts=True).y, [1.0, 0.0, 1.0])
    rows = as_data((torch.ones(2, 2), [[1, 0], [2, 3]]), amounts=True).y
    assert_real(rows, [[1.0, 0.0], [2.0, 3.0]])


def assert_real(y: torch.Tensor | None, values: Any) -> None:
    assert y is not None
    assert y.is_floating_point()
    assert y.tolist() == values


def test_whole_numbers_of_a_table_are_amounts_if_the_network_has_one_output(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("v,w,stars\n" + "".join(f"{k},{k * k % 7},{k % 5 + 1}\n" for k in range(20)))
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    for output, kind in ((None, "real"), (lambda out: out[:, 0], "real"), (lambda out: out.expand(-1, 6), "classes")):
        data = load_data(path, most=8)
        fitted = fit_data(data, model)
        _, made = output_of(output, model, fitted)
        assert made.y is not None
        assert made.y.dtype == (torch.float32 if kind == "real" else torch.int64)
        assert torch.equal(made.y.long(), data.numbers % 5 + 1)
    _, lost = output_of("loss", model, fit_data(load_data(path), model))
    assert any("the mean squared error of its outputs" in note for note in lost.notes)
    two = tmp_path / "b.csv"
    two.write_text("v,w,label\n" + "".join(f"{k},{k * k % 7},{k % 2}\n" for k in range(20)))
    _, made = output_of(None, model, fit_data(load_data(two), model))
    assert made.labels is not None  # two classes


def test_a_network_that_lacks_a_padding_token_is_refused_with_the_setting_to_make(tmp_path: Path) -> None:
    transformers = library("transformers")
    words = {
        "vocab_size": 14,
        "n_embd": 4,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**words)).eval()
    data = as_data({"input_ids": torch.tensor([[5, 7, 9], [5, 0, 0]])})
    with pytest.raises(
        TangentError, match=r"say which token pads, as its pad_token_id: in the config\.json of its folder"
    ):
        check_runs(model, data, Path("a.csv"))
    model.config.pad_token_id = 0  # as the message says
    check_runs(model, data, Path("a.csv"))
    far = as_data({"input_ids": torch.tensor([[5, 7, 90], [5, 0, 0]])})
    with pytest.raises(TangentError, match="give tokens of its own tokenizer, and no more of them than it takes"):
        check_runs(model, far, Path("a.csv"))

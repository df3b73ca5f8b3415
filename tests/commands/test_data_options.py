"""Data and outputs on the command line: tables, texts, samples held out, losses; what is refused says what there is."""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner, Result

import adaptive_tangents as at
from adaptive_tangents import cli
from adaptive_tangents.commands.reading import Reading
from adaptive_tangents.loading import as_data, load_tokenizer
from study_cases import explained_in_rounds, plain_figures

runner = CliRunner()
FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(12, 3), nn.Linear(3, 12)

    def forward(self, input_ids, attention_mask):
        summed = (self.table(input_ids) * attention_mask[:, :, None]).cumsum(1)
        return {"logits": self.head(torch.tanh(summed))}

def reader():
    torch.manual_seed(0)
    return Reader()

def first(out):
    return out["logits"][:, 0, :2]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factory_of_tables.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(0)
    for name, n in (("seen", 30), ("unseen", 12)):
        x = torch.randn(n, 2, generator=generator)
        rows = [f"{a},{b},{'yes' if a + b > 0 else 'no'}" for a, b in x.tolist()]
        (tmp_path / f"{name}.csv").write_text("\n".join(["left,right,answer", *rows]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return tmp_path


def run(command: str, *options: str) -> Result:
    return runner.invoke(cli.app, [command, *options], catch_exceptions=False)


def checkpoints(folder: Path) -> None:
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))
    torch.save(model.state_dict(), folder / "start.pt")
    rows = (folder / "seen.csv").read_text().splitlines()[1:]
    x = torch.tensor([[float(v) for v in row.split(",")[:2]] for row in rows])
    y = torch.tensor([int(row.endswith("yes")) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "end.pt")


def test_inspect_reads_a_table_and_tells_samples_held_out_apart(folder: Path) -> None:
    checkpoints(folder)
    given = [
        "--model",
        "factory_of_tables.py:make",
        "--start",
        "start.pt",
        "--end",
        "end.pt",
        "--data",
        "seen.csv",
        "--quick",
    ]
    done = run("inspect", *given, "--out", "out")
    assert done.exit_code == 1
    assert "answer (text)" in " ".join(done.output.split())
    with plain_figures("inspect"), explained_in_rounds(1):
        done = run("inspect", *given, "--label", "answer", "--held-out", "unseen.csv", "--out", "out")
    assert done.exit_code == 0, done.output
    assert "x holds the 2 numeric columns left, right of seen.csv" in done.output
    found = json.loads((folder / "out" / "results.json").read_text())
    assert found["held_out"]["trained"]["samples"] + found["held_out"]["held_out"]["samples"] == 32
    assert found["held_out"]["held_out"]["samples"] >= 8
    assert found["held_out"]["held_out"]["performance"]["end"]["accuracy"] > 0.7
    assert found["data"]["classes"] == ["no", "yes"]


@pytest.mark.slow
def test_forecast_learns_from_samples_that_are_not_held_out(folder: Path) -> None:
    given = [
        "--model",
        "factory_of_tables.py:make",
        "--data",
        "seen.csv",
        "--label",
        "answer",
        "--quick",
        "--steps",
        "1",
    ]
    with plain_figures("foretold"), explained_in_rounds(1):
        done = run("forecast", *given, "--held-out", "unseen.csv", "--out", "out")
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "out" / "results.json").read_text())["held_out"]["held_out"]["samples"] >= 8
    done = run("forecast", *given, "--output", "loss", "--out", "loss")
    assert done.exit_code == 1
    assert "forecast: a loss has no targets" in " ".join(done.output.split())


def test_kernel_reads_texts_by_a_tokenizer_of_a_folder(folder: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    words = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "a", "good", "bad", "film", "the"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "tokens").mkdir()
    tokenizer.save(str(folder / "tokens" / "tokenizer.json"))
    plain = load_tokenizer(folder / "tokens", "kernel")
    assert plain.pad_token is None  # type: ignore[attr-defined]
    assert as_data(["a", "a good film"], tokenizer=plain).x["input_ids"].tolist() == [[2, 0, 0], [2, 3, 5]]
    assert plain.pad_token is None  # type: ignore[attr-defined]
    (folder / "texts.csv").write_text("text,label\na good film,pos\nthe bad film again,neg\nbad film,neg\n")
    given = ["--model", "factory_of_tables.py:reader", "--data", "texts.csv"]
    done = run("kernel", *given, "--out", "K.zarr")
    assert "holds texts, and nothing says how" in " ".join(done.output.split())
    ids = torch.tensor([[2, 3, 5, 0], [6, 4, 5, 1], [4, 5, 0, 0]])
    mask = (torch.arange(4) < torch.tensor([[3], [4], [2]])).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    scope: dict[str, Any] = {}
    exec(FACTORY, scope)
    model = scope["reader"]()
    logits = model(**batch)["logits"]
    losses = [
        torch.nn.functional.cross_entropy(logits[row, : n - 1], ids[row, 1:n])
        for row, n in enumerate(mask.sum(1).tolist())
    ]
    wanted = {
        "loss": torch.stack(losses)[:, None],
        "last-token": logits[torch.arange(3), mask.sum(1) - 1],
        "factory_of_tables.py:first": logits[:, 0, :2],
    }
    for output, values in wanted.items():
        out = f"{output.rpartition(':')[2]}.zarr"
        done = run("kernel", *given, "--tokenizer", "tokens", "--output", output, "--outputs", "trace", "--out", out)
        assert done.exit_code == 0, done.output
        parameters = list(model.parameters())
        rows = [
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in values.flatten()
        ]
        phi = torch.stack(
            [
                torch.cat(
                    [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, parameters, strict=True)]
                )
                for row in rows
            ]
        ).reshape(3, values.shape[1], -1)
        made = torch.as_tensor(at.open_kernel(folder / out).read())
        torch.testing.assert_close(made, torch.einsum("acp,bcp->ab", phi, phi), rtol=1e-4, atol=1e-5)


def test_data_that_leave_something_open_end_in_one_line(folder: Path) -> None:
    given = ["kernel", "--model", "factory_of_tables.py:make", "--out", "K.zarr", "--data"]
    for options, words in (
        (
            ["seen.csv", "--label", "verdict"],
            "kernel: seen.csv has no column 'verdict'; its columns are left (numbers)",
        ),
        (["seen.csv", "--text", "body"], "kernel: seen.csv has no column 'body'"),
        (["nothing.csv"], "kernel: there is no data file nothing.csv"),
        (["seen.csv", "--label", "answer", "--output", "all"], "kernel: --output is loss, last-token, module:function"),
        (["seen.csv", "--label", "answer", "--output", "no.such:thing"], "kernel: importing no.such failed"),
        (["seen.csv", "--label", "answer", "--tokenizer", "nowhere"], "kernel: there is no folder nowhere"),
        (["seen.csv", "--image-size", "big"], "kernel: --image-size is a number of pixels"),
    ):
        done = runner.invoke(cli.app, [*given, *options])
        assert done.exit_code == 1
        assert words in " ".join(done.output.split())


@pytest.mark.parametrize(("name", "without"), [("inspect", set()), ("forecast", set()), ("kernel", {"held_out"})])
def test_a_command_takes_every_option_of_data_in_one_place(name: str, without: set[str]) -> None:
    taken = [option.name for option in get_command(cli.app).commands[name].params]
    wanted = [field.name for field in fields(Reading) if field.name not in without]
    first = taken.index(wanted[0])
    assert taken[first : first + len(wanted)] == wanted
    assert not without & set(taken)

"""Samples keep the numbers that they have in their source, and are the same whichever form the source has."""

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptive_tangents.errors import TangentError
from adaptive_tangents.inspection import InspectConfig, run
from adaptive_tangents.inspection.samples import moved
from adaptive_tangents.loading import Data, as_data, load_data, output_of

N, READ, SEED = 60, 12, 5


def table(path: Path, x: Tensor, y: Tensor) -> Path:
    """A table of x (n, d) and labels y, by its ending."""
    names = [f"x{j}" for j in range(x.shape[1])]
    rows = [{**dict(zip(names, row, strict=True)), "label": k} for row, k in zip(x.tolist(), y.tolist(), strict=True)]
    if path.suffix == ".npz":
        np.savez(path, x=x.numpy(), y=y.numpy())
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow")
        pytest.importorskip("pandas", reason="needs pandas").DataFrame(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*names, "label"])
            writer.writeheader()
            writer.writerows(rows)
    return path


X = torch.arange(N, dtype=torch.float64)[:, None]  # a sample is its own number
Y = torch.arange(N) % 2


def of_file(name: str) -> Callable[[Path], Any]:
    return lambda root: table(root / name, X, Y)


def frame(root: Path) -> Any:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    return pandas.DataFrame({"x": X[:, 0].numpy(), "label": Y.numpy()}, index=range(100, 100 + N))


def dataset(root: Path) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    return datasets.Dataset.from_dict({"x": X[:, 0].tolist(), "label": Y.tolist()})


def images(root: Path) -> Any:
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow")
    for k in range(N):
        path = root / "images" / "ab"[2 * k // N] / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(np.full((4, 4), k, dtype=np.uint8)).save(path)
    return root / "images"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "csv": of_file("a.csv"), "jsonl": of_file("a.jsonl"), "parquet": of_file("a.parquet"), "npz": of_file("a.npz"),
    "DataFrame": frame, "datasets": dataset, "images": images, "Dataset": lambda root: TensorDataset(X, Y),
    "shuffled DataLoader": lambda root: DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_samples_that_are_drawn_keep_their_numbers_and_how_many_there_are(source: str, tmp_path: Path) -> None:
    data = as_data(SOURCES[source](tmp_path), most=READ, seed=SEED)
    scale = 255 if source == "images" else 1
    assert data.size == N
    assert torch.equal((scale * torch.as_tensor(data.x).reshape(data.n, -1)[:, 0]).round().long(), data.numbers)
    assert data.y is not None
    labels = 2 * data.numbers // N if source == "images" else data.numbers % 2
    assert torch.equal(data.y, labels)
    some = data.take(torch.tensor([2, 0]))
    assert torch.equal(some.numbers, data.numbers[[2, 0]])
    assert some.size == N
    if "DataLoader" not in source:  # its own order decides
        assert torch.equal(data.take(data.drawn(READ, SEED)).numbers, draw(N, READ))
        assert torch.equal(data.take(data.drawn(5, SEED)).numbers, draw(N, 5))


def draw(n: int, count: int) -> Tensor:
    """The first of a random order, sorted."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SEED))[:count].sort().values


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double().eval()


def states(model: nn.Module) -> dict[str, Mapping[str, Tensor]]:
    start = {name: value.clone() for name, value in model.state_dict().items()}
    return {"start": start, "end": {name: 1.5 * value for name, value in start.items()}}


@pytest.mark.parametrize("samples", [READ, 8])
@pytest.mark.parametrize("held", [False, True])
def test_an_inspection_of_a_table_is_that_of_the_same_samples_in_an_npz_file(
    held: bool, samples: int, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (50, 10))
    found = []
    for ending in (".npz", ".csv"):
        seen = table(tmp_path / f"seen{ending}", x, (x[:, 0] > 0).long())
        unseen = table(tmp_path / f"unseen{ending}", other, (other[:, 0] > 0).long())
        data = load_data(seen, held_out=unseen if held else None, most=READ, seed=SEED)
        model = network()
        found.append(run(model, states(model), data, InspectConfig(samples=samples, seed=SEED, nodes=1)))
    one, two = found
    total = 60 if held else 50
    for each in found:
        numbers = torch.from_numpy(each.arrays["sample"])
        assert each.results["data"]["of"] == total
        wanted = f"Kernels are of {samples} of the {total} samples, drawn with seed {SEED}."
        assert wanted in each.results["limits"]
        assert ("held_out" in each.arrays) == held
        if held:
            assert "10 samples are held out" in " ".join(each.results["limits"])
            flag = torch.from_numpy(each.arrays["held_out"])
            assert int(flag.sum()) == samples // 4
            assert numbers[flag].max() < 10
            most, least = moved(each.results, each.arrays)
            order = np.argsort(-np.linalg.norm(each.arrays["change"], axis=1), kind="stable")
            titles = [f"{'held-out ' if flag[k] else ''}sample {numbers[k]}" for k in order]
            assert [sample.title for sample in (*most, *least)] == titles[: len(most)] + titles[-len(least) :]
            rows = torch.where(flag[:, None], other[numbers.clamp_max(9)], x[numbers])
        else:
            assert torch.equal(numbers, draw(50, samples))
            rows = x[numbers]
        outputs = torch.func.functional_call(model, dict(states(network())["start"]), (rows,)).detach()
        assert torch.allclose(torch.from_numpy(each.arrays["outputs.start"]), outputs)
    for name in one.arrays:
        assert np.array_equal(one.arrays[name], two.arrays[name]), name
    for key in ("growth", "performance", "held_out", "outputs", "trajectory"):
        assert one.results[key] == two.results[key], key


def test_held_out_samples_are_in_proportion_to_the_files_and_a_quarter_at_least(tmp_path: Path) -> None:
    many, few = table(tmp_path / "many.csv", X, Y), table(tmp_path / "few.csv", X[:6], Y[:6])
    for seen, unseen, counts in ((many, few, (12, 4)), (few, many, (4, 12)), (many, many, (8, 8)), (few, few, (6, 6))):
        data = load_data(seen, held_out=unseen, most=16, seed=SEED)
        assert data.held_out is not None
        assert ((~data.held_out).sum(), data.held_out.sum()) == counts
        assert torch.equal(torch.as_tensor(data.x)[:, 0].long(), data.numbers)
    with pytest.raises(TangentError, match="most must be at least 2"):
        load_data(many, held_out=few, most=1)


def test_the_first_samples_of_a_loader_are_not_said_to_be_drawn() -> None:
    x = torch.randn(30, 3, dtype=torch.float64)
    data = as_data(DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=5), most=8)
    model = network()
    limits = run(model, states(model), data, InspectConfig(samples=8, nodes=1)).results["limits"]
    assert "Kernels are of 8 of the 30 samples." in limits
    assert "Of the DataLoader, the first 8 of the 30 samples were read." in limits


def test_errors_name_a_sample_by_its_place_in_the_file(tmp_path: Path) -> None:
    def letters(texts: list[str]) -> dict[str, Tensor]:
        ids = torch.tensor([[ord(text[0]) if text[0] != "!" else 0, 0] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"{'!' if k == 40 else 'a'},0\n" for k in range(N)))
    seed = next(s for s in range(99) if 40 in torch.randperm(N, generator=torch.Generator().manual_seed(s))[:4])
    with pytest.raises(TangentError, match=r"the text of line 42 of .*a\.csv has no tokens"):
        load_data(path, tokenizer=letters, most=4, seed=seed)


def test_a_sequence_without_a_token_that_counts_is_named_by_its_place_in_the_file() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedded, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, input_ids: Tensor) -> Tensor:
            made: Tensor = self.head(self.embedded(input_ids))
            return made

    y = torch.zeros(2, 3, dtype=torch.int64)
    y[1] = -100
    data = Data({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, y, rows=torch.tensor([4, 31]), sizes=(N,))
    with pytest.raises(TangentError, match=r"sample 31 .* has no token whose loss counts"):
        output_of("loss", Tokens(), data, causal=True)

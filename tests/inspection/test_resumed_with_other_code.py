"""`--resume` refuses a network whose code has changed, also where its outputs or states do not show it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.inspection import InspectConfig, Kept, KeptInFolder, run, same_network
from adaptive_tangents.inspection.kept import Record
from adaptive_tangents.inspection.problem import pose
from adaptive_tangents.inspection.same_network import marked
from adaptive_tangents.inspection.tangents import Tangents
from adaptive_tangents.loading import Data

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
CONFIG = InspectConfig(nodes=2, fit_operations=1)


class Network(nn.Module):
    def __init__(self, *, exact: bool = True, detached: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.branch, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.act, self.detached = nn.GELU("none" if exact else "tanh"), detached

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.branch(x.detach() if self.detached else x).relu()
        logits: Tensor = self.head(x)
        return logits


def states(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    start = Network().to(dtype).state_dict()
    return {f"s{k}": {name: (1 + 0.2 * k) * value for name, value in start.items()} for k in range(2)}


def begun(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A run that is interrupted before the kernel of the end."""

    def stopped(stage: str, fraction: float) -> None:
        if stage == "end":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            Network().to(dtype), states(dtype), Data(X), CONFIG, progress=stopped,
            kept=KeptInFolder(folder, resume=False),
        )  # fmt: skip


def resumed(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    run(model.to(dtype), states(dtype), Data(X), CONFIG, kept=KeptInFolder(folder, resume=True))


def test_derivatives_that_outputs_do_not_show_are_compared(tmp_path: Path) -> None:
    begun(tmp_path)
    words = (
        r"inspect: the network's derivatives at the start are not those of the run that .*stages holds stages of \(most in "
        "stem\\), though its outputs are: its code has changed; give the same network"
    )
    with (
        pytest.warns(at.TangentWarning, match="the outputs do not change with"),
        pytest.raises(at.TangentError, match=words),
    ):
        resumed(tmp_path, Network(detached=True))
    resumed(tmp_path, Network())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_differ_by_little_more_than_rounding_are_others(tmp_path: Path, dtype: torch.dtype) -> None:
    begun(tmp_path, dtype)
    exact, near = (Network(exact=exact).to(dtype)(X.to(dtype)).detach() for exact in (True, False))
    assert float((exact - near).abs().max()) < 1e-3 * float(exact.abs().max())
    with pytest.raises(at.TangentError, match="the network's outputs are not those of the run that"):
        resumed(tmp_path, Network(exact=False), dtype)


class Elsewhere(KeptInFolder):
    """Stages of a run with other threads, whose outputs and marks were rounded in another way."""

    def get(self, name: str) -> Record | None:
        found = super().get(name)
        if found is None or name != "choices":
            return found
        return Record(
            {**found.numbers, "threads": -1}, {key: value * (1 + 1e-4) for key, value in found.tensors.items()}
        )


def test_a_run_with_other_threads_may_round_in_another_way_and_no_more(tmp_path: Path) -> None:
    begun(tmp_path)
    with (
        pytest.warns(at.TangentWarning),
        pytest.raises(at.TangentError, match="the network's derivatives at the start"),
    ):
        run(Network(detached=True), states(torch.float32), Data(X), CONFIG, kept=Elsewhere(tmp_path, resume=True))
    run(Network(), states(torch.float32), Data(X), CONFIG, kept=Elsewhere(tmp_path, resume=True))


def test_stages_without_marks_are_resumed_by_their_outputs(tmp_path: Path) -> None:
    class Earlier(KeptInFolder):
        def get(self, name: str) -> Record | None:
            found = super().get(name)
            if found is None or name != "choices":
                return found
            numbers = {key: found.numbers[key] for key in ("samples", "nodes", "chunk")}
            return Record(numbers, {key: value for key, value in found.tensors.items() if key.isdigit()})

    begun(tmp_path)
    run(Network(), states(torch.float32), Data(X), CONFIG, kept=Earlier(tmp_path, resume=True))


def test_marks_are_products_of_a_random_weighted_gradient_with_random_vectors_and_its_norm() -> None:
    model, ends = Network().double(), states(torch.float64)
    problem = pose(model, ends, Data(X), InspectConfig(nodes=2, outputs="all"), Kept())
    count, marks = marked(problem.tangents, {"end": ends["s1"]})
    assert count == 4
    drawn = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 2, generator=drawn, dtype=torch.float64)
    few = X[torch.linspace(0, 23, 4).long()].double()
    parameters = {name: value.clone().requires_grad_() for name, value in ends["s1"].items()}
    total = (torch.func.functional_call(model, parameters, (few,)) * weights).sum()
    gradient = dict(zip(parameters, torch.autograd.grad(total, [*parameters.values()]), strict=True))
    for row, layer in zip(marks["mark end"], ("stem", "branch", "head"), strict=True):
        matrix = torch.cat([gradient[f"{layer}.weight"], gradient[f"{layer}.bias"][:, None]], 1)
        left = torch.randn(2, len(matrix), generator=drawn, dtype=torch.float64)
        right = torch.randn(matrix.shape[1], 2, generator=drawn, dtype=torch.float64)
        wanted = [*(left[k] @ matrix @ right[:, k] for k in range(2)), matrix.norm()]
        assert row.tolist() == pytest.approx([float(value) for value in wanted], rel=1e-9)


@pytest.mark.parametrize(("keeps", "calls"), [(False, 0), (True, 2)])
def test_only_a_run_that_may_be_resumed_takes_a_few_samples_twice_more(
    keeps: bool, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plainly = same_network._mark

    def counted(tangents: Tangents, few: Tensor, state: dict[str, Tensor]) -> Tensor:
        seen.append(len(few))
        return plainly(tangents, few, state)

    monkeypatch.setattr(same_network, "_mark", counted)
    run(
        Network(),
        states(torch.float32),
        Data(X),
        CONFIG,
        kept=KeptInFolder(tmp_path, resume=False) if keeps else Kept(),
    )
    assert seen == [4] * calls

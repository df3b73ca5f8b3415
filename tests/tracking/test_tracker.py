"""A tracker's numbers are those of the kernel at that state, and training does not notice it."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import adaptive_tangents as at
from adaptive_tangents.tracking.arguments import check_log
from adaptive_tangents.tracking.layers import check_groups
from snapshots import Snapshot, shared_state

N, C = 24, 3


def network(seed: int = 0, outputs: int = C) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, outputs)
    )


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def train(model: nn.Module, steps: int, watch: Callable[[int], Any] = lambda step: None) -> list[Tensor]:
    """Train with dropout, batch statistics and momentum; every tensor that training leaves."""
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(steps):
        watch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.state_dict().values(), *held, torch.get_rng_state()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def twin_kernels(model: nn.Module, x: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Kernels summed over outputs of each module's parameters, from Jacobians sample by sample, in float64."""
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def outputs(values: dict[str, Tensor], one: Tensor) -> Tensor:
        found: Tensor = functional_call(model, {**values, **buffers}, (one[None],))[0]
        return found

    jacobians = vmap(jacrev(outputs), (None, 0))(parameters, x.double())
    kernels: dict[str, np.ndarray[Any, Any]] = {}
    for name, jacobian in jacobians.items():
        flat = jacobian.flatten(1).detach().numpy()
        group = f"layer {name.partition('.')[0]}"
        kernels[group] = kernels.get(group, 0) + flat @ flat.T
    return {"all": np.sum(list(kernels.values()), axis=0), **kernels}


def cosine(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any], *, centered: bool) -> float:
    middle = np.eye(len(one)) - (1 / len(one) if centered else 0)
    one, two = middle @ one @ middle, middle @ two @ middle
    return float((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))


def test_the_numbers_of_a_record_are_those_of_the_kernel_of_jacobians_at_that_state() -> None:
    model, (x, y) = network(), data()
    tracker = at.Tracker(model, x, y, budget=None)
    first, start = tracker.record(), twin_kernels(model, x)
    f0 = copy.deepcopy(model).double().eval()(x.double()).detach()
    train(model, 7)
    tracker.record()
    before = twin_kernels(model, x)
    train(model, 5)
    model.train()
    found, kernels = tracker.record(), twin_kernels(model, x)
    assert first is not None
    assert found is not None
    assert found.whole is not None
    f = copy.deepcopy(model).double().eval()(x.double()).detach()
    labels = nn.functional.one_hot(y, C).double().numpy()
    change = (f - f0).numpy()
    assert list(found.groups) == ["layer 0", "layer 1", "layer 4"] == [name for name in kernels if name != "all"]
    for group, numbers in {"all": found.whole, **found.groups}.items():
        K = kernels[group]
        expected = {
            "trace": np.trace(K),
            "alignment": cosine(K, labels @ labels.T, centered=False),
            "alignment_centered": cosine(K, labels @ labels.T, centered=True),
            "alignment_change": cosine(K, change @ change.T, centered=False),
            "alignment_change_centered": cosine(K, change @ change.T, centered=True),
            "cka_start": cosine(K, start[group], centered=True),
            "cka_last": cosine(K, before[group], centered=True),
        }
        assert {name: getattr(numbers, name) for name in expected} == pytest.approx(expected, rel=2e-5), group
    assert found.moved == pytest.approx(float((f - f0).square().mean().sqrt()), rel=1e-5)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(f, y)), rel=1e-5)
    assert found.accuracy == float((f.argmax(1) == y).double().mean())
    assert first.whole is not None
    assert (first.moved, first.whole.alignment_change, first.whole.cka_last) == (0.0, None, None)
    assert first.whole.cka_start == pytest.approx(1)


def test_the_numbers_are_those_of_the_librarys_own_measures_of_its_own_kernel() -> None:
    model, (x, y) = network(), data()
    tracker = at.Tracker(model, x, y, budget=None)
    tracker.record()
    train(model, 4)
    record = tracker.record()
    blocks = at.tangent_kernel(model.eval(), x, outputs="trace", by_block=True)
    K = torch.stack([kernel.double() for kernel in blocks.values()]).sum(0)
    assert record is not None
    assert record.whole is not None
    assert record.whole.trace == pytest.approx(float(K.trace()), rel=1e-12)
    assert record.whole.alignment == pytest.approx(at.alignment(K, y), rel=1e-12)
    assert record.whole.alignment_centered == pytest.approx(at.alignment(K, y, centered=True), rel=1e-12)
    head = at.tangent_kernel(model, x, outputs="trace", wrt="4.*").double()
    assert record.groups["layer 4"].trace == pytest.approx(float(head.trace()), rel=1e-6)
    assert sum(numbers.trace for numbers in record.groups.values()) == pytest.approx(record.whole.trace, rel=1e-12)


# training goes on as without it


def test_training_gives_bit_for_bit_the_parameters_buffers_and_draws_of_training_without_a_tracker() -> None:
    plain, watched = network(), network()
    expected = train(plain, 12)
    torch.manual_seed(0)
    watched = network()
    tracker = at.Tracker(watched, *data(), budget=None, every=2)
    assert same(train(watched, 12, tracker.record), expected)
    assert len(tracker.records) == 6


def bfloat16(model: nn.Module, x: Tensor, y: Tensor, meanwhile: Callable[[], Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
        meanwhile()
    loss.backward()


def between_forward_and_backward(model: nn.Module, x: Tensor, y: Tensor, meanwhile: Callable[[], Any]) -> None:
    loss = nn.functional.cross_entropy(model(x), y)
    meanwhile()
    loss.backward()


def accumulating(model: nn.Module, x: Tensor, y: Tensor, meanwhile: Callable[[], Any]) -> None:
    for part in (slice(0, 10), slice(10, None)):
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        meanwhile()


def scaled(model: nn.Module, x: Tensor, y: Tensor, meanwhile: Callable[[], Any]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    before = scaler.state_dict()
    meanwhile()
    assert scaler.state_dict() == before


def without_gradients(model: nn.Module, x: Tensor, y: Tensor, meanwhile: Callable[[], Any]) -> None:
    nn.functional.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        meanwhile()
    with torch.inference_mode():
        meanwhile()


def moved(p: Tensor) -> None:
    """A hook that tells whether it ran."""
    assert p.grad is not None
    p.grad.add_(1e-3)


def hooked(model: nn.Module, x: Tensor, y: Tensor, meanwhile: Callable[[], Any]) -> None:
    with torch.no_grad():
        handles = [p.register_hook(lambda gradient: gradient * 0.5) for p in model.parameters()]
        handles += [p.register_post_accumulate_grad_hook(moved) for p in model.parameters()]
    meanwhile()
    nn.functional.cross_entropy(model(x), y).backward()
    for handle in handles:
        handle.remove()


def compiled(model: nn.Module, x: Tensor, y: Tensor, meanwhile: Callable[[], Any]) -> None:
    between_forward_and_backward(model, x, y, meanwhile)


WAYS = (bfloat16, between_forward_and_backward, accumulating, scaled, without_gradients, hooked, compiled)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_in_the_middle_of_a_step_gradients_are_those_without_a_tracker(way: Callable[..., None]) -> None:
    def steps(watched: bool) -> list[Tensor]:
        model, (x, y) = network(), data()
        seen = torch.compile(model, backend="eager") if way is compiled else model
        tracker = at.Tracker(seen, x, y, budget=None)
        torch.manual_seed(3)
        for _ in range(3):
            way(seen, x, y, tracker.record if watched else lambda: None)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        assert len(tracker.records) >= 3 * watched
        return [*(p.grad for p in model.parameters()), *model.state_dict().values(), torch.get_rng_state()]

    assert same(steps(True), steps(False))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_network_wrapped_for_data_parallel_training_is_measured_and_trained_as_without() -> None:
    def steps(watched: bool) -> list[Tensor]:
        model, (x, y) = network(), data()
        wrapped = nn.parallel.DistributedDataParallel(model)
        tracker = at.Tracker(wrapped, x, y, budget=None)
        torch.manual_seed(3)
        for _ in range(2):
            loss = nn.functional.cross_entropy(wrapped(x), y)
            if watched:
                tracker.record()
            loss.backward()
        assert len(tracker.records) == 2 * watched
        return [p.grad for p in model.parameters()]

    assert same(steps(True), steps(False))


def test_a_record_leaves_model_batch_and_process_as_found() -> None:
    model, (x, y) = network(), data()
    model[1].eval()  # a norm that is frozen, in a network in training mode
    model[0].weight.requires_grad_(False)
    nn.functional.cross_entropy(model(x), y).backward()
    tracker = at.Tracker(model, x, y, budget=None)
    tracker.record()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    modes = [module.training for module in model.modules()]
    before, shared = Snapshot(model, x, y), shared_state()
    tracker.record()
    assert not before.changes(Snapshot(model, x, y))
    after = shared_state()
    assert not [name for name in shared if name != "Python's draws" and shared[name] != after[name]]
    assert [module.training for module in model.modules()] == modes == [True, True, False, True, True, True]


def test_an_interrupted_record_leaves_modes_and_draws_as_found() -> None:
    model, (x, y) = network(), data()

    def stopped(out: Tensor) -> Tensor:
        torch.rand(3)
        raise KeyboardInterrupt

    tracker = at.Tracker(model, x, y, output_fn=stopped)
    draws = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        tracker.record()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), draws)
    assert tracker.records == ()


# targets, outputs, parameters


@pytest.mark.parametrize(
    ("y", "target"),
    [
        (torch.arange(N) % 2, torch.where(torch.arange(N) % 2 == 1, 1.0, -1.0)),
        (torch.arange(N) % 2 == 1, torch.where(torch.arange(N) % 2 == 1, 1.0, -1.0)),
        (2 * (torch.arange(N) % 2) + 3, torch.where(torch.arange(N) % 2 == 1, 1.0, -1.0)),
        (torch.linspace(-1, 1, N), torch.linspace(-1, 1, N)),
        (np.linspace(-1, 1, N), torch.linspace(-1, 1, N)),
    ],
    ids=["0 and 1", "flags", "3 and 5", "real", "an array"],
)
def test_targets_of_one_output(y: Any, target: Tensor) -> None:
    model, (x, _) = network(outputs=1), data()
    record = at.Tracker(model, x, y, samples=N).record()
    K = sum(kernel.double() for kernel in at.tangent_kernel(model.eval(), x, outputs="trace", by_block=True).values())
    f = model(x)[:, 0].detach().double()
    assert record is not None
    assert record.whole is not None
    assert record.whole.alignment == pytest.approx(at.alignment(K, target), rel=1e-6)
    if isinstance(y, np.ndarray) or y.is_floating_point():
        assert record.loss == pytest.approx(float((f - target).square().mean()), rel=1e-5)
        assert record.accuracy is None
    else:
        assert record.accuracy == float(((f > 0) == (target > 0)).double().mean())
        assert record.loss == pytest.approx(float(nn.functional.softplus(-f * target).mean()), rel=1e-5)


def test_without_labels_there_is_the_alignment_with_the_change_alone() -> None:
    model, (x, _) = network(), data()
    tracker = at.Tracker(model, x, budget=None)
    tracker.record()
    train(model, 3)
    record = tracker.record()
    assert record is not None
    assert record.whole is not None
    assert record.whole.alignment is None
    assert record.whole.alignment_change is not None
    assert (record.loss, record.accuracy) == (None, None)
    assert "tangents/alignment" not in record.scalars()


def test_the_kernel_of_many_outputs_is_estimated_along_random_directions_without_bias() -> None:
    model, (x, _) = network(outputs=40), data()
    y = torch.arange(N)
    whole = at.Tracker(model, x, y, outputs="trace", samples=N).record()
    assert whole is not None
    assert whole.whole is not None
    traces = []
    for seed in range(24):
        tracker = at.Tracker(model, x, y, samples=N, seed=seed)
        record = tracker.record()
        assert record is not None
        assert record.whole is not None
        traces.append(record.whole.trace)
    assert "8 random directions of the 40 outputs, an unbiased estimate" in tracker.summary()
    spread = np.std(traces) / len(traces) ** 0.5
    assert abs(np.mean(traces) - whole.whole.trace) < 4 * spread
    assert spread < 0.08 * whole.whole.trace
    again = at.Tracker(model, x, y, seed=23, samples=N).record()
    assert again is not None
    assert again.whole == record.whole


def test_parameters_that_require_a_gradient_only_later_are_said_in_the_record() -> None:
    model, (x, y) = network(), data()
    for p in model[0].parameters():
        p.requires_grad_(False)
    tracker = at.Tracker(model, x, y, budget=None)
    tracker.record()
    for p in model[0].parameters():
        p.requires_grad_(True)
    second = tracker.record()
    model[4].bias.requires_grad_(False)
    third, fourth = tracker.record(), tracker.record()
    assert second is not None
    assert third is not None
    assert fourth is not None
    assert "2 more parameters require a gradient (0.weight, 0.bias), so K is of other parameters" in second.note
    assert list(second.groups) == ["layer 0", "layer 1", "layer 4"]
    assert second.groups["layer 0"].cka_start == pytest.approx(1), "a group starts where it is first seen"
    assert "1 no longer require a gradient (4.bias)" in third.note
    assert fourth.note == ""


def test_given_parameters_and_groups_are_those_measured() -> None:
    model, (x, y) = network(), data()
    tracker = at.Tracker(model, x, y, samples=N, wrt=["0.*", "4.weight"], groups={"inner": ["0*"], "outer": "4*"})
    record = tracker.record()
    assert record is not None
    assert list(record.groups) == ["inner", "outer"]
    outer = at.tangent_kernel(model.eval(), x, outputs="trace", wrt="4.weight")
    assert record.groups["outer"].trace == pytest.approx(float(outer.trace()), rel=1e-5)


def test_numbers_in_float64_where_the_samples_are_in_float32_and_the_network_is_not() -> None:
    model, (x, y) = network().double(), data()
    record = at.Tracker(model, x, y, samples=N).record()
    assert record is not None
    assert record.whole is not None
    assert record.whole.trace == pytest.approx(float(np.trace(twin_kernels(model, x)["all"])), rel=1e-12)


def test_a_network_that_diverged_is_a_warning_and_a_note_and_records_go_on() -> None:
    model, (x, y) = network(), data()
    tracker = at.Tracker(model, x, y, budget=None)
    tracker.record()
    weight = model[0].weight.detach().clone()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.warns(at.TangentWarning, match=r"Tracker.record: step 1 is not measured: .*; training goes on"):
        lost = tracker.record()
    again = tracker.record()  # told once
    model[0].weight.data = weight
    found = tracker.record()
    assert lost is not None
    assert again is not None
    assert found is not None
    assert lost.whole is None
    assert "not measured" in lost.note
    assert found.whole is not None
    assert found.whole.cka_last == pytest.approx(1)
    assert tracker.table()[1]["trace"] is None
    assert "not measured" in tracker.summary()
    tracker.plot()


# a curve that goes on


def test_a_training_that_is_resumed_gives_the_records_of_one_that_was_not(tmp_path: Path) -> None:
    def states(record: at.tracking.Record) -> Any:
        return record.step, record.whole, record.groups, record.loss, record.moved, record.note

    model, (x, y) = network(), data()
    whole = at.Tracker(model, x, y, budget=None, samples=15, every=2)
    train(model, 9, whole.record)
    model = network()
    first = at.Tracker(model, x, y, budget=None, samples=15, every=2)
    x0, y0 = data()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(9):
        if step == 5:
            first.save(tmp_path / "curve.safetensors")
            second = at.Tracker(model, x, y, budget=None, every=2)
            second.load(tmp_path / "curve.safetensors")
            third = at.Tracker(model, x, y, budget=None, every=2)
            torch.save(first.state_dict(), tmp_path / "state.pt")
            third.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for tracker in (first,) if step < 5 else (second, third):
            tracker.record(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x0), y0).backward()
        optimizer.step()
    expected = [states(record) for record in whole.records]
    assert [states(record) for record in second.records] == expected
    assert [states(record) for record in third.records] == expected
    assert [record.step for record in second.records] == [0, 2, 4, 6, 8]
    assert second.cost.records == 5
    assert second.cost.seconds > first.cost.seconds
    second.save(tmp_path / "end.safetensors")
    history = at.tracking.load_history(tmp_path / "end.safetensors")
    assert history.records == second.records
    assert history.summary() == second.summary()
    assert "15 of 24 samples" in history.note
    empty = at.Tracker(model, x, y)
    empty.load_state_dict(at.Tracker(model, x, y).state_dict())
    assert empty.records == ()


# what there is to see


def test_records_as_a_table_a_frame_text_and_a_picture(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    model, (x, y) = network(), data()
    with at.Tracker(model, x, y, budget=None, every=5) as tracker:
        train(model, 12, lambda step: tracker.record(step, rate=torch.tensor(0.5)))
    assert [record.step for record in tracker.records] == [0, 5, 10, 11], "the last step is recorded at the end"
    assert tracker.close() is None
    assert [row.get("rate") for row in tracker.table()] == [0.5, 0.5, 0.5, None]
    frame = tracker.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 4 * (1 + 3)
    assert list(frame["group"][:4]) == ["all", "layer 0", "layer 1", "layer 4"]
    picture = tracker.plot()
    picture.savefig(tmp_path / "curve.png", dpi=50)
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert [axes.get_title(loc="left") for axes in picture.axes[:3]] == [
        "Alignment of the kernel", "CKA of the kernel", "Trace and loss",
    ]  # fmt: skip
    text = tracker.summary()
    assert "K of 24 samples in evaluation mode, exact, summed over all 3 outputs" in text
    assert "4 records, " in text
    assert repr(tracker).startswith("<Tracker of Sequential: 4 records, ")
    drawn = at.Tracker(model, x, budget=None)
    drawn.record()
    assert drawn.plot().axes
    for step in range(1, 15):
        drawn.record(step)
    assert "and 3 more records" in drawn.summary()


def test_numbers_go_to_a_writer_of_tensorboard_or_to_a_function(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, (x, y) = network(), data()
    writer = SummaryWriter(tmp_path)
    tracker = at.Tracker(model, x, y, budget=None, every=3, log=writer)
    train(model, 7, tracker.record)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("tangents/layer.4/trace")]
    assert read == [(r.step, pytest.approx(r.groups["layer 4"].trace, rel=1e-6)) for r in tracker.records]
    assert {"tangents/trace", "tangents/alignment_centered", "tangents/cka_start", "tangents/loss"} <= set(
        events.Tags()["scalars"]
    )
    heard: list[tuple[dict[str, float], int]] = []
    told = at.Tracker(model, x, y, log=lambda numbers, step: heard.append((numbers, step)))
    record = told.record(70)
    assert record is not None
    assert heard == [(record.scalars(), 70)]
    assert not [name for name in record.scalars(groups=False) if name.count("/") > 1]


def test_without_pandas_or_matplotlib_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(), data()
    tracker = at.Tracker(model, x, y)
    tracker.record()
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(at.TangentError, match=r"to_frame: pandas is not installed; pip install pandas, or use table\("):
        tracker.to_frame()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    for name in [name for name in __import__("sys").modules if name.startswith("adaptive_tangents.tracking.figures")]:
        monkeypatch.delitem(__import__("sys").modules, name)
    monkeypatch.setitem(__import__("sys").modules, "adaptive_tangents.reporting.drawing", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.axes", None)
    with pytest.raises(at.TangentError, match=r"plot: matplotlib is not installed; pip install 'adaptive-tangents\["):
        tracker.plot()


# errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "text"}, r"Tracker: x is a tensor, or a tuple"),
        ({"x": {"a": torch.zeros(3), "b": torch.zeros(4)}}, r"Tracker: every tensor of x has .* first, got \[3, 4\]"),
        ({"x": torch.zeros(0, 5)}, r"Tracker: every tensor of x has the samples first, got \[0\]"),
        ({"y": torch.zeros(7)}, r"Tracker: y has shape \(7,\) and x 24 samples; give class numbers \(24,\)"),
        ({"y": torch.zeros(N, 2, 2)}, r"Tracker: y has shape \(24, 2, 2\)"),
        ({"y": object()}, r"Tracker: give y as a tensor, a NumPy array or a list"),
        ({"samples": 0}, r"Tracker: samples is 1 to 24, the samples of x, got 0; or None"),
        ({"samples": 25}, r"Tracker: samples is 1 to 24"),
        ({"every": 0}, r"Tracker: every is a positive number of calls, got 0"),
        ({"budget": 0.0}, r"Tracker: budget is a share of the time of training, such as 0.05, got 0.0; None takes"),
        ({"budget": float("nan")}, r"Tracker: budget is a share"),
        ({"outputs": "some"}, r"Tracker: outputs is 'auto', 'trace' or a positive number of directions, got 'some'"),
        ({"outputs": 0}, r"Tracker: outputs is 'auto'"),
        ({"groups": {"all": "0*"}}, r"Tracker: groups\['all'\] is '0\*'; give a pattern .* a name other than 'all'"),
    ],
)  # fmt: skip
def test_what_a_tracker_cannot_take_is_an_error_that_says_what_to_give(change: dict[str, Any], message: str) -> None:
    x, y = data()
    given = {"model": network(), "x": x, "y": y, **change}
    with pytest.raises(at.TangentError, match=message):
        at.Tracker(given.pop("model"), given.pop("x"), given.pop("y"), **given)


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({}, torch.arange(N) % 4, r"Tracker: targets are class numbers from 0 to 3 and there are 3 outputs"),
        ({}, torch.zeros(N, 2), r"Tracker: y has 2 target\(s\) for each sample and the model 3 output\(s\); give class"),
        ({}, torch.linspace(0, 1, N), r"Tracker: y has 1 target\(s\) for each sample and the model 3 output\(s\)"),
        ({"groups": {"a": "nothing*"}}, None, r"Tracker.record: groups\['a'\]: 'nothing\*' matches no block; the blocks are"),
        ({"groups": {"a": "0", "b": "*"}}, None, r"Tracker.record: block '0' is in the groups 'a' and 'b'; narrow"),
        ({"wrt": "nothing"}, None, r"Tracker.record: wrt 'nothing' matches no parameter"),
        ({"output_fn": lambda out: out[:, :, None]}, None, r"Tracker.record: the output has shape"),
        ({"memory_limit": 10}, None, r"Tracker.record: .*memory"),
    ],
)  # fmt: skip
def test_what_only_the_first_record_can_tell_is_an_error_there(options: Any, y: Any, message: str) -> None:
    tracker = at.Tracker(network(), data()[0], y, **options)
    with pytest.raises(at.TangentError, match=message):
        tracker.record()
    assert tracker.records == ()


def test_a_value_that_is_no_number_and_a_picture_of_nothing_are_errors() -> None:
    tracker = at.Tracker(network(), *data())
    with pytest.raises(at.TangentError, match=r"plot: there is no record to draw; call record\(step\)"):
        tracker.plot()
    assert "no records yet" in tracker.summary()
    assert repr(tracker) == "<Tracker of Sequential: nothing was measured yet>"
    with pytest.raises(
        at.TangentError, match=r"Tracker.record: rate is a number, got Tensor; give one, e.g. loss.item\(\)"
    ):
        tracker.record(rate=torch.zeros(2))
    with pytest.raises(at.TangentError, match=r"Tracker: log is a writer with add_scalar, or a function .*, got int"):
        check_log("Tracker", 3)
    with pytest.raises(at.TangentError, match=r"Tracker: groups is a mapping from a group's name to patterns"):
        check_groups("Tracker", ["a"])
    with pytest.raises(at.TangentError, match=r"Tracker: groups\['a'\] is 3; give a pattern or a list of patterns"):
        check_groups("Tracker", {"a": 3})


def test_a_curve_of_other_samples_or_no_curve_at_all_is_refused(tmp_path: Path) -> None:
    model, (x, y) = network(), data()
    tracker = at.Tracker(model, x, y, budget=None)
    tracker.record()
    state, path = tracker.state_dict(), tmp_path / "curve.safetensors"
    tracker.save(path)
    with pytest.raises(at.TangentError, match=r"Tracker.load: this tracker has 1 records; load into a new one"):
        tracker.load(path)
    for other in ((x + 1, y), (x, (y + 1) % 3), (x[:9], y[:9]), (x, None)):
        with pytest.raises(
            at.TangentError, match=r"load_state_dict: the state was recorded on other samples or labels"
        ):
            at.Tracker(model, *other).load_state_dict(state)
    fresh = at.Tracker(model, x, y)
    for wrong in ({}, {"numbers": {}}, {"numbers": {**state["numbers"], "format": 9}, "tensors": {}}):
        with pytest.raises(at.TangentError, match=r"load_state_dict: the state is no tracker of this version"):
            fresh.load_state_dict(wrong)
    lacking = {"numbers": {k: v for k, v in state["numbers"].items() if k != "calls"}, "tensors": state["tensors"]}
    with pytest.raises(at.TangentError, match=r"load_state_dict: the state is damaged \('calls'\)"):
        fresh.load_state_dict(lacking)
    bent = {"numbers": {**state["numbers"], "records": [{"step": 0}]}, "tensors": state["tensors"]}
    with pytest.raises(at.TangentError, match=r"load_state_dict: the state is damaged"):
        fresh.load_state_dict(bent)
    assert fresh.records == ()
    (tmp_path / "text").write_text("no tracker")
    for read, call in ((fresh.load, "Tracker.load"), (at.tracking.load_history, "load_history")):
        with pytest.raises(
            at.TangentError, match=rf"{call}: .*text cannot be read \(.*give a file that Tracker.save wrote"
        ):
            read(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(at.TangentError, match=r"load_history: .*weights.safetensors is no tracker of this version"):
        at.tracking.load_history(tmp_path / "weights.safetensors")
    with pytest.raises(at.TangentError, match=r"save: .* cannot be written \(.*give another path"):
        tracker.save(tmp_path / "text" / "curve.safetensors")

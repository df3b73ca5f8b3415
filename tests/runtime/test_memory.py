"""Memory: what is free, limits, and that no tensor exceeds what was promised."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adaptive_tangents as at
from adaptive_tangents.features.kernel_layout import Outputs
from adaptive_tangents.runtime import memory
from cases import Forward, mlp, normal


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns, not counting views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Memory that `memory.empty` takes from NumPy first appears as a tensor of bytes.
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dtype == torch.uint8]
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in taken)])
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def largest(function: Callable[[], Any]) -> int:
    with Largest() as seen:
        function()
    return seen.bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (3, 5_000, 1_001)])
def test_empty_gives_memory_of_its_own_aligned_as_pytorch_aligns(shape, dtype) -> None:
    like = torch.zeros(2, dtype=dtype)
    one, two = memory.empty(shape, like), memory.empty(shape, like)
    assert one.shape == shape
    assert one.dtype == dtype
    assert one.is_contiguous()
    assert not one.requires_grad
    assert one.data_ptr() % 64 == 0
    one.fill_(1)
    two.fill_(2)
    assert bool((one == 1).all())
    assert memory.empty(shape, like, torch.float64).dtype == torch.float64


def test_where_numpy_has_no_memory_left_pytorch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(memory.np, "empty", refused)
    assert memory.empty((3, 1_000, 1_000), torch.zeros(2)).shape == (3, 1_000, 1_000)


def test_the_largest_tensor_is_seen() -> None:
    a = torch.ones(100, 100, dtype=torch.float64)
    assert largest(lambda: (a[:50].flatten(), a.mT, a.sum())) == 8
    assert largest(lambda: a @ a) == 80_000
    assert largest(lambda: memory.empty((1_000, 1_000), a).zero_()) == pytest.approx(8_000_000, abs=100)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("tokens", [1, 60], ids=["gram", "materialize"])
def test_a_kernel_never_holds_the_features(outputs: str, tokens: int) -> None:
    model = Forward(lambda m, x: m.body(x).mean(1), body=mlp(nn.Tanh, widths=(30, 40, 3)))
    feats = at.tangent_features(model, normal(24, tokens, 30))
    whole = feats.n * feats.c * feats.p * 8
    plan = feats.plan(outputs=outputs)
    room = 30_000
    limited = at.TangentFeatures(feats.n, feats.c, feats.blocks, feats.parameters, plan.kernel_bytes + room)
    assert {b.route for b in plan.blocks if b.name == "body.0"} == {"gram" if tokens == 1 else "materialize"}
    held = max(t.numel() * 8 for b in feats.blocks.values() for t in vars(b.outer).values())
    peak = largest(lambda: limited.kernel(outputs=outputs))
    assert peak <= max(plan.kernel_bytes, room, held)
    assert whole > 20 * room
    torch.testing.assert_close(limited.kernel(outputs=outputs), feats.kernel(outputs=outputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nodes", [1, 6])
def test_average_features_and_their_kernel_never_hold_the_features(nodes: int) -> None:
    model, x = mlp(nn.Tanh, widths=(60, 80, 60, 2)), normal(30, 60)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    end = {k: v + 0.1 for k, v in start.items()}
    whole = 30 * 2 * sum(v.numel() for v in start.values()) * 8
    peak = largest(lambda: at.average_features(model, start, end, x, nodes=nodes, memory_limit=2_000_000).kernel())
    assert whole > 4_500_000
    assert peak <= 1_000_000  # half the limit: two tiles of features


def test_a_kernel_in_tiles_never_holds_the_features_of_all_samples() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 1)).double(),
        normal(80, 1, 8, 8),
    )
    whole = 80 * sum(v.numel() for v in model.parameters()) * 8
    factors = 80 * (288 + 1) * 8
    peak = largest(lambda: at.tangent_kernel(model, x, tile=8))
    assert peak < 80 * 288 * 8  # activations of the interaction probes, on at most 32 samples
    assert min(whole, factors) > peak


def test_a_plan_tells_what_a_kernel_will_take_before_it_runs() -> None:
    feats = at.tangent_features(mlp(nn.Tanh, widths=(30, 40, 3)), normal(24, 30))
    plan = feats.plan()
    assert plan.kernel_bytes == 24 * 3 * 24 * 3 * 8
    assert plan.feature_bytes == feats.bytes == 24 * (3 * 40 + 31 + 3 * 3 + 41) * 8
    assert plan.bytes == plan.kernel_bytes + plan.feature_bytes + max(b.working_bytes for b in plan.blocks)
    assert plan.operations == sum(b.operations for b in plan.blocks)
    peak = largest(feats.kernel)
    assert peak <= max(plan.kernel_bytes, *(b.working_bytes for b in plan.blocks))


def test_memory_that_is_free_is_no_more_than_the_machine_has() -> None:
    free = memory.available_bytes()
    assert 0 < free <= psutil.virtual_memory().total
    assert memory.limit_for(None) == pytest.approx(free / 2, rel=0.2)
    assert memory.limit_for(12345) == 12345


def test_limits_of_the_container_and_the_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_group_bytes", lambda: 7_000)
    assert memory.available_bytes() == 7_000
    monkeypatch.setattr(memory, "_process_bytes", lambda: 5_000)
    assert memory.available_bytes() == 5_000
    monkeypatch.setattr(memory, "_process_bytes", lambda: -1)
    assert memory.available_bytes() == 0


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_a_slurm_jobs_limit_counts_though_its_step_has_none(tmp_path: Path) -> None:
    job = tmp_path / "system.slice" / "slurmstepd.scope" / "job_7"
    group(job, memory__max=9_000, memory__current=4_000, memory__stat="anon 3000\ninactive_file 500")
    group(job / "step_0", memory__max="max", memory__current=4_000, memory__stat="anon 3000\ninactive_file 500")
    group(tmp_path / "system.slice", memory__max=50_000, memory__current=8_000, memory__stat="inactive_file 0")
    own = tmp_path / "cgroup"
    own.write_text("0::/system.slice/slurmstepd.scope/job_7/step_0\n")
    assert memory._group_bytes(tmp_path, own) == 9_000 - 4_000 + 500
    group(tmp_path, memory__max=6_000, memory__current=5_000, memory__stat="inactive_file 1")  # the container's own
    assert memory._group_bytes(tmp_path, own) == 1_001


def test_control_groups_of_the_first_version_count_in_a_container_that_does_not_show_its_path(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("12:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n1:name=systemd:/docker/abc\n")
    group(
        tmp_path / "memory",
        memory__limit_in_bytes=8_000,
        memory__usage_in_bytes=3_000,
        memory__stat="total_inactive_file 250",
    )
    assert memory._group_bytes(tmp_path, own) == 5_250
    group(tmp_path / "memory", memory__limit_in_bytes=9_223_372_036_854_771_712)  # as a group without a limit says it
    assert memory._group_bytes(tmp_path, own) is None


@pytest.mark.parametrize("text", ["", "0::/nowhere\n"])
def test_where_no_control_group_has_a_limit_none_counts(text: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(text)
    assert memory._group_bytes(tmp_path, tmp_path / "cgroup") is None
    assert memory._group_bytes(tmp_path, tmp_path / "absent") is None


def test_a_limit_on_the_address_space_leaves_what_is_not_yet_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**15, resource.RLIM_INFINITY))
    left = memory._process_bytes()
    assert left is not None
    assert 10**15 - 10**13 < left < 10**15


@pytest.mark.parametrize("requested", [0, -5])
def test_a_limit_is_a_positive_number_of_bytes(requested: int) -> None:
    with pytest.raises(at.TangentError, match=f"memory_limit: expected a positive number of bytes, got {requested}"):
        memory.limit_for(requested)


def test_a_refusal_names_the_call_both_sizes_and_the_remedy() -> None:
    message = "^call: needs 2 kB of memory and the limit is 999 bytes; do less, or raise memory_limit$"
    with pytest.raises(at.TangentError, match=message):
        memory.require_memory("call", 2_000, 999, remedy="do less")
    memory.require_memory("call", 999, 999, remedy="do less")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3e9, "3 GB"), (4.2e15, "4.2e+03 TB")]
)
def test_bytes_are_written_for_people(count: float, text: str) -> None:
    assert memory.format_bytes(count) == text


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_no_route_is_planned_that_needs_more_than_there_is_where_another_does_not(
    outputs: Outputs,
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4096, 10))
    feats = at.tangent_features(model, torch.randn(1, 2, 32, 32), memory_limit=20_000_000)
    plan = feats.plan(outputs=outputs)
    assert max(block.working_bytes for block in plan.blocks) <= plan.limit
    assert all(block.operations > 0 for block in plan.blocks)

"""What an inspection plans and tells of its time, how often it takes samples through the network, and the stages it keeps."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.inspection import InspectConfig, Kept, KeptInFolder, Plan, run
from adaptive_tangents.inspection.kept import Record
from adaptive_tangents.inspection.plan import planned
from adaptive_tangents.inspection.problem import pose
from adaptive_tangents.inspection.tangents import averaged, collapsed
from adaptive_tangents.loading import Data
from adaptive_tangents.runs.record import RunResult
from adaptive_tangents.runtime.pace import Pace, Stage
from adaptive_tangents.runtime.tensor_files import write_tensors

State = dict[str, Tensor]
ORIGIN = {"settings": "{}", "samples": "of the test"}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def states(count: int = 2) -> dict[str, State]:
    start = network().state_dict()
    return {f"s{k}": {name: (1 + 0.2 * k) * value for name, value in start.items()} for k in range(count)}


def data(n: int = 24) -> Data:
    return Data(torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


LIGHT = InspectConfig(nodes=2, fit_operations=1)


# passes


TAKEN: list[int] = []  # here, since what a hook holds is put back as it was


def samples_taken(n: int, count: int) -> int:
    """Samples that the network is called on in an inspection of ``n`` samples at ``count`` states."""
    model = network()
    TAKEN.clear()
    model.register_forward_pre_hook(lambda module, inputs: TAKEN.append(len(inputs[0])))
    run(model, states(count), data(n), InspectConfig(samples=n, nodes=2, fit_operations=1))
    return sum(TAKEN)


def test_features_are_made_once_at_every_state_and_once_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_tangents.inspection.measures.explained", lambda *_: {})  # of features, to save time
    few, many = samples_taken(60, 3), samples_taken(160, 3)
    outputs, ends, states_, nodes, probes = 3, 2, 3, 2, 1
    # The path's identity takes the outputs at both ends again. Other probes than the path's do not grow with the samples.
    assert many - few == 100 * (outputs + ends + states_ + nodes + probes)


# the plan


def test_the_plan_names_every_stage_before_the_first_one_starts() -> None:
    told: list[Plan | str] = []
    found = run(
        network(), states(3), data(), LIGHT, show=told.append, progress=lambda stage, fraction: told.append(stage)
    )
    where = next(k for k, entry in enumerate(told) if isinstance(entry, Plan))
    plan = told[where]
    assert isinstance(plan, Plan)
    assert set(told[:where]) == {"outputs"}
    assert [stage.name for stage in plan.stages] == list(dict.fromkeys(told[where + 1 :]))
    assert (plan.samples, plan.outputs, plan.parameters, plan.blocks, plan.nodes, plan.passes) == (24, 1, 31, 2, 2, 5)
    assert all(stage.seconds >= 0 for stage in plan.stages)
    text = str(plan)
    assert text.startswith("Plan: 24 samples, 1 output, 31 parameters in 2 blocks\n  passes   5 of all samples forward")
    assert "memory   at most " in text
    assert "time     about " in text
    assert found.results["plan"]["passes"] == 5
    assert found.results["plan"]["seconds"].keys() == found.results["wall_seconds"].keys() - {"outputs", "total"}


def test_the_plan_counts_the_bytes_of_the_features_that_are_made() -> None:
    problem = pose(network(), states(), data(), LIGHT, Kept())
    plan = planned(problem, ["s0", "s1"], LIGHT, Kept())
    start, end = states().values()
    feats, average = problem.tangents.at(start), problem.tangents.average(start, end, 2)
    assert plan.feature_bytes == feats.bytes
    assert plan.average_bytes == average.bytes
    assert plan.bytes >= feats.bytes + average.bytes


def test_features_of_an_average_are_counted_in_the_form_that_they_will_have() -> None:
    start, end = states().values()
    x = data().x
    one = at.tangent_features(network(), x[:1], params=start)
    average = at.average_features(network(), start, end, x[:1], nodes=3)
    counted = averaged(one, 3)
    assert {k: (b.kind, b.bytes) for k, b in counted.blocks.items()} == {
        k: (b.kind, b.bytes) for k, b in collapsed(average).blocks.items()
    }


def test_quick_and_default_differ_in_samples_and_nodes_only() -> None:
    plain, quick = vars(InspectConfig()), vars(InspectConfig().quick())
    assert {name for name in plain if plain[name] != quick[name]} == {"samples", "nodes"}


# the time left


class Simulated:
    """Stages on a clock of their own, where each kind of work takes ``slowness`` times as long as planned."""

    def __init__(self, stages: list[Stage], slowness: Callable[[str], float]) -> None:
        self.now, self.stages, self.slowness = 0.0, stages, slowness
        self.pace = Pace(lambda stage, share: self.shares.append((self.now, share)), lambda: self.now)
        self.shares: list[tuple[float, float]] = []

    def run(self, ticks: int = 10) -> list[tuple[str, float, float, float]]:
        """The stage, the fraction of its kind done, the time left as told, and as it is, at every tick."""
        took = {stage.name: stage.seconds * self.slowness(stage.kind) for stage in self.stages}
        whole, seen = sum(took.values()), []
        kinds = {s.kind: sum(t.seconds for t in self.stages if t.kind == s.kind) for s in self.stages}
        done = dict.fromkeys(kinds, 0.0)
        self.pace.expect(self.stages)
        for stage in self.stages:
            began = self.now
            with self.pace.stage(stage.name) as tick:
                for k in range(1, ticks + 1):
                    self.now = began + took[stage.name] * k / ticks
                    tick(k / ticks)
                    left = self.pace.left(stage.name, k / ticks, self.now - began)
                    share = (done[stage.kind] + stage.seconds * k / ticks) / kinds[stage.kind]
                    seen.append((stage.kind, share, left, whole - self.now))
            done[stage.kind] += stage.seconds
        return seen


PARTS = [("start", 1.0, "features"), ("end", 1.0, "features"), ("average", 4.0, "features"), ("left", 9.0, "explain")]
PARTS += [("two_sided", 25.0, "explain"), ("models", 3.0, "models")]


def test_the_time_left_is_exact_where_work_takes_what_was_planned() -> None:
    found = Simulated([Stage(*part) for part in PARTS], lambda kind: 1.0)
    for _, _, told, true in found.run():
        assert told == pytest.approx(true)
    for now, share in found.shares[1:]:
        assert share == pytest.approx(now / sum(seconds for _, seconds, _ in PARTS))


@pytest.mark.parametrize("slowness", [0.6, 0.8, 1.3, 1.6])
def test_on_a_machine_of_another_speed_the_time_left_holds_within_half_once_a_tenth_is_done(slowness: float) -> None:
    stages = [Stage(*part) for part in PARTS]
    whole = slowness * sum(stage.seconds for stage in stages)
    for _, _, told, true in Simulated(stages, lambda kind: slowness).run():
        if 1e-9 < true <= 0.9 * whole:
            assert true / 1.5 <= told <= 1.5 * true


def test_a_kind_of_work_that_is_slower_than_planned_is_told_within_half_once_a_quarter_of_it_is_done() -> None:
    draws = random.Random(0)
    for _ in range(50):
        speeds = {kind: 3 ** draws.uniform(-1, 1) for _, _, kind in PARTS}
        last = [Stage(*part) for part in PARTS if part[2] != "models"]
        for kind, share, told, true in Simulated(last, speeds.__getitem__).run():
            if kind == "explain" and share >= 0.25 and true > 1e-9:
                assert true / 1.5 <= told <= 1.5 * true


def test_the_time_left_counts_what_comes_after_the_last_tick_of_a_stage() -> None:
    now, shares = [0.0], list[float]()
    pace = Pace(lambda stage, share: shares.append(share), lambda: now[0])
    pace.expect([Stage("start", 4.0, "features", told=0.25), Stage("end", 6.0, "features")])
    with pace.stage("start") as tick:
        now[0] = 0.5
        tick(0.5)
        now[0] = 1.0
        tick(1.0)
        now[0] = 4.0
    assert shares == pytest.approx([0.0, 0.05, 0.1, 0.4])


def test_a_plan_leaves_time_for_kernels_after_the_features_of_a_stage() -> None:
    problem = pose(network(), states(3), data(), LIGHT, Kept())
    plan = planned(problem, list(states(3)), LIGHT, Kept())
    parts = {stage.name: stage.told for stage in plan.stages}
    for name in ("start", "end", "average", "checkpoint s1"):
        assert 0 < parts.pop(name) < 1
    assert set(parts.values()) == {1.0}


def test_stages_without_a_plan_tell_no_share_and_none_is_left_in_the_end() -> None:
    found = Simulated([Stage(*part) for part in PARTS], lambda kind: 2.0)
    with found.pace.stage("outputs") as tick:
        tick(0.5)
    assert [share for _, share in found.shares] == [0.0, 0.0, 0.0]
    found.run()
    assert found.pace.left() == 0
    assert found.shares[-1][1] == pytest.approx(1)


# stages on disk


def kept(folder: Path, *, resume: bool, **origin: str) -> KeptInFolder:
    made = KeptInFolder(folder, resume=resume)
    made.claim(ORIGIN | origin)
    return made


def test_a_kept_stage_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    numbers = {"a": 0.1 + 0.2, "none": None, "deep": {"words": "é", "n": 3}}
    tensors = {"half": torch.randn(2).half(), "0.weight": torch.randn(3, dtype=torch.float64)}
    name = "checkpoint runs/step 1.pt"
    kept(tmp_path, resume=False).put(name, Record(numbers, tensors))
    found = kept(tmp_path, resume=True).get(name)
    assert found is not None
    assert found.numbers == numbers
    assert list(found.tensors) == ["half", "0.weight"]
    assert all(
        torch.equal(found.tensors[k], value) and found.tensors[k].dtype == value.dtype for k, value in tensors.items()
    )
    assert kept(tmp_path, resume=False).get(name) is None
    assert kept(tmp_path, resume=True).get("start") is None
    long = "checkpoint " + "x" * 400
    kept(tmp_path, resume=True).put(long, Record())
    assert kept(tmp_path, resume=True).get(long) == Record()


def test_stages_of_another_run_are_not_continued_and_replaced_only_by_what_is_finished(tmp_path: Path) -> None:
    kept(tmp_path, resume=False).put("start", Record({"run": 1}))
    kept(tmp_path, resume=False).put("end", Record({"run": 1}))
    with pytest.raises(at.TangentError, match="holds stages of a run with other samples, device; resume it as it was"):
        kept(tmp_path, resume=True, samples="others", device="cpu")
    other = kept(tmp_path, resume=False, samples="others")
    assert {path.stem for path in (tmp_path / "stages").iterdir()} == {"start", "end"}
    other.put("start", Record({"run": 2}))
    assert {path.stem for path in (tmp_path / "stages").iterdir()} == {"start"}
    found = kept(tmp_path, resume=True, samples="others").get("start")
    assert found == Record({"run": 2})


@pytest.mark.parametrize("resume", [False, True])
def test_files_that_no_inspection_has_written_stay_as_they_are(tmp_path: Path, resume: bool) -> None:
    folder = tmp_path / "stages"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    write_tensors(folder / "mine.safetensors", {"mine": torch.zeros(1)}, {"format": "pt"})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = kept(tmp_path, resume=resume)
    made.put("start", Record())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "start.safetensors"} == before
    write_tensors(folder / "end.safetensors", {"mine": torch.zeros(1)}, {"format": "pt"})
    (folder / "average.safetensors").write_bytes(b"no tensors")
    os.symlink(folder / "start.safetensors", folder / "explain 1.safetensors")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("end", "average", "explain 1"):
        with pytest.raises(
            at.TangentError, match=rf"{name}.safetensors was not written by adaptive-tangents, or is damage"
        ):
            made.put(name, Record())
        if resume:
            with pytest.raises(
                at.TangentError, match=rf"{name}.safetensors was not written by adaptive-tangents, or is"
            ):
                made.get(name)
    with pytest.raises(
        at.TangentError, match=r"so it is neither read nor replaced; move it away, or give another folder"
    ):
        kept(tmp_path, resume=resume)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_places_that_cannot_hold_stages_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "stages").write_text("mine")
    with pytest.raises(at.TangentError, match="stages is not a folder; move it away"):
        kept(tmp_path / "file", resume=False)
    made = kept(tmp_path / "three", resume=False)
    (tmp_path / "three").write_text("a file where the folder was to be")
    with pytest.raises(at.TangentError, match=r"start\.safetensors cannot be written"):
        made.put("start", Record())


def test_a_stage_cut_short_is_told_to_be_deleted(tmp_path: Path) -> None:
    kept(tmp_path, resume=False).put("start", Record({}, {"x": torch.zeros(100)}))
    path = tmp_path / "stages" / "start.safetensors"
    metadata = {"program": "adaptive-tangents", "origin": json.dumps(ORIGIN)}
    write_tensors(path, {}, metadata)  # without its numbers
    with pytest.raises(at.TangentError, match=r"start\.safetensors cannot be read \('numbers'\); delete it to"):
        kept(tmp_path, resume=True).get("start")


def test_a_resumed_run_of_another_network_is_refused_by_its_outputs(tmp_path: Path) -> None:
    def stopped(stage: str, fraction: float) -> None:
        if stage == "end":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(network(), states(), data(), LIGHT, progress=stopped, kept=KeptInFolder(tmp_path, resume=False))
    other = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 1)).double()
    with pytest.raises(
        at.TangentError, match=r"the network's outputs are not those of the run that .*stages holds stages"
    ):
        run(other, states(), data(), LIGHT, kept=KeptInFolder(tmp_path, resume=True))
    with pytest.raises(at.TangentError, match="with other settings; resume it as it was started"):
        run(network(), states(), data(), InspectConfig(nodes=3), kept=KeptInFolder(tmp_path, resume=True))
    with pytest.raises(at.TangentError, match="with other checkpoint s2; resume"):
        run(network(), states(3), data(), LIGHT, kept=KeptInFolder(tmp_path, resume=True))


def test_a_finished_run_resumed_takes_nothing_through_the_network_but_a_check(tmp_path: Path) -> None:
    first = run(network(), states(3), data(), LIGHT, kept=KeptInFolder(tmp_path, resume=False))
    plans: list[Plan] = []
    again = run(network(), states(3), data(), LIGHT, show=plans.append, kept=KeptInFolder(tmp_path, resume=True))
    assert plans[0].stages == ()
    assert "resumed  7 stages were finished before" in str(plans[0])
    assert told(again) == told(first)


def told(found: RunResult) -> dict[str, Any]:
    return {k: v for k, v in found.results.items() if k not in ("plan", "wall_seconds", "cpu_seconds")}

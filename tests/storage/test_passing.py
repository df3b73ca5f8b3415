"""Features that one process passes to another are the same bits in the same layout; what does not come is captured."""

import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

import adaptive_tangents as at
import forked
from adaptive_tangents.features.summands import tensors_of
from adaptive_tangents.features.transforms import Entrywise, Joint
from adaptive_tangents.kernels.schedule import Deal
from adaptive_tangents.storage import passing
from adaptive_tangents.storage.folders import FEATURES, announce, announced, clear_claims
from adaptive_tangents.storage.packing import message_room, packed, tensors_within, unpacked
from adaptive_tangents.storage.passing import Passing, passing_seconds
from cases import Case
from prepared import every_case, prepare
from stored import data, network

CPU = torch.device("cpu")


def passed(feats: at.TangentFeatures, here: object = None, there: object = None) -> tuple[at.TangentFeatures, int]:
    """The features as another process gets them, and the bytes that were sent."""
    messages, places = packed(feats, tensors_within(here))
    received = [message_room(len(m), place, CPU).copy_(m) for m, place in zip(messages, places, strict=True)]
    return unpacked(received, CPU, tensors_within(there)), sum(map(len, messages))


def tensors(feats: at.TangentFeatures) -> list[Tensor]:
    return [t for block in feats.blocks.values() for part in block.summands for t in tensors_of(part)]


def assert_same(one: at.TangentFeatures, other: at.TangentFeatures) -> None:
    assert (type(one), one.n, one.c, one.parameters) == (type(other), other.n, other.c, other.parameters)
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)
        assert not a.numel() or (a.data_ptr() - b.data_ptr()) % 64 == 0
    assert torch.equal(one.kernel(outputs="trace"), other.kernel(outputs="trace"))
    assert torch.equal(one.kernel(one[:1], outputs="full"), other.kernel(other[:1], outputs="full"))


@every_case
def test_features_of_every_network_arrive_bit_for_bit_in_the_same_layout(case: Case) -> None:
    feats = prepare(case).feats
    found, sent = passed(feats)
    assert_same(feats, found)
    assert sent <= 2 * feats.bytes + 20_000
    assert {t.untyped_storage().data_ptr() for t in tensors(feats) if t.numel()}.isdisjoint(
        t.untyped_storage().data_ptr() for t in tensors(found) if t.numel()
    )


def test_memory_that_tensors_share_or_leave_out_is_sent_once_and_laid_out_alike() -> None:
    feats = at.tangent_features(network(), data(900))
    for some in (feats[2:7], feats[1:], feats[torch.tensor([3, 1])], feats.to(torch.bfloat16)[1:]):
        assert_same(some, passed(some)[0])
    one = {"0": feats.blocks["0"]}
    twice = replace(feats, blocks={**one, "2": feats.blocks["0"].scaled(1.0)})
    assert feats.blocks["0"].outer.inputs is twice.blocks["2"].outer.inputs
    inputs = feats.blocks["0"].outer.inputs.nbytes
    assert passed(twice)[1] < 2 * passed(replace(feats, blocks=one))[1] - 0.9 * inputs
    assert passed(feats[:9])[1] < 0.1 * passed(feats)[1]


def test_what_all_ranges_share_is_not_sent() -> None:
    feats = at.tangent_features(network(), data(6))
    shapes = {name: block.shape for name, block in feats.blocks.items()}
    joint = Joint({name: torch.randn(shape).double() for name, shape in shapes.items()}, 3.0)
    for transforms in (
        dict.fromkeys(shapes, joint),
        {name: Entrywise(torch.rand(shape).double()) for name, shape in shapes.items()},
    ):
        there = pickle.loads(pickle.dumps(transforms))
        adapted = feats.transformed(transforms)
        found, sent = passed(adapted, transforms, there)
        assert_same(adapted, found)
        assert sent < passed(adapted)[1] - 0.9 * sum(8 * o * i for o, i in shapes.values())
        theirs = {t.untyped_storage().data_ptr() for t in tensors_within(there)}
        assert len(theirs & {t.untyped_storage().data_ptr() for t in tensors(found)}) == len(shapes)


def test_features_that_are_more_than_plain_tensors_are_not_passed() -> None:
    feats = at.tangent_features(network(), data(6))
    block = feats.blocks["0"]
    for odd in (nn.Parameter(block.outer.inputs), torch.complex(block.outer.inputs, block.outer.inputs).conj().imag):
        changed = replace(block, outer=replace(block.outer, inputs=odd))
        assert packed(replace(feats, blocks={"0": changed})) == ([], [])
    assert packed(replace(feats, blocks=MappingProxyType(dict(feats.blocks)))) == ([], [])  # cannot be pickled


# announcements


def test_only_announcements_are_read_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / FEATURES
    announce(folder, (0, 12), [[0, 100, 8]])
    announce(folder, (1, 3), [])
    other = {"0-1": "", "0-2": "[[0, 1, 2]]", "0-3": "{", "2-4": (folder / "0-12").read_text(), "note": "mine"}
    for name, text in other.items():
        (folder / name).write_text(text)
    found = {entry.name: announced(entry) for entry in folder.iterdir()}
    assert {name: value for name, value in found.items() if value} == {
        "0-12": ((0, 12), [[0, 100, 8]]),
        "1-3": ((1, 3), []),
    }
    clear_claims(tmp_path)
    assert {entry.name: entry.read_text() for entry in folder.iterdir()} == other


def waiting(seconds: float | None, *, folder: Path) -> Passing:
    """A process that has captured something in so many seconds; another one owns a range."""
    made = Passing(None, folder, 0, Deal([[], []], {(0, 0): 1}, 1), needed=(), device=CPU, known=())
    made.seconds = seconds
    return made


def test_nothing_waits_longer_for_a_range_than_capturing_it_takes(tmp_path: Path) -> None:
    made = waiting(0.02, folder=tmp_path)
    for _ in range(2):
        started, rounds = time.monotonic(), 0
        while made.wait():
            rounds += 1
        assert rounds
        assert time.monotonic() - started >= 0.02
    assert not made.decided((0, 0))
    assert made.decided((0, 1))  # nobody owns it


def test_what_takes_longer_to_receive_than_to_capture_is_captured(tmp_path: Path) -> None:
    size = 1_000_000
    announce(tmp_path, (0, 0), [[0, size, 0]])
    for seconds, received in ((0.5 * passing_seconds(size), False), (2 * passing_seconds(size), True), (None, True)):
        made = waiting(seconds, folder=tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passing.dist, "irecv", lambda *given: "on its way")
            assert made.decided((0, 0))
            made._request((0, 0))
        assert ((0, 0) in made._coming) == received
        assert (made._requested[0, 0] == 1) == received


# processes


def test_a_process_that_dies_or_stops_is_done_without(tmp_path: Path) -> None:
    forked.done_without(tmp_path)


def test_where_only_some_ranges_are_held_features_are_passed_again(tmp_path: Path) -> None:
    forked.passed_again(tmp_path)

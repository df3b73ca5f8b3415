"""A fit that is written and read again is the same fit to the last bit, whatever it is made of; other files are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptive_tangents as at
from adaptive_tangents.capture.path_average import AverageFeatures
from adaptive_tangents.runtime import tensor_files
from adaptive_tangents.solvers import KernelFit, leave_one_out
from adaptive_tangents.solvers.fit import unwarned
from prepared import draw, prepare
from registry import by_name

PENALTIES = {
    "Quadratic": at.Quadratic(0.3), "Absolute": at.Absolute(0.7), "Power": at.Power(2.5, strength=0.4),
    "LogSquared": at.penalties.LogSquared(0.2), "NoAdaptation": at.NoAdaptation(),
    "Composition": at.Quadratic(1 / 3).compose(at.Power(3.0), at.NoAdaptation()),
}  # fmt: skip
STRUCTURES: dict[str, at.structures.Structure] = {
    "Fixed": at.Fixed(), "Full": at.Full(at.Quadratic(0.5)), "LayerScale": at.LayerScale(at.Absolute(0.5)),
    "Rows": at.Rows(), "Columns": at.Columns(scale_invariant=True), "Diagonal": at.Diagonal(at.Power(2.0)),
    "Left": at.Left(), "Right": at.Right(at.penalties.LogSquared()),
    "TwoSided": at.TwoSided(at.Quadratic(0.1), at.Quadratic(0.7)),
    "Modes": at.Modes({"out": at.Quadratic(0.5), "spatial": at.Quadratic(4.0)}), "Modes of one": at.Modes(at.Quadratic(2.0)),
    "Mixed": at.Mixed({"0": at.Modes(), "*": at.Full(at.Quadratic(0.5))}),
}  # fmt: skip


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()


MODEL = network()
X, OTHER = draw(9, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
FEATS, NEW = at.tangent_features(MODEL, X), at.tangent_features(MODEL, OTHER)
R, LABELS = draw(9, 2, seed=2), torch.arange(9) % 2


def again(found: Any, folder: Path, **options: Any) -> Any:
    found.save(folder / "fit.safetensors", **options)
    return at.load_fit(folder / "fit.safetensors")


def same(one: Any, other: Any) -> bool:
    """Whether two values agree to the last bit, tensors and all."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and one != one:
        return bool(other != other)
    if hasattr(one, "__dataclass_fields__"):
        return type(one) is type(other) and all(same(getattr(one, k), getattr(other, k)) for k in vars(one))
    return bool(one == other)


def fitted(structure: at.structures.Structure, loss: str, ridge: float, feats: at.TangentFeatures = FEATS) -> at.Fit:
    options: dict[str, Any] = {"structure": structure, "ridge": ridge, "max_rounds": 3}  # near the solution or not
    if loss == "cross-entropy":
        options |= {"loss": "cross-entropy", "offset": MODEL(X).detach()}
    found = unwarned(feats, LABELS if loss == "cross-entropy" else R, **options)
    assert isinstance(found, at.Fit)
    return found


LOSSES = [("squared", 0.1), ("cross-entropy", 0.3), ("squared", 0.0)]
# A file describes structure and loss apart from each other: structures take the losses in turn, and two take them all.
KEPT = [
    (name, *loss)
    for k, name in enumerate(STRUCTURES)
    for loss in (LOSSES if name in ("TwoSided", "Mixed") else [LOSSES[k % 3]])
]


@pytest.mark.parametrize(("name", "loss", "ridge"), KEPT)
def test_a_fit_read_again_predicts_transforms_and_certifies_the_same_bits(
    name: str, loss: str, ridge: float, tmp_path: Path
) -> None:
    found = fitted(STRUCTURES[name], loss, ridge)
    kept = again(found, tmp_path)
    assert torch.equal(kept.predict(NEW), found.predict(NEW))
    assert torch.equal(kept.transform(NEW).kernel(), found.transform(NEW).kernel())
    assert kept.structure == found.structure
    assert repr(kept) == repr(found)
    assert kept.summary() == found.summary()
    assert kept._repr_html_() == found._repr_html_()
    assert all(same(getattr(found, name), value) for name, value in vars(kept).items() if name != "features")


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_and_composition_is_described(name: str, tmp_path: Path) -> None:
    found = fitted(at.TwoSided(PENALTIES[name], at.Quadratic(1.0)), "squared", 0.5)
    kept = again(found, tmp_path)
    assert kept.structure == found.structure
    assert kept.structure.penalty(found.coefficients) == found.structure.penalty(found.coefficients)


@pytest.mark.parametrize("name", ["embedding of indices", "two layers with one weight", "attention"])
def test_features_of_every_form_are_kept_where_asked_for(name: str, tmp_path: Path) -> None:
    p = prepare(by_name[name])
    r = draw(p.feats.n, p.feats.c)
    found = at.fit(p.feats, r, structure=at.Diagonal(), ridge=1.0, tol=1e-3)
    kept = again(found, tmp_path, features=True)
    assert torch.equal(kept.features.kernel(), found.features.kernel())
    assert torch.equal(kept.predict(p.other), found.predict(p.other))
    assert kept.kernel_change().summary() == found.kernel_change().summary()
    # Adapted features have other summands: gains on entries, and a direction that samples share.
    for structure in (at.Diagonal(), at.Full()):
        adapted = at.fit(p.feats, r, structure=structure, ridge=1.0, tol=1e-3).transform(p.feats)
        over = at.fit(adapted, r, structure=at.Fixed(), ridge=1.0)
        assert torch.equal(again(over, tmp_path, features=True).features.kernel(), adapted.kernel())


def test_average_and_sketched_features_stay_what_they_are(tmp_path: Path) -> None:
    start = {name: value.clone() for name, value in MODEL.state_dict().items()}
    end = {name: value + 0.1 for name, value in start.items()}
    average = at.average_features(MODEL, start, end, X, nodes=2)
    kept = again(fitted(at.Fixed(), "squared", 0.1, average), tmp_path, features=True).features
    assert type(kept) is AverageFeatures
    assert kept.error == average.error
    sketched = at.Sketch(20).apply(FEATS)
    found = at.fit(sketched, R, structure=at.LayerScale(), ridge=0.1)
    kept_fit = again(found, tmp_path)
    assert torch.equal(kept_fit.predict(sketched), found.predict(sketched))
    with pytest.raises(at.TangentError, match=r"^predict: the features are a sketch .* and exact"):
        kept_fit.predict(FEATS)


@pytest.mark.parametrize("by_block", [True, False])
def test_a_fit_to_kernels_read_again_is_the_same(by_block: bool, tmp_path: Path) -> None:
    found = at.fit(FEATS.kernel(by_block=by_block), R, structure=at.LayerScale() if by_block else at.Fixed(), ridge=0.1)
    kept = again(found, tmp_path)
    assert isinstance(kept, KernelFit)
    K = NEW.kernel(FEATS, by_block=by_block)
    assert torch.equal(kept.predict(K), found.predict(K))
    assert same(found, kept)
    assert kept.summary() == found.summary()
    with pytest.raises(
        at.TangentError, match=r"^load_fit: .*fit to kernels, which has no features; leave features out"
    ):
        at.load_fit(tmp_path / "fit.safetensors", features=FEATS)


def test_without_its_features_a_fit_stays_small_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    found = fitted(at.TwoSided(), "squared", 0.1)
    kept = again(found, tmp_path)
    assert kept.features.n == 1
    message = "this fit was kept without the features of its 9 samples; use load_fit"
    with pytest.raises(at.TangentError, match=f"^kernel_change: {message}"):
        kept.kernel_change()
    with pytest.raises(at.TangentError, match=f"^leave_one_out: {message}"):
        leave_one_out(kept)
    whole = at.load_fit(tmp_path / "fit.safetensors", features=FEATS)
    assert isinstance(whole, at.Fit)
    assert torch.equal(leave_one_out(whole), leave_one_out(found))
    with pytest.raises(at.TangentError, match=r"^load_fit: the fit was of \(9, 2\) samples and outputs"):
        at.load_fit(tmp_path / "fit.safetensors", features=NEW)


def test_a_penalty_of_ones_own_is_named_and_all_else_can_be_kept(tmp_path: Path) -> None:
    def cubic(z: Tensor) -> Tensor:
        return (z - 1) ** 3

    found = fitted(at.Mixed({"0": at.Left(at.Penalty(cubic)), "*": at.Fixed()}), "squared", 0.5)
    with pytest.raises(
        at.TangentError,
        match=r"^save: fit.structure.structures\['0'\].penalty_on_transform is Penalty\(cubic.*of class Penalty, and a file "
        r"describes only .*save\(path, without_structure=True\) keeps all else",
    ):
        found.save(tmp_path / "fit.safetensors")
    assert not list(tmp_path.iterdir())
    kept = again(found, tmp_path, without_structure=True)
    assert torch.equal(kept.predict(NEW), found.predict(NEW))
    assert kept.summary() == found.summary()
    for work in (
        lambda: kept.structure.penalty(kept.coefficients), lambda: kept.structure.dual(kept.coefficients),
        lambda: kept.structure.with_scales({}),
    ):  # fmt: skip
        with pytest.raises(at.TangentError, match=r"^\w+: of Mixed\(.* only the name was kept"):
            work()


def test_a_structure_of_ones_own_with_a_name_of_the_librarys_is_not_taken_for_it(tmp_path: Path) -> None:
    class Fixed(at.Fixed):
        pass

    with pytest.raises(at.TangentError, match=r"^save: fit.structure is Fixed\(\), of class Fixed, and a file"):
        fitted(Fixed(), "squared", 0.5).save(tmp_path / "fit.safetensors")


# ---------------------------------------------------------------------------------------------- files that are no fits


def altered(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file with another head, its hash as it was."""
    head = json.loads(tensor_files.read_metadata(path)["fit"])
    change(head)
    tensor_files.write_tensors(path, tensor_files.read_tensors(path), {"fit": json.dumps(head)})


def test_files_that_are_no_fits_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    with pytest.raises(
        at.TangentError, match=r"^load_fit: .*fit.safetensors cannot be read .*give a file that fit.save"
    ):
        at.load_fit(path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(at.TangentError, match=r"^load_fit: .* cannot be read"):
        at.load_fit(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(
        at.TangentError, match=r"^load_fit: .*fit.safetensors is no fit; give a file that fit.save wrote"
    ):
        at.load_fit(path)
    save_file({"a": torch.ones(2)}, path, {"fit": '{"kind": "adaptive-tangents fit", "format": 1}'})
    with pytest.raises(at.TangentError, match=r"^load_fit: .* is damaged \(KeyError"):
        at.load_fit(path)
    fitted(at.Fixed(), "squared", 0.5).save(path)
    whole = path.read_bytes()
    for change, message in (
        (lambda head: head.update(format=2), r"is of format 2, this version reads 1; update, or save it again"),
        (lambda head: head["record"]["fields"].update(ridge=2.0), r"is not as it was written; put back a copy of it"),
        (lambda head: head.update(kind="adaptive-tangents forecast"), r"is no fit"),
    ):
        path.write_bytes(whole)
        altered(path, change)
        with pytest.raises(at.TangentError, match=rf"^load_fit: .*{message}"):
            at.load_fit(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(at.TangentError, match=r"^load_fit: .* is not as it was written"):
        at.load_fit(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(at.TangentError, match=r"^load_fit: .* cannot be read"):
        at.load_fit(path)


def test_a_record_of_a_class_that_no_fit_has_is_not_made(tmp_path: Path) -> None:
    from adaptive_tangents.runtime.records import FORMAT

    tree = {"record": "Path", "fields": {}}
    head = {"kind": "adaptive-tangents fit", "format": FORMAT, "record": tree}
    head["hash"] = tensor_files.fingerprint([json.dumps(tree), {}])
    tensor_files.write_tensors(tmp_path / "fit.safetensors", {}, {"fit": json.dumps(head)})
    with pytest.raises(at.TangentError, match=r"^load_fit: .* is damaged \(KeyError: 'Path'\)"):
        at.load_fit(tmp_path / "fit.safetensors")
    tree = {"record": "TwoSided", "fields": {"left": None}}
    head |= {"record": tree, "hash": tensor_files.fingerprint([json.dumps(tree), {}])}
    tensor_files.write_tensors(tmp_path / "fit.safetensors", {}, {"fit": json.dumps(head)})
    with pytest.raises(at.TangentError, match=r"^load_fit: .*(holds a TwoSided; give a file that fit.save|is damaged)"):
        at.load_fit(tmp_path / "fit.safetensors")


def test_a_path_that_cannot_be_written_is_said_and_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(at.TangentError, match=r"^save: .* cannot be written .*give another path"):
        fitted(at.Fixed(), "squared", 0.5).save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------------- explanations


def test_an_explanation_read_again_is_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = draw(24, 4)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + 0.3 * draw(*value.shape, seed=3) for name, value in start.items()}
    feats, average = at.tangent_features(model, x), at.average_features(model, start, end, x)
    path = tmp_path / "told.safetensors"
    for structure in (at.TwoSided(), at.Mixed({"0": at.Left(), "*": at.Diagonal()}), at.Full()):
        found = at.explain(feats, average, structure, rank=(1, 2))
        found.save(path)
        kept = at.measures.load_explanation(path)
        assert same(found, kept)
        assert kept.structure == found.structure
        assert repr(kept) == repr(found)
        assert kept._repr_html_() == found._repr_html_()
        assert list(kept.r2_by_rank.get("0", {})) == list(found.r2_by_rank.get("0", {}))
    with pytest.raises(at.TangentError, match=r"^load_fit: .*told.safetensors is no fit"):
        at.load_fit(path)
    fitted(at.Fixed(), "squared", 0.5).save(path)
    with pytest.raises(
        at.TangentError, match=r"^load_explanation: .*is no explanation; give a file that Explanation.save"
    ):
        at.measures.load_explanation(path)
    own = at.explain(feats, average, at.Left(at.Penalty(lambda z: z - 1)), rank=1)
    with pytest.raises(at.TangentError, match=re.escape("save(path, without_structure=True) keeps all else")):
        own.save(path)
    own.save(path, without_structure=True)
    assert at.measures.load_explanation(path).total == own.total

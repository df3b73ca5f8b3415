"""A user's factories, checkpoints and data are read without pickle, or refused with a remedy."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adaptive_tangents as at
from adaptive_tangents import loading
from adaptive_tangents.capture.state_names import NESTED

FACTORIES = """
import torch
from torch import nn
from helper_of_factories import WIDTH

answer = 42
instance = nn.Linear(2, 1)

def make():
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Dropout(), nn.Linear(WIDTH, 2))

def needs(width):
    return nn.Linear(width, 1)

def raises():
    raise RuntimeError("no weights here")

def nothing():
    return None
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    (tmp_path / "helper_of_factories.py").write_text("WIDTH = 4\n")
    (tmp_path / "broken_of_test.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return tmp_path


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("spec", ["factories_of_test:make", "factories_of_test.py:make", "./factories_of_test.py:make"])
def test_a_factory_by_module_or_file_makes_a_network_in_evaluation_mode(folder: Path, spec: str) -> None:
    made = loading.load_model(spec)
    assert [tuple(p.shape) for p in made.parameters()] == [(4, 3), (4,), (2, 4), (2,)]
    assert not made.training
    assert not any(module.training for module in made.modules())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("factories_of_test", "--model is package.module:factory or path/to/file.py:factory, got 'factories_of_test'"),
        (":make", "--model is package.module:factory"),
        (
            "nowhere_at_all:make",
            "importing nowhere_at_all failed with ModuleNotFoundError.*or give path/to/file.py:factory",
        ),
        ("broken_of_test.py:make", "importing broken_of_test.py failed with ModuleNotFoundError.*nothing_of_that_name"),
        ("gone.py:make", "there is no file gone.py"),
        (
            "factories_of_test:mak",
            "factories_of_test has no 'mak'; it holds .*make, needs, raises.*; name one that makes",
        ),
        ("factories_of_test:answer", "is a int, not a function; name a function without arguments"),
        ("factories_of_test:instance", "is a Linear, not a function"),
        ("factories_of_test:needs", r"raised TypeError: needs\(\) missing.*called without arguments"),
        ("factories_of_test:raises", "raised RuntimeError: no weights here"),
        ("factories_of_test:nothing", "returned NoneType, not a torch.nn.Module; return the network"),
    ],
)
def test_a_factory_that_makes_no_network_is_refused(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(at.TangentError, match=f"^inspect: .*{message}"):
        loading.load_model(spec)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(("suffix", "key"), [(".safetensors", None), *((".pt", key) for key in (None, *NESTED))])
def test_checkpoints_load_from_every_form(tmp_path: Path, suffix: str, prefix: str, key: str | None) -> None:
    wanted = {name: value + 1 for name, value in model().state_dict().items()}
    state: Any = {prefix + name: value for name, value in wanted.items()}
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(state if key is None else {key: state, "epoch": 3}, path)
    else:
        save_file(state, path)
    found = loading.load_checkpoint(path, model())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_checkpoint_may_lack_integer_buffers_and_be_of_another_precision(tmp_path: Path) -> None:
    state = {name: value.double() for name, value in model().state_dict().items() if value.is_floating_point()}
    torch.save(state, tmp_path / "a.pt")
    found = loading.load_checkpoint(tmp_path / "a.pt", model())
    assert found["0.weight"].dtype == torch.float32
    assert "1.num_batches_tracked" in found


def spoiled(path: Path, change: Any) -> Path:
    state = dict(model().state_dict())
    torch.save(change(state), path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "2.bias"},
            "does not fit the model: missing 2.bias; give the factory",
        ),
        (lambda s: s | {"head.weight": torch.ones(2)}, "does not fit the model: unexpected head.weight"),
        (lambda s: s | {"0.weight": torch.ones(3, 4)}, r"of another shape: 0.weight \(3, 4\) for \(4, 3\)"),
        (lambda s: {"model": {"a": torch.ones(1)}}, "under 'model', does not fit the model: missing 0.weight"),
        (
            lambda s: s | {"0.weight": torch.full((4, 3), torch.nan)},
            "not finite in 0.weight; use an earlier checkpoint",
        ),
        (
            lambda s: {"weights": s},
            "holds keys weights, not a state dict.*'state_dict' or 'model' or 'model_state_dict'",
        ),
        (lambda s: [1.0], "holds a list, not a state dict of tensors"),
        (
            lambda s: nn.Linear(2, 2),
            "is not a checkpoint of tensors alone.*pickles are never loaded; save model.state_dict",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_its_tensors(tmp_path: Path, change: Any, message: str) -> None:
    path = spoiled(tmp_path / "a.pt", change)
    with pytest.raises(at.TangentError, match=f"^inspect: .*{message}"):
        loading.load_checkpoint(path, model())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "there is no checkpoint .*none.pt"),
        ("cut.safetensors", b"\x10", "cut.safetensors cannot be read .*save the checkpoint again"),
        ("empty.pt", b"", "empty.pt cannot be read .*save the checkpoint again"),
        ("evil.pt", pickle.dumps(print, protocol=2), "is not a checkpoint of tensors alone"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(at.TangentError, match=f"^inspect: .*{message}"):
        loading.load_checkpoint(tmp_path / name, model())


def test_checkpoints_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("step_10.pt", "step_9.pt", "step_100.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in loading.find_checkpoints(str(tmp_path / "*.pt"))] == [
        "step_9.pt",
        "step_10.pt",
        "step_100.pt",
    ]
    with pytest.raises(at.TangentError, match="matches 1 file; at least two are needed"):
        loading.find_checkpoints(str(tmp_path / "step_9.*"))
    with pytest.raises(at.TangentError, match=r"matches 0 files.*quote the pattern"):
        loading.find_checkpoints(str(tmp_path / "no.*"))


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_data_become_a_tensor_a_tuple_or_a_dict(tmp_path: Path) -> None:
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 1], np.uint8)
    one = loading.load_data(saved(tmp_path / "a.npz", x=x, y=y, classes=np.array(["cat", "dog"])))
    assert isinstance(one.x, torch.Tensor)
    assert (one.n, one.classes) == (3, ("cat", "dog"))
    two = loading.load_data(saved(tmp_path / "b.npz", x1=x, x0=x + 1))
    assert isinstance(two.x, tuple)
    assert float(two.x[0][0, 0]) == 1
    named = loading.load_data(saved(tmp_path / "c.npz", tokens=np.ones((3, 2), np.int32), mask=x, y=x[:, :1]))
    assert isinstance(named.x, dict)
    assert named.labels is None
    assert named.y is not None
    assert named.y.shape == (3,)
    fitted = loading.fit_data(one, nn.Linear(2, 2))
    assert fitted.labels is not None
    assert (fitted.labels.dtype, fitted.x.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.ones(3)}, "holds no inputs; save them as x"),
        (
            {"x": np.ones((3, 2)), "y": np.ones(4)},
            "different numbers of samples: x 3, y 4; give the same number for each",
        ),
        ({"x": np.ones((3, 2)), "extra": np.ones((3, 2))}, "holds x beside extra; give x alone, x0, x1"),
        ({"x": np.array([[1], [1, 2]], dtype=object)}, "holds pickled objects.*never loaded; save arrays of numbers"),
        ({"x": np.array(["a", "b"])}, "'x' in .* holds <U1, not numbers; give text as token indices"),
        ({"x": np.float64(3.0)}, "'x' in .* is a single number"),
        ({"x": np.array([[1.0], [np.nan]])}, "'x' in .* is not finite at sample 1; remove or correct it"),
        ({"x": np.ones((0, 2))}, "holds no samples"),
        ({"x": np.ones((2, 2)), "y": np.ones((2, 2, 2))}, r"y in .* has shape \(2, 2, 2\); give labels"),
        ({"x": np.ones((2, 2)), "classes": np.ones(2)}, "'classes' in .* must be a list of names, got float64"),
    ],
)
def test_data_that_cannot_be_used_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(at.TangentError, match=f"^inspect: .*{message}"):
        loading.load_data(saved(tmp_path / "a.npz", **arrays))


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        at.TangentError, match=r"there is no data file .*gone.npz; save one with numpy.savez\('gone.npz'"
    ):
        loading.load_data(tmp_path / "gone.npz")
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    with pytest.raises(at.TangentError, match=r"pickled objects|not an npz file"):
        loading.load_data(tmp_path / "text.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(at.TangentError, match="is not an npz file"):
        loading.load_data(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(at.TangentError, match=r"is a single array; save it with numpy\.savez"):
        loading.load_data(tmp_path / "one.npy")


def test_integer_pixels_are_refused_with_the_remedy_and_tokens_are_not() -> None:
    pixels = loading.Data(torch.randint(0, 256, (4, 3), dtype=torch.uint8))
    with pytest.raises(at.TangentError, match=r"x holds integers \(torch.uint8, .*convert x to float and normalize it"):
        loading.fit_data(pixels, nn.Linear(3, 1))
    tokens = loading.fit_data(pixels, nn.Sequential(nn.Embedding(256, 2), nn.Flatten(), nn.Linear(6, 1)))
    assert isinstance(tokens.x, torch.Tensor)
    assert tokens.x.dtype == torch.int64
    with pytest.raises(at.TangentError, match="the model has no parameters"):
        loading.fit_data(pixels, nn.Identity())

"""Folders of images by class, and data sets of Hugging Face on disk and in memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import Data, as_data, image_form, load_data

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def picture(path: Path, *shape: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def folder(root: Path) -> dict[str, np.ndarray]:
    return {f"{c}/{k}.png": picture(root / c / f"{k}.png", 6, 5, 3, seed=k) for c in ("dog", "cat") for k in range(2)}


def told(data: Data, words: str) -> bool:
    return any(words in note for note in data.notes)


def test_class_folders_are_classes_and_pixels_come_channels_first(tmp_path: Path) -> None:
    pixels = folder(tmp_path)
    (tmp_path / "cat" / ".DS_Store").write_text("x")
    (tmp_path / "cat" / "Thumbs.db").write_text("x")
    data = load_data(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.y is not None
    assert data.y.tolist() == [0, 0, 1, 1]
    wanted = np.stack([pixels[f"{c}/{k}.png"] for c in ("cat", "dog") for k in range(2)]).transpose(0, 3, 1, 2) / 255
    assert torch.allclose(torch.as_tensor(data.x), torch.from_numpy(wanted).float())
    assert told(data, "not normalized, as nothing says what training did")


def test_class_folders_get_the_numbers_of_the_networks_classes(tmp_path: Path) -> None:
    folder(tmp_path)
    data = load_data(tmp_path, classes=("Dog", "Fox", "Cat"))
    assert data.y is not None
    assert data.y.tolist() == [2, 2, 0, 0]
    with pytest.raises(
        TangentError, match=r"the label 'dog' at .*dog/0.png of .* is none of the network's classes, cat, fox"
    ):
        load_data(tmp_path, classes=("cat", "fox"))


def test_a_gray_image_among_colored_ones_is_taken_as_color_and_told(tmp_path: Path) -> None:
    folder(tmp_path)
    gray = picture(tmp_path / "cat" / "a.png", 6, 5)
    data = load_data(tmp_path)
    x = torch.as_tensor(data.x)
    assert x.shape == (5, 3, 6, 5)
    assert torch.allclose(x[2], torch.from_numpy(gray / 255).float().expand(3, 6, 5))
    assert told(data, "Gray images")


def test_gray_images_have_one_channel_unless_the_normalization_has_three(tmp_path: Path) -> None:
    for k in range(2):
        picture(tmp_path / "a" / f"{k}.jpg", 6, 6, seed=k)
    assert torch.as_tensor(load_data(tmp_path).x).shape == (2, 1, 6, 6)
    assert torch.as_tensor(load_data(tmp_path, images=image_form("inspect", normalize="imagenet")).x).shape == (
        2,
        3,
        6,
        6,
    )


def test_several_sizes_need_the_size_of_training(tmp_path: Path) -> None:
    folder(tmp_path)
    picture(tmp_path / "dog" / "tall.png", 9, 5, 3)
    with pytest.raises(
        TangentError, match=r"cat/0.png is 6x5 \(height x width\) and .*tall.png 9x5; give --image-size"
    ):
        load_data(tmp_path)
    data = load_data(tmp_path, images=image_form("inspect", size="4x3"))
    assert torch.as_tensor(data.x).shape == (5, 3, 4, 3)
    assert told(data, "scaled to 4x3")


@pytest.mark.slow
def test_the_form_of_training_is_read_beside_the_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pixels = folder(tmp_path / "data")["cat/0.png"]
    held = {
        "do_resize": True, "size": {"height": 4, "width": 4}, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(held))
    form = image_form("inspect", beside=[tmp_path / "none", tmp_path])
    data = load_data(tmp_path / "data", images=form)
    import importlib

    vit: Any = importlib.import_module("transformers.models.vit.image_processing_pil_vit") if int(
        transformers.__version__.partition(".")[0]
    ) >= 5 else importlib.import_module("transformers.models.vit.image_processing_vit")  # fmt: skip
    kind = next(getattr(vit, name) for name in ("ViTImageProcessorPil", "ViTImageProcessor") if hasattr(vit, name))
    wanted = kind(**held)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(torch.as_tensor(data.x)[0], wanted, atol=1e-5)
    assert told(data, "preprocessor_config.json")


def test_the_form_of_timm_is_read_from_its_config(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    pixels = folder(tmp_path / "data")["cat/0.png"]
    held = {
        "input_size": [3, 4, 4],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "crop_pct": 0.8,
        "interpolation": "bicubic",
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": held}))
    data = load_data(tmp_path / "data", images=image_form("inspect", beside=[tmp_path]))
    config = {**held, "input_size": tuple(held["input_size"])}  # type: ignore[arg-type]
    made = timm.data.create_transform(**timm.data.resolve_data_config(config))
    assert torch.allclose(torch.as_tensor(data.x)[0], made(Image.fromarray(pixels)), atol=2 / 255)


def test_at_most_as_many_images_are_opened_as_asked_for(tmp_path: Path) -> None:
    folder(tmp_path)
    for k in range(40):
        (tmp_path / "cat" / f"zz{k}.png").write_text("broken")
    chosen = next(
        seed for seed in range(2000) if max(torch.randperm(44, generator=torch.Generator().manual_seed(seed))[:1]) < 2
    )
    data = load_data(tmp_path, most=1, seed=chosen)
    assert data.n == 1
    assert data.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("size", "normalize", "words"),
    [
        ("big", None, "--image-size is a number of pixels"),
        ("0", None, "--image-size is a number of pixels"),
        ("4x4x4", None, "--image-size is a number of pixels"),
        (None, "1,2", "--normalize is none, imagenet, or"),
        (None, "1,2/1", "--normalize is none, imagenet, or"),
        (None, "0.5/0", "--normalize is none, imagenet, or"),
    ],
)
def test_options_of_images_are_checked(size: str | None, normalize: str | None, words: str) -> None:
    with pytest.raises(TangentError, match=words):
        image_form("inspect", size=size, normalize=normalize)


def test_folders_that_are_no_images_by_class_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(TangentError, match=r"holds nothing, not data by itself; data are \.npz"):
        load_data(tmp_path)
    (tmp_path / "texts.csv").write_text("text,label\n")
    with pytest.raises(
        TangentError, match=r"holds texts.csv, not data by itself; give one of them, such as .*texts.csv"
    ):
        load_data(tmp_path)
    picture(tmp_path / "data" / "train" / "cat" / "0.png", 4, 4, 3)
    picture(tmp_path / "data" / "test" / "cat" / "0.png", 4, 4, 3)
    with pytest.raises(TangentError, match=r"holds splits, test, train; give one, such as .*data/test"):
        load_data(tmp_path / "data")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "0.png").write_text("no image")
    with pytest.raises(TangentError, match=r"0.png is no image that can be read .*; remove it"):
        load_data(tmp_path / "broken")
    deep = np.zeros((4, 4), dtype=np.uint16)
    (tmp_path / "deep" / "cat").mkdir(parents=True)
    Image.fromarray(deep).save(tmp_path / "deep" / "cat" / "0.png")
    with pytest.raises(TangentError, match="not of 8 bits a channel"):
        load_data(tmp_path / "deep")
    folder(tmp_path / "good")
    with pytest.raises(TangentError, match=r"is of 2 channels, and the images of .* have 3"):
        load_data(tmp_path / "good", images=image_form("inspect", normalize="0,0/1,1"))


def letters(texts: list[str]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([ord(c) for c in text]) for text in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def sentences(datasets: Any) -> Any:
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    return datasets.Dataset.from_dict({"text": ["good film", "bad", "fine"], "label": [1, 0, 1]}, features=kinds)


def test_data_sets_on_disk_and_in_memory_are_read_with_their_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    made = sentences(datasets)
    made.save_to_disk(str(tmp_path / "one"))
    made.to_parquet(str(tmp_path / "one.parquet"))
    for data in (load_data(tmp_path / "one", tokenizer=letters), as_data(made, tokenizer=letters),
                 load_data(tmp_path / "one.parquet", tokenizer=letters)):  # fmt: skip
        assert data.classes == ("neg", "pos")
        assert data.texts == ("good film", "bad", "fine")
        assert data.y is not None
        assert data.y.tolist() == [1, 0, 1]
    turned = as_data(made, tokenizer=letters, classes=("POS", "NEG"), most=2)
    assert turned.y is not None
    assert turned.texts is not None
    assert turned.y.tolist() == [{"good film": 0, "bad": 1, "fine": 0}[text] for text in turned.texts]
    stream = as_data(made.to_iterable_dataset(), tokenizer=letters, most=2)
    assert stream.texts == ("good film", "bad")


def test_splits_and_ragged_tokens_are_refused_in_words(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    made = sentences(datasets)
    both = datasets.DatasetDict({"train": made, "test": made})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(
        TangentError, match=r"both holds the splits train, test; give one of them, such as .*both/train"
    ):
        load_data(tmp_path / "both", tokenizer=letters)
    assert load_data(tmp_path / "both" / "train", tokenizer=letters).n == 3
    with pytest.raises(TangentError, match=r"holds the splits train, test; give one of them, such as data\['train'\]"):
        as_data(both, tokenizer=letters)
    with pytest.raises(TangentError, match="a stream without an end"):
        as_data(made.to_iterable_dataset(), tokenizer=letters)
    with pytest.raises(TangentError, match="holds no samples"):
        as_data(made.select([]), tokenizer=letters)
    tokens = datasets.Dataset.from_dict({"input_ids": [[1], [1, 2]], "label": [0, 1]})
    with pytest.raises(TangentError, match=r"'input_ids' of .* holds 1 to 2 tokens a sample; pad them"):
        as_data(tokens)
    equal = as_data(
        datasets.Dataset.from_dict({"input_ids": [[1, 3], [1, 2]], "attention_mask": [[1, 1]] * 2, "label": [0, 1]})
    )
    assert isinstance(equal.x, dict)
    assert equal.x["input_ids"].tolist() == [[1, 3], [1, 2]]


def test_images_in_a_data_set_are_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    pixels = [picture(tmp_path / f"{k}.png", 5, 4, 3, seed=k) for k in range(3)]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    made = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / f"{k}.png") for k in range(3)], "label": [0, 1, 0]}, features=kinds
    )
    data = as_data(made)
    assert torch.allclose(
        torch.as_tensor(data.x), torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2) / 255).float()
    )
    assert data.classes == ("a", "b")
    assert data.texts is None

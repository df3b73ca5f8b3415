"""Images in folders, one a class, as tensors (n, channels, height, width)."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading.samples import Opened, Samples, drawn_note
from adaptive_tangents.loading.words import listed_names, optional, told
from adaptive_tangents.runtime.memory import format_bytes, limit_for

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "dev")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BILINEAR = 2


@dataclass(frozen=True)
class ImageForm:
    """How images become inputs: scaled to ``size`` (height, width) if given, and each channel as (x/255 − mean)/std.

    With ``shortest``, the shorter side is first scaled to that and the middle is cut out. ``source`` is what said so.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shortest: int | None = None
    resample: int = _BILINEAR
    rescale: float = 1 / 255
    source: str = ""


def image_form(
    call: str, *, size: str | int | None = None, normalize: str | None = None, beside: Sequence[Path] = ()
) -> ImageForm:
    """The form that was asked for, or the one that is kept beside a checkpoint.

    ``size`` is "224" or "224x256" (height, width); ``normalize`` is "imagenet", "none" or "MEANS/STDS" with numbers separated
    by commas; ``beside`` are folders that may hold a preprocessor_config.json (transformers) or a config.json with
    pretrained_cfg (timm).
    """
    found = next((form for folder in beside if (form := _kept(folder)) is not None), ImageForm())
    values: dict[str, Any] = vars(found).copy()
    if size is not None:
        values |= {"size": _size(size, call), "shortest": None}
    if normalize is not None:
        mean, std = _normalization(normalize, call)
        values |= {"mean": mean, "std": std, "source": "--normalize"}
    return ImageForm(**values)


def _size(size: str | int, call: str) -> tuple[int, int]:
    parts = str(size).lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() and 0 < int(part) < 65536 for part in parts):
        raise TangentError(
            f"{call}: --image-size is a number of pixels, 224, or height and width, 224x256; got {size!r}"
        )
    return int(parts[0]), int(parts[-1])


def _normalization(words: str, call: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if words == "none":
        return (0.0,), (1.0,)
    if words == "imagenet":
        return _IMAGENET
    with suppress(ValueError):
        mean, std = (tuple(float(part) for part in side.split(",")) for side in words.split("/"))
        if len(mean) == len(std) and all(part > 0 for part in std) and np.isfinite([*mean, *std]).all():
            return mean, std
    raise TangentError(
        f"{call}: --normalize is none, imagenet, or means and deviations of the channels, 0.5,0.5,0.5/0.5,0.5,0.5; got "
        f"{words!r}"
    )


def _kept(folder: Path) -> ImageForm | None:
    """The form that a checkpoint's folder says, if it does."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        path = folder / "preprocessor_config.json"
        if path.is_file():
            return _of_transformers(json.loads(path.read_text(encoding="utf-8")), str(path))
        path = folder / "config.json"
        held = json.loads(path.read_text(encoding="utf-8")).get("pretrained_cfg")
        if held:
            height, width = held["input_size"][-2:]
            kinds = {"nearest": 0, "bilinear": 2, "bicubic": 3}
            return ImageForm(
                (height, width), tuple(held["mean"]), tuple(held["std"]), round(height / held.get("crop_pct", 1.0)),
                kinds.get(held.get("interpolation", "bilinear"), _BILINEAR), source=str(path),
            )  # fmt: skip
    return None


def _of_transformers(held: dict[str, Any], source: str) -> ImageForm:
    def pair(value: Any) -> tuple[int, int] | None:
        if isinstance(value, int):
            return value, value
        return (int(value["height"]), int(value["width"])) if value and "height" in value else None

    size = held.get("size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    cut = pair(held.get("crop_size")) if held.get("do_center_crop") else None
    wanted = cut or pair(size) or (None if shortest is None else (int(shortest), int(shortest)))
    if not held.get("do_resize", True):
        wanted, shortest = None, None
    normal = held.get("do_normalize", True) and held.get("image_mean")
    rescale = float(held.get("rescale_factor", 1 / 255)) if held.get("do_rescale", True) else 1.0
    return ImageForm(
        wanted, tuple(held["image_mean"]) if normal else (0.0,), tuple(held["image_std"]) if normal else (1.0,),
        None if shortest is None else int(shortest), int(held.get("resample", _BILINEAR)), rescale, source,
    )  # fmt: skip


def is_image_folder(path: Path) -> bool:
    """Whether a folder has folders that hold images, at any depth."""
    return any(_images(folder) for folder in _folders(path))


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith((".", "__")))


def _images(folder: Path) -> list[Path]:
    found = (each for each in folder.rglob("*") if each.suffix.lower() in ENDINGS and each.is_file())
    return sorted(each for each in found if not each.name.startswith("."))


def open_images(path: Path, call: str, form: ImageForm | None = None, *, seed: int = 0) -> Opened:
    """The images in a folder of class folders, whose sorted names are the classes; ``seed`` is that of a draw.

    Raises TangentError for images of several sizes without a size asked for, for splits, and for files that are no images.
    """
    held = {folder.name: _images(folder) for folder in _folders(path)}
    named = {name: files for name, files in held.items() if files}
    if len(named) > 0 and all(name.lower() in _SPLITS for name in named):
        raise TangentError(
            f"{call}: {path} holds splits, {listed_names(named)}; give one, such as {path / next(iter(named))}"
        )
    files = [file for name in held for file in held[name]]
    labels = tuple(name for name in held for _ in held[name])

    def read(rows: list[int] | None) -> Samples:
        notes = [] if rows is None else [drawn_note(str(path), len(files), len(rows), seed)]
        opened = files if rows is None else [files[k] for k in rows]
        x, said = stacked(opened, [str(file) for file in opened], str(path), call, form or ImageForm())
        return Samples(
            str(path), x=x, labels=labels, classes=tuple(held), column="folder", where=lambda k: str(files[k]),
            notes=(*notes, *_left_out(path, held), *said), rows=None if rows is None else tuple(rows), total=len(files),
            labels_of_all=True,
        )  # fmt: skip

    return Opened(len(files), read)


def _left_out(path: Path, held: Mapping[str, Sequence[Path]]) -> list[str]:
    """Sentences on images beside the class folders, and on folders without any."""
    notes = []
    loose = sum(each.suffix.lower() in ENDINGS for each in path.iterdir() if each.is_file())
    if loose:
        notes.append(f"{loose} images beside the class folders of {path} were left out.")
    empty = [name for name, found in held.items() if not found]
    if empty:
        notes.append(f"The class folders {listed_names(empty)} of {path} hold no images.")
    return notes


def stacked(
    images: Sequence[Any], names: Sequence[str], source: str, call: str, form: ImageForm
) -> tuple[Tensor, list[str]]:
    """Images, as files or as Pillow's, as one tensor, and what was done to them."""
    pillow = optional("PIL.Image", "reading images", call, " or pillow, or give an .npz file")
    modes: dict[str, str] = {}
    sizes: dict[tuple[int, int], str] = {}
    arrays = []
    for image, name in zip(images, names, strict=True):
        try:
            opened = image if isinstance(image, pillow.Image) else pillow.open(image)
            opened.load()
        except Exception as error:  # broken files raise many kinds
            raise TangentError(f"{call}: {name} is no image that can be read ({told(error)}); remove it") from error
        if opened.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
            raise TangentError(
                f"{call}: {name} is an image of kind {opened.mode}, not of 8 bits a channel; convert it, or give an .npz file"
            )
        modes.setdefault("gray" if opened.mode in ("1", "L", "LA") else "color", name)
        sizes.setdefault((opened.height, opened.width), name)
        if len(sizes) > 1 and form.size is None:
            (one, first), (other, second) = sizes.items()
            raise TangentError(
                f"{call}: images of {source} have several sizes: {first} is {one[0]}x{one[1]} (height x width) and {second} "
                f"{other[0]}x{other[1]}; give --image-size, the size that training scaled them to"
            )
        channels = len(form.mean) if form.mean is not None and len(form.mean) > 1 else None
        _check_room(len(images), form.size or next(iter(sizes)), source, call)
        opened = opened.convert("RGB" if "color" in modes or channels == 3 else "L")
        arrays.append(np.asarray(_scaled(opened, form), dtype=np.uint8))
    color = "color" in modes or (form.mean is not None and len(form.mean) == 3)
    arrays = [np.repeat(a[..., None], 3, 2) if color and a.ndim == 2 else a for a in arrays]
    pixels = torch.from_numpy(np.stack(arrays))
    pixels = pixels.permute(0, 3, 1, 2) if color else pixels[:, None]
    return _normalized(pixels.contiguous(), form, source, call), _said(modes, sizes, form, source)


def _check_room(n: int, size: tuple[int, int], source: str, call: str) -> None:
    need, limit = 2 * 4 * 3 * n * size[0] * size[1], limit_for(None, torch.device("cpu"))
    if need > limit:
        raise TangentError(
            f"{call}: the {n:,} images of {source} take {format_bytes(need)}, more than the {format_bytes(limit)} allowed; "
            "give a folder with fewer, or a smaller --image-size"
        )


def _scaled(image: Any, form: ImageForm) -> Any:
    if form.size is None:
        return image
    height, width = form.size
    if form.shortest is None:
        return image if image.size == (width, height) else image.resize((width, height), form.resample)
    factor = form.shortest / min(image.size)
    whole = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image if image.size == whole else image.resize(whole, form.resample)
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _normalized(pixels: Tensor, form: ImageForm, source: str, call: str) -> Tensor:
    x = pixels.float() * form.rescale
    if form.mean is None or form.std is None:
        return x
    if len(form.mean) not in (1, x.shape[1]):
        raise TangentError(
            f"{call}: the normalization ({form.source}) is of {len(form.mean)} channels, and the images of {source} have "
            f"{x.shape[1]}; give one of as many"
        )
    mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in (form.mean, form.std))
    return (x - mean) / std


def _said(modes: dict[str, str], sizes: dict[tuple[int, int], str], form: ImageForm, source: str) -> list[str]:
    """Sentences on what was done to the images."""
    notes = []
    if form.mean is None:
        notes.append(
            f"Images of {source} are scaled to 0…1 and not normalized, as nothing says what training did; if it did "
            "more, give --normalize MEANS/STDS."
        )
    elif form.mean != (0.0,) or form.std != (1.0,):
        notes.append(
            f"Images of {source} are normalized by means {form.mean} and deviations {form.std} ({form.source})."
        )
    if form.size is not None and set(sizes) != {form.size}:
        cut = "" if form.shortest is None else ", the middle cut out"
        notes.append(f"Images of {source} are scaled to {form.size[0]}x{form.size[1]}{cut}.")
    if len(modes) > 1:
        notes.append(f"Gray images of {source} ({modes['gray']}) are taken as color, as the others are.")
    return notes

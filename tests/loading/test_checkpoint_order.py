"""The order of checkpoints: by what files store, by numbers as numbers, by words; open questions are refused."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adaptive_tangents as at
from adaptive_tangents.loading.checkpoint_order import ordered, swapped

WEIGHTS = {"weight": torch.ones(2, 2)}


def written(folder: Path, files: dict[str, Any]) -> list[Path]:
    """Files in an order of no meaning: None is bare weights, a mapping is saved with them."""
    paths = []
    for name, extra in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(WEIGHTS, path, metadata=extra)
        else:
            torch.save(WEIGHTS if extra is None else {"state_dict": WEIGHTS} | extra, path)
        paths.append(path)
    random.Random(0).shuffle(paths)
    return paths


def adam(steps: int) -> dict[str, Any]:
    return {"state": {0: {"step": torch.tensor(float(steps)), "exp_avg": torch.zeros(2)}}, "param_groups": []}


STORED: dict[str, dict[str, Any]] = {
    "Lightning": {"start.ckpt": {"global_step": 0}, "a.ckpt": {"global_step": 90}, "end.ckpt": {"global_step": 800}},
    "names that mislead": {"z.pt": {"step": 1}, "m.pt": {"step": 20}, "a.pt": {"step": 100}},
    "epochs": {"c.pt": {"epoch": 2}, "b.pt": {"epoch": 10}, "a.pt": {"epoch": 11}},
    "steps before epochs": {"b.pt": {"step": 5, "epoch": 1}, "a.pt": {"step": 9, "epoch": 1}},
    "iterations in meta": {"b.pth": {"meta": {"iter": 5}}, "a.pth": {"meta": {"iter": 50}}},
    "a tensor": {"b.pt": {"iteration": torch.tensor(3)}, "a.pt": {"iteration": torch.tensor(30)}},
    "an optimizer": {"b.pt": {"optimizer": adam(3)}, "a.pt": {"optimizer": adam(30)}},
    "Lightning's optimizers": {"b.pt": {"optimizer_states": [adam(3)]}, "a.pt": {"optimizer_states": [adam(30)]}},
    "safetensors": {"b.safetensors": {"step": "9"}, "a.safetensors": {"step": "10"}},
    "bare start": {"init.pt": None, "b.pt": {"step": 5}, "a.pt": {"step": 50}},
    "bare end": {"b.pt": {"step": 5}, "a.pt": {"step": 50}, "final.pt": None},
    "best with a step": {"a.pt": {"step": 1}, "best.pt": {"step": 7}, "c.pt": {"step": 90}},
    "last that equals a step": {"step=9.ckpt": {"global_step": 9}, "last.ckpt": {"global_step": 9}},
}
NAMED: dict[str, tuple[str, ...]] = {
    "the issue": ("start.ckpt", "epoch_1.ckpt", "epoch_2.ckpt", "epoch_10.ckpt", "end.ckpt"),
    "numbers": ("step_9.pt", "step_10.pt", "step_100.pt"),
    "bare numbers": ("9.pt", "80.pt", "700.pt"),
    "zeros": ("0000.pt", "0090.pt", "0800.pt"),
    "initial and final": ("initial.pt", "model_5.pt", "final.pt"),
    "first and last": ("first.pt", "last.pt"),
    "first and best": ("model_init.pt", "model_best.pt"),
    "before and after": ("before_training.pt", "after_training.pt"),
    "words alone": ("untrained.pt", "trained.pt"),
    "pretrained": ("pretrained.pt", "finetuned.pt"),
    "fine-tuned": ("base.pt", "fine-tuned.pt"),
    "Lightning": ("epoch=0-step=50.ckpt", "epoch=1-step=100.ckpt", "epoch=10-step=550.ckpt"),
    "a loss before": ("val_loss=0.91-epoch=2.ckpt", "val_loss=0.35-epoch=3.ckpt", "val_loss=0.20-epoch=12.ckpt"),
    "a loss behind": ("epoch=2-val_loss=0.91.ckpt", "epoch=3-val_loss=1.35.ckpt", "epoch=12-val_loss=0.20.ckpt"),
    "steps of an epoch": ("epoch_1_step_500.pt", "epoch_2_step_100.pt", "epoch_2_step_500.pt", "epoch_10_step_1.pt"),
    "a network's number": ("resnet18_9.pt", "resnet18_10.pt"),
    "thousands": ("step_500.pt", "step_10k.pt", "step_1m.pt"),
    "behind": ("500steps.pt", "1000steps.pt", "20000steps.pt"),
    "checkpoint-N": ("checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors"),
    "one between": ("init.pt", "model.pt", "final.pt"),
    "one without a word": ("init.pt", "model.pt"),
    "words that all share": ("vit-base-trained_9.pt", "vit-base-trained_10.pt"),
    "a word beside shared ones": ("vit-base-init.pt", "vit-base_9.pt", "vit-base_10.pt"),
    "capitals": ("Init.pt", "Step_5.pt", "Step_40.pt", "FINAL.pt"),
    "weekend": ("weekend_1.pt", "weekend_2.pt"),
}


@pytest.mark.parametrize("case", STORED)
def test_what_files_store_gives_the_order(case: str, tmp_path: Path) -> None:
    found = ordered(written(tmp_path, STORED[case]))
    assert [path.name for path in found.paths] == list(STORED[case])


@pytest.mark.parametrize("case", NAMED)
def test_numbers_and_words_of_names_give_the_order(case: str, tmp_path: Path) -> None:
    found = ordered(written(tmp_path, dict.fromkeys(NAMED[case])))
    assert [str(path.relative_to(tmp_path)) for path in found.paths] == list(NAMED[case])
    assert found.doubts == ()


def test_the_trainers_record_beside_a_checkpoint_counts(tmp_path: Path) -> None:
    paths = written(tmp_path, {"b/model.safetensors": None, "a/model.safetensors": None})
    for name, step in (("b", 9), ("a", 10)):
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    found = ordered(paths)
    assert [path.parent.name for path in found.paths] == ["b", "a"]
    assert (found.basis, found.places) == ("the steps in trainer_state.json", ("9", "10"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "best without a step": (
        {"step_1.pt": None, "best.pt": None, "step_9.pt": None},
        "the best checkpoint may come anywhere",
    ),
    "best beside last": ({"start.pt": None, "best.pt": None, "last.pt": None}, "the best checkpoint may come anywhere"),
    "two ends": ({"init.pt": None, "last.pt": None, "final.pt": None}, "all say that they come after the others"),
    "two starts": ({"init.pt": None, "start.pt": None, "final.pt": None}, "all say that they come before the others"),
    "one that says nothing": (
        {"step_1.pt": None, "model.pt": None, "step_9.pt": None},
        "where .*model.pt comes",
    ),
    "one without a step": ({"a.pt": {"step": 1}, "b.pt": None, "c.pt": {"step": 2}}, "nothing says where .*b.pt comes"),
    "beside words": ({"init.pt": None, "net.pt": None, "model.pt": None}, "nothing says where .*net.pt.* come"),
    "a start that is none": (
        {"start.ckpt": {"global_step": 900}, "a.ckpt": {"global_step": 10}, "end.ckpt": {"global_step": 1000}},
        r"by its name .*start.ckpt is the first checkpoint, but by the steps stored in the files it is at 900 and .* at 10;",
    ),
    "an end that is none": (
        {"end.pt": {"epoch": 1}, "b.pt": {"epoch": 5}},
        "end.pt is the last checkpoint, but by the epochs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_order_that_is_open_is_refused_with_what_to_give(case: str, tmp_path: Path) -> None:
    files, words = REFUSED[case]
    with pytest.raises(at.TangentError, match=f"^inspect: .*{words}.*give --start and --end, or names with the step"):
        ordered(written(tmp_path, files))


def test_an_order_by_the_alphabet_alone_or_against_a_source_is_doubted(tmp_path: Path) -> None:
    paths = written(tmp_path, {"anna.pt": None, "berta.pt": None})
    assert "nothing but the alphabet gives the order" in ordered(paths).doubts[0]
    against = written(tmp_path, {"step_1.pt": {"step": 500}, "step_2.pt": {"step": 100}})
    found = ordered(against)
    assert [path.name for path in found.paths] == ["step_2.pt", "step_1.pt"]
    assert "by the numbers in their names, " in found.doubts[0]


def test_the_order_does_not_depend_on_how_files_are_listed(tmp_path: Path) -> None:
    paths = written(tmp_path, dict.fromkeys(("init.pt", "step_2.pt", "step_10.pt", "end.pt")))
    assert len({ordered(listing).paths for listing in itertools.permutations(paths)}) == 1


def test_a_start_that_comes_after_the_end_is_told(tmp_path: Path) -> None:
    early, late = (tmp_path / name for name in ("a.pt", "b.pt"))
    written(tmp_path, {"a.pt": {"global_step": 10}, "b.pt": {"global_step": 200}})
    assert swapped(early, late) is None
    assert "comes after" in str(swapped(late, early))
    assert "(200 and 10); if --start and --end are swapped" in str(swapped(late, early))


def test_files_that_cannot_be_read_are_left_to_loading(tmp_path: Path) -> None:
    for name in ("step_2.pt", "step_10.pt", "step_3.safetensors"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    found = ordered(sorted(tmp_path.iterdir()))
    assert [path.stem for path in found.paths] == ["step_2", "step_3", "step_10"]

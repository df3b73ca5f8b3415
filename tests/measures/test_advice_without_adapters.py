"""LoRA advice where no layer gets an adapter."""

from torch import nn

import adaptive_tangents as at


def test_it_says_what_is_trained_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    nn.init.orthogonal_(model[0].weight)  # no change of lower rank carries most of it
    state = model.state_dict()
    advice = at.lora_advice(({name: 2 * value for name, value in state.items()}, state))
    assert not advice.adapted
    assert advice.sentence() == "No layer needs an adapter of low rank. 0, 2 are trained whole."
    assert str(advice).startswith(advice.sentence())

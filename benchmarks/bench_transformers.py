"""Full tangent kernels of two transformers, float32, beside the ``torch.func`` recipe ``vmap(jacrev)``."""

import recipes
from common import contend
from networks import gpt, made, vit

contenders = {
    "ViT: adaptive-tangents": lambda: recipes.ours(made(vit), repeats=3),
    "ViT: torch.func": lambda: recipes.torch_func(made(vit)),
    "GPT: adaptive-tangents": lambda: recipes.ours(made(gpt), repeats=3),
    "GPT: torch.func": lambda: recipes.torch_func(made(gpt)),
}

if __name__ == "__main__":
    contend(
        __file__, contenders,
        "full tangent kernels, n = 20, c = 10, float32: ViT 192 wide, 6 deep, 65 tokens; GPT 256 wide, 4 deep, 64 tokens",
        recipes.COLUMNS,
    )  # fmt: skip

"""Full tangent kernels of convolutional networks on 32×32 images, float32, beside other ways to make them."""

import recipes
from common import contend
from networks import cnn, made, resnet18

contenders = {
    "CNN: adaptive-tangents": lambda: recipes.ours(made(cnn)),
    **recipes.by_implementation("CNN", lambda: made(cnn)),
    "CNN: nngeometry": lambda: recipes.nngeometry(made(cnn)),
    "CNN: asdfghjkl": lambda: recipes.asdl(made(cnn), repeats=3),
    "CNN: torch.func": lambda: recipes.torch_func(made(cnn), repeats=2, warm=1),
    "ResNet-18: adaptive-tangents": lambda: recipes.ours(made(resnet18), repeats=3),
    "ResNet-18: nngeometry": lambda: recipes.nngeometry(made(resnet18), repeats=1),
    "ResNet-18: asdfghjkl": lambda: recipes.asdl(made(resnet18)),
    "ResNet-18: torch.func": lambda: recipes.torch_func(made(resnet18)),
}

if __name__ == "__main__":
    contend(
        __file__, contenders, "full tangent kernels, CNN with n = 100 and ResNet-18 in eval with n = 20, c = 10, float32",
        recipes.COLUMNS,
    )  # fmt: skip

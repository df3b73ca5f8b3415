"""Images for experiments: MNIST and CIFAR-10 files read and checked, and digits that ship with packages."""

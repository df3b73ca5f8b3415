"""Images with labels for experiments, as two stacks of uint8 images for training and testing.

``images`` loads data sets by name, from packages, files or OpenML; ``image_files`` reads and checks MNIST's and CIFAR-10's
files.
"""

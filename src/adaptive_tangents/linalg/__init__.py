"""Solving without networks: Cholesky factors, conjugate gradients, systems of kernels, products of factors, Hadamard rows."""

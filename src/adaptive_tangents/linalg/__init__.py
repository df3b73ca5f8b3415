"""Numerical linear algebra that knows no networks.

It has Cholesky factors, conjugate gradients, the linear systems of kernels, products with feature factors, and rows of
Hadamard matrices. It imports from runtime.
"""

"""Memory and files: what every other wing needs.

It has the free memory and the limit in force, ranges to work through step by step, and tensor files that are written
whole or not at all. It imports only the error types.
"""

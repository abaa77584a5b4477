"""Triton kernels: what quantize.py and moments.py do in many passes over the memory, in one.

Nothing here is imported where there is no GPU; `tests/numerics/test_kernels.py` runs them in Triton's interpreter.
"""

"""Triton kernels: what quantize.py, moments.py, whitened.py and descent.py do in many passes over the memory, in one.

Nothing here is imported where there is no GPU; `tests/numerics/test_*kernel*.py` run them in Triton's interpreter.
"""

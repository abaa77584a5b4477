"""Pure functions on tensors: codebooks, rounding, packing, storages, matrix roots."""

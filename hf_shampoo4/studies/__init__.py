"""The measurements behind docs/results: races, benchmarks, error tables."""

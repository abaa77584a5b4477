"""Optimizer state to disk and back, in every file layout that trainers use."""

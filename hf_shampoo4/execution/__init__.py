"""Shapes become blocks, blocks become waves, and a wave takes a step."""

"""What tests of several rooms share."""

from __future__ import annotations

from typing import Any

from hf_shampoo4.options import Options, what_uses

LONGEST_CHILD = 600
"""Seconds that a process of a test may take.  It ends a hang; how fast anything is, no test decides by it."""


def used(options: dict[str, Any]) -> dict[str, Any]:
    """Without what the chosen algorithm, or Shampoo's factor, has no use for and refuses."""
    algorithm, factor = options.get("algorithm", Options.algorithm), options.get("factor", Options.factor)
    return {name: value for name, value in options.items() if not what_uses(name, algorithm, factor)}

"""What tests of several rooms share."""

LONGEST_CHILD = 600
"""Seconds that a process of a test may take.  It ends a hang; how fast anything is, no test decides by it."""

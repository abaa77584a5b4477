"""Pictures are written whole or not at all, and many lines can be told apart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from hf_shampoo4.utils.plots import label_ends, picture, style


def test_a_picture_is_written_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    with picture(path, (4, 3), (1, 2), dpi=50) as (_, axes):
        axes[0][1].plot([1, 2], [3, 4], **style(0))
        assert not path.exists()
    with Image.open(path) as found:
        assert found.size == (200, 150)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_block_that_fails_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="no"), picture(path, (4, 3)):
        raise ValueError("no")
    assert path.read_bytes() == b"old"


def test_lines_differ_in_colour_or_dashes() -> None:
    assert len({tuple(style(i).values()) for i in range(24)}) == 24
    for what in ("color", "marker"):
        assert len({style(i)[what] for i in range(6)}) == 6


def test_names_at_the_ends_of_lines_do_not_lie_over_each_other(tmp_path: Path) -> None:
    with picture(tmp_path / "a.png", (4, 3)) as (_, axes):
        axes[0][0].set(xlim=(0, 1), ylim=(0, 1))
        label_ends(axes[0][0], [(1, y, f"line {y}", "black") for y in (0.5, 0.501, 0.99, 1.0, 0.502)])
        offsets = [text.xyann[1] + text.xy[1] * 3 * 72 for text in axes[0][0].texts]
    assert all(after - before > 8 for before, after in pairwise(sorted(offsets)))

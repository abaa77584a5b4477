"""Small YAML files: what is read, and what is refused with its place."""

from pathlib import Path

import pytest

from hf_shampoo4.utils.yaml import read_yaml


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nsteps: 5\nlr: 2\n", "key 'lr' is in line 1 and again in line 3"),
        ("lr: 1\n'lr': 1\n", "key 'lr' is in line 1 and again in line 2"),
        ("a:\n  b: 1\n  b: 1\n", "key 'b' is in line 2 and again in line 3"),
        ("a: [{b: 1, b: 2}]\n", "key 'b' is in line 1 and again in line 1"),
        ("a: &x 1\nb: *x\n", r"references \(\*x\) are not allowed"),
    ],
)
def test_what_would_be_read_otherwise_than_it_looks_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"is not valid YAML: {said}"):
        read_yaml(tmp_path / "some.yaml")


def test_one_name_in_several_mappings_is_no_key_twice(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("a: {x: 1}\nb: {x: 2, 1: 3, '1': 4}\n")
    assert read_yaml(tmp_path / "some.yaml") == {"a": {"x": 1}, "b": {"x": 2, 1: 3, "1": 4}}

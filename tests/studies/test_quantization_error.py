"""`hf-shampoo4 errors`: the measures, the schemes and the files, at a small order."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_shampoo4 import cli
from hf_shampoo4.studies.quantization_error import compare, inverse_root, measure, time_solvers
from hf_shampoo4.studies.quantization_matrices import PAPER_A1, PAPER_A2, SCHEMES, Scheme, geometric, two_valued


def test_nre_and_ae_of_known_matrices() -> None:
    eye, other = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert compare(eye, eye) == pytest.approx((0.0, 0.0), abs=1e-5)
    assert compare(eye, 3 * eye) == pytest.approx((2.0, 0.0), abs=1e-5)
    assert compare(eye, other) == pytest.approx((math.sqrt(0.5), 45.0))


def test_an_indefinite_matrix_is_taken_at_its_absolute_value() -> None:
    a = torch.diag(torch.tensor([16.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(inverse_root(a, 0.0), torch.diag(torch.tensor([0.5, 1.0], dtype=torch.float64)))


def test_the_synthetic_matrices_have_their_spectra() -> None:
    for matrix, expected in (
        (two_valued(64), [1e-3] * 24 + [1.0] * 40),
        (geometric(64), np.logspace(-3, 0, 64)),
    ):
        found = torch.linalg.eigvalsh(matrix.a)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert matrix.a.dtype == torch.float64


def test_what_the_papers_found_holds_here() -> None:
    """Eigenvectors beat the matrix, orthogonality helps, linear-2 beats dynamic, 8 bits beat 4, C beats A."""
    found = {scheme: nre for scheme, (nre, _) in measure(geometric(256)).items()}
    assert found[Scheme("U", "linear2", 4)] < 0.5 * found[Scheme("A", "linear2", 4)]
    assert found[Scheme("U", "linear2", 4, 1)] < found[Scheme("U", "linear2", 4)]
    assert found[Scheme("U", "linear2", 4, 1)] < found[Scheme("U", "dynamic", 4, 1)]
    assert found[Scheme("U", "linear2", 8)] < 0.2 * found[Scheme("U", "linear2", 4)]
    assert found[Scheme("C", "linear2", 4)] < 0.5 * found[Scheme("A", "linear2", 4)]
    assert found[Scheme("C+EF mean", "linear2", 4)] < found[Scheme("C", "linear2", 4)]


def test_every_published_value_has_a_scheme_and_an_angle_that_its_norm_allows() -> None:
    """sin AE <= NRE for any two matrices: the values were copied, and read in the right units."""
    for paper in (PAPER_A1, PAPER_A2, geometric(8).paper):
        assert set(paper) <= set(SCHEMES)
        for nre, ae in paper.values():
            assert math.sin(math.radians(ae)) <= nre * 1.005


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = np.random.default_rng(0).normal(size=(48, 60)).astype(np.float32)
    np.save(tmp_path / "mine.npy", g @ g.T)
    arguments = [
        "errors",
        "--order",
        "48",
        "--output_dir",
        str(tmp_path / "out"),
        "--matrix",
        str(tmp_path / "mine.npy"),
    ]
    assert cli.main(arguments) == 0
    content = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert list(content) == ["synthetic, two eigenvalues", "synthetic, geometric", "real, mine"]
    for entry in content.values():
        assert len(entry["rows"]) == len(SCHEMES)
        assert entry["order"] == 48
        assert all(0 <= row["nre"] and 0 <= row["ae_degrees"] <= 180 for row in entry["rows"])
    assert (tmp_path / "out" / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert "Björck" in capsys.readouterr().out


def test_bad_input_is_answered_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "flat.npy", np.ones(3))
    for arguments, says in (
        (["--matrix", str(tmp_path / "none.npy")], "does not exist"),
        (["--matrix", str(tmp_path / "flat.npy")], "square matrix"),
    ):
        assert cli.main(["errors", "--output_dir", str(tmp_path), *arguments]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["errors", "--output_dir", str(tmp_path), "--order", "1"])
    assert "'1' is not a whole number, 2 or more" in capsys.readouterr().err


def test_solvers_are_timed_at_every_order() -> None:
    rows = time_solvers((8, 16), elements=256)
    assert [(row["order"], row["blocks"]) for row in rows] == [(8, 4), (16, 1)]
    assert all(row[name] >= 0 for row in rows for name in ("eigh", "newton", "newton_db"))

"""What a user installs: the wheel's contents, the pins, README's commands."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from importlib.machinery import SOURCE_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CONFIG_SUFFIXES = {".yaml", ".yml", ".json"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


FOLDERS = ("hf_shampoo4", "configs", "tests", "docs", "scripts", "benchmarks", ".ci")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt",
         "mkdocs.yml", ".gitignore", ".pre-commit-config.yaml")  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree: no old build folder gets in, and no new one is left."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def built(source: Path) -> str:
    """The sdist, and the wheel from it, beside the source; what the build has printed."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source.parent), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source: Path, built: str) -> Path:
    (path,) = source.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(source: Path, built: str) -> Path:
    (path,) = source.parent.glob("*.tar.gz")
    return path


def test_the_build_warns_of_nothing(built: str) -> None:
    told = [line for line in built.splitlines() if re.search("warning|ignored|deprecat", line, re.IGNORECASE)]
    assert not [line for line in told if "byte-compiling" not in line]  # which is of PYTHONDONTWRITEBYTECODE


def test_the_sdist_has_all_that_a_clone_has(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "build" not in p.parts}
    assert not {name for name in wanted if ".egg-info" not in name} - inside


COLD = """
import sys, pathlib
import hf_shampoo4, torch
assert pathlib.Path(hf_shampoo4.__file__).is_relative_to(sys.prefix), hf_shampoo4.__file__
weight = torch.nn.Parameter(torch.ones(64, 64))
optimizer = hf_shampoo4.Shampoo4bit([weight], lr=1e-2)
weight.square().sum().backward()
optimizer.step()
from hf_shampoo4.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["sdist", "git"])
def test_a_cold_start_in_an_empty_environment(kind: str, sdist: Path, source: Path, tmp_path: Path) -> None:
    """Dependencies are those of this environment, by a path file: what is tested is our own package."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    if kind == "git":
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "a"]):
            subprocess.run(["git", *words], cwd=source, check=True, env=clean)
    what = str(sdist) if kind == "sdist" else f"hf-shampoo4[train] @ git+file://localhost{source}"
    flags = ["--no-deps", "--no-build-isolation", "--ignore-installed", "--no-warn-script-location", "-q"]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", *flags, what]
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(install, capture_output=True, text=True, env=outside, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    words, said = {"sdist": ("plan llama_tiny", "1,840,256 parameters"), "git": ("train --help", "stdlib_tiny")}[kind]
    command = [python, "-c", COLD, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=outside, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    done = subprocess.run(
        [environment / "bin" / "hf-shampoo4", "--version"], capture_output=True, text=True, env=outside
    )
    assert done.stdout.startswith("hf-shampoo4 "), done.stderr


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def _files(folder: Path, suffixes: set[str]) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes}


def test_wheel_has_every_module_and_marker(names: set[str]) -> None:
    expected = _files(ROOT / "hf_shampoo4", set(SOURCE_SUFFIXES))
    expected |= {"hf_shampoo4/py.typed", "hf_shampoo4/_site/sitecustomize.py"}
    assert not expected - names


def test_wheel_has_every_config_inside_the_package(names: set[str]) -> None:
    expected = {f"hf_shampoo4/{name}" for name in _files(ROOT / "configs", CONFIG_SUFFIXES)}
    assert expected
    assert not expected - names


def test_wheel_has_nothing_else(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"hf_shampoo4", "hf_shampoo4-0.1.0.dist-info"}


def test_wheel_metadata(wheel: Path, names: set[str]) -> None:
    metadata = _metadata(wheel)
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"train", "trl", "bnb", "race", "vision", "bench", "triton", "deepspeed", "docs", "test", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_imports_and_runs_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "import hf_shampoo4; from hf_shampoo4.cli import main\n"
        "assert 'site' in hf_shampoo4.__file__, hf_shampoo4.__file__\n"
        "sys.argv = ['hf-shampoo4', '--help']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


WITHOUT = """
import sys
from hf_shampoo4.utils.extras import EXTRAS
sys.modules.update(dict.fromkeys([*EXTRAS, "scipy", "trackio", "wandb", "optuna"]))  # None: as if not installed
import torch
import hf_shampoo4 as s4
from hf_shampoo4.cli import main

model = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Linear(80, 8))
optimizer = s4.Shampoo4bit(s4.param_groups(model), lr=1e-3, stats_every=1)
model(torch.ones(2, 80)).square().sum().backward()
optimizer.step()
assert s4.metrics(optimizer)["optim/state_bytes"] > 0
s4.register()
print(s4.plan(model).state.total)
for words in (["plan", "llama_tiny"], ["train", "stdlib_tiny"], ["demo"], ["finetune", "lora"], ["race", "moments"]):
    assert main(words) == 2, words
for make in (lambda: s4.plan("llama_tiny"), lambda: s4.Shampoo4bit(model.parameters(), moments="8bit").step()):
    try:
        make()
    except ImportError as error:
        print(error, file=sys.stderr)
"""


def test_without_any_optional_package_the_extra_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    said = done.stderr.splitlines()
    extras = [re.findall(r"hf-shampoo4\[([\w,]+)\]", line) for line in said]
    assert extras == [["train"]] * 3 + [["train,trl"]] + [["train"]] * 2 + [["bnb"]], done.stderr


def test_every_extra_that_code_names_exists(project: dict[str, Any]) -> None:
    from hf_shampoo4.utils.extras import EXTRAS

    assert set(EXTRAS.values()) <= set(project["project"]["optional-dependencies"])


def test_sub_packages_are_listed(project: dict[str, Any]) -> None:
    """`packages` is explicit (configs/ is mapped into the package), so a new folder must be added to it."""
    folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "hf_shampoo4").rglob("*.py")}
    configs = {f"hf_shampoo4.configs.{p.name}" for p in (ROOT / "configs").iterdir() if p.is_dir()}
    assert set(project["tool"]["setuptools"]["packages"]) == folders | {"hf_shampoo4.configs"} | configs


def _pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in pairs}


def test_constraints_pin_everything_that_is_named(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    named = [*project["project"]["dependencies"], *(text for extra in extras.values() for text in extra)]
    pins = _pins()
    for requirement in map(Requirement, named):
        if requirement.name != "hf-shampoo4":
            assert canonicalize_name(requirement.name) in pins, requirement.name
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_torch_pin_takes_a_cpu_build(project: dict[str, Any]) -> None:
    """A local version (`+cpu`) would tie users to one index; the plain one is satisfied by any build of it."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", _pins()["torch"])


def _readme_command(name: str) -> str:
    match = re.search(rf"<!-- command: {name} -->\s*```bash\n(.+?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert match, f"README.md has no block marked '<!-- command: {name} -->'"
    return match[1]


@pytest.mark.parametrize(("name", "extra", "tool"), [("demo", "train", "hf-shampoo4 demo"), ("test", "test", "pytest")])
def test_readme_commands_set_up_what_they_need(project: dict[str, Any], name: str, extra: str, tool: str) -> None:
    command = _readme_command(name)
    assert "\n" not in command
    assert "-m venv .venv" in command
    assert "-c constraints.txt" in command
    assert f"-e '.[{extra}]'" in command
    assert f".venv/bin/{tool}" in command
    assert extra in project["project"]["optional-dependencies"]


def test_ci_runs_the_readme_test_command() -> None:
    """.ci/run reads the command from README; this holds its pattern to the same mark."""
    assert "<!-- command: test -->" in (ROOT / ".ci/run").read_text()


WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"),
           *(ROOT / "hf_shampoo4").rglob("*.md")]  # fmt: skip


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_to_headings_that_are_there(page: Path) -> None:
    for target, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name}: {target}"
        assert not heading or heading in _headings(found), f"{page.name}: {target}#{heading}"


def _headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and mkdocs make them of its headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}

"""Imported by every Python process below `python -m hf_shampoo4 --exec`: registers the optimizers there.

No error here may stop an interpreter: it may have nothing to do with training.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _run_hidden_sitecustomize() -> None:
    """Python imports one sitecustomize, the first of the path; the one behind this one must run too."""
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if p and Path(p).resolve() != HERE])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _register() -> None:
    """Load the package from where this file is: another interpreter's path may lack it, or hold another version."""
    package = HERE.parent
    spec = importlib.util.spec_from_file_location(package.name, package / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{package} cannot be loaded")
    sys.modules[package.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()


for _step in (_run_hidden_sitecustomize, _register):
    try:
        _step()
    except Exception as error:
        print(f"hf_shampoo4 --exec: {_step.__name__}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

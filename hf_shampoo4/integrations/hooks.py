"""Do something to a module right after it was imported, whenever that happens, and put methods of ours around others'.

Importing transformers ourselves would cost seconds, and a script that sets environment variables before it imports
transformers would find them ignored.  So nothing is imported early: a finder in `sys.meta_path` waits.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Call `action(module)` once module `name` is imported: now, if it already is.

    An action that fails is reported on stderr and does not break the import: a process may have nothing to do with us.

    Args:
        name: full name of the module.
        action: called with the executed module; asking twice for the same action before the import counts once.
    """
    if name in sys.modules:
        _run(action, sys.modules[name])
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    waiting = _FINDER.actions.setdefault(name, [])
    if action not in waiting:
        waiting.append(action)


def wrap_once(owner: Any, name: str, wrapping: Callable[[Any], Callable[..., Any]]) -> None:
    """Put `wrapping(original)` in the place of a class's method `name`; again it changes nothing."""
    original = getattr(owner, name)
    if hasattr(original, "before_hf_shampoo4"):
        return
    wrapped: Any = functools.wraps(original)(wrapping(original))
    wrapped.before_hf_shampoo4 = original
    setattr(owner, name, staticmethod(wrapped) if isinstance(vars(owner).get(name), staticmethod) else wrapped)


class _Finder(MetaPathFinder):
    """Lets the other finders find a module, then adds the waiting actions to the end of its execution."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for action in self.actions.pop(module.__name__, ()):
                    _run(action, module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def _run(action: Action, module: ModuleType) -> None:
    try:
        action(module)
    except Exception as error:
        message = f"hf_shampoo4 could not extend {module.__name__}: {type(error).__name__}: {error}"
        print(message, file=sys.stderr, flush=True)

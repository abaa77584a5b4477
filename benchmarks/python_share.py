"""What Python takes of an optimizer step: the step beside its own torch calls written down one after the other.

python -m benchmarks.python_share            the default on the tiny LLaMA (1.8M parameters), one thread, processor time
python -m benchmarks.python_share adamw4bit  another --optim

A step's torch calls are recorded as Python makes them, with which result goes into which call, and written as a function
without a branch or a loop: the same kernels on the same memory, and nothing else.  What the step takes beyond that function
is this package's Python, and would stay whatever the kernels took.  The function itself is split by what a call takes
that has next to nothing to do: torch's own Python binding and dispatch, which are what it costs to launch a kernel.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_shampoo4.optimizer import Shampoo4bit
from hf_shampoo4.studies.bench import Bench
from hf_shampoo4.studies.bench_contestants import CONTESTANTS, Settings
from hf_shampoo4.studies.code_version import commit

ROUNDS = 5
VIEWS = (torch.Tensor.mT.__get__, torch.Tensor.T.__get__)  # type: ignore[attr-defined]  # attributes that are operations
READ = {"item", "tolist", "__bool__", "__float__", "__int__"}


class Recorder(TorchFunctionMode):
    """The torch calls that Python makes: function, arguments and result of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, dict[str, Any], Any]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__iter__:
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def operations(self) -> list[tuple[Callable[..., Any], Any, dict[str, Any], Any]]:
        """Without those that only look at a tensor: its shape, its device, its gradient."""
        return [call for call in self.calls if _operates(call[0], call[3])]


def _operates(function: Callable[..., Any], result: Any) -> bool:
    name = function.__name__
    if name == "__get__":
        return function in VIEWS
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return in_place or name in READ or any(True for _ in _tensors(result))


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors([*tree.values()])


def straight(calls: list[tuple[Callable[..., Any], Any, dict[str, Any], Any]]) -> Callable[[], None]:
    """A function that makes the calls one after the other, and drops each result after its last use."""
    known: dict[str, Any] = {}
    names: dict[int, str] = {}
    last: dict[str, int] = {}
    lines: list[str] = []

    def constant(value: Any) -> str:
        return (
            next((n for n, v in known.items() if v is value), None)
            or known.setdefault(f"c{len(known)}", value)
            and (f"c{len(known) - 1}")
        )

    def text(value: Any, i: int) -> str:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = f"c{len(known)}"
                known[names[id(value)]] = value
            name = names[id(value)]
            if name.startswith("v"):
                last[name] = i
            return name
        if isinstance(value, (list, tuple)) and any(True for _ in _tensors(value)):
            inside = "".join(f"{text(item, i)}, " for item in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        known[f"c{len(known)}"] = value
        return f"c{len(known) - 1}"

    for i, (function, args, kwargs, result) in enumerate(calls):
        arguments = [text(value, i) for value in args] + [f"{key}={text(value, i)}" for key, value in kwargs.items()]
        made = [t for t in _tensors(result) if id(t) not in names]
        for t in made:
            names[id(t)] = f"v{len(names)}"
            last[names[id(t)]] = i
        target = ""
        if made:
            whole = [result] if isinstance(result, Tensor) else result
            target = ", ".join(names[id(t)] if isinstance(t, Tensor) else "_" for t in whole)
            target += " = " if isinstance(result, Tensor) else ", = " if len(whole) == 1 else " = "
        lines.append(f"{target}{text(function, i)}({', '.join(arguments)})")
    dropped: dict[int, list[str]] = {}
    for name, i in last.items():
        dropped.setdefault(i, []).append(name)
    body = [f"    {line}" + (f"; del {', '.join(dropped[i])}" if i in dropped else "") for i, line in enumerate(lines)]
    scope = dict(known)
    exec("def run():\n" + "\n".join(body), scope)  # noqa: S102  (our own text)
    return scope["run"]

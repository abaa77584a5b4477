"""What Python takes of an optimizer step: the step beside its own torch calls written down one after the other.

python -m benchmarks.python_share            the default on the tiny LLaMA (1.8M parameters), one thread, processor time
python -m benchmarks.python_share adamw4bit  another --optim

A step's torch calls are recorded as Python makes them, with which result goes into which call, and written as a
function without a branch or a loop: the same kernels in the same order, and nothing else.  A timer stops both every
quarter of a millisecond and notes in which library the processor is.  What the step spends in the interpreter's beyond
that function is this package's Python, and would stay whatever the kernels took.  (The difference of the two times has
the caches and the lifetimes of tensors in it too, and the noise of the kernels.)  Torch's own part, binding and
dispatch, is the calls times what one takes that has next to nothing to do: what it costs to launch a kernel.

It needs Linux on x86-64, a C compiler, and a Python with a shared library.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_shampoo4.studies.bench import Bench
from hf_shampoo4.studies.bench_contestants import CONTESTANTS, Settings
from hf_shampoo4.studies.code_version import commit
from hf_shampoo4.studies.machine import machine

STEPS, PERIOD, IDLE = 60, 10, 1000
EVERY = 250_000  # nanoseconds
Call = tuple[Callable[..., Any], Any, dict[str, Any], Any]
"""Function, arguments, keywords, result."""
VIEWS = (torch.Tensor.mT.__get__, torch.Tensor.T.__get__)  # type: ignore[attr-defined]  # attributes that are operations
READ = {"item", "tolist", "__bool__", "__float__", "__int__"}


class Recorder(TorchFunctionMode):
    """The torch calls that Python makes: function, arguments and result of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__iter__:
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def operations(self) -> list[Call]:
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


def straight(calls: Sequence[Call]) -> Callable[[], None]:
    """A function that makes the calls one after the other, and drops each result after its last use."""
    return _Program().made_of(calls)


class _Program:
    """Text of a function, the values that it names, and where each of its variables is used last."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}
        self.names: dict[int, str] = {}
        self.last: dict[str, int] = {}

    def made_of(self, calls: Sequence[Call]) -> Callable[[], None]:
        lines = [self.line(i, call) for i, call in enumerate(calls)]
        dropped: dict[int, list[str]] = {}
        for name, i in self.last.items():
            dropped.setdefault(i, []).append(name)
        body = [line + (f"; del {', '.join(dropped[i])}" if i in dropped else "") for i, line in enumerate(lines)]
        exec("def run():\n " + "\n ".join(body or ["pass"]), self.scope)
        run: Callable[[], None] = self.scope["run"]
        return run

    def line(self, i: int, call: Call) -> str:
        function, args, kwargs, result = call
        given = [self.text(value, i) for value in args] + [f"{key}={self.text(v, i)}" for key, v in kwargs.items()]
        made = [t for t in _tensors(result) if id(t) not in self.names]  # in place: it has a name
        for t in made:
            self.last[self.names.setdefault(id(t), f"v{len(self.names)}")] = i
        target = ""
        if made:
            whole = [result] if isinstance(result, Tensor) else result
            target = ", ".join(self.names[id(t)] if isinstance(t, Tensor) else "_" for t in whole)
            target += ", = " if len(whole) == 1 and result is not whole[0] else " = "
        return f"{target}{self.constant(function)}({', '.join(given)})"

    def text(self, value: Any, i: int) -> str:
        if isinstance(value, Tensor):
            name = self.names.setdefault(id(value), "") or self.names.update({id(value): self.constant(value)})
            if name and name.startswith("v"):
                self.last[name] = i
            return self.names[id(value)]
        if isinstance(value, (list, tuple)) and any(True for _ in _tensors(value)):
            inside = "".join(f"{self.text(item, i)}, " for item in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        return self.constant(value)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name


SAMPLER = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
static unsigned long at[1 << 20];
static volatile int found;
static timer_t timer;
static void note(int signal, siginfo_t *info, void *context) {
  if (found < 1 << 20) at[found++] = ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
}
void start(long every) {
  struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO | SA_RESTART};
  struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR2};
  struct itimerspec times = {{0, every}, {0, every}};
  event._sigev_un._tid = syscall(SYS_gettid);
  sigaction(SIGUSR2, &action, 0);
  timer_create(CLOCK_MONOTONIC, &event, &timer);
  timer_settime(timer, 0, &times, 0);
}
int stop(void) { timer_delete(timer); return found; }
void clear(void) { found = 0; }
unsigned long *counters(void) { return at; }
"""


class Sampler:
    """Where the processor is while something runs."""

    def __init__(self, folder: Path) -> None:
        (folder / "sampler.c").write_text(SAMPLER)
        compiled = ["cc", "-O1", "-shared", "-fPIC", "-o", "sampler.so", "sampler.c", "-lrt"]
        subprocess.run(compiled, cwd=folder, check=True)
        self._library = ctypes.CDLL(str(folder / "sampler.so"))
        self._library.counters.restype = ctypes.POINTER(ctypes.c_ulong)
        self._library.start.argtypes = [ctypes.c_long]

    def of(self, runs: Sequence[Callable[[], Any]], before: Callable[[], None]) -> tuple[float, float]:
        """Milliseconds of one of the runs, and those in the interpreter; processor time.

        Args:
            before: what is to be done before each, off the clock.
        """
        self._library.clear()
        total, found = 0.0, 0
        for run in runs:
            before()
            self._library.start(EVERY)
            began = time.process_time()
            run()
            total += time.process_time() - began
            found = self._library.stop()
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "libpython" in line]
        ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if "x" in line[1]]
        counters = self._library.counters()
        inside = sum(any(low <= counters[i] < high for low, high in ranges) for i in range(found))
        return 1e3 * total / len(runs), 1e3 * total / len(runs) * inside / max(found, 1)


class Measured:
    """A contestant's steps on the tiny LLaMA, beside their straight functions."""

    def __init__(self, name: str, sampler: Sampler) -> None:
        self.sampler = sampler
        self.bench = Bench(CONTESTANTS[name], Settings(model="llama_tiny", threads=1, clock="cpu"))
        for _ in range(2 * PERIOD):
            self.bench.step()

    def over(self, period: int) -> dict[str, float]:
        """Means over some periods of steps."""
        step, programs, calls = self.bench.optimizer.step, list[Callable[[], Any]](), 0
        for _ in range(period):
            self.bench.fresh_gradients()
            with Recorder() as recorder:
                step()
            operations = recorder.operations()
            programs.append(torch.no_grad()(straight(operations)))
            calls += len(operations)
        recorder.calls.clear()
        of_step = self.sampler.of([step] * STEPS, self.bench.fresh_gradients)
        of_programs = self.sampler.of(programs * (STEPS // period), self.bench.fresh_gradients)
        launch = min(_took(_idle) for _ in range(5)) / IDLE
        return {
            "step, ms": of_step[0], "straight, ms": of_programs[0], "interpreter, ms": of_step[1],
            "of straight, ms": of_programs[1], "ours, ms": of_step[1] - of_programs[1], "torch calls": calls / period,
            "dispatch, ms": calls / period * launch, "Python calls": python_calls(step),
        }  # fmt: skip


def _took(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return 1e3 * (time.process_time() - began)


def _idle() -> None:
    small = torch.zeros(1)
    for _ in range(IDLE):
        small.add_(1.0)


def python_calls(run: Callable[[], Any]) -> int:
    """Functions of Python that `run` enters."""
    entered = 0

    def count(frame: Any, event: str, value: Any) -> None:
        nonlocal entered
        entered += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return entered


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "contestant", nargs="?", default="shampoo4bit", choices=[n for n, c in CONTESTANTS.items() if c.ours]
    )
    name = parser.parse_args().contestant
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(name, Sampler(Path(folder)))
    rows = {"late": measured.over(PERIOD)}
    if measured.bench.update_all_bases():
        measured.bench.step()
        rows["all bases"] = measured.over(1)
    print(f"{name}, {commit()}, one thread of {machine()['processor']}, processor time")
    for row, found in rows.items():
        print(f"{row:<10}" + "; ".join(f"{key} {value:,.{2 if 'ms' in key else 0}f}" for key, value in found.items()))


if __name__ == "__main__":
    main()

"""What a step launches on a device, counted without one.

On the meta device a step of any model takes seconds and no memory.  An operation that torch dispatches is a launch, and
so is a Triton kernel; what only looks at memory (views) or reserves it is none.  A foreach operation is one launch; a
GPU splits it where it has many tensors.  The call stack says which part of a step a launch is of.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..exceptions import OptionError
from ..execution.blocking import meta_has_memory
from ..groups import param_groups
from ..integrations.trainer import head_options
from ..numerics import quantize
from ..optimizer import Shampoo4bit
from ..options import Options, users_of
from ..preconditioners import eigenbasis, moments
from ..preconditioners.algorithms import algorithm_class

ALLOCATIONS = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "lift_fresh", "detach", "set_",
}  # fmt: skip
RARELY_TOUCHED = {("_clear", "x")}  # operands of Triton kernels that an ordinary step neither reads nor writes
VIEWS = {"_unsafe_view", "_reshape_alias"}  # whose schema does not say so
GATHERS = {"index", "index_select", "gather", "embedding", "take"}
ONE_BY_ONE = {"index_select", "bitsandbytes::quantize_blockwise", "bitsandbytes::dequantize_blockwise"}
"""What a CPU does number by number, and not at the rate of its memory."""
ONLY_READ = {"_fused_adamw_": (1,)}  # arguments that an operation may write to, and does not: unscaled gradients
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "index_copy_"}
DECOMPOSITIONS = {
    "linalg_qr", "linalg_cholesky_ex", "linalg_solve_triangular", "_linalg_eigh", "linalg_eigh",
    "linalg_householder_product", "geqrf", "linalg_inv_ex", "_linalg_solve_ex", "linalg_lu_factor_ex", "_linalg_svd",
}  # fmt: skip

ITERATED = ("newton", "newton_db")  # of `Options.root`: they end by their residual

# Functions of the optimizer -> the part of a step that they are.  The innermost on the call stack counts, but what a
# basis update calls is of that.
BASIS_UPDATE = "basis update"
PARTS = {
    "update_bases": BASIS_UPDATE, "_update_bases": BASIS_UPDATE, "carry": BASIS_UPDATE, "carried": BASIS_UPDATE,
    "are_finite": "finite",
    "collect": "collect", "_collected": "collect",
    "read": "decode", "write": "encode", "write_first": "encode",
    "rotate": "rotate",
    "_update_eigenvalues": "eigenvalues", "_update_eigenvalues_in_passes": "eigenvalues", "_scales": "eigenvalues",
    "_bounded": "bound", "_bounding": "bound",
    "update": "moments", "steps": "moments", "direction": "moments",
    "send": "send", "apply": "apply",
}  # fmt: skip


class Launch(NamedTuple):
    """One operation on a device."""

    operation: str
    bytes: int
    """Read and written: of each operand once, of one that is changed in place twice."""
    products: int = 0
    """Operations of a matrix product, 2 k m n."""
    precision: str = ""
    """Of its operands: float32, tf32 or bfloat16."""
    order: int = 0
    """Of the matrices that are decomposed."""
    matrices: int = 0
    """How many; a device may take them one by one, in several kernels each."""
    written: int = 0
    """Of the bytes those that are written and not read before."""
    numbers: int = 0
    """Looked up or coded, one by one: of `ONE_BY_ONE`."""


class Counted(Counter[tuple[str, Launch]]):
    """(part of the step, launch) -> how often."""

    def launches(self) -> Counter[Launch]:
        """Of all parts."""
        found: Counter[Launch] = Counter()
        for (_, launch), times in self.items():
            found[launch] += times
        return found

    def totals(self) -> dict[str, dict[str, int]]:
        """Part -> its launches and bytes, the part with the most launches first."""
        found: dict[str, dict[str, int]] = {}
        for (part, launch), times in self.items():
            of_part = found.setdefault(part, {"launches": 0, "bytes": 0})
            of_part["launches"] += times
            of_part["bytes"] += times * launch.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]["launches"]))

    def summary(self, steps: int = 1) -> dict[str, Any]:
        """Launches, bytes, operations of products by precision, matrices decomposed by operation and order.

        Args:
            steps: that were counted; the figures are of one, rounded down but for the matrices.
        """
        products: Counter[str] = Counter()
        matrices: Counter[str] = Counter()
        for launch, times in self.launches().items():
            if launch.products:
                products[launch.precision] += times * launch.products
            if launch.matrices:
                matrices[f"{launch.operation} {launch.order}"] += times * launch.matrices
        return {
            "launches": self.total() // steps,
            "bytes": sum(launch.bytes * times for (_, launch), times in self.items()) // steps,
            "products": {precision: count // steps for precision, count in products.items()},
            "decompositions": {what: count if steps == 1 else count / steps for what, count in matrices.items()},
        }


class LaunchCounter(TorchDispatchMode):
    """Counts what is dispatched to a device."""

    def __init__(self, device: str = "meta", rotations: str = "float32") -> None:
        """
        Args:
            device: what happens elsewhere is not counted.
            rotations: the precision of the products that are rotations; the meta device cannot tell.
        """
        super().__init__()
        self.found = Counted()
        self._device, self._rotations = device, rotations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composed(function, self._device):
            with self:  # it is Python that calls operations: count these
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = function(*args, **kwargs)
        name = function._overloadpacket._qualified_op_name.removeprefix("aten::")
        if name not in ALLOCATIONS and not _is_view(function):
            given, made = _tensors((args, kwargs)), _tensors(result)
            if any(t.device.type == self._device for t in made or given):
                moved, written = _bytes(function, name, args, kwargs, given, made)
                numbers = max(t.numel() for t in made or given) if name in ONE_BY_ONE else 0
                work = _work(function, name, args, kwargs, result)
                self.add(sys._getframe(), Launch(name, moved, *work, written, numbers))
        return result

    def add(self, frame: FrameType, launch: Launch) -> None:
        """A launch by the code of a frame."""
        part = _part(frame)
        if part == "rotate" and launch.products and launch.precision == "float32":
            launch = launch._replace(precision=self._rotations)
        self.found[part, launch] += 1

    @contextmanager
    def with_triton(self) -> Iterator[None]:
        """Count Triton kernels where the optimizer has some, instead of what they stand for; none is run."""
        from triton.runtime.jit import KernelInterface

        def launched(kernel: Any, grid: Any) -> Callable[..., None]:
            def count(*args: Any, **kwargs: Any) -> None:
                operands = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
                touched = _touched(kernel)
                moved = sum(_size(t) * touched.get(name, 1) for name, t in operands.items() if isinstance(t, Tensor))
                if kernel.fn.__name__ == "_descend":  # its operands are a table of pointers
                    moved = quantize.kernels("descent").moved(operands)
                self.add(sys._getframe(1), Launch(f"triton {kernel.fn.__name__.lstrip('_')}", moved))

            return count

        def has_kernels(device: torch.device, block: int) -> bool:
            return quantize.kernels().can_run(block)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", launched))
            for module in [m for name, m in sys.modules.items() if name.startswith("hf_shampoo4.")]:
                if hasattr(module, "has_kernels"):
                    stack.enter_context(mock.patch.object(module, "has_kernels", has_kernels))
            yield


def steps_of(
    model: nn.Module, options: Mapping[str, Any], triton: bool = True, device: str = "cuda", late: int = 1
) -> dict[str, Counted]:
    """What a step of `Shampoo4bit` launches: "late", when bases are updated as rarely as they ever are, and "all", when
    all of them are.

    Args:
        model: on the meta device.
        options: of the optimizer, resolved.
        triton: with Triton's kernels, which must be installed then.
        device: where the step would be: "cuda" or "cpu", which choose differently where options say auto.
        late: steps that are counted as "late".

    Raises:
        OptionError: an iteration whose length depends on numbers.
    """
    if triton and find_spec("triton") is None:
        raise ImportError("Triton, whose kernels are to be counted, is not installed")
    if (root := options.get("root", Options.root)) in ITERATED:
        raise OptionError(
            f"root={root} cannot be counted: how long it iterates depends on the numbers; root=eigh can be"
        )
    found = {}
    algorithm = options.get("algorithm", Options.algorithm)
    all_refreshed = dict.fromkeys(algorithm_class(algorithm).every.values(), 1)
    for name, changed in (("late", {}), ("all", all_refreshed)):
        given = {**options, **changed}
        if algorithm in users_of("orthogonalise") and device == "cuda":
            iteration = options.get("orthogonalise", "auto")  # auto's choice on CUDA:
            given |= {"orthogonalise": "cholesky_qr" if iteration == "auto" else iteration}
        if algorithm in users_of("refresh_warmup"):
            given |= {"refresh_warmup": 0}
        auto = "tf32" if device == "cuda" else "float32"
        with _as_on_a_cpu() if device == "cpu" else nullcontext():
            found[name] = _counted(model, given, triton, auto, late if name == "late" else 1)
    return found


@contextmanager
def _as_on_a_cpu() -> Iterator[None]:
    """Waves and pieces are small, codes are looked up, no gradient is zero, and none has grown."""
    with (
        meta_has_memory(0),
        mock.patch.object(quantize, "GPU_PIECE", quantize.CPU_PIECE),
        mock.patch.object(quantize, "_has_whole_blocks", return_value=False),
        mock.patch.object(moments, "has_no_zero", lambda g: g.all().dim() == 0),
        mock.patch.object(eigenbasis, "may_exceed", lambda rows, weight: (rows.mean(-1) * weight > 1).any().dim() > 0),
    ):
        yield


def _counted(model: nn.Module, options: Mapping[str, Any], triton: bool, auto: str, steps: int) -> Counted:
    """Some steps after the first; `auto` is what `rotation_precision=auto` means."""
    precision = {"auto": auto}.get(chosen := options.get("rotation_precision", "auto"), chosen)
    plain = dict(options)
    if options.get("algorithm", Options.algorithm) in users_of("rotation_precision"):
        plain["rotation_precision"] = "float32"  # the others are emulated where there is no GPU
    optimizer = Shampoo4bit(param_groups(model, head=head_options(options)), **plain)
    for p in model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    counter = LaunchCounter(rotations=precision)
    try:
        optimizer.step()
        with counter.with_triton() if triton else ExitStack(), counter:
            for _ in range(steps):
                optimizer.step()
    finally:
        for p in model.parameters():
            p.grad = None
    return counter.found


def _part(frame: FrameType | None) -> str:
    found = ""
    while frame is not None:
        if "hf_shampoo4" in frame.f_code.co_filename:
            part = "apply" if frame.f_code.co_filename.endswith("descent.py") else PARTS.get(frame.f_code.co_name, "")
            if part == BASIS_UPDATE:
                return part
            found = found or part
        frame = frame.f_back
    return found or "other"


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


@cache
def _is_view(function: Any) -> bool:
    """Whether the results are the arguments' memory, which is left as it was."""
    returns = function._schema.returns
    aliased = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return aliased or function._schema.name.removeprefix("aten::") in VIEWS


@cache
def _written(function: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes to."""
    arguments = enumerate(function._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _size(t: Tensor) -> int:
    """Bytes; what is expanded is there once."""
    count = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else 1
    return count


def _is_composed(function: Any, device: str) -> bool:
    """Whether a CPU's operation of another package is made of operations that can be counted: bitsandbytes' update."""
    name = function._schema.name
    return device == "cpu" and name.startswith("bitsandbytes::optimizer_update_")


def _bytes(
    function: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]
) -> tuple[int, int]:
    """Bytes that an operation moves, and of them those that it writes without having read them."""
    places = [(i, n) for i, n in _written(function) if i not in ONLY_READ.get(name, ())]
    written = [kwargs[n] if n in kwargs else args[i] if i < len(args) else None for i, n in places]
    changed = _tensors(written)
    ids = {id(t) for t in changed}
    fresh = sum(_size(t) for t in made if id(t) not in ids)
    read = [_size(t) for t in given if id(t) not in ids]
    if name == "index_put_":
        return 2 * _size(_tensors(args[2])[0]), _size(_tensors(args[2])[0])
    if name in GATHERS:
        return fresh + sum(min(size, fresh) for size in read), fresh
    overwritten, over = name in OVERWRITES or "out" in kwargs, sum(map(_size, changed))
    if overwritten:
        return fresh + sum(read) + over, fresh + over
    return fresh + sum(read) + 2 * over, fresh


def _work(function: Any, name: str, args: Any, kwargs: Any, result: Any) -> tuple[int, str, int, int]:
    """Products, their precision, order and number of decomposed matrices."""
    if name in DECOMPOSITIONS:
        return 0, "", args[0].shape[-1], args[0].shape[:-2].numel()
    if function._overloadpacket in flop_registry:
        products = flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
        return products, str(_tensors(args)[-1].dtype).removeprefix("torch."), 0, 0
    return 0, "", 0, 0


@cache
def _touched(kernel: Any) -> dict[str, int]:
    """How often a Triton kernel goes over each of its operands, by the loads and stores of its source."""
    source = inspect.getsource(kernel.fn)
    names: Iterable[str] = (n for verb in ("load", "store") for n in set(re.findall(rf"{verb}\w*\(\s*(\w+)", source)))
    rarely = {operand: 0 for name, operand in RARELY_TOUCHED if name == kernel.fn.__name__}
    return {**Counter(names), **rarely}

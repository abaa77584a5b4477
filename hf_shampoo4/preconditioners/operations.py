"""What a step computes and what memory it takes for it, in closed form: `plan`, `bench` and the balance over ranks
count by it, and a test holds the code to it (tests/preconditioners/test_operations.py).

Room is counted in float32 numbers that are alive at once beside the state, the gradients and the updates, of all
blocks of a stack.  It holds for plain PyTorch on a CPU; kernels need less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ..numerics.quantize import CPU_PIECE

FACTORISED = 3  # a QR's operation takes as long as three of a product's: 49 and 158 GFLOP/s at order 1024 on an EPYC
PER_ENTRY = 50  # operations of a product that take as long as one entry's way through the moments and their storage
NEWTON_STEPS = 20  # of an inverse root by iteration, as a rule: how many it takes depends on the factor


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a block."""

    products: int = 0
    """Of matrix products, 2 k m n for (m, k) times (k, n): what torch's FlopCounterMode counts."""
    factorised: int = 0
    """Of QR, eigh and Cholesky, by LAPACK's count to leading order."""

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.factorised + other.factorised)

    def __mul__(self, times: int | Fraction) -> Work:
        return Work(int(self.products * times), int(self.factorised * times))

    def cost(self, entries: int) -> int:
        """In operations of a product that take as long, that of a block's entries included."""
        return self.products + FACTORISED * self.factorised + PER_ENTRY * entries


CODER = 6.5  # float32 copies of a piece (`quantize.CPU_PIECE`) that its codes are made with
ZIP_CODER = 14  # the same, rounding in preconditioner space


def coding_workspace(entries: int, copies: float = CODER) -> int:
    """float32 numbers that it takes to store some in few bits, beside themselves."""
    return int(copies * min(entries, CPU_PIECE))


def product(m: int, k: int, n: int) -> Work:
    """(m, k) times (k, n)."""
    return Work(2 * m * k * n)


def bjorck_work(k: int, steps: int) -> Work:
    """Of `linalg.bjorck`: two products a step."""
    return product(k, k, k) * (2 * steps)


def qr_work(k: int) -> Work:
    """Q and R of (k, k): Householder's reflections, and what they make of the identity."""
    return Work(factorised=8 * k**3 // 3)


def cholesky_work(k: int) -> Work:
    """Of (k, k)."""
    return Work(factorised=k**3 // 3)


def cholesky_qr_work(k: int) -> Work:
    """Of `orthogonal.orthogonal_iteration`: in each of two rounds a Gram matrix and a triangular solve; R2 R1."""
    return product(k, k, k) * 3 + cholesky_work(k) * 3 + Work(factorised=2 * k**3)


def root_work(k: int, solver: str) -> Work:
    """An inverse fourth root of (k, k) by one of `linalg.ROOTS`."""
    if solver == "eigh":
        return product(k, k, k) + Work(factorised=9 * k**3)
    products = {"newton": 4, "newton_db": 3 * 2}  # of a step; Newton-DB takes the square root of a square root
    return product(k, k, k) * (products[solver] * NEWTON_STEPS)


def amortised(work: Mapping[str, Work], intervals: Mapping[str, int]) -> Work:
    """A step's work on average, from each refresh's and how many steps lie between two ("step": every step's)."""
    return total(work[name] * Fraction(1, intervals.get(name, 1)) for name in work)


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    return sum(works, Work())

"""What devices reach, with the source of every number: cards.yaml, and a user's file of the same form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..exceptions import OptionError
from ..utils.yaml import read_yaml

TABLE = Path(__file__).with_name("cards.yaml")
DECOMPOSITIONS = {
    "linalg_qr_ms": ("linalg_qr", "geqrf"),
    "cholesky_ms": ("linalg_cholesky_ex",),
    "triangular_ms": ("linalg_solve_triangular",),
    "eigh_ms": ("_linalg_eigh", "linalg_eigh"),
    "inv_ms": ("linalg_inv_ex",),
}
"""Key of the table -> torch's operations that it is of."""
NUMBERS = ("reached", "tbytes", "gbytes", "streamed", "launch_us", "link_gbytes")
NETWORK = "network_gbytes"  # may be left out: as link_gbytes
MACHINE = 8  # GPUs of a machine, unless it is known
TABLES = ("tflops", *DECOMPOSITIONS)
FORM = (
    f"a mapping of cards to mappings of name, device, like, {', '.join((*TABLES, *NUMBERS, NETWORK))}; "
    "numbers as [value, source]"
)


@dataclass(frozen=True)
class Ceilings:
    """Of one device: seconds, bytes a second, operations a second."""

    name: str
    products: Mapping[str, float]
    """Of matrix products, by the precision of their operands."""
    memory: float
    """Bytes read and written."""
    peak: float
    """Operations a second of bfloat16 products as published, to which a model's utilisation is a share."""
    launch: float
    """Seconds that the smallest operation takes."""
    link: float = math.inf
    """Bytes that it sends to other devices of its machine."""
    network: float = math.inf
    """Bytes that it sends to those of other machines."""
    capacity: int = 80 * 10**9
    """Bytes of memory."""
    decompositions: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Operation -> order -> seconds for one matrix."""
    in_place: float = 0.0
    """Bytes read and written of what is changed in place: a CPU reads what it overwrites; 0: as `memory`."""
    one_by_one: Mapping[str, float] = field(default_factory=dict)
    """Operation -> numbers a second, of those that a CPU does one by one; what is not there takes its bytes."""
    fresh: float = math.inf
    """Bytes of new memory: a CPU's pages are faulted in when they are written first."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each number is from."""

    def sending(self, sent: float, world: int, machine: int = MACHINE) -> float:
        """Seconds for so many bytes, spread evenly over the others of `world` ranks, `machine` of them together."""
        near = min(machine, world) - 1
        return sent * (near / self.link + (world - 1 - near) / self.network) / max(world - 1, 1)

    def moving(self, total: int, written: int) -> float:
        """Seconds that bytes take, of which some are written without having been read.

        A copy reads as much as it writes, so that what such bytes take beyond others follows from the two rates.
        """
        in_place = self.in_place or self.memory
        return (total - written) / in_place + written * (2 / self.memory - 1 / in_place)

    def of_products(self, precision: str) -> float:
        """Operations a second; bfloat16 stands for float16, and float32 for what is not known."""
        known = {"float16": "bfloat16"}.get(precision, precision)
        return self.products.get(known, self.products["float32"])

    def decomposition(self, operation: str, order: int) -> float | None:
        """Seconds for one matrix: by the power law between the nearest orders, by the cube beyond them.

        None: the table has no time of this operation.
        """
        known = sorted(self.decompositions.get(operation, {}).items())
        if not known:
            return None
        if order <= known[0][0]:  # small ones cost what they launch
            return known[0][1] * (order / known[0][0])
        if order >= known[-1][0]:
            return known[-1][1] * (order / known[-1][0]) ** 3
        (low, least), (high, most) = next(p for p in zip(known, known[1:], strict=False) if p[0][0] <= order <= p[1][0])
        return least * (order / low) ** (math.log(most / least) / math.log(high / low))


def ceilings_of(card: str, file: Path | None = None) -> Ceilings:
    """Of a card of the table, or of the file.

    Raises:
        OptionError: a card that neither knows; a file that is not of the form.
    """
    cards = _read(TABLE)
    if file is not None:
        for name, numbers in _read(file).items():
            cards[name] = _over(cards.get(name, {}), numbers)
    if card not in cards:
        raise OptionError(
            f"--gpu {card!r} is not known; known: {', '.join(cards)}.  Another card's numbers go into a file for "
            "--ceilings, which begins as hf_shampoo4/utils/cards.yaml does"
        )
    return _ceilings(card, _with_base(card, cards), file or TABLE)


@cache
def ceilings_of_device(name: str) -> Ceilings | None:
    """Of the table's card that torch calls so; None: the table has none."""
    return next((ceilings_of(card) for card, numbers in _read(TABLE).items() if numbers.get("device") == name), None)


def _with_base(card: str, cards: Mapping[str, Any]) -> dict[str, Any]:
    own = cards[card]
    base = own.get("like")
    if base is None:
        return own
    if base not in cards or "like" in cards[base]:
        raise OptionError(f"card {card!r} is like {base!r}: it must be a card that is like no other")
    # measured decompositions replace the base's: those were of another card
    return _over(
        {key: value for key, value in cards[base].items() if key not in own or key in (*NUMBERS, NETWORK)}, own
    )


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise OptionError(f"{path} {error}") from error
    if not isinstance(content, dict) or not all(isinstance(numbers, dict) for numbers in content.values()):
        raise OptionError(f"{path} is not {FORM}")
    for card, numbers in content.items():
        unknown = set(numbers) - {"name", "device", "like", *TABLES, *NUMBERS, NETWORK}
        if unknown:
            raise OptionError(f"{path}: card {card!r} has unknown {sorted(map(str, unknown))[0]!r}; it is {FORM}")
    return {str(card): numbers for card, numbers in content.items()}


def _ceilings(card: str, numbers: Mapping[str, Any], path: Path) -> Ceilings:
    sources: dict[str, str] = {}

    def number(where: str, given: Any) -> float:
        fine = isinstance(given, list) and len(given) == 2 and isinstance(given[0], (int, float)) and given[0] > 0
        if not fine or isinstance(given[0], bool):
            raise OptionError(f"{path}: {card}.{where} is {given!r}; it must be [a number above 0, its source]")
        sources[where] = str(given[1])
        return float(given[0])

    missing = [key for key in ("tflops", *NUMBERS) if key not in numbers]
    if missing or "float32" not in numbers["tflops"]:
        raise OptionError(
            f"{path}: card {card!r} lacks {(missing or ['tflops.float32'])[0]}; or let it be `like` another"
        )
    of = {key: number(key, numbers[key]) for key in (*NUMBERS, NETWORK) if key in numbers}
    products = {kind: number(f"tflops.{kind}", value) for kind, value in numbers["tflops"].items()}
    decompositions = {
        operation: {int(order): 1e-3 * number(f"{key}.{order}", value) for order, value in numbers[key].items()}
        for key, operations in DECOMPOSITIONS.items()
        if key in numbers
        for operation in operations
    }
    return Ceilings(
        name=str(numbers.get("name", card)),
        products={kind: 1e12 * of["reached"] * value for kind, value in products.items()},
        memory=1e12 * of["tbytes"] * of["streamed"],
        peak=1e12 * products.get("bfloat16", products["float32"]),
        launch=1e-6 * of["launch_us"],
        link=1e9 * of["link_gbytes"],
        network=1e9 * of.get(NETWORK, of["link_gbytes"]),
        capacity=int(1e9 * of["gbytes"]),
        decompositions=decompositions,
        sources=sources,
    )

"""Grids of a race: contestants, the points at which each is run, and which point its sweep tries next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_shampoo4.exceptions import ConfigError
from hf_shampoo4.options import KINDS
from hf_shampoo4.training.config import config_root, read_config

Settings = dict[str, Any]

RATE = "learning_rate"
COORDINATES = (RATE, *KINDS)
"""What can be swept: the rate of all parameters together, and the factor on it of one kind."""


def pieces(settings: Mapping[str, Any]) -> int:
    """How many forward and backward passes make a step of a run on one process."""
    if total := settings.get("total_batch_size"):
        return int(total) // int(settings["per_device_train_batch_size"])
    return int(settings.get("gradient_accumulation_steps", 1))


def tokens_a_step(settings: Mapping[str, Any]) -> int:
    """Of a run on one process."""
    return int(settings["per_device_train_batch_size"]) * pieces(settings) * int(settings["seq_len"])


@dataclass(frozen=True)
class Point:
    """Where a contestant is run."""

    learning_rate: float
    rates: tuple[tuple[str, float], ...] = ()
    """Factors by kind, those of 1 left out."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Point:
        """The point of a run's settings."""
        factors = settings.get("rates", {})
        return cls(float(settings[RATE]), tuple((k, float(factors[k])) for k in KINDS if factors.get(k, 1) != 1))

    def settings(self) -> Settings:
        """The inverse of `of`."""
        return {RATE: self.learning_rate, **({"rates": dict(self.rates)} if self.rates else {})}

    def get(self, coordinate: str) -> float:
        """A coordinate's value."""
        return self.learning_rate if coordinate == RATE else dict(self.rates).get(coordinate, 1.0)

    def moved(self, coordinate: str, up: bool, stride: int = 1) -> Point:
        """The next point along a coordinate: rates lie `stride` factors of sqrt(2) apart, factors by kind one of 2."""
        if coordinate == RATE:
            return replace(self, learning_rate=_next_rate(self.learning_rate, stride if up else -stride))
        factors = {**dict(self.rates), coordinate: self.get(coordinate) * (2.0 if up else 0.5)}
        return Point.of({RATE: self.learning_rate, "rates": factors})

    def same_but(self, other: Point, coordinate: str) -> bool:
        """Whether two points agree in all coordinates but one."""
        return all(self.get(c) == other.get(c) for c in COORDINATES if c != coordinate)


def best_of(losses: Mapping[Point, float]) -> Point:
    """The point of lowest loss."""
    return min(losses, key=lambda point: losses[point])


def sides(losses: Mapping[Point, float], coordinate: str) -> tuple[bool, bool]:
    """Whether along a coordinate there is a point below, and above, the best one."""
    best = best_of(losses)
    values = [point.get(coordinate) for point in losses if point.same_but(best, coordinate)]
    return min(values) < best.get(coordinate), max(values) > best.get(coordinate)


def _next_rate(rate: float, steps: int) -> float:
    """So many places up among 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, ...: powers of sqrt(2), of two digits."""
    k = round(2 * math.log2(rate / 1e-3)) + steps
    exact = 1e-3 * 2.0 ** (k / 2)
    scale = 10.0 ** (math.floor(math.log10(exact) + 1e-9) - 1)
    return float(f"{math.floor(exact / scale + 1e-9) * scale:.2g}")


@dataclass(frozen=True)
class Contestant:
    """One entry of a grid."""

    name: str
    label: str
    points: tuple[Point, ...]
    """Where it is run in any case."""
    sweep: tuple[str, ...]
    """The coordinates along which `race --sweep` looks for a better point."""
    settings: Settings
    """All else that a run depends on, but the seed: settings of `hf-shampoo4 train`; a `peer` in place of `optim`."""
    paper: tuple[float, float] | None = None
    """The published share, as a range."""
    stride: int = 1
    """Factors of sqrt(2) between two rates of the sweep."""

    def run(self, point: Point, seed: int) -> Settings:
        """The settings of one run."""
        return {**self.settings, **point.settings(), "seed": seed}

    def losses(self, seed: int, finished: Sequence[Settings]) -> dict[Point, float]:
        """Final loss (infinite where it diverged) at every point of this contestant's that is finished at a seed."""
        found: dict[Point, float] = {}
        for run in finished:
            rest = {k: v for k, v in run["settings"].items() if k not in (RATE, "rates", "seed")}
            if rest == self.settings and run["settings"]["seed"] == seed:
                point, loss = Point.of(run["settings"]), run["final_loss"]
                if self._has(point):
                    found.setdefault(point, loss if math.isfinite(loss) else math.inf)
        return found

    def _has(self, point: Point) -> bool:
        """Whether a point is of this contestant: its own, or one that its sweep can reach."""
        reachable = all(point.get(c) == self.points[0].get(c) for c in COORDINATES if c not in self.sweep)
        return point in self.points or reachable

    def best(self, seed: int, finished: Sequence[Settings]) -> Point | None:
        """The point of lowest loss at a seed; None: no run."""
        losses = self.losses(seed, finished)
        return best_of(losses) if losses else None

    def next_point(self, seed: int, finished: Sequence[Settings]) -> Point | None:
        """What the sweep tries next: the first missing neighbour of the best point; None: there is none missing."""
        best, losses = self.best(seed, finished), self.losses(seed, finished)
        if best is None or losses[best] == math.inf:
            return None
        neighbours = [best.moved(c, up, self.stride) for c in self.sweep for up in (True, False)]
        return next((point for point in neighbours if point not in losses), None)

    def closed(self, seed: int, finished: Sequence[Settings]) -> dict[str, bool]:
        """Coordinate that is swept, or has several values -> whether worse points lie on both sides of the best one."""
        losses = self.losses(seed, finished)
        found = {c: sides(losses, c) for c in COORDINATES} if losses else {}
        return {c: all(both) for c, both in found.items() if any(both) or c in self.sweep}

    def edges(self, seed: int, finished: Sequence[Settings]) -> list[str]:
        """The coordinates along which the best point is the first or the last of several, or the only one swept."""
        return [coordinate for coordinate, closed in self.closed(seed, finished).items() if not closed]


@dataclass(frozen=True)
class Grid:
    """Contestants, and what is asked of them."""

    name: str
    title: str
    baseline: str
    """The contestant that the others are measured against."""
    target: str | None
    """If given: the question is what share of the way from `baseline`'s loss to this one's each contestant goes."""
    seeds: tuple[int, ...]
    common: Settings
    contestants: tuple[Contestant, ...]
    curves: tuple[str, ...] = ()
    """The contestants that the picture shows; none: all of them."""


def read_plan() -> Settings:
    """`configs/demo.yaml`."""
    return read_config(config_root() / "demo.yaml")


def read_grid(name: str, quick: bool = False, changes: Mapping[str, Any] | None = None) -> Grid:
    """A grid of `configs/race.yaml`, over the demo's settings.

    Args:
        name: of the grid.
        quick: a few steps of a tiny model, one seed, one point.
        changes: settings over all of these, for every run.

    Raises:
        ConfigError: there is no such grid, or it sweeps or scales what does not exist.
    """
    plan, demo = read_config(config_root() / "race.yaml"), read_plan()
    if name not in plan["grids"]:
        raise ConfigError(f"race has no grid {name!r}; it has: {', '.join(plan['grids'])}")
    given = _with_likes(plan["grids"], name)
    common = {**demo["common"], **plan["common"], **given.get("settings", {})}
    if quick:
        common |= {**demo["quick"], **plan["quick"]}
    common |= changes or {}
    contestants = tuple(
        _contestant(key, _laid_over(given["contestants"], key), common, given.get("sweep", []), 1 if quick else None)
        for key in given["contestants"]
    )
    return Grid(
        name,
        given["title"] + (" (--quick: a few steps of a smaller model, which say nothing)" if quick else ""),
        given["baseline"],
        given.get("target"),
        tuple(given["seeds"][: 1 if quick else None]),
        common,
        contestants,
        tuple(given.get("curves", ())),
    )


def _with_likes(grids: Mapping[str, Any], name: str) -> Settings:
    """A grid laid over the one that it is `like`, and that over the one that it is like: settings one by one, and those
    of each contestant, with its own contestants behind; of them all those in `only`, if it is there.

    Raises:
        ConfigError: an `only` names a contestant that is in neither grid.
    """
    given = grids[name]
    if "like" not in given:
        return given
    base = _with_likes(grids, given["like"])
    changes = given.get("contestants", {})
    contestants = {
        key: {**base["contestants"].get(key, {}), **changes.get(key, {})} for key in {**base["contestants"], **changes}
    }
    if strange := [key for key in given.get("only", ()) if key not in contestants]:
        raise ConfigError(f"race {name!r} has no contestant {strange[0]!r}; it may have: {', '.join(contestants)}")
    merged = {
        "settings": {**base.get("settings", {}), **given.get("settings", {})},
        "contestants": {key: contestants[key] for key in given.get("only", contestants)},
    }
    return {**base, **given, **merged}


def _laid_over(contestants: Mapping[str, Settings], name: str) -> Settings:
    """A contestant's settings over those of the contestant that it is `like`, if it is, but for that one's label.

    Raises:
        ConfigError: there is no such contestant, or that one is itself like another.
    """
    entry = dict(contestants[name])
    if "like" not in entry:
        return entry
    like = entry.pop("like")
    others = {key: other for key, other in contestants.items() if "like" not in other}
    if like not in others:
        raise ConfigError(f"contestant {name!r} is like {like!r}; it can be like: {', '.join(others)}")
    return {**{key: value for key, value in others[like].items() if key != "label"}, **entry}


def _contestant(
    name: str, given: Mapping[str, Any], common: Settings, sweep: Sequence[str], points: int | None
) -> Contestant:
    entry = dict(given)
    if "label" not in entry:
        raise ConfigError(
            f"contestant {name!r} needs a label, or to have the name of one of the grid that this is like"
        )
    label, paper, rate = entry.pop("label"), entry.pop("paper", None), entry.pop(RATE, [])
    factors, sweep = entry.pop("rates", {}), tuple(entry.pop("sweep", sweep))
    if strange := [c for c in (*factors, *sweep) if c not in COORDINATES]:
        raise ConfigError(f"contestant {name!r} sweeps or scales {strange[0]!r}; it can be: {', '.join(COORDINATES)}")
    given_rates = (rate if isinstance(rate, list) else [rate])[:points]
    if not given_rates:
        raise ConfigError(f"contestant {name!r} needs a learning_rate")
    found = tuple(Point.of({RATE: value, "rates": factors}) for value in given_rates)
    shares = None if paper is None else (paper[0] / 100, paper[1] / 100)
    return Contestant(name, label, found, sweep, {**common, **entry}, shares)


def some_of(grid: Grid, names: Sequence[str]) -> Grid:
    """The grid with the named contestants alone, in the order of the names; no name at all: with all of them.

    Raises:
        ConfigError: a name that the grid does not have.
    """
    known = {contestant.name: contestant for contestant in grid.contestants}
    wanted = [name.strip() for name in names if name.strip()]
    if strange := [name for name in wanted if name not in known]:
        raise ConfigError(f"race {grid.name!r} has no contestant {strange[0]!r}; it has: {', '.join(known)}")
    return replace(grid, contestants=tuple(known[name] for name in wanted or known))

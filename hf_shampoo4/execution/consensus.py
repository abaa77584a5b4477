"""What each rank sees when a step begins, and what all ranks then agree on (sharding/agreement.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..sharding import agreement
from ..sharding.agreement import Failures, View
from ..sharding.rendezvous import in_first_step
from ..sharding.replicas import has_gradient
from . import gradients
from .model_groups import read_options
from .plans import Plans, State
from .units import Unit


def look(plans: Plans, called: Sequence[dict[str, Any]], state: State) -> tuple[list[Unit], View]:
    """What this call of `step` updates, and what this rank sees of it; no rank waits for another.

    Args:
        plans: with the ranks that train together.
        called: the optimizer's groups now.
        state: the optimizer's.

    Raises:
        RuntimeError: the process group is gone.  Any other error is kept in the view's `failures`.
    """
    plans.ranks.require()
    view, units = View(Failures(plans.ranks)), list[Unit]()
    with view.failures.kept():
        plans.ranks.require_same()
        plans.replica_checks.refuse_join()
        units = plans.units(called, state)
        view.rates = plans.groups.rates()
        live = [local for unit in units for local in unit.candidates]  # as many on every rank, whatever is frozen
        changed = [unit for unit in units if plans.is_stale(unit, state)]
        for unit in changed:
            read_options(unit.group)
        view.stale = any(plans.is_stale(unit, state) for unit in changed)
        found = gradients.are_finite(live, wait=plans.ranks.world > 1)
        view.finite, view.verdict = (found, None) if isinstance(found, bool) else (True, found)
        view.present = {local.name: width for local in live if (width := gradients.width(local.buffer.grad))}
        if plans.ranks.world > 1:
            view.names = [local.name for local in live]
            view.settings = plans.groups.settings(plans.of_unit, afresh=view.stale)
            if view.stale:
                plans.reclaim(state)
            view.bits = plans.equal_replicas.digest(plans.waves())
            view.fresh = has_gradient(plans.replica_checks.pending(plans.replicas(units)))
    return units, view


def agree(plans: Plans, units: Sequence[Unit], mine: View) -> View:
    """The same view on every rank: which gradients there are, whether all are finite, whether a plan is needed.

    Raises:
        Exception: this rank has failed.
        RuntimeError: another one has, or ranks have other options, parameters or rates, or other bits where all apply.
    """
    if any(unit.key in plans.of_unit for unit in units):  # the second round: all that was to be read has been
        plans.reader = None
    device = next((local.buffer.device for unit in units for local in unit.candidates), torch.device("cpu"))
    with nullcontext() if plans else in_first_step(plans.ranks):
        agreed = agreement.agree(plans.ranks, mine, lambda: plans.groups.explained(plans.of_unit), device)
    if agreed.apart:
        plans.equal_replicas.settle(plans.ranks, plans.waves(), plans.groups.groups)
    return agreed


def check_replicas(plans: Plans, units: Sequence[Unit], agreed: View) -> None:
    """Compare what is taken for replicas: after planning, when first there are gradients, and ever more rarely.

    Also where ranks have gradients of other parameters: what one has and another has not must be zero.

    Raises:
        RuntimeError: parameters or gradients that should be the same on all ranks are not.
    """
    if plans.ranks.world == 1 or not agreed.present:
        return
    again = [unit for unit in units if not agreed.alike or (unit.group["step"] + 1).bit_count() == 1]
    plans.replica_checks.again(plans.replicas(again))
    if again or agreed.stale or agreed.fresh:
        here = [local for local in plans.replicas(units) if local.name in agreed.present]
        plans.replica_checks.compare(plans.ranks, here)

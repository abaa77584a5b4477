"""The names of a checkpoint's parameters beside those of the optimizer that is to take it over."""

from __future__ import annotations

from collections.abc import Collection

OTHERS = "of other parameters than the optimizer has"
AFRESH = "load the model alone and start the optimizer afresh, with a short warm-up"
UNFROZEN = (
    "If they were frozen then, freeze them when the optimizer is made, and in a loop of your own add them by "
    "add_param_group() once the checkpoint is loaded"
)
FROZEN = (
    "If they are frozen now, let them require gradients when the optimizer is made, and freeze them once the "
    "checkpoint is loaded (in the Trainer in a callback's on_train_begin)"
)


def renamed(there: Collection[str], here: Collection[str]) -> dict[str, str]:
    """Names there -> names here, if all have one prefix more or less, as of a model that was wrapped otherwise; else
    empty."""
    if len(there) != len(here) or not here:
        return {}
    pairs = list(zip(sorted(there), sorted(here), strict=True))
    shorter, longer = sorted(pairs[0], key=len)
    prefix = longer[: len(longer) - len(shorter)]
    is_longer_here = len(pairs[0][1]) > len(pairs[0][0])
    alike = all(b == prefix + a if is_longer_here else a == prefix + b for a, b in pairs)
    return dict(pairs) if prefix.endswith(".") and alike else {}


def told_apart(there: Collection[str], here: Collection[str]) -> str:
    """Which parameters only one of two optimizers has, and what to do about it.

    Args:
        there: names in the checkpoint; empty, as `here`, if it has none.
        here: names in the optimizer.
    """
    mine, theirs = (sorted(a - b) for a, b in ((set(here), set(there)), (set(there), set(here))))
    if not there or not here:
        advice = "Make the optimizer of the parameters that it was written with"
    elif mine and theirs:
        told = f"only here are {_few(mine)}, only there {_few(theirs)}.  "
        advice = f"{told}Wrap, freeze and tie the model as it was there, with the same adapters"
    elif mine:
        advice = f"only here are {_few(mine)}.  {UNFROZEN}"
    elif theirs:
        advice = f"only there are {_few(theirs)}.  {FROZEN}"
    else:
        advice = "the same are in other groups.  Make these as they were (weight decay, optim_target_modules, options)"
    return f"{advice}; or {AFRESH}"


def _few(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(map(repr, names[:3]))}{', ...' * (len(names) > 3)})"

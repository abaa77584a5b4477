"""`hf-shampoo4 race GRID --peaks`: what a step of every contestant holds at its peak; on any machine, however busy."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from hf_shampoo4.studies.grid import Contestant, Settings
from hf_shampoo4.studies.peers import code_of
from hf_shampoo4.studies.race_times import Racer
from hf_shampoo4.studies.runner import Runs

DECISIVE = ("model", "model_overrides", "vocab_size", "mask_fraction", "optim", "optim_args", "adam_beta2", "peer")
"""Settings of a run that its peak depends on, or its code's version: grids that differ in others share it."""
TOKENS = 32  # of the one sequence that the gradients are of


def measure_peaks(contestants: Sequence[Contestant], kept: Runs) -> None:
    """Measure those that this code has not measured yet, each at the first of its points, and keep them."""
    for contestant in contestants:
        told = _decisive(contestant)
        found = kept.once(told, code_of(told), functools.partial(_measured, contestant))
        print(f"{contestant.label}: {found['bytes_per_parameter']:.2f} bytes of state a parameter, "
              f"{found['peak_bytes_per_parameter']:.2f} at the peak", flush=True)  # fmt: skip


def peaks_of(contestants: Sequence[Contestant], measured: Sequence[Settings]) -> Mapping[str, float]:
    """Bytes a parameter at the peak, by name; without those that nobody has measured.

    Args:
        contestants: of a grid.
        measured: what `measure_peaks` has kept, as `Runs.of` reads it.
    """
    told = {contestant.name: _decisive(contestant) for contestant in contestants}
    return {
        name: run["peak_bytes_per_parameter"]
        for name, settings in told.items()
        for run in measured
        if run["settings"] == settings
    }


def _decisive(contestant: Contestant) -> Settings:
    return {name: contestant.settings[name] for name in DECISIVE if name in contestant.settings}


def _measured(contestant: Contestant) -> Settings:
    """In the third step, when the state is there and all bases are still updated in every step."""
    racer = Racer(contestant.run(contestant.points[0], 0))
    tokens = torch.randint(racer.vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        racer.gradients(tokens)
        racer.update()
    racer.gradients(tokens)
    state, peak = racer.bytes()
    return {"bytes_per_parameter": round(state, 4), "peak_bytes_per_parameter": round(peak, 4)}

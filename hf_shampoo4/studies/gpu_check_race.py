"""The race of `hf-shampoo4 bench --gpu-check`: the same small LLaMA against the clock, an optimizer after the other.

Text is Python's standard library, so no network is needed.  The learning rate rises and falls with the time that is
used, not with steps: each optimizer has its whole schedule within the same seconds.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_shampoo4.studies.gpu_check import Notes, Scale
from hf_shampoo4.studies.grid import read_grid, read_plan
from hf_shampoo4.studies.peers import optimizer_of, train_settings
from hf_shampoo4.training.data import load_text
from hf_shampoo4.training.model import build_model
from hf_shampoo4.training.pretrain import parse

RATES_OF = "tiny_long"
"""The grid of `configs/race.yaml`, of a smaller model, whose rates are taken; they were not swept for this one."""
CONTESTANTS: dict[str, dict[str, Any]] = {
    "shampoo4bit": {"optim": "shampoo4bit"},
    "adamw": {"optim": "adamw_torch_fused"},
    "muon": {"peer": "torch_muon"},
}
WARMUP = 0.1
"""Share of the time in which the rate rises."""
VALIDATIONS = 5
LEAST = 0.2  # of a contestant's seconds, or it does not start


def race(notes: Notes, scale: Scale, seconds: float) -> None:
    """Train with each contestant for the same time; curves of (seconds, step, validation loss)."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**read_plan()["common"], "adam_beta2": 0.95, **scale.race}
        chosen = parse({**train_settings(settings), "output_dir": scratch, "use_cpu": scale.device == "cpu"})
        text = load_text(chosen.data)
    train, validation = (_tokens(part, scale.device) for part in (text.train, text.validation))
    notes.put("text", {"tokens": train.numel(), "validation": validation.numel(), "vocabulary": len(text.tokenizer)})
    rates = {contestant.name: contestant.points[0].settings() for contestant in read_grid(RATES_OF).contestants}
    left = [name for name in CONTESTANTS if name not in notes.found]
    for i, name in enumerate(left):
        each = min(scale.race_seconds, 0.85 * (seconds - (time.monotonic() - began)) / (len(left) - i))
        if each < LEAST * scale.race_seconds:
            notes.leave_out(name, "the stage's time is over")
            continue
        run = Run(
            {**settings, **CONTESTANTS[name], **rates[name]}, len(text.tokenizer), scale.device, train, validation
        )
        notes.once(name, lambda run=run, each=each: run.until(each))  # type: ignore[misc]


def _tokens(part: Any, device: str) -> Tensor:
    """(sequences, length), int64."""
    return torch.tensor(part.with_format(None)["input_ids"][:], dtype=torch.long).to(device)


class Run:
    """A model, its optimizer and its text."""

    def __init__(
        self, settings: Mapping[str, Any], vocabulary: int, device: str, train: Tensor, validation: Tensor
    ) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            chosen = parse({**train_settings(settings), "output_dir": scratch, "use_cpu": device == "cpu"})
        torch.manual_seed(0)
        self.model = build_model(chosen.model, vocabulary).to(device)
        kind, keywords = optimizer_of(settings)(self.model, chosen.training)
        self.optimizer: torch.optim.Optimizer = kind(**keywords)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.batch, self.device = settings["per_device_train_batch_size"], device
        self.train, self.validation = train, validation

    def until(self, seconds: float) -> dict[str, Any]:
        """Train for so long, validation not counted; the first step, which makes state and kernels, is not either."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).to(self.device)
        used, step, curve, taken = 0.0, 0, [(0.0, 0, self._loss())], []
        while used < seconds:
            rows = order[(step * self.batch + torch.arange(self.batch, device=self.device)) % len(order)]
            began = self._now()
            self._step(self.train[rows], used / seconds)
            step += 1
            if step > 1:
                taken.append(self._now() - began)
                used += taken[-1]
            if used >= seconds * len(curve) / VALIDATIONS:
                curve.append((used, step, self._loss()))
        tokens = self.batch * self.train.shape[1]
        return {
            "curve": curve, "steps": step, "ms": 1e3 * statistics.median(taken), "tokens_per_step": tokens,
            "parameters": sum(p.numel() for p in self.model.parameters()), "loss": curve[-1][2],
        }  # fmt: skip

    def _step(self, tokens: Tensor, progress: float) -> None:
        share = min(progress / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * max(share, 1e-3)
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def _loss(self) -> float:
        losses = [self.model(input_ids=rows, labels=rows).loss for rows in self.validation.split(min(self.batch, 64))]
        return float(torch.stack(losses).mean())

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()  # whatever else the machine does
        torch.cuda.synchronize()
        return time.perf_counter()

"""Kill a training again and again, at random moments, and see that every resume goes on bit for bit.

    python -m tests.stress.crash --kills 120 --seed 0

For each mode (one process; DDP, FSDP2 with full and with sharded checkpoints, and ZeRO on 2 ranks) a training is run
once unbroken.  Then it is started, killed by SIGKILL (all ranks, or one of them) and started again, always from the
last complete checkpoint, until it ends; then anew in an empty folder, until there were enough kills.  Every loss that
any of these processes logs must be the unbroken run's of that step, bit for bit, and so must the parameters and the
optimizer's state at the end.  A checkpoint that all ranks had finished must be found to be complete.

To be cheap, the processes are forked from this one, which has imported everything; a process says in shared memory
whether it is in a step, in a refresh of factors or in a save, and half of the kills wait for one of these.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# MKL's results may depend on where in memory a matrix lies; the tests set this too
os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch  # noqa: E402
from accelerate import state as accelerate_state  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

from hf_shampoo4.checkpointing.completeness import last_complete  # noqa: E402
from hf_shampoo4.utils.files import write_json  # noqa: E402
from hf_shampoo4.utils.stopwatch import Stopwatch  # noqa: E402
from tests.stress.ranks import ZERO, deepspeed_without_compiler, unwrapped, whole  # noqa: E402
from tests.support.tiny import Tokens, arguments, llama  # noqa: E402

with contextlib.suppress(ImportError):
    import deepspeed.ops  # noqa: F401  # accelerate imports it where it is installed: here once, not in every child

STEPS, SAVE_EVERY = 24, 4
WAITING, STEP, REFRESH, SAVE = range(4)
PHASES = ("start", "step", "refresh", "save")
OPTIONS = {
    "shampoo": ("shampoo4bit", "algorithm=shampoo,stats_every=2,roots_every=3,stochastic_rounding=true"),
    "soap": ("soap4bit", "stats_every=3,refresh_warmup=5"),
    "kl_shampoo": ("kl_shampoo4bit", "stats_every=2,refresh_warmup=3,moments=4bit_zipsr"),
}


@dataclass(frozen=True)
class Mode:
    """How many ranks, and what they train in."""

    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)


def _fsdp(kind: str) -> Mode:
    config = {
        "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True,
        "state_dict_type": kind,
    }  # fmt: skip
    return Mode(2, {"use_cpu": False, "fsdp": True, "fsdp_config": config})


def _zero(kind: str) -> Mode:
    config = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": ZERO[kind]}
    return Mode(2, {"use_cpu": False, "deepspeed": config})


MODES = {
    "single": Mode(1),
    "ddp": Mode(2),
    "ddp_sharded": Mode(2, {"shard_state": True}),
    "fsdp2_full": _fsdp("FULL_STATE_DICT"),
    "fsdp2_sharded": _fsdp("SHARDED_STATE_DICT"),
    "zero1": _zero("zero1"),
    "zero2": _zero("zero2"),
    "zero3": _zero("zero3"),
}


class Blackboard:
    """Shared memory: the phase of every rank, and the step of the last checkpoint that it has finished."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, 64)

    def clear(self) -> None:
        self._bytes[:] = bytes(64)

    def phase(self, rank: int) -> int:
        return self._bytes[rank]

    def set_phase(self, rank: int, phase: int) -> None:
        self._bytes[rank] = phase

    def saved(self, rank: int) -> int:
        return self._bytes[32 + rank]

    def set_saved(self, rank: int, step: int) -> None:
        self._bytes[32 + rank] = step


class Tell(TrainerCallback):
    """Writes to the blackboard, and every loss to a file."""

    def __init__(self, board: Blackboard, rank: int, log: Path) -> None:
        self.board, self.rank, self.log = board, rank, log

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.board.set_phase(self.rank, STEP)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.board.set_phase(self.rank, SAVE if control.should_save else STEP)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.board.set_saved(self.rank, state.global_step)
        self.board.set_phase(self.rank, STEP)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            with self.log.open("a") as file:
                file.write(f"{state.global_step} {float(logs['loss']).hex()} {float(logs['grad_norm']).hex()}\n")


def child(mode: Mode, options: str, folder: Path, board: Blackboard, rank: int, port: int) -> None:
    """Train or go on, in a forked process; never returns."""
    code = 1
    try:
        # in a process group of its own the harness can end it; what it prints is for the one who looks into a failure
        os.setpgid(0, 0)
        output = os.open(folder / f"out{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if mode.ranks > 1:
            world = str(mode.ranks)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        _train(mode, options, folder, board, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(mode: Mode, options: str, folder: Path, board: Blackboard, rank: int) -> None:
    settings = dict(mode.settings)
    optim, optim_args = OPTIONS[options]
    optim_args += ",shard_state=true" if settings.pop("shard_state", False) else ""
    if "use_cpu" in settings:  # accelerate shards on a CPU only if told that this is a machine with several devices
        os.environ.update(ACCELERATE_TORCH_DEVICE="cpu")
        accelerate_state.PartialState._prepare_backend = lambda *a, **k: ("gloo", DistributedType.MULTI_GPU)
    if "fsdp" in settings:
        os.environ.update(FSDP_STATE_DICT_TYPE=settings["fsdp_config"]["state_dict_type"])
    if "deepspeed" in settings:
        deepspeed_without_compiler()
    _mark_refreshes(board, rank)
    args = arguments(
        folder / "run", optim=optim, optim_args=optim_args, max_steps=STEPS, save_strategy="steps",
        save_steps=SAVE_EVERY, save_total_limit=2, per_device_train_batch_size=2, weight_decay=0.1,
        lr_scheduler_type="cosine", warmup_steps=3, ddp_backend="gloo" if mode.ranks > 1 and "use_cpu" not in
        settings else None, **settings,
    )  # fmt: skip
    checkpoint, _ = last_complete(folder / "run")
    trainer = Trainer(
        llama(attention_dropout=0.1), args, train_dataset=Tokens(count=64),
        callbacks=[Tell(board, rank, folder / f"losses{rank}.txt")],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    write_json(folder / f"done{rank}.json", _digests(trainer))


def _mark_refreshes(board: Blackboard, rank: int) -> None:
    on = Stopwatch.on

    def marked(*arguments: Any) -> Any:
        board.set_phase(rank, REFRESH)
        return on(*arguments)

    Stopwatch.on = marked  # type: ignore[method-assign]


def _digests(trainer: Trainer) -> dict[str, str]:
    """Of all parameters and this rank's optimizer state, every bit."""
    parameters = [p for _, p in sorted(whole(trainer.model_wrapped).items())]
    entries = [_digest([t for _, t in sorted(entry.items())]) for entry in unwrapped(trainer.optimizer).state.values()]
    return {"parameters": _digest(parameters), "state": " ".join(sorted(entries))}


def _digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ----------------------------------------------------------------------------------------------------- the harness


@dataclass
class Tally:
    """What happened in one mode."""

    kills: Counter[str] = field(default_factory=Counter)
    one_rank: int = 0
    trainings: int = 0
    resumes: int = 0
    afresh: int = 0
    at_the_end: int = 0
    torn: Counter[str] = field(default_factory=Counter)
    losses: int = 0
    seconds: float = 0.0


class Mismatch(AssertionError):
    """A resumed training was not the unbroken one."""


def start(mode: Mode, options: str, folder: Path, board: Blackboard) -> list[int]:
    """Fork the ranks; their process ids."""
    board.clear()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    pids = []
    for rank in range(mode.ranks):
        pid = os.fork()
        if pid == 0:
            child(mode, options, folder, board, rank, port)
        pids.append(pid)
    return pids


def wait(pids: list[int], until: float) -> list[int | None]:
    """Exit status of each process (None: still running when the time was up)."""
    found: dict[int, int] = {}
    while len(found) < len(pids) and time.monotonic() < until:
        for pid in pids:
            if pid not in found:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    found[pid] = status
        time.sleep(0.002)
    return [found.get(pid) for pid in pids]


def unbroken(mode: Mode, options: str, folder: Path, board: Blackboard) -> tuple[dict[int, str], list[Any], float]:
    """Loss by step, what each rank ended with, and seconds, of a training that nobody kills."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    statuses = wait(start(mode, options, folder, board), began + 300)
    if statuses != [0] * mode.ranks:
        raise RuntimeError(f"the unbroken run failed: {statuses}\n{(folder / 'out0.txt').read_text()[-4000:]}")
    return logged(folder), ended(mode, folder), time.monotonic() - began


def logged(folder: Path) -> dict[int, str]:
    """What rank 0 has logged by step; the same step logged by two processes must agree."""
    found: dict[int, str] = {}
    for line in (folder / "losses0.txt").read_text().splitlines():
        step, _, value = line.partition(" ")
        if found.setdefault(int(step), value) != value:
            raise Mismatch(f"step {step} was logged as {found[int(step)]} and as {value}")
    return found


def ended(mode: Mode, folder: Path) -> list[Any]:
    """What each rank has written at the end."""
    return [json.loads((folder / f"done{rank}.json").read_text()) for rank in range(mode.ranks)]


def kill_at_random(pids: list[int], board: Blackboard, dice: random.Random, seconds: float, tally: Tally) -> bool:
    """Kill all ranks or one, at a random time or in a phase; false if they had ended before."""
    victim = dice.randrange(len(pids))
    phase = dice.choice((None, None, None, STEP, REFRESH, SAVE))
    at = time.monotonic() + dice.uniform(0.15 * seconds, seconds)
    while time.monotonic() < at or (phase is not None and board.phase(victim) != phase):
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
            break
        time.sleep(0.0002)
    time.sleep(dice.uniform(0.0, 0.02) if phase == SAVE else 0.0)
    if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
        return False
    alone = len(pids) > 1 and dice.random() < 0.3
    at_work = PHASES[board.phase(victim)]
    for pid in [pids[victim]] if alone else pids:
        os.kill(pid, signal.SIGKILL)
    tally.kills[at_work] += 1
    tally.one_rank += alone
    return True


def check_checkpoints(mode: Mode, folder: Path, board: Blackboard, tally: Tally) -> int:
    """After a kill: what was finished is known as complete.  The step to go on from."""
    finished = min(board.saved(rank) for rank in range(mode.ranks))
    run = folder / "run"
    newest, passed_over = last_complete(run) if run.is_dir() else (None, {})
    step = int(newest.name.partition("-")[2]) if newest else 0
    if finished and step < finished:
        raise Mismatch(f"checkpoint-{finished} was finished, but found was {newest}; passed over: {passed_over}")
    for reason in passed_over.values():
        tally.torn[reason.split("_state_")[0] if "rank" in reason else reason] += 1
    return step


def batter(name: str, options: str, kills: int, dice: random.Random, work: Path) -> Tally:
    """One mode: train, kill, resume until there were `kills` kills and the last training has ended."""
    mode, board, tally = MODES[name], Blackboard(), Tally()
    began = time.monotonic()
    curve, truth, seconds = unbroken(mode, options, work / "unbroken", board)
    while sum(tally.kills.values()) < kills:
        tally.trainings += 1
        folder = work / f"training{tally.trainings}"
        folder.mkdir()
        while True:
            pids = start(mode, options, folder, board)
            more = sum(tally.kills.values()) < kills
            killed = more and kill_at_random(pids, board, dice, 0.8 * seconds, tally)
            statuses = wait(pids, time.monotonic() + max(120, 10 * seconds))  # a busy machine is no hang
            for pid, status in zip(pids, statuses, strict=True):
                if status is None:
                    os.kill(pid, signal.SIGKILL)
                    raise Mismatch("a rank hangs after " + ("the kill of another" if killed else "no kill at all"))
            seen = logged(folder) if (folder / "losses0.txt").exists() else {}
            wrong = [step for step, value in seen.items() if curve.get(step) != value]
            if wrong:
                raise Mismatch(f"the loss at steps {wrong} is not the unbroken run's")
            if not killed:
                break
            step = check_checkpoints(mode, folder, board, tally)
            if step == STEPS:
                break
            tally.resumes += step > 0
            tally.afresh += step == 0
        if killed:  # after its last checkpoint: there is nothing to go on with
            tally.at_the_end += 1
            continue
        if statuses != [0] * mode.ranks:
            raise Mismatch(f"a resume failed: {statuses}\n{(folder / 'out0.txt').read_text()[-3000:]}")
        if ended(mode, folder) != truth or logged(folder) != curve:
            raise Mismatch("the training ended elsewhere than the unbroken one")
        tally.losses += len(seen)
        shutil.rmtree(folder)
    tally.seconds = time.monotonic() - began
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=120, help="in all, shared by the modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--options", default="shampoo", help=f"one of {', '.join(OPTIONS)}, or all")
    parser.add_argument("--output", type=Path, help="a JSON file, such as docs/results/crash.json; adds to it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [(m, o) for m in given.modes.split(",") for o in (OPTIONS if given.options == "all" else [given.options])]
    before = json.loads(given.output.read_text()) if given.output and given.output.exists() else {}
    results: dict[str, Any] = before.get("modes", {})
    for i, (mode, options) in enumerate(chosen):
        share = given.kills // len(chosen) + (i < given.kills % len(chosen))
        with tempfile.TemporaryDirectory(prefix="hf_shampoo4-crash-") as work:
            tally = batter(mode, options, share, random.Random(f"{given.seed} {mode} {options}"), Path(work))
        results[f"{mode} {options}"] = vars(tally)
        print(f"{mode} {options}: {vars(tally)}", flush=True)
        total = sum(sum(found["kills"].values()) for found in results.values())
        if given.output:  # after each mode
            said = f"--kills {given.kills} --seed {given.seed} --options {given.options} --modes {given.modes}"
            commands = [*before.get("commands", []), f"python -m tests.stress.crash {said}"]
            write_json(
                given.output, {"commands": commands, "torch": torch.__version__, "kills": total, "modes": results}
            )
    print(f"survived {total} kills")


if __name__ == "__main__":
    main()

"""Runs that are made once and kept: one JSON file a run, named by everything that the run depends on.

A study describes a run by its settings and by the code that would make it (`code_version`).  A finished run is on the
disk at once and whole, so that a study can be stopped at any time, shared by processes, and continued; a run of other
code has another name, and is never taken for one of this code.  What a run needs to go on after it was killed is in
`unfinished` beside the folder of runs, under the same name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hf_shampoo4.studies.code_version import commit, same
from hf_shampoo4.studies.machine import machine
from hf_shampoo4.utils.files import write_json

Settings = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """The finished runs in a folder."""

    folder: Path

    def path(self, settings: Mapping[str, Any], code: Mapping[str, str]) -> Path:
        """Where a run is kept: a digest of its settings, and one of the code."""
        return self.folder / f"{_digest(settings)}-{_digest(code)[:8]}.json"

    def find(self, settings: Mapping[str, Any], code: Mapping[str, str]) -> Settings | None:
        """What a run came to, if the same code has finished it."""
        found = [json.loads(p.read_text(encoding="utf-8")) for p in self.folder.glob(f"{_digest(settings)}-*.json")]
        return next((run for run in found if same(run["code"], code)), None)

    def once(self, settings: Settings, code: Mapping[str, str], make: Callable[[], Settings]) -> Settings:
        """The run from the disk, or else made now and kept.

        Args:
            settings: all that distinguishes the run, as JSON can hold it.
            code: name -> version of what makes it.
            make: makes it; what it returns is kept beside `settings`, `code`, `commit`, `machine` and `finished`.
        """
        if (found := self.find(settings, code)) is not None:
            return found
        began = {"settings": settings, "code": dict(code), "commit": commit(), "machine": machine()}
        result = {**began, **make(), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(self.path(settings, code), result)
        return result

    @contextmanager
    def alone(self, settings: Mapping[str, Any], code: Mapping[str, str]) -> Iterator[Path]:
        """A folder for the making of a run, until the run is kept; another process that wants it waits.

        What the block leaves in the folder when it ends by an error, or is killed, the next one finds.

        Args:
            settings: of the run.
            code: of the run; other code has another folder.

        Yields:
            The folder, which is there.
        """
        folder = self.folder.with_name("unfinished") / self.path(settings, code).stem
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock")
        with lock.open("w") as held:
            _wait_for(held, folder.name)
            folder.mkdir(exist_ok=True)
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)  # who waits for it finds the run finished

    def of(self, code: Callable[[Settings], Mapping[str, str]] | None) -> list[Settings]:
        """All finished runs whose code is what `code` says of their settings today; None: of any code, the last first.

        Args:
            code: as in `once`, by settings.
        """
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]
        if code is None:
            return sorted(found, key=lambda run: run["finished"], reverse=True)
        return [run for run in found if same(run["code"], code(run["settings"]))]


if sys.platform == "win32":

    def _wait_for(held: TextIO, name: str) -> None:
        """There two processes must not be given one run: `--shard`."""

else:
    import fcntl

    def _wait_for(held: TextIO, name: str) -> None:
        """Have the file's lock, which the system takes back from a process that ends in whatever way."""
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process makes run {name}: waiting for it", flush=True)
            fcntl.flock(held, fcntl.LOCK_EX)


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

"""The Hugging Face hub: whether it can be reached at all."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import urllib.parse
import urllib.request

PATIENCE = 3.0  # seconds for a name server's answer


def offline_without_network() -> None:
    """Where the hub's name cannot be resolved, have its libraries look on the disk alone, and say so.

    They would try again for half a minute for every file.  It must be called before they are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE") or urllib.request.getproxies():
        return
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    if not _resolves(host):
        print(f"{host} cannot be reached: looking for models and data on this disk alone", file=sys.stderr)
        os.environ["HF_HUB_OFFLINE"] = "1"


def _resolves(host: str) -> bool:
    found: list[object] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            found.extend(socket.getaddrinfo(host, 443))

    asking = threading.Thread(target=ask, daemon=True)  # which a silent name server may hold up for half a minute
    asking.start()
    asking.join(PATIENCE)
    return bool(found)

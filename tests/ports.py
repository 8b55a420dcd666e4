"""Ports for servers of tests."""

from __future__ import annotations

import contextlib
import os
import socket
from itertools import count

# Below those that Linux gives to outgoing connections (one of Ray's can take such a port between the look and the
# server's start) and above those of Ray's workers and of deploy/slurm.sh.
LOWEST, HIGHEST = 30_000, 32_700
# Test processes side by side begin far from each other.
_turns = count(os.getpid() * 997)


def free_port() -> int:
    """A port that nobody listens on, another one at every call."""
    for turn in _turns:
        port = LOWEST + turn % (HIGHEST - LOWEST)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("unreachable: turns do not end")

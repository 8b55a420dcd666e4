"""Ray's token: nobody without it runs code on a cluster or reads a job. Never switched off here, and never shown."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def token_file() -> Path:
    """Ray's token file of this user: RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))


def use_token() -> None:
    """Has Ray in this process, and in those it starts, show and ask for the token, where this user has one."""
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or token_file().exists()):
        os.environ["RAY_AUTH_MODE"] = "token"


def make_token() -> Path:
    """The token file, made with a new token where there is none, and closed to others (Ray leaves its own open)."""
    path = token_file()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
    path.chmod(0o600)
    return path

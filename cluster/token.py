"""Ray's token: nobody without it runs code on a cluster or reads a job. Never switched off here, and never shown.

A job's secrets are sealed with it: Ray writes a job's environment into its logs, and tells it to whoever may see the
job. The job's own processes open them again, where the same token lies.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

SEALED = "CHARTLM_SEALED"  # in the environment of a job


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


def _token() -> str | None:
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    return token_file().read_text().strip() if token_file().exists() else None


def seal(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment by which a job gets this one, unreadable without the token. Raises ConfigError without one."""
    if not environment:
        return {}
    if (token := _token()) is None:
        raise ConfigError(
            f"{', '.join(sorted(environment))}: are passed on sealed with the cluster's token, and {token_file()} is "
            "not there; copy it from the cluster's head"
        )
    return {SEALED: _box(token).encrypt(json.dumps(dict(environment)).encode()).decode()}


def unseal() -> None:
    """Puts what was sealed for this job into the environment of this process."""
    if (sealed := os.environ.pop(SEALED, None)) is not None:
        from cryptography.fernet import InvalidToken

        try:
            os.environ.update(json.loads(_box(_token() or "").decrypt(sealed.encode())))
        except InvalidToken:
            raise ConfigError(f"{token_file()}: is not the token with which this job's secrets were sealed") from None


def _box(token: str) -> Any:
    from cryptography.fernet import Fernet  # not needed, and perhaps not installed, before a job is submitted

    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(f"chartlm {token}".encode()).digest()))

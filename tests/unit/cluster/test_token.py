"""What a job's secrets are sealed with, and who opens them."""

from pathlib import Path

import pytest

from cluster import token
from cluster.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", token.SEALED, "SECRET_OF_TEST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path


def test_only_the_same_token_opens_what_was_sealed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert token.seal({}) == {}
    with pytest.raises(ConfigError, match="SECRET_OF_TEST: are passed on sealed with the cluster's token"):
        token.seal({"SECRET_OF_TEST": "xyzzy"})
    made = token.make_token()
    assert made.stat().st_mode & 0o777 == 0o600
    sealed = token.seal({"SECRET_OF_TEST": "xyzzy"})
    assert "xyzzy" not in str(sealed)
    monkeypatch.setenv(token.SEALED, sealed[token.SEALED])
    monkeypatch.setenv("SECRET_OF_TEST", "")  # so that it goes with the test
    token.unseal()
    import os

    assert os.environ["SECRET_OF_TEST"] == "xyzzy"
    assert token.SEALED not in os.environ
    token.unseal()  # nothing is sealed any more
    monkeypatch.setenv(token.SEALED, sealed[token.SEALED])
    made.write_text("0" * 64)
    with pytest.raises(ConfigError, match="is not the token with which this job's secrets were sealed"):
        token.unseal()


def test_a_token_that_ray_left_open_is_closed(home: Path) -> None:
    (home / "token").write_text("1" * 64)
    (home / "token").chmod(0o644)
    assert token.make_token().stat().st_mode & 0o777 == 0o600
    assert (home / "token").read_text() == "1" * 64

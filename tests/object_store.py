"""A real S3 server on loopback."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import fsspec
import pytest
from ports import free_port


@contextlib.contextmanager
def object_store(bucket: str) -> Iterator[dict[str, str]]:
    """Runs the server with an empty bucket; yields what a process must know to reach it, which this one then knows."""
    boto3 = pytest.importorskip("boto3")
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                assert time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.2)
            # fsspec keeps what it opened: of a server of the same process before, perhaps.
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            boto3.client("s3").create_bucket(Bucket=bucket)
            yield environment
        finally:
            server.kill()
            server.wait()

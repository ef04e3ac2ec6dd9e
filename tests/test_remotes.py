"""DVC remotes as docs/remotes.md says it: what is pushed to S3 or SSH is what a clone pulls; no secret is committed.

Against real servers on this machine (moto's for S3, asyncssh's for SFTP), each with DVC's plug-in.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.ray_cluster import HOST

SECRET = "-".join(("not", "a", "real", "key"))  # in parts, so that this file is no leak
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def needs(*modules: str) -> pytest.MarkDecorator:
    absent = [m for m in modules if find_spec(m.partition(".")[0]) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} not installed (extra remotes)")


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., str]:
    """Run a command in a folder, with a home of its own; its output."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "AWS_", "GOOGLE_", "SSH_"))}
    env = kept | {"HOME": str(home), "DVC_NO_ANALYTICS": "1", "NO_PROXY": HOST, "no_proxy": HOST}

    def run(where: Path, *command: str, **extra: str) -> str:
        done = subprocess.run(command, cwd=where, env=env | extra, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.stdout

    return run


def travels(call: Callable[..., str], root: Path, url: str, options: dict[str, str], secrets: dict[str, str]) -> None:
    """Push from one repository, pull in a clone of it; `secrets` are environment variables."""
    dvc, git = (sys.executable, "-m", "dvc"), ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    repo, clone = root / "repo", root / "clone"
    (repo / "adapter").mkdir(parents=True)
    content = {"adapter/adapter_model.safetensors": os.urandom(200_000), "adapter/config.json": b"{}"}
    for name, data in content.items():
        (repo / name).write_bytes(data)
    call(repo, "git", "init", "-q")
    call(repo, *dvc, "init", "-q")
    call(repo, *dvc, "remote", "add", "-d", "storage", url)
    for key, value in options.items():
        call(repo, *dvc, "remote", "modify", "storage", key, value)
    call(repo, *dvc, "add", "-q", "adapter")
    call(repo, *git, "add", "-A")
    call(repo, *git, "commit", "-qm", "state")
    call(repo, *dvc, "push", **secrets)
    assert "in sync" in call(repo, *dvc, "status", "--cloud", **secrets)
    call(root, "git", "clone", "-q", str(repo), str(clone))
    call(clone, *dvc, "pull", **secrets)
    assert {name: (clone / name).read_bytes() for name in content} == content
    committed = call(repo, "git", "grep", "-I", "", "HEAD")
    assert url in committed and not [s for s in secrets.values() if s in committed]


@needs("dvc_s3", "moto.server")
def test_s3_with_keys_from_the_environment(call: Callable[..., str], tmp_path: Path) -> None:
    from moto.server import ThreadedMotoServer  # pyright: ignore[reportMissingImports]

    server = ThreadedMotoServer(ip_address=HOST, port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        urlopen(Request(f"{endpoint}/bucket", method="PUT"), timeout=30).close()
        secrets = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        travels(call, tmp_path, "s3://bucket/ragdistill", {"endpointurl": endpoint}, secrets)
        with urlopen(f"{endpoint}/bucket?list-type=2", timeout=30) as listed:
            assert listed.read().count(b"<Key>ragdistill/files/md5/") == 3
    finally:
        server.stop()


@contextmanager
def sftp(root: Path, home: Path) -> Iterator[tuple[int, Path]]:
    """An SFTP server whose `/` is `root`; yields its port and the key file it lets in, and makes it known in `home`."""
    import asyncssh

    key, host = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    (home / ".ssh").mkdir()
    key.write_private_key(home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "id_ed25519").chmod(0o600)
    allowed = asyncssh.import_authorized_keys(key.export_public_key().decode())
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), [0]

    def jail(connection: Any) -> asyncssh.SFTPServer:
        return asyncssh.SFTPServer(connection, chroot=str(root).encode())

    async def serve() -> None:
        server = await asyncssh.listen(
            HOST, 0, server_host_keys=[host], authorized_client_keys=allowed, sftp_factory=jail
        )
        port[0] = server.get_port()
        ready.set()

    loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(20)
    public = host.export_public_key().decode()
    (home / ".ssh" / "known_hosts").write_text(f"[{HOST}]:{port[0]} {public}")
    try:
        yield port[0], home / ".ssh" / "id_ed25519"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@needs("dvc_ssh", "asyncssh")
def test_ssh_with_a_key_file(call: Callable[..., str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with sftp(store, tmp_path / "home") as (port, key):
        travels(call, tmp_path, f"ssh://someone@{HOST}:{port}/ragdistill", {"keyfile": str(key)}, {})
    assert len([p for p in (store / "ragdistill/files/md5").rglob("*") if p.is_file()]) == 3

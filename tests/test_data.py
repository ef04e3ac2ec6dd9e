"""`ragdistill data`: official files come whole and unchanged or not at all, and without internet it says what to do."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ragdistill import downloads
from ragdistill.commands.data import FOLDER, _unpack, data_sets, get_data
from ragdistill.envs.alfworld.official import official_root, official_tasks
from ragdistill.errors import ConfigError, DataError, IdentityError
from ragdistill.records import read_json

GAME = "json_2.1.1/valid_unseen/pick_and_place_simple-Mug-None-Shelf-10/trial_1"


class Handler(http.server.SimpleHTTPRequestHandler):
    """A file server that can hang up in the middle."""

    def do_GET(self) -> None:
        if Path(self.translate_path(self.path)).name == "cut.json":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"[1, 2")
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local HTTP server's folder, named as the mirror; the working directory is an empty project."""
    served, project = tmp_path / "served", tmp_path / "project"
    served.mkdir()
    project.mkdir()
    monkeypatch.chdir(project)
    handler = functools.partial(Handler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv(downloads.MIRROR, f"http://127.0.0.1:{running.server_port}")
        yield served
        running.shutdown()


def zipped(**members: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return out.getvalue()


def put_alfworld(folder: Path) -> None:
    traj = {f"{GAME}/traj_data.json": '{"task_type": "pick_and_place_simple"}'}
    (folder / "json_2.1.1_json.zip").write_bytes(zipped(**traj))
    games = {f"{GAME}/game.tw-pddl": '{"solvable": true}', "../outside.txt": "x", "/absolute.txt": "x"}
    (folder / "json_2.1.2_tw-pddl.zip").write_bytes(zipped(**games))


def test_alfworld_comes_from_where_its_own_downloader_takes_it() -> None:
    script = shutil.which("alfworld-download", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if script is None:
        pytest.skip("alfworld-download is not installed as a script")
    text = Path(script).read_text()
    for source in data_sets()["alfworld"].files["all"]:
        assert f'"{source.url}"' in text


def test_fetched_games_are_found_and_nothing_leaves_the_folder(
    server: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_alfworld(server)
    assert get_data("alfworld", "all", False) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"export ALFWORLD_DATA={(FOLDER / 'alfworld').resolve()}"
    monkeypatch.setenv("ALFWORLD_DATA", last.partition("=")[2])
    root = official_root()
    assert root is not None
    (task,) = official_tasks(root, "valid_unseen")
    assert task.group.endswith("10")
    written = {p.name for p in Path().rglob("*") if p.is_file()}
    assert not (FOLDER.parent / "outside.txt").exists() and not Path("/absolute.txt").exists()
    assert not [n for n in written if n.endswith(".tmp")]
    (server / "json_2.1.1_json.zip").unlink()
    assert get_data("alfworld", "all", False) == 0, "what is there is not fetched again"


def test_a_file_that_changes_later_is_refused(server: Path) -> None:
    for name in ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json"):
        (server / name).write_text("[]")
    assert get_data("webshop", "small", False) == 0
    path = FOLDER / "webshop/items_human_ins.json"
    assert len(read_json(FOLDER / "webshop" / downloads.NOTED)) == 3
    path.write_text("[1]")
    with pytest.raises(IdentityError, match="was removed; fetch it again"):
        get_data("webshop", "small", False)
    assert not path.exists()
    assert get_data("webshop", "small", False) == 0
    with pytest.raises(ConfigError, match="no size 'tiny'; choose one of all, small"):
        get_data("webshop", "tiny", False)


def test_a_member_that_a_kill_cut_off_is_made_whole_and_a_damaged_one_never_gets_its_name(server: Path) -> None:
    put_alfworld(server)
    torn = FOLDER / "alfworld" / GAME / "game.tw-pddl"
    torn.parent.mkdir(parents=True)
    torn.write_text('{"solv')
    assert get_data("alfworld", "all", False) == 0
    assert torn.read_text() == '{"solvable": true}'
    with zipfile.ZipFile(FOLDER / "alfworld/bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("new.json", '{"solvable": true}' * 1000)
    damaged = bytearray((FOLDER / "alfworld/bad.zip").read_bytes())
    damaged[40:46] = bytes(b ^ 0xFF for b in damaged[40:46])
    (FOLDER / "alfworld/bad.zip").write_bytes(damaged)
    with pytest.raises(DataError, match=r"bad\.zip is damaged .*delete it"):
        _unpack(FOLDER / "alfworld/bad.zip", FOLDER / "alfworld")
    assert not (FOLDER / "alfworld/new.json").exists() and not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "text"), [("page.json", b"<!DOCTYPE html><title>Sign in"), ("cut.zip", b"PK\x03\x04")]
)
def test_a_wrong_file_put_there_by_hand_is_not_what_is_demanded_later(server: Path, name: str, text: bytes) -> None:
    good = zipped(a="1") if name.endswith(".zip") else b"[]"
    (server / name).write_bytes(good)
    Path("there").mkdir()
    there, source = Path("there") / name, downloads.Source(name, f"https://example.org/{name}", "")
    there.write_bytes(text)
    with pytest.raises(DataError, match=r"is not the file .*; delete it"):
        downloads.fetch([source], Path("there"))
    there.unlink()
    assert downloads.fetch([source], Path("there")) == [there] and there.read_bytes() == good


def test_a_clone_demands_what_was_committed(server: Path) -> None:
    (server / "a.json").write_text("[1]")
    Path("there").mkdir()
    source = downloads.Source("a.json", "https://example.org/a.json", "")
    tracked = Path("there/a.json.dvc")
    tracked.write_text(f"outs:\n- md5: {hashlib.md5(b'[]').hexdigest()}\n  hash: md5\n  path: a.json\n")
    with pytest.raises(IdentityError, match=r"has md5 .* and was removed; .*`dvc update`"):
        downloads.fetch([source], Path("there"))
    (server / "a.json").write_text("[]")
    downloads.fetch([source], Path("there"))
    Path("there/a.json").write_text("[2]")  # as `dvc update` does, with the line of the other file
    tracked.write_text(f"outs:\n- md5: {hashlib.md5(b'[2]').hexdigest()}\n  path: a.json\n")
    assert downloads.fetch([source], Path("there")) == [Path("there/a.json")]
    tracked.write_text("outs: 1")
    with pytest.raises(DataError, match=r"is no \.dvc file"):
        downloads.fetch([source], Path("there"))


def test_a_pinned_hash_is_demanded_at_once(server: Path) -> None:
    (server / "a.json").write_text("[]")
    source = downloads.Source("a.json", "https://example.org/a.json", "", sha256="0" * 64)
    with pytest.raises(IdentityError, match="not 0000"):
        downloads.fetch([source], Path("there"))
    assert not Path("there/a.json").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent.json", "File not found"),
        ("cut.json", "only 5 of 1000 bytes|IncompleteRead"),
        ("page.json", "a web page"),
    ],
)
def test_what_cannot_be_had_leaves_nothing_and_says_what_to_do(server: Path, name: str, says: str) -> None:
    (server / "page.json").write_text("<!DOCTYPE html><title>Quota exceeded</title>")
    with pytest.raises(DataError, match=says) as caught:
        downloads.fetch([downloads.Source(name, f"https://example.org/{name}", "")], Path("there"))
    assert "put it at there/" in str(caught.value) and downloads.MIRROR in str(caught.value)
    assert list(Path("there").iterdir()) == []


def test_without_internet_it_says_so(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(downloads.MIRROR, "http://127.0.0.1:1")
    with pytest.raises(DataError, match="Without internet: fetch it on another machine"):
        get_data("alfworld", "all", False)
    for mirror in (
        "ftp://somewhere",
        "http://[::1",
        "https://me:secret@host",
        "http://host:99999",
        "http://h/a?key=secret",
    ):
        monkeypatch.setenv(downloads.MIRROR, mirror)
        for with_dvc in (False, True):
            with pytest.raises(DataError, match="https://, http:// or file://") as caught:
                get_data("alfworld", "all", with_dvc)
            assert "secret" not in str(caught.value)
    monkeypatch.setenv(downloads.MIRROR, "http://127.0.0.1:1/\u00f6")
    with pytest.raises(DataError, match="could not be fetched"):
        get_data("alfworld", "all", False)


@pytest.mark.timeout(300)
def test_a_tracked_import_is_dvcs(server: Path) -> None:
    for name in ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json"):
        (server / name).write_text("[]")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    assert get_data("webshop", "small", True) == 0
    tracked = (FOLDER / "webshop/items_human_ins.json.dvc").read_text()
    assert "items_human_ins.json" in tracked and "http://127.0.0.1" in tracked and "md5" in tracked
    assert (FOLDER / "webshop/items_human_ins.json").read_text() == "[]"

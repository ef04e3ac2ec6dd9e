"""WebShop's files and catalogues when something is wrong with them: each is named, none costs the machine."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ragdistill.envs.webshop import products as reader
from ragdistill.envs.webshop.catalogue import Catalogue, ensure_catalogue
from ragdistill.envs.webshop.engine import WebshopEnv
from ragdistill.envs.webshop.products import Product, read_by_asin, read_products, read_reviews
from ragdistill.envs.webshop.sources import VARIABLE, embedded_products, original_files
from ragdistill.errors import DataError
from tests.test_webshop_catalogue import RAW
from tests.webshop_small import product

LINES = "".join(json.dumps({"id": i, "product": RAW | {"asin": f"B00000000{i}"}}) + "\n" for i in range(5)).encode()
PACKED = gzip.compress(LINES)


def read(path: Path, data: bytes) -> list[Product]:
    path.write_bytes(data)
    return list(read_products(path, {}, {}))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("half.jsonl.gz", PACKED[: len(PACKED) // 2]),
        ("no.jsonl.gz", b"not packed"),
        ("flipped.jsonl.gz", PACKED[:60] + bytes([PACKED[60] ^ 255]) + PACKED[61:]),
        ("sum.jsonl.gz", PACKED[:-6] + b"000000"),
        ("half.jsonl", LINES[:-50]),
        ("list.jsonl", b"[1]\n"),
        ("number.jsonl", b"3\n"),
        ("null.jsonl", b'{"product": null}\n'),
        ("bytes.json", b'[{"asin": "\xff"}]'),
        ("object.json", b'{"B0": {}}'),
    ],
)
def test_damaged_files_are_named_in_every_format(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / name))}.*fetch"):
        read(tmp_path / name, data)


def test_a_blank_line_is_no_damage(tmp_path: Path) -> None:
    assert len(read(tmp_path / "a.jsonl", LINES + b"\n \n")) == 5


def test_damage_in_the_middle_does_not_take_the_rest_of_the_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_CHUNK", 1000)
    monkeypatch.setattr(reader, "MAX_ENTRY", 10_000)
    path = tmp_path / "items.json"
    path.write_text("[" + json.dumps(RAW) + ", {broken " + "x" * 200_000)
    opened = path.open()
    with pytest.raises(json.JSONDecodeError):
        list(reader._array(opened))
    assert opened.tell() < 50_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", None), ("name", 5), ("category", None), ("product_category", None), ("query", None),
        ("full_description", 3), ("small_description", [None]), ("pricing", ["a"]), ("pricing", "$"), ("pricing", 5),
        ("customization_options", {"a": [{"value": None}]}), ("customization_options", {"a": "xy"}), ("asin", None),
    ],
)  # fmt: skip
def test_an_entry_that_pages_and_reward_cannot_use_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(DataError, match=r"product 1: .*fetch"):
        read(tmp_path / "items.json", json.dumps([RAW | {"asin": "B000000009"}, RAW | {key: value}]).encode())


def test_the_other_files_are_named_too_and_not_called_a_stages(tmp_path: Path) -> None:
    path = tmp_path / "items_ins_v2.json"
    for data in ("[]", '{"B0": ', ""):
        path.write_text(data)
        with pytest.raises(DataError, match=r"items_ins_v2\.json is not what WebShop has.*fetch it again"):
            read_by_asin(path)
    for rows in ([{"asin": "B0"}], [[1]], [{"asin": "B0", "average_rating": 1, "reviews": [3]}]):
        path.write_text(json.dumps(rows))
        with pytest.raises(DataError, match="entry 0"):
            list(read_reviews(path))


def test_of_several_files_the_same_is_taken_everywhere_and_none_that_is_being_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    names = ["z_docs.jsonl", "b_docs.jsonl", "c_docs.jsonl", "a_docs.jsonl.gz.part", "a_docs.jsonl.part"]
    for name in [*names, "items_ins_v2_1000.json", "items_ins_v2.json", "items_human_ins.json"]:
        (tmp_path / name).write_text("{}")
    unsorted = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, what: sorted(unsorted(self, what), reverse=True))
    found = original_files()
    assert found is not None and (found.products.name, found.attributes.name) == ("b_docs.jsonl", "items_ins_v2.json")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    one = product(instruction="Find me shirts", instruction_attributes=("easy care",))
    return ensure_catalogue(tmp_path / "c", lambda: [one], lambda: ())


USES: tuple[Callable[[Catalogue], object], ...] = (
    lambda c: c.search("cotton"), lambda c: c.product("B0SHIRT001"), lambda c: c.price("B0SHIRT001"),
    lambda c: c.goal("synthetic", 0), lambda c: c.goal_rows("synthetic"), lambda c: list(c.products()),
    lambda c: c.bucket_words.bucket("cotton shirt"),
)  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "half", "other"])
@pytest.mark.parametrize("name", ["catalogue.sqlite", "terms.sqlite", "docs.npy", "lengths.npy"])
def test_a_damaged_catalogue_says_which_folder_to_delete(built: Path, name: str, how: str) -> None:
    data = (built / name).read_bytes()
    (built / name).write_bytes({"empty": b"", "half": data[: len(data) // 2], "other": b"x" * len(data)}[how])
    # Terms are needed for a search only. Anything but this error fails the test.
    for use in USES[:1] if name == "terms.sqlite" else USES:
        with pytest.raises(DataError, match=f"{re.escape(str(built))} is damaged .*; delete that folder"):
            use(Catalogue(built))


def _slow(mark: str) -> Iterator[Product]:
    """Products of a build that says that it began, and takes its time."""
    with Path(mark).open("a") as f:
        f.write(f"{os.getpid()}\n")
    for one in embedded_products(30):
        time.sleep(0.02)
        yield one


def _build(folder: str, mark: str) -> int:
    return len(Catalogue(ensure_catalogue(Path(folder), lambda: _slow(mark), lambda: ())))


def test_processes_that_want_it_at_once_build_it_once(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(_build, [(str(tmp_path / "c"), str(mark))] * 2) == [30, 30]
    assert len(mark.read_text().split()) == 1, "the other one waited"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", "c", "mark"]


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(str(tmp_path / "c"), str(mark)))
    process.start()
    while not mark.exists() and process.is_alive():
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "c").exists() and len(list(tmp_path.glob(".c.*/"))) == 1
    assert _build(str(tmp_path / "c"), str(mark)) == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", "c", "mark"]


def test_environments_of_one_process_hold_one_catalogue(built: Path) -> None:
    one, other = WebshopEnv(built), WebshopEnv(built)
    assert one._catalogue is other._catalogue
    one.close()
    assert other._catalogue.price("B0SHIRT001") == 20.0

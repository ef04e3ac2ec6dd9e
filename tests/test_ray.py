"""Environments on several nodes: the same episodes as on this machine, each once, also when a node dies."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from ragdistill.envs import identity_of, make_domain, ray_pool
from ragdistill.envs.hosts import Host, open_process
from ragdistill.envs.pool import EnvPool
from ragdistill.envs.ray_node import keep, node_cache, open_on_node
from ragdistill.envs.ray_pool import AVOIDED, Actor, Cluster, connect, game_of, said, sizes
from ragdistill.errors import ConfigError, EnvironmentFault, IdentityError
from ragdistill.journal import Journal, cache_dir
from ragdistill.llm import Reply, Sampling
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import Params, RayParams, convert_params
from ragdistill.records import Message, StopReason, Task, Trajectory, read_jsonl, write_json, write_jsonl
from ragdistill.stages.common import GAMES, IDENTITY
from ragdistill.stages.playing import play
from tests.ray_cluster import OWN, Node, cluster, kill
from tests.scripted_policy import play as policy
from tests.test_params import changed
from tests.test_pool import Toy, task

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install -e '.[ray]')")
ATTEMPTS = 4
ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 600.0
"""Seconds; a busy machine takes minutes for a cluster."""


class Wrong(SimpleNamespace):
    """Ray's exceptions, as far as they are told apart."""

    class RayError(Exception): ...

    class GetTimeoutError(RayError): ...

    class RayTaskError(RayError): ...

    class RayActorError(RayError):
        actor_init_failed = False


class FakeRay:
    """What `Cluster` and `Actor` ask of Ray."""

    exceptions = Wrong

    def __init__(self, **cpus: float) -> None:
        self.cpus = cpus
        self.asked: list[tuple[str, float | None]] = []

    def get(self, question: tuple[str, object], timeout: float | None = None) -> object:
        verb, answer = question
        self.asked.append((verb, timeout))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address="head:1")

    def nodes(self) -> list[dict]:
        return [{"NodeID": n, "Alive": c >= 0, "Resources": {"CPU": c} if c else {}} for n, c in self.cpus.items()]


class Remote:
    """A handle to an actor that answers, or fails, as `answers` says by verb."""

    def __init__(self, **answers: object) -> None:
        def asked(slot: int, verb: str, argument: object, game: bytes | None) -> tuple[str, object]:
            return verb, answers[verb] if isinstance(answers[verb], Exception) else (answers[verb], 1.0)

        self.begin, self.answer = SimpleNamespace(remote=lambda: ("begin", None)), SimpleNamespace(remote=asked)


class Opened(Actor):
    def __init__(self, cluster: Cluster, node: str, factory: object, shared: object) -> None:
        self._cluster, self.node = cluster, node


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(ray_pool, "Actor", Opened)
    monkeypatch.setattr(ray_pool, "_silence", lambda _: "")
    return Cluster(FakeRay(a=2.0, b=1.0, empty=0.0, gone=-1.0), tmp_path)  # pyright: ignore[reportArgumentType]


def fill(nodes: Cluster) -> list[str]:
    """Open actors until there is no room; their nodes in order."""
    working: list[Host] = []
    while (host := nodes.open(Toy, working)) is not None:
        working.append(host)
    return [h.node for h in working if isinstance(h, Opened)]


def test_actors_go_where_most_cpus_are_free_and_to_no_node_without(nodes: Cluster) -> None:
    assert fill(nodes) == ["a", "a", "b"] and nodes.rooms() == {"a": 2, "b": 1}


def test_a_node_that_lost_an_actor_is_avoided_for_a_while(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    host = nodes.open(Toy, [])
    assert host is not None and host.alive()
    nodes.lost("a")
    assert not host.alive() and fill(nodes) == ["b"]
    now = time.monotonic()
    monkeypatch.setattr("ragdistill.envs.ray_pool.time.monotonic", lambda: now + AVOIDED + 1)
    assert host.alive() and sorted(fill(nodes)) == ["a", "a", "b"]


def test_the_last_node_is_never_avoided(nodes: Cluster) -> None:
    nodes.lost("a")
    nodes.lost("b")
    assert fill(nodes) == ["b"]


def actor(nodes: Cluster, **answers: object) -> Actor:
    host = Opened(nodes, "a", Toy, Path())
    host._handle, host._ready = Remote(**answers), False
    return host


def test_what_a_first_environment_builds_is_no_step_that_is_late(nodes: Cluster) -> None:
    host = actor(nodes, prepare=None, step="text")
    assert [host.exchange(0, "step", "look", 5.0) for _ in range(2)] == [("text", 1.0)] * 2
    assert nodes.ray.asked == [("begin", 5.0), ("prepare", None), ("step", 5.0), ("step", 5.0)]
    refused = actor(nodes, prepare=("IdentityError", "another"))
    assert refused.exchange(0, "step", "look", 5.0) == (("IdentityError", "another"), 1.0)


def test_only_a_death_makes_a_node_lost_and_its_cause_is_said(nodes: Cluster) -> None:
    trace = (
        "\x1b[36mray::NodeWorker.answer()\x1b[39m (pid=7, ip=10.0.0.2)\n  File x\nModuleNotFoundError: No module 'y'"
    )
    failed, _ = actor(nodes, prepare=None, step=Wrong.RayTaskError(trace)).exchange(0, "step", "look", 5.0)
    assert failed[0] == "EnvironmentFault" and "ip=10.0.0.2): ModuleNotFoundError: No module 'y')" in failed[1]
    assert not nodes.avoids("a")
    never = Wrong.RayActorError(trace)
    never.actor_init_failed = True
    with pytest.raises(ConfigError, match=r"cannot run environments.*No module 'y'.*cluster\.md"):
        actor(nodes, prepare=never).exchange(0, "step", "look", 5.0)
    assert not nodes.avoids("a")
    dead = Wrong.RayActorError("The actor died:\n  id: 1\n  its node has died.")
    with pytest.raises(EOFError, match=r"The actor died: its node has died"):
        actor(nodes, prepare=None, step=dead).exchange(0, "step", "look", 5.0)
    assert nodes.avoids("a")


def test_one_line_stays_one_line() -> None:
    assert (said(ValueError("no cluster.")), said(ValueError(""))) == ("no cluster", "ValueError")


def test_a_silent_head_is_one_sentence(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> None:
        raise RuntimeError("gcs\nis gone")

    monkeypatch.setattr(nodes.ray, "nodes", nobody)
    with pytest.raises(ConfigError, match=r"head .* does not answer any more \(gcs: is gone\); start .* are kept"):
        nodes.rooms()
    monkeypatch.undo()
    assert nodes.gone
    for place in ("127.0.0.1:9", "nobody"):
        monkeypatch.setattr(nodes.ray, "get_runtime_context", lambda p=place: SimpleNamespace(gcs_address=p))
        with pytest.raises(ConfigError, match="does not answer any more"):
            nodes.rooms()
    actor(nodes).kill()  # asks nobody


def test_a_node_that_joins_gets_actors_where_their_number_is_not_given(tmp_path: Path) -> None:
    def of(workers: int | None) -> RayParams:
        return RayParams(address="auto", workers=workers)

    assert (sizes(of(None), 8), sizes(of(3), 8), sizes(of(9), 8)) == ((8, 1), (3, 3), (8, 1))
    rooms = [1]

    async def body() -> int:
        pool = EnvPool(Toy, *sizes(of(None), 3), opener=lambda f, w: open_process(f, w) if len(w) < rooms[0] else None)
        try:
            async with pool.lease() as a, pool.lease() as b:
                before = {(await e.reset(task())).text.split()[2] for e in (a, b)}
                rooms[0] = 2
                async with pool.lease() as c:
                    return len(before | {(await c.reset(task())).text.split()[2]})
        finally:
            await pool.close()

    assert asyncio.run(body()) == 2


def test_where_there_is_no_room_the_others_hold_more_and_without_any_it_is_a_fault() -> None:
    async def body(rooms: int) -> set[str]:
        pool = EnvPool(Toy, 3, 1, opener=lambda f, w: open_process(f, w) if len(w) < rooms else None)
        try:
            async with pool.lease() as a, pool.lease() as b:
                return {(await e.reset(task())).text.split()[2] for e in (a, b)}
        finally:
            await pool.close()

    assert len(asyncio.run(body(1))) == 1
    with pytest.raises(EnvironmentFault, match="No environment worker is left"):
        asyncio.run(body(0))


def test_a_game_travels_with_its_hash_and_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "data").mkdir(parents=True)
    (tmp_path / "secret").write_text("no game")
    (here / "data" / "g.tw-pddl").write_text("game")
    monkeypatch.chdir(here)
    sha = hashlib.sha256(b"game").hexdigest()
    one = msgspec.structs.replace(task(), data="data/g.tw-pddl", sha256=sha)
    assert game_of(one) == b"game"
    for data in ("", "data", "../secret", str(tmp_path / "secret"), "official:x", "key/synthetic/3"):
        assert game_of(msgspec.structs.replace(one, data=data)) is None
    (here / "data" / "g.tw-pddl").rename(tmp_path / "cached")
    (here / "data" / "g.tw-pddl").symlink_to(tmp_path / "cached")
    assert game_of(one) == b"game", "as DVC links it to its cache"
    (tmp_path / "cached").write_text("no game")
    with pytest.raises(IdentityError, match="is not the game"):
        game_of(one)
    kept = keep(one, b"game", there)
    assert (there / kept.data).read_bytes() == b"game" and keep(one, b"game", there) == kept
    with pytest.raises(IdentityError, match="is not the game"):
        keep(one, b"another", there)


def test_a_node_shares_the_driver_s_cache_where_it_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "own"))
    assert node_cache(tmp_path) == tmp_path
    assert node_cache(tmp_path / "elsewhere") == tmp_path / "own" / "env"


def test_a_node_with_another_environment_is_refused(tmp_path: Path) -> None:
    params = convert_params(changed("seed", 0))
    identity = identity_of(make_domain(params.env), params.env)
    open_on_node(params.env, False, identity, tmp_path).close()
    with pytest.raises(IdentityError, match="another alfworld environment"):
        open_on_node(params.env, False, "other", tmp_path)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:1", "head", "me:key@head:1", "head:x", ""])
def test_an_address_that_is_none_is_refused_when_it_is_read(address: str) -> None:
    with pytest.raises(ConfigError, match=r"ray\.address"):
        convert_params(changed("ray.address", address))


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_one_sentence_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt -e '\.\[ray\]'"):
        connect("auto")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9"])
def test_where_no_cluster_answers_one_sentence_says_so(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConfigError, match="No Ray cluster answers"):
        connect(address)


# A real cluster


def jobs_of() -> list[tuple[Task, int]]:
    """As the fixture has them, in another process."""
    return [(t, i % ATTEMPTS) for i, t in enumerate(read_jsonl(Path("jobs.jsonl"), Task))]


class Noted(ScriptedModel):
    """Notes the episodes it answers, and takes its time, so that a node can die under them."""

    def __init__(self) -> None:
        super().__init__(lambda m, s: policy(m, s, "base"), "base")
        self.episodes: set[str] = set()

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:

        self.episodes.add(conversation)
        await asyncio.sleep(0.02)
        return await super().chat(messages, sampling, conversation)


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """Nodes listen on the network: nobody else shall run code on them. A process keeps the first token it reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[tuple[Task, int]]]]:
    """A folder with six real games of the six kinds, and their episodes."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("RAGDISTILL_CACHE", str(root / "cache"))
        patch.delenv("DVC_ROOT", raising=False)
        params = settings(None)
        domain = make_domain(params.env)
        write_json(IDENTITY, {"environment": identity_of(domain, params.env)})
        tasks = domain.tasks("train", 6, 0, GAMES / "train")
        yield root, [(t, a) for t in tasks for a in range(ATTEMPTS)]


@pytest.fixture(scope="module")
def here(project: tuple[Path, list[tuple[Task, int]]]) -> list[Trajectory]:
    """The same episodes in worker processes of this machine."""
    done = played(None, project[1], Noted())
    assert len({t.id for t in done}) == len(done) and any(t.success for t in done)
    return done


def settings(address: str | None) -> Params:
    raw = changed("ray.address", address)
    raw["env"] |= {"max_steps": 30, "step_timeout": 600}
    raw["model"] |= {"concurrency": 8}
    return convert_params(raw)


def played(address: str | None, jobs: Sequence[tuple[Task, int]], model: Noted) -> list[Trajectory]:
    """Play with an empty journal; times are set to 0."""
    journal = cache_dir("journal", "episodes")
    emptied()
    done = play(settings(address), "base", "rollouts", jobs, model, 0.7)
    stored = Journal(journal, Trajectory)
    assert [stored.get(t.id) for t in done] == done and len(list(journal.rglob("*.json"))) == len(done) == len(jobs)
    assert not [t.error for t in done if t.stop is StopReason.INFRA_ERROR]
    return [msgspec.structs.replace(t, seconds=0.0) for t in done]


class Strike:
    """Kills a node, in a thread, once `after` episodes are finished; `join` hands over what went wrong with it."""

    def __init__(self, root: Path, node: Node, after: int) -> None:
        self.finished: set[str] = set()
        self._wrong: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(root, node, after), daemon=True)
        self._thread.start()

    def _run(self, root: Path, node: Node, after: int) -> None:
        try:
            journal, deadline = root / "cache" / "journal" / "episodes", time.monotonic() + DEADLINE
            while len(found := {p.stem for p in journal.rglob("*.json")}) < after:
                assert time.monotonic() < deadline, f"{len(found)} episodes ended in {DEADLINE:g} s"
                time.sleep(0.02)
            self.finished.update(found)
            assert kill(node) > 2
        except BaseException as e:  # noqa: BLE001 - handed over by `join`
            self._wrong.append(e)

    def join(self) -> None:
        self._thread.join(DEADLINE)
        if self._wrong:
            raise self._wrong[0]
        assert not self._thread.is_alive()


def emptied() -> None:
    for entry in cache_dir("journal", "episodes").rglob("*.json"):
        entry.unlink()


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("size", "shared"), [(2, False), (4, True)])
def test_a_cluster_plays_what_this_machine_plays_and_a_lost_node_costs_its_unfinished_episodes_only(
    size: int, shared: bool, project: tuple[Path, list[tuple[Task, int]]], here: list[Trajectory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a folder that nodes share, and without any: then each keeps its games in a folder of its own."""
    root, jobs = project
    if not shared:
        monkeypatch.setattr(ray_pool, "shared_name", lambda _: root / "only" / "here")
    with cluster(size) as (address, nodes, where):
        quiet = Noted()
        assert played(address, jobs, quiet) == here
        assert {e[-2:] for e in quiet.episodes} == {"/0"}
        games = (root / "cache" / "env" if shared else where / OWN / "env") / "games"
        assert list(games.rglob("*.tw-pddl"))

        emptied()
        victim, strike = Noted(), Strike(root, nodes[-1], 5)
        again = played(address, jobs, victim)
        strike.join()
    assert again == here
    replayed = {e.rpartition("/")[0] for e in victim.episodes if not e.endswith("/0")}
    finished = strike.finished
    print(f"{size} raylets: {len(finished)} of {len(jobs)} finished when one was killed, {len(replayed)} played again")
    assert 0 < len(replayed) <= -(-8 // size) + 1 and not replayed & finished


HEADLESS = """
import sys
from pathlib import Path
from ragdistill.stages.common import run_stage
from tests.test_ray import Noted, jobs_of, settings
from ragdistill.stages.playing import play
run_stage("rollouts", lambda _: str(len(play(settings(sys.argv[1]), "base", "rollouts", jobs_of(), Noted(), 0.7))))
"""


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_lost_head_ends_the_run_with_one_sentence_and_keeps_what_is_finished(
    project: tuple[Path, list[tuple[Task, int]]],
) -> None:
    root, jobs = project
    write_jsonl(root / "jobs.jsonl", [t for t, _ in jobs])
    shutil.copy(ROOT / "params.yaml", root)
    emptied()
    with cluster(2) as (address, nodes, _):
        env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
        driver = subprocess.Popen(
            [sys.executable, "-c", HEADLESS, address], cwd=root, env=env, stderr=subprocess.PIPE, text=True
        )
        strike = Strike(root, nodes[0], 3)
        try:
            _, words = driver.communicate(timeout=DEADLINE)
        finally:
            driver.kill()
        strike.join()
    kept = {p.stem for p in (root / "cache/journal/episodes").rglob("*.json")}
    assert driver.returncode != 0 and kept >= strike.finished
    lines = [line for line in words.splitlines() if line.startswith("rollouts: ")]
    assert len(lines) == 1 and "head" in lines[0] and "Traceback" not in words, words[-3000:]

"""Environments on several nodes: the same episodes as on this machine, each once, also when a node dies."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from ragdistill.envs import identity_of, make_domain
from ragdistill.envs.hosts import Host
from ragdistill.envs.pool import EnvPool
from ragdistill.envs.ray_pool import AVOIDED, Actor, Cluster, connect, game_of, keep, node_cache, open_on_node
from ragdistill.errors import ConfigError, EnvironmentFault, IdentityError
from ragdistill.journal import Journal, cache_dir
from ragdistill.llm import Reply, Sampling
from ragdistill.llm.scripted import ScriptedModel
from ragdistill.params import Params, convert_params
from ragdistill.records import Message, StopReason, Task, Trajectory, write_json
from ragdistill.stages.common import GAMES, IDENTITY
from ragdistill.stages.playing import play
from tests.ray_cluster import cluster, kill
from tests.scripted_policy import play as policy
from tests.test_params import changed
from tests.test_pool import Toy, task

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install 'ragdistill[ray]')")
ATTEMPTS = 4


class FakeRay:
    """What `Cluster` asks of Ray."""

    def __init__(self, **cpus: float) -> None:
        self.cpus = cpus

    def nodes(self) -> list[dict]:
        return [{"NodeID": n, "Alive": c >= 0, "Resources": {"CPU": c} if c else {}} for n, c in self.cpus.items()]


class Opened(Actor):
    def __init__(self, cluster: Cluster, node: str, factory: object, shared: object) -> None:
        self._cluster, self.node = cluster, node


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr("ragdistill.envs.ray_pool.Actor", Opened)
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


def test_where_there_is_no_room_the_others_hold_more_and_without_any_it_is_a_fault() -> None:

    from ragdistill.envs.hosts import open_process

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
    with pytest.raises(ConfigError, match=r"ragdistill\[ray\]"):
        connect("auto")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9"])
def test_where_no_cluster_answers_one_sentence_says_so(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConfigError, match="No Ray cluster answers"):
        connect(address)


# A real cluster


class Noted(ScriptedModel):
    """Notes the episodes it answers, and takes its time, so that a node can die under them."""

    def __init__(self) -> None:
        super().__init__(lambda m, s: policy(m, s, "base"), "base")
        self.episodes: set[str] = set()

    async def chat(self, messages: Sequence[Message], sampling: Sampling, conversation: str = "") -> Reply:

        self.episodes.add(conversation)
        await asyncio.sleep(0.02)
        return await super().chat(messages, sampling, conversation)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[tuple[Task, int]]]]:
    """A folder with six real games of the six kinds, and their episodes."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("RAY_AUTH_MODE", "token")  # nodes listen on the network: nobody else shall run code on them
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
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
    for entry in journal.rglob("*.json"):
        entry.unlink()
    done = play(settings(address), "base", "rollouts", jobs, model, 0.7)
    stored = Journal(journal, Trajectory)
    assert [stored.get(t.id) for t in done] == done and len(list(journal.rglob("*.json"))) == len(done) == len(jobs)
    assert not [t.error for t in done if t.stop is StopReason.INFRA_ERROR]
    return [msgspec.structs.replace(t, seconds=0.0) for t in done]


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [2, 4])
def test_a_cluster_plays_what_this_machine_plays_and_a_lost_node_costs_its_unfinished_episodes_only(
    size: int, project: tuple[Path, list[tuple[Task, int]]], here: list[Trajectory]
) -> None:
    root, jobs = project
    with cluster(size) as (address, nodes):
        quiet = Noted()
        assert played(address, jobs, quiet) == here
        assert {e[-2:] for e in quiet.episodes} == {"/0"}
        assert list((root / "cache" / "env" / "games").rglob("*.tw-pddl"))

        finished: set[str] = set()

        def strike() -> None:
            journal = root / "cache" / "journal" / "episodes"
            while len(found := {p.stem for p in journal.rglob("*.json")}) < 5:
                time.sleep(0.02)
            finished.update(found)
            assert kill(nodes[-1]) > 2

        victim = Noted()
        killer = threading.Thread(target=strike)
        for entry in cache_dir("journal", "episodes").rglob("*.json"):
            entry.unlink()
        killer.start()
        again = played(address, jobs, victim)
        killer.join()
    assert again == here
    replayed = {e.rpartition("/")[0] for e in victim.episodes if not e.endswith("/0")}
    print(f"{size} raylets: {len(finished)} of {len(jobs)} finished when one was killed, {len(replayed)} played again")
    assert 0 < len(replayed) <= -(-8 // size) + 1 and not replayed & finished

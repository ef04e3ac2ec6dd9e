"""The MLflow projection on a real sqlite store: idempotence, aliases, round trip, promotion and rollback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mlflow.tracking import MlflowClient

from ragdistill import champions, registry
from ragdistill.champions import Decision
from ragdistill.commands import promote
from ragdistill.errors import ConfigError, DataError
from ragdistill.params import load_params
from ragdistill.registry import Projection
from ragdistill.stats import Interval, PairedTest
from ragdistill.tracking import open_client

ROOT = Path(__file__).resolve().parents[1]
MODEL = "adapter"
GOOD = PairedTest(Interval(0.2, 0.1, 0.3), p=0.001, n=100, wins=25, losses=5)
YES = Decision(True, "Promote: tested")
Project = Callable[..., registry.Projected]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def store(base: Path) -> Path:
    return base / "store"


@pytest.fixture
def project(base: Path, store: Path, request: pytest.FixtureRequest) -> Project:
    """Project into an experiment and a registered model of this test's own, in the shared store."""
    own = request.node.name

    def call(
        lineage: str = "l1", weights: bytes | None = b"\x00w", files: Mapping[str, bytes] = {}, **changes: object
    ) -> registry.Projected:
        adapter = None
        if weights is not None:
            adapter = base / own / weights[:8].hex()
            (adapter / "sub").mkdir(parents=True, exist_ok=True)
            (adapter / "adapter_model.safetensors").write_bytes(weights)
            for file, content in {"sub/config.json": b"{}\r\n", **files}.items():
                (adapter / file).write_bytes(content)
        report = base / "report.html"
        report.write_text("<p>numbers</p>")
        arguments: dict[str, object] = {
            "name": "a run", "note": "see [it]({run}/artifacts/report.html)",
            "experiment": own, "lineage": lineage, "params": {"seed": 1, "env.name": "alfworld"},
            "metrics": {"success": 0.5}, "curves": {"loss": [(i, 1 / i) for i in range(1, 1500)]},
            "datasets": [("tasks", "data/tasks.jsonl", "ab" * 32)], "artifacts": [report], "adapter": adapter,
            "registered_model": own, "tags": {"label": "test"},
        }  # fmt: skip
        return registry.project(store, Projection(**{**arguments, **changes}))  # pyright: ignore[reportArgumentType]

    return call


@pytest.fixture(autouse=True)
def nothing_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow falls back to a store in the current directory whenever a call forgets its address."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert not list(here.iterdir())


def client(store: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db", registry_uri=f"sqlite:///{store}/mlflow.db")


def test_same_lineage_is_the_same_run_without_duplicates(project: Project, store: Path) -> None:
    first, second = project(), project()
    assert first == second
    c = client(store)
    run = c.get_run(first.run_id)
    assert len(c.search_runs([run.info.experiment_id])) == 1
    assert len(c.get_metric_history(first.run_id, "loss")) == 1499
    assert len(c.get_metric_history(first.run_id, "success")) == 1
    assert run.inputs is not None
    assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["tasks"]
    assert len(c.search_model_versions("name = 'test_same_lineage_is_the_same_run_without_duplicates'")) == 1
    assert run.data.params == {"seed": "1", "env.name": "alfworld"}
    assert run.data.tags["label"] == "test" and run.info.status == "FINISHED"
    here = f"#/experiments/{run.info.experiment_id}/runs/{first.run_id}"
    assert run.data.tags["mlflow.note.content"] == f"see [it]({here}/artifacts/report.html)"
    assert project(name="a better name") == first and c.get_run(first.run_id).info.run_name == "a better name"


def test_same_lineage_takes_new_numbers_and_survives_a_drifted_param(project: Project, store: Path) -> None:
    run_id = project().run_id
    assert project(metrics={"success": 0.75}, params={"seed": 1, "env.name": "webshop"}).run_id == run_id
    run = client(store).get_run(run_id)
    assert run.data.metrics["success"] == 0.75
    assert run.data.params["env.name"] == "alfworld"
    assert run.data.tags["params.changed"] == '{"env.name": "webshop"}'


def test_an_environment_s_own_words_do_not_break_the_names_of_metrics(project: Project, store: Path) -> None:
    """Types of task stand in them, and a plug-in may call these as it likes; MLflow takes few characters."""
    kinds = ("a & b, (c)", "../up", "x//y", "", ".", "zwei\nZeilen", "Küche", "long " * 90, "pick_two")
    metrics = {f"kinds/{kind}.base": i / 10 for i, kind in enumerate(kinds)} | {"kinds/a//": 0.95}
    run_id = project(metrics=metrics, curves={}).run_id
    stored = client(store).get_run(run_id).data.metrics
    assert sorted(stored.values()) == sorted(metrics.values()), "each has its own"
    assert stored["kinds/pick_two.base"] == 0.8 and stored["kinds/Küche.base"] == 0.6, "good names stay as they are"


def test_artifacts_lie_in_the_store(project: Project, store: Path, request: pytest.FixtureRequest) -> None:
    project()
    assert list((store / "artifacts" / request.node.name).rglob("report.html"))


def test_new_lineage_is_a_new_run_and_the_same_weights_the_same_version(project: Project) -> None:
    first, second, third = project(), project("l2"), project("l3", weights=b"other")
    assert len({first.run_id, second.run_id, third.run_id}) == 3
    assert (first.version, second.version, third.version) == ("1", "1", "2")


def test_challenger_follows_the_workspace_and_ignores_queued_experiments(
    project: Project, store: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    project(weights=b"one")
    assert champions.champion_and_challenger(store, name) == champions.Aliases(champion=None, challenger="1")
    project("exp", weights=b"two", tags={"DVC_EXP_NAME": "funny-name"})
    assert champions.champion_and_challenger(store, name).challenger == "1"
    project("l2", weights=b"three")
    assert champions.champion_and_challenger(store, name).challenger == "3"


def test_projection_without_an_adapter_registers_nothing(project: Project, store: Path) -> None:
    assert project(weights=None).version is None
    with pytest.raises(DataError, match="absent or empty"):
        project(adapter=store / "nowhere")


def test_download_returns_the_registered_bytes(
    project: Project, store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    weights = bytes(range(256)) * 40
    project(weights=weights)
    got = registry.download(store, request.node.name, "challenger", tmp_path / "out")
    files = {p.relative_to(got).as_posix(): p.read_bytes() for p in got.rglob("*") if p.is_file()}
    assert files == {"adapter_model.safetensors": weights, "sub/config.json": b"{}\r\n"}
    with pytest.raises(ConfigError, match="not empty"):
        registry.download(store, request.node.name, "challenger", got)
    with pytest.raises(ConfigError, match="champion"):
        registry.download(store, request.node.name, "champion", tmp_path / "none")


def test_download_refuses_weights_that_changed_in_the_store(
    project: Project, store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    project(weights=b"honest weights")
    for stored in (store / "artifacts" / request.node.name).rglob("adapter_model.safetensors"):
        stored.write_bytes(b"swapped weight")
    with pytest.raises(DataError, match="changed in the store"):
        registry.download(store, request.node.name, "challenger", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lo", "has_champion", "promoted"),
    [
        (-0.049, True, True),  # not worse than the champion by the margin
        (-0.05, True, False),
        (0.049, False, False),  # the first champion must beat base by the margin
        (0.051, False, True),
    ],
)
def test_decision_compares_the_lower_bound_with_the_margin(lo: float, has_champion: bool, promoted: bool) -> None:
    decision = champions.decide(
        PairedTest(Interval(0.06, lo, 0.2), 0.2, 134, 20, 12), margin=0.05, has_champion=has_champion
    )
    assert decision.promote is promoted
    assert "134 tasks" in decision.reason
    assert ("champion" if has_champion else "base") in decision.reason


def promoted(store: Path, name: str, version: str, decision: Decision = YES) -> None:
    """Promote `version` as if it had played against the champion of this moment."""
    played = champions.Aliases(champion(store, name), version)
    champions.promote(store, name, played, decision, "ada", GOOD)


def test_promotion_records_itself_and_rolls_back(project: Project, store: Path, request: pytest.FixtureRequest) -> None:
    name = request.node.name
    project(weights=b"one")
    promoted(store, name, "1")
    assert champions.champion_and_challenger(store, name) == champions.Aliases(champion="1", challenger="1")
    with pytest.raises(ConfigError, match="already is the champion"):
        promoted(store, name, "1")
    project("l2", weights=b"two")
    with pytest.raises(ConfigError, match="became version 2 meanwhile"):
        promoted(store, name, "1")
    with pytest.raises(ConfigError, match=r"champion of .* became version 1 meanwhile"):
        champions.promote(store, name, champions.Aliases(None, "2"), YES, "ada", GOOD)
    promoted(store, name, "2")
    tags = client(store).get_model_version(name, "2").tags
    assert tags["ragdistill.promoted_by"] == "ada" and tags["ragdistill.previous_champion"] == "1"
    assert '"n": 100' in tags["ragdistill.promotion_numbers"]
    assert champions.rollback(store, name, "grace") == "1"
    assert champions.champion_and_challenger(store, name) == champions.Aliases(champion="1", challenger="2")
    assert client(store).get_model_version(name, "2").tags["ragdistill.rolled_back"].startswith("grace, 20")


def champion(store: Path, name: str) -> str | None:
    return champions.champion_and_challenger(store, name).champion


def test_rolling_back_undoes_every_promotion_down_to_no_champion(
    project: Project, store: Path, request: pytest.FixtureRequest
) -> None:
    """One, two and one again: going back twice must not end where it began."""
    name = request.node.name
    for lineage, weights in (("l1", b"one"), ("l2", b"two"), ("l3", b"one")):
        version = project(lineage, weights=weights).version
        assert version
        promoted(store, name, version)
    assert champion(store, name) == "1"
    assert [champions.rollback(store, name, "ada") for _ in range(3)] == ["2", "1", None]
    assert champion(store, name) is None
    with pytest.raises(ConfigError, match="is called champion"):
        champions.rollback(store, name, "ada")
    promoted(store, name, "1")
    assert champions.rollback(store, name, "ada") is None, "what was undone is forgotten"


def test_an_interrupted_or_manual_move_does_not_confuse_the_history(
    project: Project, store: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, c = request.node.name, client(store)
    for lineage, weights in (("l1", b"one"), ("l2", b"two")):
        promoted(store, name, str(project(lineage, weights=weights).version))
    project("l3", weights=b"three")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promoted(store, name, "3")
    assert champion(store, name) == "2"
    c.set_registered_model_alias(name, "champion", "3")  # by hand, in the user interface
    assert [champions.rollback(store, name, "ada") for _ in range(3)] == ["2", "1", None]


def test_a_champion_of_a_store_without_history_goes_back_to_what_it_replaced(
    project: Project, store: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    for lineage, weights in (("l1", b"one"), ("l2", b"two")):
        promoted(store, name, str(project(lineage, weights=weights).version))
    client(store).delete_registered_model_tag(name, champions.HISTORY_TAG)
    assert [champions.rollback(store, name, "ada") for _ in range(2)] == ["1", None]


def test_two_that_fetch_one_adapter_at_once_both_get_it(
    project: Project, store: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two servers of the champion that are started together; a folder that one reads stays where it is."""
    params = load_params(ROOT / "params.yaml")
    named = msgspec.structs.replace(params.track, registered_model=request.node.name)
    params = msgspec.structs.replace(params, track=named)
    monkeypatch.setenv("RAGDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(promote, "STORE", store)
    both, real = threading.Barrier(2, timeout=60), registry.download

    def download(*args: Any) -> Path:
        got = real(*args)
        both.wait()
        return got

    monkeypatch.setattr(registry, "download", download)
    project(files={"adapter_config.json": b"{}"})
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: promote.fetch_adapter(params, "challenger"), range(2))
    assert first == second and (first / "adapter_config.json").read_bytes() == b"{}"
    there = first.stat().st_ino
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: promote.fetch_adapter(params, "challenger"), range(2))) == {first}
    assert first.stat().st_ino == there and [p.name for p in first.parent.iterdir()] == [first.name]


def test_a_refusal_moves_nothing(project: Project, store: Path, request: pytest.FixtureRequest) -> None:
    name = request.node.name
    project()
    with pytest.raises(ConfigError, match="Refuse: because"):
        promoted(store, name, "1", Decision(False, "Refuse: because"))
    assert champions.champion_and_challenger(store, name).champion is None


@pytest.mark.parametrize("content", [b"junk\n", b"SQLite format 3", b"PK" * 4096], ids=["junk", "cut", "other"])
def test_a_file_that_is_no_store_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    for create in (False, True):
        with pytest.raises(DataError, match=r"mlflow\.db is no MLflow store; move it away"):
            open_client(tmp_path, create)
    assert (tmp_path / "mlflow.db").read_bytes() == content


def test_a_store_that_does_not_exist_is_named_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dvc repro track"):
        champions.champion_and_challenger(tmp_path / "empty", "m")
    assert not (tmp_path / "empty").exists()

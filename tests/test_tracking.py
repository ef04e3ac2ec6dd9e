"""MLflow's records on a tracking server: what a directory can do, it can; credentials stand in the environment only."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient

from ragdistill import cli, tracking
from ragdistill.commands.smoke import override
from ragdistill.envs.alfworld.domain import AlfworldDomain
from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.llm import Sampling
from ragdistill.llm.endpoint import EndpointModel
from ragdistill.params import convert_params, load_params
from ragdistill.records import Message, Step, StopReason, Trajectory, digest, write_json, write_jsonl
from ragdistill.stages import track
from tests.misbehaving import KEY, Act, serving, then
from tests.mlflow_server import serve
from tests.ray_cluster import HOST
from tests.scripted_policy import play as policy
from tests.test_mlflow_page import numbers
from tests.test_params import changed

ROOT = Path(__file__).resolve().parents[1]
SECRET = "-".join(("a", "secret", "0123456789"))  # in parts, so that this file is no leak
MODEL = "ragdistill-student"


def test_the_variable_counts_only_where_the_parameter_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org/team/")
    assert tracking.store_at(None, tmp_path) == tmp_path
    assert tracking.store_at("env", tmp_path) == "https://mlflow.example.org/team"
    assert tracking.store_at("http://localhost:5000", tmp_path) == "http://localhost:5000"


@pytest.mark.parametrize(
    "named", ["", "file:///x", "sqlite:///x.db", f"http://me:{SECRET}@h/", f"http://h/?t={SECRET}"]
)
def test_a_variable_that_is_no_plain_address_is_refused_unseen(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as caught:
        tracking.store_at("env", Path())
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri", [f"http://me:{SECRET}@host", f"https://host/?key={SECRET}", "file:///x", "host:5000", ""]
)
def test_an_address_with_credentials_or_without_http_is_refused_when_it_is_read(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"track\.uri") as caught:
        convert_params(changed("track.uri", uri))
    assert SECRET not in str(caught.value)


class Refusing(BaseHTTPRequestHandler):
    """An MLflow server that wants another password, and remembers which it was given."""

    seen: list[str] = []  # noqa: RUF012 - of the class on purpose: a request makes an instance

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization", ""))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"You are not authenticated.")

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_credentials_come_from_the_environment_and_a_refusal_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    server = HTTPServer((HOST, 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ConfigError, match="refuses; set MLFLOW_TRACKING_USERNAME") as caught:
            tracking.open_client(f"http://{HOST}:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert Refusing.seen and set(Refusing.seen) == {f"Bearer {SECRET}"}
    assert SECRET not in str(caught.value)


def test_a_silent_server_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"No MLflow server answers at http://127\.0\.0\.1:9;"):
        tracking.open_client(f"http://{HOST}:9")


def test_keys_reach_no_run_trace_or_artifact_though_servers_repeat_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply, a refusal and an error that hold the key, as trajectories have them, projected into a directory."""
    for name in ("PLAYER_KEY", "VLLM_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "STORE", tmp_path / "mlruns")
    refused = {"choices": [{"message": {"refusal": f"No, {KEY}"}, "finish_reason": "stop"}]}
    acts = [Act(text=f"Action: say {KEY}"), Act("body", body=refused), Act("body", body={"choices": KEY})]
    with serving(then(acts)) as server:
        raw = changed("endpoint.base_url", server.url)
        raw["endpoint"] |= {"api_key_env": "PLAYER_KEY", "model": "m", "budget": None}
        raw["vllm"]["url"] = server.url
        raw["sft"]["variants"], raw["evaluate"]["policies"] = ["distilled"], ["base"]
        params = convert_params(raw)
        model = EndpointModel(params.endpoint, tmp_path / "calls", tmp_path / "ledger.jsonl", "rollouts")
        asked = [Message(role="user", content=f"question {i}") for i in range(len(acts))]
        said = [asyncio.run(model.chat([q], Sampling())).text for q in asked]
        model.close()
    assert server.keys == [f"Bearer {KEY}"] * 3 and all("***" in text for text in said[:2])
    finished(tmp_path, b"one", 1)
    played = [
        msgspec.structs.replace(trajectory(f"{run}-{i}"), error=text, steps=(step(text),))
        for run in ("base", "distilled") for i, text in enumerate(said)
    ]  # fmt: skip
    for run in ("base-0", "distilled-0"):
        write_jsonl(tmp_path / "results/eval" / run / "trajectories.jsonl", [t for t in played if t.id[:4] == run[:4]])
    print(track.body(params))
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert any(b"say ***" in data for p, data in files.items() if p.name == "mlflow.db"), "traces are looked into"
    assert not [p for p, data in files.items() if KEY.encode() in data]


def test_a_server_that_fails_in_the_middle_is_one_sentence_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "STORE", tmp_path / "mlruns")
    raw = changed("sft.variants", ["distilled"])
    raw["evaluate"]["policies"] = ["base"]
    finished(tmp_path, b"one", 1)
    with monkeypatch.context() as patch:

        def broken(*_: object, **__: object) -> None:
            raise MlflowException(f"500 error for {KEY}\n<html>")

        patch.setattr(MlflowClient, "log_inputs", broken)
        with pytest.raises(EnvironmentFault, match=r"mlruns/mlflow.db \(500 error for \*\*\* <html>\); run again"):
            track.body(convert_params(raw))
    line = track.body(convert_params(raw))
    raw["ray"]["address"], raw["training"]["packing"] = "auto", True
    assert track.body(convert_params(raw)) == line, "the same results, computed elsewhere"
    raw["hints"]["k"] = 1
    assert track.body(convert_params(raw)).split()[1] != line.split()[1]
    store = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    client = MlflowClient(store, store)
    runs = client.search_runs([client.search_experiments(filter_string="name = 'ragdistill'")[0].experiment_id])
    assert len(runs) == 2 and all(run.info.status == "FINISHED" for run in runs)


def test_only_what_changed_since_the_last_projection_is_projected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "STORE", tmp_path / "mlruns")
    raw = changed("sft.variants", ["distilled"])
    raw["evaluate"]["policies"] = ["base"]
    finished(tmp_path, b"one", 1)
    params, done, project = convert_params(raw), list[str](), track.project

    def counted(*args: Any) -> str:
        done.append(project(*args))
        return done[-1]

    monkeypatch.setattr(track, "project", counted)
    assert track.body(params) == track.body(params) == done[0] and len(done) == 1
    client = MlflowClient(store := f"sqlite:///{tmp_path}/mlruns/mlflow.db", store)
    client.delete_run(done[0].split()[1])
    assert track.body(params) != done[0], "somebody deleted the run: there is a new one"
    (tmp_path / "results/report.html").write_text("another page")
    track.body(params)
    finished(tmp_path, b"two", 1)
    assert track.body(params).endswith("version 2") and len(done) == 4


def test_where_results_are_recorded_is_no_part_of_what_they_are() -> None:
    settings = dict(track.flat(msgspec.to_builtins(load_params(ROOT / "params.yaml"))))
    own = {k: v for k, v in settings.items() if not k.startswith(track.ELSEWHERE)}
    assert settings.keys() - own.keys() >= {"ray.address", "training.launch", "track.uri"} and "track.experiment" in own
    assert track.lineage(settings, {"a": "b"}) == digest("lineage", own, {"a": "b"})
    for key, value in (("ray.workers", 3), ("training.processes", 2), ("track.uri", "http://h")):
        assert track.lineage(settings | {key: value}, {}) == track.lineage(settings, {})
    assert track.lineage(settings | {"hints.k": 1}, {}) != track.lineage(settings, {})


def step(reply: str) -> Step:
    return Step(reply=reply, thought="", action="look", observation="nothing")


def trajectory(name: str) -> Trajectory:
    return Trajectory(
        id=name, task_id="t", policy=name, agent="react", attempt=0, seed=0, goal="g", bucket="b", group="room",
        kind="k", stop=StopReason.LOOP,
    )  # fmt: skip


# A real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow server` with a database and proxied artifacts of its own."""
    with serve(tmp_path_factory.mktemp("server")) as address:
        yield address


def rival(messages: Sequence[Message], sampling: Sampling, name: str) -> str:
    """The base knows nothing; whatever adapter was fetched knows the rules."""
    return "Thought: I look.\nAction: look" if name == "base" else policy(messages, sampling, "distilled")


def finished(project: Path, weights: bytes, lineage: int) -> None:
    """Just the files of a finished pipeline that `track` projects."""
    folder = project / "models/students/distilled-0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "loss.csv").write_text("step,epoch,loss,lr,tokens_per_second\n1,0.5,2.0,0.1,10\n2,1.0,1.5,0.1,10\n")
    write_json(project / "results/metrics.json", numbers())
    write_json(project / "results/timing.json", {})
    (project / "results/report.html").write_text("<p>numbers</p>")
    for name in ("results/plots", "data/hints", "data/sft"):
        (project / name).mkdir(parents=True, exist_ok=True)
        (project / name / "file.csv").write_text(f"{lineage}\n")
    for run in ("base-0", "distilled-0"):
        (project / "results/eval" / run).mkdir(parents=True, exist_ok=True)
        write_jsonl(project / "results/eval" / run / "trajectories.jsonl", [trajectory(run)])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two real evaluation games, whose records go to a server."""
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "RAGDISTILL_CACHE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    domain = AlfworldDomain()
    write_json(Path("data/identity.json"), {"environment": domain.fingerprint()})
    write_jsonl(Path("data/tasks/eval.jsonl"), domain.tasks("test", 6, 0, Path("data/games/eval")))
    write_jsonl(Path("data/tasks/dev.jsonl"), domain.tasks("dev", 1, 0, Path("data/games/dev")))
    Path("models/base").mkdir(parents=True)
    override(
        tmp_path / "params.yaml",
        ["model.engine=scripted", "model.script=tests.test_tracking:rival", "sft.variants=[distilled]",
         "evaluate.policies=[base]", "evaluate.primary=[]", "env.max_steps=40"],
    )  # fmt: skip
    return tmp_path


def ragdistill(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ragdistill", *args])
    return cli.main()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["address", "variable"])
def test_projecting_promoting_rolling_back_and_playing_work_on_a_server(
    how: str, server: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{MODEL}-{how}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server if how == "variable" else "http://nobody.invalid:1")
    override(project / "params.yaml", [f"track.uri={server if how == 'address' else 'env'}"])
    override(project / "params.yaml", [f"track.registered_model={name}", f"track.experiment={how}"])
    params = load_params()

    finished(project, b"one", 1)
    line = track.body(params)
    assert line == track.body(params), "projecting again adds nothing"
    assert server in line and line.endswith(f"{name} version 1")
    client = MlflowClient(server, server)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name == how])
    assert run.data.metrics["headline/success_base"] == 0.3 and run.data.params["track.registered_model"] == name
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"report.html", "plots"}
    traces = TracingClient(server).search_traces(locations=[run.info.experiment_id], run_id=run.info.run_id)
    assert len(list(traces)) == 2

    assert ragdistill(monkeypatch, "promote") == 0
    finished(project, b"two", 2)
    assert track.body(params).endswith(f"{name} version 2")
    assert ragdistill(monkeypatch, "promote", "--margin", "0.5") == 0
    assert ragdistill(monkeypatch, "rollback") == 0
    assert f"{name} version 1 is champion again" in capsys.readouterr().out
    aliases = client.get_registered_model(name).aliases
    assert {k: str(v) for k, v in aliases.items()} == {"champion": "1", "challenger": "2"}
    lines = [json.loads(x) for x in (project / "results/promotions.jsonl").read_text().splitlines()]
    assert [x.get("promote", x.get("rollback")) for x in lines] == [True, True, True]

    assert ragdistill(monkeypatch, "play", "--model", "champion") == 0
    assert "won in" in capsys.readouterr().out
    (fetched,) = {p.read_bytes() for p in (project / ".cache/registry").rglob("*.safetensors")} - {b"two"}
    assert fetched == b"one"
    assert not (project / "mlruns").exists() and not (project / "mlflow.db").exists()

"""The DAG itself: its deps are the import closure, and the whole of it runs on real games with scripted players."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ragdistill.agents import make_agent
from ragdistill.agents.examples import HEADER
from ragdistill.commands.smoke import copy_project, override
from ragdistill.params import StripParams
from ragdistill.records import EvalEpisode, Hint, SftExample, Trajectory, read_jsonl
from ragdistill.stages.strip import renderer
from ragdistill.strip import strip
from tests.faults.project import SMALL, make_project
from tests.test_training import make_base

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = """
label=test
model.base=tiny
model.engine=scripted
model.script=tests.scripted_policy:play
model.concurrency=8
env.max_steps=30
tasks.train=12
tasks.dev=0
tasks.test=12
coldstart.demos=8
coldstart.lora.r=4
coldstart.lora.epochs=1
coldstart.lora.batch=4
coldstart.lora.max_tokens=32000
sft.lora.r=4
sft.lora.epochs=1
sft.lora.batch=4
sft.lora.max_tokens=32000
rollouts.attempts=3
hints.min_support=1
strip.max_invalid=null
report.bootstrap=200
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with small numbers, a tiny random model and a scripted player, after `dvc repro`."""
    copy = tmp_path_factory.mktemp("dag") / "project"
    copy_project(copy)
    make_base(copy / "tiny", 0)
    override(copy / "params.yaml", [line for line in OVERRIDES.splitlines() if line])
    done = run(copy, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return copy


def run(where: Path, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "RAGDISTILL_"))} | extra
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env.setdefault("PYTHONPATH", "src")
    return subprocess.run([sys.executable, *args], cwd=where, env=env, capture_output=True, text=True, check=False)


def test_code_deps_of_every_stage_are_its_import_closure() -> None:
    done = run(ROOT, "scripts/dag_deps.py")
    assert done.returncode == 0, done.stdout


def test_a_stage_reruns_for_every_parameter_that_its_module_reads() -> None:
    decide_nothing = {"training", "sft.checkpoint_steps"}  # how fast, and what is kept on the way
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        body = stage.get("do", stage)
        module = re.search(r"ragdistill\.stages\.(\w+)", body["cmd"])
        assert module, name
        source = (ROOT / f"src/ragdistill/stages/{module[1]}.py").read_text()
        for key in set(re.findall(r"\bparams\.([a-z_]+(?:\.[a-z_]+)?)", source)) - decide_nothing:
            near = [d for d in body.get("params", []) if d == key or key.startswith(f"{d}.") or d.startswith(f"{key}.")]
            assert near or body.get("always_changed"), f"{name} reads {key}, which DVC does not know of"


@pytest.mark.timeout(600)
def test_the_whole_dag_finds_the_withheld_rules_and_passes_them_on(project: Path) -> None:
    hints = read_jsonl(project / "data/hints/bank.jsonl", Hint)
    assert any("with {sinkbasin}" in h.text or "with {fridge}" in h.text or "use {" in h.text for h in hints)
    taught = read_jsonl(project / "data/teach/hints.jsonl", Trajectory)
    assert any(t.hints for t in taught)
    examples = read_jsonl(project / "data/sft/distilled.jsonl", SftExample)
    assert examples
    assert not any(h.text in m.content for e in examples for m in e.messages for h in hints)
    metrics = json.loads((project / "results/metrics.json").read_text())
    assert metrics["policies"]["raw"]["success"] == 0
    assert metrics["policies"]["distilled"]["success"] > metrics["policies"]["base"]["success"]
    assert "smoke" not in metrics["label"]
    assert metrics["engine"] == "a script, no model"
    assert json.loads((project / "results/timing.json").read_text())["rollouts"]["work"] == 36


@pytest.mark.timeout(300)
def test_a_repeated_repro_changes_nothing_and_registers_one_version(project: Path) -> None:
    before = (project / "dvc.lock").read_text()
    done = run(project, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (project / "dvc.lock").read_text() == before
    assert "version 1" in done.stdout
    assert "rollouts" not in [line.split(":")[0] for line in done.stdout.splitlines()]


@pytest.mark.timeout(300)
def test_losing_every_output_replays_from_the_journal_without_playing(project: Path) -> None:
    before = (project / "data/rollouts.jsonl").read_bytes()
    (project / "data/rollouts.jsonl").unlink()
    done = run(project, "-m", "dvc", "repro", "--force", "--single-item", "rollouts", CI="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (project / "data/rollouts.jsonl").read_bytes() == before
    assert "36 of 36 episodes from the cache)" in done.stdout
    assert "episodes" not in done.stderr, "a log of CI holds the closing line only"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [("rollouts",), ("teach", "hints")])
def test_a_killed_stage_loses_and_repeats_no_finished_episode(project: Path, tmp_path: Path, stage: list[str]) -> None:
    out = project / ("data/rollouts.jsonl" if len(stage) == 1 else "data/teach/hints.jsonl")
    whole = read_jsonl(out, Trajectory)
    journal = tmp_path / "cache"
    shutil.copytree(project / ".cache/env", journal / "env")
    module = [sys.executable, "-m", f"ragdistill.stages.{stage[0]}", *stage[1:]]
    env = os.environ | {"PYTHONPATH": "src", "RAGDISTILL_CACHE": str(journal)}
    victim = subprocess.Popen(module, cwd=project, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list(journal.glob("journal/episodes/*/*.json"))) < len(whole) // 3:
        assert victim.poll() is None, "it finished before it could be killed"
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    kept = {p: p.stat().st_mtime_ns for p in journal.glob("journal/episodes/*/*.json")}
    assert 0 < len(kept) < len(whole)
    again = run(project, *module[1:], RAGDISTILL_CACHE=str(journal))
    assert again.returncode == 0, again.stderr
    assert all(p.stat().st_mtime_ns == at for p, at in kept.items())
    assert f"{len(kept)} of {len(whole)} episodes from the cache)" in again.stdout
    replayed = read_jsonl(out, Trajectory)
    assert [t.id for t in replayed] == [t.id for t in whole]
    assert [t.steps for t in replayed] == [t.steps for t in whole]


@pytest.mark.timeout(300)
def test_another_agent_is_one_parameter(project: Path, tmp_path: Path) -> None:
    """StateAct demonstrations and rollouts; both are played, stated and read back in its own form."""
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns(".cache", "models", ".dvc", "results"))
    (copy / "models").symlink_to(project / "models")
    override(copy / "params.yaml", ["agent.name=stateact", "agent.max_reply_tokens=200", "rollouts.attempts=1"])
    for stage in ("demos", "rollouts"):
        done = run(copy, "-m", f"ragdistill.stages.{stage}", RAGDISTILL_CACHE=str(project / ".cache"))
        assert done.returncode == 0, done.stderr
    agent = make_agent("stateact")
    demonstrated = [e.messages for e in read_jsonl(copy / "data/demos.jsonl", SftExample)]
    assert all(m.content.startswith("Goal: ") for chat in demonstrated for m in chat if m.role == "assistant")
    played = read_jsonl(copy / "data/rollouts.jsonl", Trajectory)
    before = {t.task_id: t for t in read_jsonl(project / "data/rollouts.jsonl", Trajectory) if t.attempt == 0}
    assert len(played) == len(before)
    for t in played:
        assert t.agent == "stateact"
        assert [s.action for s in t.steps] == [s.action for s in before[t.task_id].steps], "the player is the same"
        assert all(list(s.state)[:2] == ["goal", "current location"] for s in t.steps)
        assert not any(s.state for s in before[t.task_id].steps)
    examples, report = strip(played, StripParams(None, None, "drop_thought", 1), renderer(agent))
    assert examples and report.state_dropped == 0
    assert all(agent.parse(m.content).state for e in examples for m in e.messages if m.role == "assistant")


@pytest.mark.timeout(300)
def test_examples_and_no_thoughts_are_two_parameters_and_leave_the_students_as_they_are(
    project: Path, tmp_path: Path
) -> None:
    copy, cache = tmp_path / "copy", str(project / ".cache")
    shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns(".cache", "models", ".dvc", "results"))
    (copy / "models").symlink_to(project / "models")

    def stage(name: str, *item: str) -> str:
        done = run(copy, "-m", f"ragdistill.stages.{name}", *item, RAGDISTILL_CACHE=cache, CI="1")
        assert done.returncode == 0, done.stderr
        return done.stdout

    override(copy / "params.yaml", ["agent.examples=2"])
    assert "12 of 12 episodes from the cache" in stage("evaluate", "distilled-0"), "students play as they learnt"
    fresh = stage("evaluate", "base-0")
    assert "12 episodes, " in fresh and "from the cache" not in fresh
    shown, bare = (read_jsonl(at / "results/eval/base-0/trajectories.jsonl", Trajectory) for at in (copy, project))
    for with_examples, without in zip(shown, bare, strict=True):
        assert [s.action for s in with_examples.steps] == [s.action for s in without.steps], "the player is the same"
        assert with_examples.usage.prompt_tokens > without.usage.prompt_tokens
    override(copy / "params.yaml", ["agent.name=act", "rollouts.attempts=1", "sft.variants=[sft]"])
    for name in ("demos", "rollouts", "strip"):
        stage(name)
    played = read_jsonl(copy / "data/rollouts.jsonl", Trajectory)
    assert all((t.agent, s.thought) == ("act", "") for t in played for s in t.steps)
    learnt = [read_jsonl(copy / f, SftExample) for f in ("data/demos.jsonl", "data/sft/sft.jsonl")]
    texts = [(m.role, m.content) for part in learnt for e in part for m in e.messages]
    assert all(text.startswith("Action: ") and "\n" not in text for role, text in texts if role == "assistant")
    assert not any(HEADER in text for _, text in texts)


@pytest.mark.timeout(300)
def test_promotion_needs_a_measured_gain_and_is_recorded(project: Path) -> None:
    refused = run(project, "-m", "ragdistill.cli", "promote", "--margin", "0.99")
    assert refused.returncode == 1
    assert "Refuse" in refused.stdout
    done = run(project, "-m", "ragdistill.cli", "promote", "--margin", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Promote: challenger - base = +" in done.stdout and "version 1 is now champion" in done.stdout
    again = run(project, "-m", "ragdistill.cli", "promote", "--margin", "0")
    assert again.returncode == 1, "the champion is not better than itself"
    lines = [json.loads(x) for x in (project / "results/promotions.jsonl").read_text().splitlines()]
    assert [x["promote"] for x in lines] == [False, True, False]


def test_contaminated_tasks_are_refused_by_the_stage(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns(".cache", "models", ".dvc"))
    rows = read_jsonl(copy / "data/rollouts.jsonl", Trajectory)
    leaked = read_jsonl(copy / "results/eval/base-0/episodes.jsonl", EvalEpisode)[0].task_id
    text = (copy / "data/rollouts.jsonl").read_text().replace(rows[0].task_id, leaked)
    (copy / "data/rollouts.jsonl").write_text(text)
    done = run(copy, "-m", "ragdistill.stages.hints", PYTHONPATH="src")
    assert done.returncode == 1
    assert "evaluation tasks occur in the rollouts" in done.stderr


def test_a_student_that_is_not_there_is_not_played_as_the_base(project: Path) -> None:
    done = run(project, "-m", "ragdistill.stages.evaluate", "distilled-7")
    assert done.returncode == 1
    assert "models/students/distilled-7 does not exist; run the stage sft@distilled-7" in done.stderr
    assert not (project / "results/eval/distilled-7").exists()


@pytest.mark.timeout(300)
def test_a_fresh_clone_pulls_what_was_pushed_and_has_nothing_to_rerun(project: Path, tmp_path: Path) -> None:
    def git(where: Path, *args: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *who, *args], cwd=where, check=True, capture_output=True)

    remote = tmp_path / "remote"
    assert run(project, "-m", "dvc", "remote", "modify", "local", "url", str(remote)).returncode == 0
    assert run(project, "-m", "dvc", "push").returncode == 0
    git(project, "add", "-A")
    git(project, "commit", "-qm", "state")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    pulled = run(clone, "-m", "dvc", "pull")
    assert pulled.returncode == 0, pulled.stderr
    assert (clone / "models/students/distilled-0/adapter_model.safetensors").exists()
    status = run(clone, "-m", "dvc", "status")
    changed = {line for line in status.stdout.splitlines() if line.endswith(":") and not line.startswith("\t")}
    assert changed <= {"identity:", "track:"}, status.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_experiment_changes_one_parameter_and_leaves_the_workspace_s_challenger(project: Path) -> None:
    done = run(project, "-m", "dvc", "exp", "run", "-n", "one-hint", "-S", "hints.k=1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shown = run(project, "-m", "dvc", "exp", "show", "--csv")
    assert "one-hint" in shown.stdout
    assert all(len(t.hints) <= 1 for t in read_jsonl(project / "data/teach/hints.jsonl", Trajectory))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_without_students_ends_in_a_report_of_who_played(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", f"{SMALL}sft.variants=[]\n", ())
    played = json.loads((project / "results/metrics.json").read_text())["policies"]
    assert set(played) == {"raw", "base", "rag"}
    assert (project / "results/report.html").exists()

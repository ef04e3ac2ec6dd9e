"""The run as a person meets it in MLflow's own user interface: what it is called, what it says, what was played."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from ragdistill.commands.smoke import override
from ragdistill.params import load_params
from ragdistill.records import Step, StopReason, Trajectory, Usage, write_json, write_jsonl
from ragdistill.report import headline, words
from ragdistill.report.page import Page, write_page
from ragdistill.stages import track
from tests.browser import Tab, find_browser, open_tab
from tests.mlflow_server import serve
from tests.test_report import KINDS, RATES, episode, measure

ROOT = Path(__file__).resolve().parents[1]
BROWSER = find_browser()


@cache
def numbers() -> dict[str, Any]:
    """What a finished pipeline measured."""
    return measure([episode(p, t, t < 40 * rate) for p, rate in RATES.items() for t in range(40)])


def test_a_run_is_called_what_it_showed() -> None:
    assert headline.run_name(numbers()) == "evidence alfworld/react distilled 70 % (base 30 %)"
    alone = measure([episode("base", t, t < 2) for t in range(8)], label="smoke", agent="act")
    assert headline.run_name(alone) == "smoke alfworld/act base 17 %"
    lost = measure([episode("base", t, False, stop=StopReason.INFRA_ERROR) for t in range(8)])
    assert headline.run_name(lost) == "evidence alfworld/react"


def test_the_note_answers_first_and_holds_the_table_with_intervals() -> None:
    note = headline.note(numbers(), "#/somewhere")
    answer, *rest = words.answer(numbers())
    assert note.startswith(f"**{answer}**\n\n{rest[0]}\n\n")
    assert "[The whole report](#/somewhere)" in note and "\n| distilled " in note and "| distilled − base " in note
    assert "Primary task kinds: clean, heat, cool." in note
    assert "Smoke, not evidence" in headline.note({**numbers(), "label": "smoke"}, "")


def test_the_headline_stands_first_in_both_of_mlflow_s_orders() -> None:
    """The overview lists metrics as they were logged, the charts in alphabetical order of their groups."""
    shown = headline.shown(numbers())
    first = [k for k in shown if k.startswith("headline/")]
    assert list(shown)[: len(first)] == first and sorted(shown, key=lambda k: k.split("/")[0])[: len(first)] == first
    assert shown["headline/success_distilled"] == numbers()["primary"]["policies"]["distilled"]["success"]
    assert shown["headline/gain_over_base_lo"] == numbers()["primary"]["paired"]["distilled-base"]["lo"]
    assert shown["headline/tokens_billed_over_rag"] == 0.8
    assert shown["policies/rag.steps"] == 10 and shown["policies_primary/distilled-base.success"] > 0
    assert shown["kinds/clean.base"] == numbers()["by_kind"]["clean"]["base"]["success"]
    assert len(shown) < 150


def trajectory(policy: str, task: int, won: bool) -> Trajectory:
    step = Step(reply="", thought="I look.", action="go to fridge 1", observation="You see an apple.")
    return Trajectory(
        id=f"{policy}{task}", task_id=f"t{task}", policy=policy, agent="react", attempt=0, seed=0, bucket="clean",
        goal=f"put apple {task} away", group="room1", kind=KINDS[task % 4], steps=(step,), seconds=2.0 + won,
        stop=StopReason.SUCCESS if won else StopReason.LOOP, usage=Usage(prompt_tokens=90, completion_tokens=10),
    )  # fmt: skip


def project(where: Path) -> None:
    """The files of a finished pipeline: two policies, four games."""
    shutil.copy(ROOT / "params.yaml", where)
    override(where / "params.yaml", ["sft.variants=[distilled]", "evaluate.policies=[base]"])
    student = where / "models/students/distilled-0"
    student.mkdir(parents=True)
    (student / "adapter_config.json").write_text("{}")
    (student / "adapter_model.safetensors").write_bytes(b"weights")
    (student / "loss.csv").write_text("step,epoch,loss,lr,tokens_per_second\n1,0.5,2.0,0.1,10\n2,1.0,1.5,0.1,10\n")
    write_json(where / "results/metrics.json", numbers())
    write_json(where / "results/timing.json", {})
    write_page(where / "results/report.html", Page(numbers(), bootstrap=100))
    for name in ("results/plots", "data/hints", "data/sft", "data/tasks"):
        (where / name).mkdir(parents=True)
        (where / name / "file.csv").write_text("a,b\n1,2\n")
    for policy, wins in (("base", 1), ("distilled", 3)):
        played = [trajectory(policy, t, t < wins) for t in range(4)]
        write_jsonl(where / f"results/eval/{policy}-0/trajectories.jsonl", played)


@dataclass(frozen=True)
class Shown:
    """A run page in a browser."""

    tab: Tab
    run: str
    """Its address."""
    client: MlflowClient
    run_id: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    where = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.chdir(where)
        patch.setattr(track, "STORE", where / "mlruns")
        project(where)
        params = load_params()
        first = track.body(params)
        (track.STORE / track.RECEIPT).unlink()
        assert track.body(params) == first, "projecting again adds nothing"
    client = MlflowClient(tracking_uri=f"sqlite:///{where}/mlruns/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert BROWSER
    with serve(where / "mlruns") as server, open_tab(BROWSER, where / "profile") as tab:
        tab.size(1400, 1500)
        tab.open(server)  # its scripts take a while the first time
        yield Shown(
            tab, f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}", client, run.info.run_id
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: install one or set RAGDISTILL_CHROMIUM")
def test_the_run_page_shows_name_answer_table_and_headline(shown: Shown, tmp_path: Path) -> None:
    tab, name = shown.tab, headline.run_name(numbers())
    tab.open("about:blank")  # from page to page of one document there is no load to wait for
    tab.open(shown.run)
    more = "document.querySelector('[data-testid=show-comment-toggle]')"
    tab.wait(f"document.body.innerText.includes({name!r}) && {more}", 120)
    text = tab.text()
    assert words.answer(numbers())[0] in text, "the answer is read without unfolding anything"
    tab.run(f"{more}.click()")
    tab.wait("document.querySelectorAll('table tr').length > 8")
    cells = tab.run("[...document.querySelectorAll('td')].map((c) => c.innerText)")
    share = numbers()["primary"]["policies"]["distilled"]
    interval = "–".join(f"{100 * share[bound]:.1f}" for bound in ("success_lo", "success_hi"))
    assert {"distilled", "distilled − base", f"{100 * share['success']:.1f} [{interval}]"} <= set(cells)
    text = tab.text()
    metrics = [x for x in text.splitlines() if x.startswith(("headline/", "kinds/", "policies", "loss/"))]
    assert metrics[0].startswith("headline/") and "distilled/base" not in text
    tab.screen(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 50_000, "a picture to look at, not a blank page"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: install one or set RAGDISTILL_CHROMIUM")
def test_the_note_leads_to_the_report_and_traces_say_who_played(shown: Shown) -> None:
    tab = shown.tab
    tab.open("about:blank")
    tab.open(shown.run)
    link = "[...document.querySelectorAll('a')].find((a) => a.innerText === 'The whole report')"
    tab.wait(link, 120)
    address = tab.run(f"{link}.href")
    assert address == f"{shown.run}/artifacts/report.html"
    tab.open("about:blank")
    tab.open(address)
    tab.wait("document.querySelector('iframe.mlflow-html-iframe')?.src", 120)
    tab.open("about:blank")
    tab.open(f"{shown.run}/traces")
    tab.wait("document.body.innerText.includes('distilled: won in 1 steps')", 120)
    text = tab.text()
    games = [text.index(f"put apple {t} away") for t in range(4)]
    assert text.count("base: ") == 4 and text.count("distilled: ") == 4
    assert sorted(games) == games, "the games stand in order, both policies of each together"

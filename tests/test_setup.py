"""The setup: pins that are complete and portable, a second call that does nothing, no CUDA by accident."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ragdistill import doctor

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path, install: ModuleType) -> Path:
    """A project whose environment is complete, as far as the stamps say."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==1.0\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    (tmp_path / ".venv" / "place").write_text(install.place_key(tmp_path))
    (tmp_path / ".venv" / "pins").write_text(install.pins_key(tmp_path))
    (tmp_path / ".cache").mkdir()
    return tmp_path


@pytest.fixture
def calls(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Record pip calls instead of making them."""
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "pip", lambda root, *args: made.append(args))
    for name in ("RAGDISTILL_TORCH_INDEX", "RAGDISTILL_ALLOW_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_every_declared_dependency_is_pinned() -> None:
    declared = [Requirement(r) for r in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
    pinned = {canonicalize_name(p.split("==")[0]): p.split("==")[1] for p in PINS}
    assert not [r.name for r in declared if canonicalize_name(r.name) not in pinned]
    assert not [str(r) for r in declared if not r.specifier.contains(pinned[canonicalize_name(r.name)])]


def test_pins_are_exact_and_portable() -> None:
    odd = [p for p in PINS if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", p)]
    assert not odd, f"a pin is `name==version`, with no local version and no address: {odd}"
    names = [canonicalize_name(p.split("==")[0]) for p in PINS]
    assert len(names) == len(set(names))


def test_the_pins_bring_no_cuda(install: ModuleType) -> None:
    assert not [p for p in PINS if p.startswith(install.CUDA_PREFIXES)]


def test_second_call_does_nothing(install: ModuleType, project: Path, calls: list[tuple[str, ...]]) -> None:
    assert install.main(project) == 0
    assert calls == []


def hold_torch(project: Path, version: str) -> None:
    site = project / ".venv" / "lib" / "python3.11" / "site-packages"
    (site / f"torch-{version}.dist-info").mkdir(parents=True)


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_pins_install_again_into_the_same_environment(
    install: ModuleType, project: Path, calls: list[tuple[str, ...]], changed: str
) -> None:
    hold_torch(project, "1.0+cpu")
    (project / ".venv" / "mine").touch()
    with (project / changed).open("a") as f:
        f.write("# changed\n")
    assert install.main(project) == 0
    assert [args[0] for args in calls] == ["install", "check"]
    assert (project / ".venv" / "mine").exists()
    assert install.is_complete(project)


def test_a_failed_install_is_not_taken_for_a_complete_one(
    install: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(root: Path, *args: str) -> str:
        raise install.SetupError("no network")

    monkeypatch.setattr(install, "pip", fail)
    (project / "constraints.txt").write_text("torch==2.0\n")
    assert install.main(project) == 1
    assert "no network" in capsys.readouterr().err
    assert not install.is_complete(project)


def test_a_moved_project_does_not_trust_its_old_environment(install: ModuleType, project: Path) -> None:
    moved = project.rename(project.with_name("moved"))
    assert not install.is_complete(moved)


def test_two_setups_take_turns(install: ModuleType, project: Path) -> None:
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import install, pathlib\n"
        f"with install.lock(pathlib.Path({str(project)!r})): print('in', time.monotonic(), flush=True)"
    )
    with install.lock(project):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        assert "waiting" in child.stdout.readline()
        released = time.monotonic()
    out, _ = child.communicate(timeout=20)
    assert float(out.split()[-1]) >= released


def report(*names: str) -> dict[str, list[dict[str, dict[str, str]]]]:
    return {"install": [{"metadata": {"name": name}} for name in names]}


def test_a_cuda_build_is_recognised_by_what_it_brings(install: ModuleType) -> None:
    assert install.cuda_packages(report("torch", "sympy", "numpy")) == []
    found = install.cuda_packages(report("torch", "nvidia_cudnn_cu13", "triton", "cuda-bindings"))
    assert found == ["cuda-bindings", "nvidia-cudnn-cu13", "triton"]


@pytest.fixture
def pip_offers_cuda(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    made: list[tuple[str, ...]] = []

    def pip(root: Path, *args: str) -> str:
        made.append(args)
        return '{"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "nvidia-nccl-cu13"}}]}'

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "has_gpu", lambda: False)
    for variable in ("RAGDISTILL_TORCH_INDEX", "RAGDISTILL_ALLOW_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    return made


def test_without_a_gpu_a_cuda_build_is_refused_before_the_download(
    install: ModuleType, project: Path, pip_offers_cuda: list[tuple[str, ...]]
) -> None:
    with pytest.raises(install.SetupError, match="RAGDISTILL_TORCH_INDEX"):
        install.install_torch(project, "torch==1.0")
    assert all("--dry-run" in args for args in pip_offers_cuda)


def test_a_new_torch_pin_is_checked_again(
    install: ModuleType, project: Path, pip_offers_cuda: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    hold_torch(project, "1.0+cpu")
    (project / "constraints.txt").write_text("torch==1.0.1\n")
    assert install.main(project) == 1
    assert "RAGDISTILL_TORCH_INDEX" in capsys.readouterr().err
    assert all("--dry-run" in args for args in pip_offers_cuda)


@pytest.mark.parametrize("variable", ["RAGDISTILL_TORCH_INDEX", "RAGDISTILL_ALLOW_CUDA"])
def test_a_person_can_say_which_torch_is_meant(
    install: ModuleType,
    project: Path,
    pip_offers_cuda: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, "1")
    install.install_torch(project, "torch==1.0")
    assert pip_offers_cuda[-1][-1] == "torch==1.0"
    assert not any("--dry-run" in args for args in pip_offers_cuda)


def test_without_a_fit_python_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    command = ["/bin/sh", str(ROOT / "scripts" / "setup.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Python 3.11 or 3.12" in done.stderr
    assert "RAGDISTILL_PYTHON" in done.stderr


def test_settings_read_the_same_in_make_and_in_a_shell() -> None:
    lines = [x for x in (ROOT / "scripts" / "env").read_text().splitlines() if x and not x.startswith("#")]
    assert lines
    assert not [x for x in lines if not re.fullmatch(r"export \w+=\w+", x)]


def test_doctor_asks_for_missing_things_and_only_then_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = doctor.Check(name="a", status="ok", detail="there")
    spare = doctor.Check(name="b", status="optional", detail="not there", fix="do b")
    gone = doctor.Check(name="c", status="missing", detail="not there", fix="do c")
    monkeypatch.setattr(doctor, "CHECKS", [lambda root: here, lambda root: spare])
    assert doctor.main() == 0
    monkeypatch.setattr(doctor, "CHECKS", [lambda root: here, lambda root: gone])
    assert doctor.main() == 1
    assert "(fix: do c)" in capsys.readouterr().out


def test_doctor_names_each_wrong_package(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("pytest==0.0.1\nno-such-package==1.0\n")
    check = doctor.check_packages(tmp_path)
    assert check.status == "missing"
    assert "no-such-package not installed" in check.detail
    assert "pytest" in check.detail


def test_doctor_reads_every_line_on_an_empty_folder(tmp_path: Path) -> None:
    checks = {c.name: c for c in (check(tmp_path) for check in doctor.CHECKS)}
    assert all(c.fix for c in checks.values() if c.status != "ok")
    assert checks["dvc"].status == "missing"
    assert checks["model"].status == "missing"
    assert checks["engine"].status == "ok"


def test_doctor_asks_for_the_memory_that_a_run_was_measured_to_take() -> None:
    measured = re.search(r"peak memory, engine and environments [^:]*: ([\d.]+) GB", read("docs/measured.md"))
    told = re.search(r"([\d.]+) GB of free memory", read("README.md"))
    assert measured and told
    assert float(measured[1]) <= doctor.MIN_MEMORY_GIB * 1024**3 / 1e9 <= float(told[1])


def read(name: str) -> str:
    """The text of a document on one line."""
    return " ".join((ROOT / name).read_text().split())


def test_doctor_never_prints_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-value")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(
        "['remote \"store\"']\n    url = https://me:sk-secret-value@example.org/x\n"
    )
    doctor.main(tmp_path)
    out = capsys.readouterr().out
    assert "OPENAI_API_KEY set" in out
    assert "store" in out
    assert "secret-value" not in out

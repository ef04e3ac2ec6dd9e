"""The design's promises about the code itself: where imports may go, how long things may be, what may stand nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "ragdistill"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    {"errors", "records", "params", "checks", "files", "progress"},
    {"journal", "stats", "profiles", "downloads", "timing"},
    {"envs", "agents", "llm"},
    {
        "rollout",
        "hints",
        "training",
        "strip",
        "contamination",
        "report",
        "champions",
        "registry",
        "serving",
        "tracking",
        "traces",
        "doctor",
    },
    {"stages"},
    {"commands"},
    {"cli"},
)
"""A room imports from its own layer or one above in this list, never from one below."""

STRANGERS = {
    "envs": {"agents", "llm"},  # an environment knows no model
    "agents": {"envs", "llm"},  # an agent knows no engine and no network
    "llm": {"envs", "agents"},  # a model knows no task
}
"""Rooms of one layer that must not know each other."""

HEAVY = {
    "torch": {"llm", "serving", "training"},
    "transformers": {"llm", "serving", "training"},
    "peft": {"llm", "serving", "training"},
    "trl": {"training"},
    "datasets": {"training"},
    "safetensors": {"llm", "training"},
    "openai": {"llm", "serving"},
    "alfworld": {"envs"},
    "textworld": {"envs"},
    "ray": {"envs"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "mlflow": {"champions", "registry", "traces", "tracking"},
    "matplotlib": {"report"},
    "sklearn": {"hints", "training"},
    "dvc": {"commands", "doctor"},
}
"""Heavy library → the rooms that may import it."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imports(path: Path, *, everywhere: bool = True) -> list[tuple[int, str]]:
    """(line, dotted module) of each import; with `everywhere=False` only of those that run on import."""
    body = tree(path).body if not everywhere else list(ast.walk(tree(path)))
    found: list[tuple[int, str]] = []
    for node in body:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively; write the whole name"
            base = node.module or ""
            subs = [f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in MODULES]
            found += [(node.lineno, sub) for sub in subs or [base]]
    return found


def test_every_data_file_of_the_package_is_shipped() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ragdistill"]
    data = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}]
    assert {p.suffix for p in data} >= {".json", ".j2", ".css"}
    assert not [name(p) for p in data if p.suffix not in {Path(pattern).suffix for pattern in patterns}]


def inner_imports(path: Path) -> list[tuple[int, str]]:
    """Imports of this package's rooms: (line, room)."""
    dotted = [(line, what.split(".")) for line, what in imports(path)]
    return [(line, parts[1]) for line, parts in dotted if parts[0] == "ragdistill" and len(parts) > 1]


def layer(which: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if which in rooms)


def code_rooms() -> list[Path]:
    return [path for path in FILES if room(path) not in {"__init__", "__main__"}]


def test_every_room_has_its_place_in_the_layers() -> None:
    known = set().union(*LAYERS)
    rooms = {room(path) for path in code_rooms()}
    assert not rooms - known, f"give these rooms a layer in {Path(__file__).name}: {sorted(rooms - known)}"
    assert not known - rooms, f"these rooms are gone, drop their layer: {sorted(known - rooms)}"


def test_contributors_are_told_the_layers_as_they_are() -> None:
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    told = text.partition("Imports flow one way: ")[2].partition(". ")[0].split("←")
    assert [set(re.findall(r"`(\w+)`", part)) for part in told] == list(LAYERS)


def test_imports_flow_one_way() -> None:
    known = set().union(*LAYERS)
    wrong = [
        f"{name(path)}:{line} {room(path)} imports {target}"
        for path in code_rooms()
        for line, target in inner_imports(path)
        if target in known
        and room(path) in known
        and (layer(target) > layer(room(path)) or target in STRANGERS.get(room(path), set()))
    ]
    assert not wrong, "\n".join(wrong)


def test_what_works_for_every_environment_names_none() -> None:
    from ragdistill.envs.plugins import BUILT_IN

    found = [
        f"{name(path)}: {ast.unparse(statement).splitlines()[0]}"
        for path in FILES
        if room(path) in {"stages", "hints", "rollout", "strip", "report", "training"}
        for statement in tree(path).body
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and node.value in BUILT_IN
    ]
    assert found == ["src/ragdistill/stages/defaults.py: FIRST = ('alfworld', 'react')"], "registries began with it"


def runs_as_stage(path: Path) -> bool:
    """Whether a module can be run; the other modules of the room (`common`, `playing`) are what stages share."""
    guards = [ast.unparse(node.test) for node in tree(path).body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in guards


def test_no_stage_imports_another_stage() -> None:
    stages = {m for m, path in MODULES.items() if m.startswith("ragdistill.stages.") and runs_as_stage(path)}
    assert len(stages) > 5, "the stages are not recognised any more"
    wrong = [
        f"{name(path)}:{line} imports {target}"
        for path in FILES
        if room(path) == "stages"
        for line, target in imports(path)
        if target in stages
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_import_without_a_cycle() -> None:
    graph = {m: {t for _, t in imports(p, everywhere=False) if t in MODULES and t != m} for m, p in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(error.args[1])}")


def test_heavy_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{name(path)}:{line} imports {what}; only {sorted(HEAVY[what.split('.')[0]])} may"
        for path in FILES
        for line, what in imports(path)
        if what.split(".")[0] in HEAVY and room(path) not in HEAVY[what.split(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("entry", ["ragdistill.cli", "ragdistill.doctor", "ragdistill.envs", "ragdistill.agents"])
def test_light_entries_load_nothing_heavy(entry: str) -> None:
    if entry not in MODULES:
        pytest.skip(f"{entry} does not exist")
    code = f"import sys, {entry}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= 300, f"{name(path)} has more than 300 lines"
    functions = (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [f"{name(path)}:{f.lineno} {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 50]
    assert not long, f"functions over 50 lines: {long}"


def unsafe(code: ast.Module) -> list[tuple[int, str]]:
    """(line, what) for remote code switched on and for every way to load a pickle."""
    found: list[tuple[int, str]] = []
    pickles = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve"}
    for node in ast.walk(code):
        if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if off else [(node.value.lineno, node.arg)]
        elif isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) in {"torch", *pickles}:
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] in pickles]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in pickles:
            found.append((node.lineno, str(node.module)))
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_remote_code_and_no_pickles(path: Path) -> None:
    found = unsafe(tree(path))
    assert not found, f"{name(path)}: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "np.load('x', allow_pickle=True)",
    ],
    ids=str,
)
def test_the_unsafe_patterns_are_recognised(code: str) -> None:
    assert unsafe(ast.parse(code))


def machine_traces(text: str) -> list[str]:
    """Absolute paths of somebody's machine and addresses of package registries."""
    homes = r"(?<![\w.$}/-])/(?:work|root|tmp|farm|home/\w+|Users/\w+)/[\w.]+"
    hosts = r"\b(?:pypi\." + r"org|python" + r"hosted\.org|npm" + r"js\.(?:org|com)|deb\.debian" + r"\.org)"
    return [m.group(0) for m in re.finditer(f"{homes}|{hosts}", text)]


def test_machine_traces_are_recognised() -> None:
    for path in ("work/main", "root/x", "tmp/venv"):
        assert machine_traces(f"see /{path}.")
    assert machine_traces("https://pypi." + "org/simple")
    for path in ("$DVC_ROOT/.dvc/{}/exps", "docs/{}/x", "https://example.org/{}/x"):
        assert not any(machine_traces(path.format(folder)) for folder in ("work", "tmp"))


def test_no_machine_paths_in_tracked_files() -> None:
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    wrong: list[str] = []
    for tracked in filter(None, done.stdout.split("\0")):
        path = ROOT / tracked
        if path == Path(__file__) or not path.is_file() or path.stat().st_size > 5_000_000:
            continue
        raw = path.read_bytes()
        if b"\0" not in raw[:8000]:
            wrong += [f"{tracked}: {trace}" for trace in machine_traces(raw.decode("utf-8", "replace"))]
    assert not wrong, "\n".join(wrong)

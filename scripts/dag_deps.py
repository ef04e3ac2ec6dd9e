"""Keep `dvc.yaml` honest: a stage's code deps are the import closure of its module.

DVC does not see Python imports. `python scripts/dag_deps.py` prints what is wrong; `--write` mends it.
Imports inside functions count. Modules that decide no result (errors, parameter checking, writing files whole,
progress) do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ragdistill"
NO_BEHAVIOUR = {
    f"src/ragdistill/{name}.py" for name in ("__init__", "checks", "errors", "files", "params", "progress", "timing")
}
DATA = {
    "report/paper.py": ("paper.json",),
    "report/page.py": ("page.html.j2", "parts.html.j2", "page.css", "page.js"),
    "hints/prompts.py": tuple(f"prompt_{n}.txt" for n in ("system", "single", "pair", "repair", "choose")),
    "hints/quarantine.py": ("advice_words.txt",),
    "envs/alfworld/rooms.py": ("priors.json",),
    "envs/alfworld/examples.py": ("examples.json",),
    "envs/webshop/examples.py": ("examples.json",),
    "envs/webshop/generator.py": ("lexicon.json",),
}
"""Files that a module reads beside itself."""


def _file(module: str) -> Path | None:
    base = ROOT / "src" / Path(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _executed(node)


@cache
def imports(path: Path) -> frozenset[Path]:
    """Files of this package that `path` imports, at any depth of nesting, packages' `__init__` included."""
    found: set[Path] = set()
    for node in _executed(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in (n for n in names if n.split(".")[0] == "ragdistill"):
            parts = name.split(".")
            found.update(f for i in range(1, len(parts) + 1) if (f := _file(".".join(parts[:i]))))
    return frozenset(found)


def closure(path: Path) -> list[str]:
    """Relative names of all files that decide what `path` does, itself included."""
    seen, todo = {path}, [path]
    while todo:
        fresh = imports(todo.pop()) - seen
        seen |= fresh
        todo += fresh
    names = {p.relative_to(ROOT).as_posix() for p in seen}
    for module, files in DATA.items():
        owner = f"src/ragdistill/{module}"
        if owner in names:
            names |= {f"{Path(owner).parent.as_posix()}/{f}" for f in files if (ROOT / owner).with_name(f).exists()}
    return _by_folder({n for n in names - NO_BEHAVIOUR if (ROOT / n).read_text().strip()})


def _by_folder(names: set[str]) -> list[str]:
    """Name a package instead of its files where all of them are meant."""
    for folder in sorted((d for d in SOURCE.rglob("*") if d.is_dir()), key=lambda d: -len(d.parts)):
        files = {p.relative_to(ROOT).as_posix() for p in folder.iterdir() if p.is_file() and p.suffix != ".pyc"}
        within = {n for n in names if n.startswith(f"{folder.relative_to(ROOT).as_posix()}/")}
        nested = {n for n in within if n not in files}
        if files and {n for n in files if (ROOT / n).read_text().strip()} <= within and not _partial(folder, nested):
            names = names - within | {folder.relative_to(ROOT).as_posix()}
    return sorted(names)


def _partial(folder: Path, nested: set[str]) -> bool:
    """Whether some sub-package of `folder` is not named as a whole."""
    inner = {d.relative_to(ROOT).as_posix() for d in folder.iterdir() if d.is_dir() and d.name != "__pycache__"}
    return not inner <= nested


def expected(stage: dict) -> list[str]:
    """Code deps of a stage, from the module its `cmd` runs."""
    module = stage["cmd"].split("-m ")[1].split()[0]
    path = _file(module)
    if path is None:
        raise SystemExit(f"dvc.yaml runs {module}, which does not exist.")
    return closure(path)


def main() -> int:
    """Compare, and with `--write` mend; 1 when something is wrong and was not mended."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    path = ROOT / "dvc.yaml"
    dag = yaml.load(path.read_text())
    wrong = 0
    for name, stage in dag["stages"].items():
        inputs = [d for d in stage.get("deps", []) if not str(d).startswith("src/")]
        code = expected(stage)
        if [d for d in stage.get("deps", []) if str(d).startswith("src/")] != code:
            wrong += 1
            print(f"{name}: code deps differ from the import closure")
            stage["deps"] = CommentedSeq([*inputs, *code])
    if wrong and "--write" in sys.argv:
        with path.open("w") as f:
            yaml.dump(dag, f)
        print(f"{path.name} written")
        return 0
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

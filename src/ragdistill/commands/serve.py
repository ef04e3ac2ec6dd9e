"""`ragdistill serve`: the champion, or any model of the project, behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path

from ragdistill import progress
from ragdistill.commands.play import resolve
from ragdistill.llm import cpu_env
from ragdistill.params import load_params
from ragdistill.stages.common import quiet_libraries
from ragdistill.stages.playing import at_once, open_model


def serve(model: str, adapter: Path | None, host: str, port: int, name: str | None) -> int:
    """Serve until Ctrl-C, which is the normal end (status 0). The engine is the one that `params.model` names."""
    params = load_params()
    quiet_libraries()
    cpu_env.apply()
    with progress.display("serve"):
        directories = resolve(params, model, adapter)
        from ragdistill.serving.http import run

        engine = open_model(params, *directories)
    name = name or (adapter.name if adapter else model)

    def ready(url: str) -> None:
        print(f"{name} answers at {url} (model name: {name!r}; Ctrl-C ends)", flush=True)

    try:
        run(engine, name, host, port, at_once(params, engine), ready)
    finally:
        engine.close()
    print("stopped.", flush=True)
    return 0

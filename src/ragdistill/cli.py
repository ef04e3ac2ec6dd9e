"""`ragdistill …` for people. Thin: each command imports its room only when it runs, so `--help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ragdistill import __version__
from ragdistill.errors import RagdistillError
from ragdistill.files import storage_error


def _doctor(_: argparse.Namespace) -> int:
    from ragdistill.doctor import main

    return main()


def _table(args: argparse.Namespace) -> int:
    from ragdistill.commands.table import show_table

    return show_table(args.rev)


def _promote(args: argparse.Namespace) -> int:
    from ragdistill.commands.promote import promote

    return promote(args.margin, args.new_base)


def _rollback(_: argparse.Namespace) -> int:
    from ragdistill.commands.promote import rollback

    return rollback()


def _smoke(args: argparse.Namespace) -> int:
    from ragdistill.commands.smoke import smoke

    return smoke(args.keep)


def _show(args: argparse.Namespace) -> int:
    from ragdistill.commands.show import show_hints, show_trajectory

    return show_hints() if args.what == "hints" else show_trajectory(args.id)


def _envs(_: argparse.Namespace) -> int:
    from ragdistill.commands.envs import show_envs

    return show_envs()


def _use(args: argparse.Namespace) -> int:
    from ragdistill.commands.use import use

    return use(args.profile)


def _memory(args: argparse.Namespace) -> int:
    from ragdistill.commands.memory import show_memory

    return show_memory(args.profile)


def _data(args: argparse.Namespace) -> int:
    from ragdistill.commands.data import get_data

    return get_data(args.name, args.size, args.dvc)


def _play(args: argparse.Namespace) -> int:
    from ragdistill.commands.play import play

    return play(args.model, args.adapter, args.task, args.me)


def _estimate(args: argparse.Namespace) -> int:
    from ragdistill.commands.costs import Speeds
    from ragdistill.commands.estimate import estimate

    speeds = Speeds(args.prefill, args.decode, args.train, args.latency, args.gpu_price)
    return estimate(args.profile, args.params, speeds)


def _export(args: argparse.Namespace) -> int:
    from ragdistill.commands.export import export

    return export(args.student, args.out, args.chats, args.dtype, args.gguf, args.agreement)


def _serve(args: argparse.Namespace) -> int:
    from ragdistill.commands.serve import serve

    return serve(args.model, args.adapter, args.host, args.port, args.name)


LOOKING = frozenset({"doctor", "envs", "estimate", "memory", "play", "serve", "show", "table"})
"""Commands that keep nothing of what they do, so that there is nothing to go on with."""
Add = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
"""Name, function and help text of a command → its parser."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="ragdistill", description="Distil an agent's failures into a better student.")
    parser.add_argument("--version", action="version", version=f"ragdistill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    _add_looking(add)
    _add_settings(add)
    _add_students(add)
    smoke = add("smoke", _smoke, "run the whole DAG in minutes in a copy of the project: smoke, not evidence")
    smoke.add_argument("--keep", action="store_true", help="keep the copy's outputs of the last smoke run")
    return parser


def _add_looking(add: Add) -> None:
    """What is there: machine, results, hints, episodes."""
    add("doctor", _doctor, "say what this machine can do and what is missing, one line each, with the fix")
    table = add("table", _table, "print the table of policies of the last report, or several experiments as one table")
    table.add_argument("rev", nargs="*", metavar="REV", help="commit, branch, DVC experiment, or workspace")
    show = add("show", _show, "print the hint bank, or one trajectory")
    what = show.add_subparsers(dest="what", required=True, metavar="WHAT")
    what.add_parser("hints", help="the bank as a table: provenance, use, success with and without")
    one = what.add_parser("trajectory", help="one episode as readable text")
    one.add_argument("id", help="the id or its first characters; the report shows ids")
    play = add("play", _play, "watch an agent act on one task, step by step, or act yourself")
    play.add_argument("--model", help="base (default), champion, challenger, or a model directory")
    play.add_argument("--adapter", type=Path, help="an adapter directory, such as models/students/distilled-0")
    play.add_argument("--task", metavar="ID", help="a part of a task's id; without it the first development task")
    play.add_argument("--me", action="store_true", help="you act; `history` lists your commands, `quit` ends")


def _add_settings(add: Add) -> None:
    """Before a run: environments, profiles, data, cost."""
    add("envs", _envs, "list the environments that are available, with their fingerprints")
    use = add("use", _use, "switch params.yaml to a profile and print what changes; without a name, list the profiles")
    use.add_argument("profile", nargs="?", metavar="PROFILE", help="such as paper-alfworld-7b-react, or default")
    memory = add("memory", _memory, "say how much GPU memory training the students takes, before anything is fetched")
    memory.add_argument("profile", nargs="?", metavar="PROFILE", help="as if `ragdistill use PROFILE` had been said")
    data = add("data", _data, "fetch the official data of a benchmark into data/official, checked, or say how by hand")
    data.add_argument("name", choices=("alfworld", "webshop"))
    data.add_argument("--size", default="all", help="all (default) or small (WebShop's 1,000 products)")
    data.add_argument("--dvc", action="store_true", help="as a tracked import (`dvc import-url`)")
    cost = add("estimate", _estimate, "estimate tokens, money and time of each stage; asks and spends nothing")
    cost.add_argument("profile", nargs="?", metavar="PROFILE", help="as this profile would change params.yaml")
    cost.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE", help="parameters to estimate")
    for name, default, what in (
        ("prefill", 10_000.0, "prompt tokens/s of one GPU, for a 14B model"),
        ("decode", 1_500.0, "generated tokens/s of one GPU, for a 14B model"),
        ("train", 1_500.0, "trained tokens/s of one GPU, for a 14B model"),
        ("latency", 2.0, "seconds an endpoint takes for a reply"),
        ("gpu-price", 0.0, "money per GPU-hour"),
    ):
        cost.add_argument(f"--{name}", type=float, default=default, metavar="X", help=f"{what} (default {default:g})")


def _add_students(add: Add) -> None:
    """After a run: promotion and use."""
    promote = add("promote", _promote, "re-evaluate challenger and champion; move `champion` if the gate opens")
    promote.add_argument("--margin", type=float, help="success share, instead of promote.margin")
    promote.add_argument("--new-base", action="store_true", help="against its base: the champion has another")
    add(
        "rollback",
        _rollback,
        "undo the last promotion: give `champion` back to the version it replaced, or take it away",
    )
    export = add("export", _export, "write a student as adapter, merged weights and GGUF, proved to be one model")
    export.add_argument("student", help="champion, challenger, or an adapter such as models/students/distilled-0")
    export.add_argument("--out", type=Path, metavar="DIR", help="where to; without it below exports/")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="merged weights")
    export.add_argument("--gguf", choices=("f16", "q8_0"), default="f16", help="precision of the GGUF file")
    export.add_argument("--chats", type=int, default=8, help="training games to compare on (default 8)")
    export.add_argument("--agreement", type=float, default=0.98, help="least share of equal tokens after rounding")
    serve = add("serve", _serve, "put a model behind an OpenAI-compatible endpoint; Ctrl-C ends it")
    serve.add_argument("--model", default="champion", help="champion (default), challenger, base or a model directory")
    serve.add_argument("--adapter", type=Path, help="an adapter directory for it")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind; another needs RAGDISTILL_SERVE_KEY")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--name", help="the model's name for clients; without it the one given here")


def main() -> int:
    """Entry point; designed errors print one sentence and exit 1."""
    args = build_parser().parse_args()
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; closing must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        said = e if isinstance(e, RagdistillError) else storage_error(e)
        if said is None:
            raise
        print(f"ragdistill: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        kept = f"interrupted; {str(e) or 'finished work is kept'}, run again to go on"
        print(f"ragdistill: {'stopped; nothing is recorded' if args.command in LOOKING else kept}.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())

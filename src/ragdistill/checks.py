"""What makes parameters wrong beyond their types: contradictions, addresses, secrets, packages that are not there.

Parameters are committed, logged to MLflow and printed; so no address and no argument in them may hold a credential,
and no message here repeats one. Knows what the sections mean, not how they are read.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

if TYPE_CHECKING:
    from ragdistill.params import Params

_SECRET_ARGS = ("--api-k", "--hf-t")
"""Beginnings of vLLM's arguments that hold a secret; it takes abbreviations, and `_` for `-`."""

TRACKING_REMEDY = (
    "give https://host, and put credentials into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN."
)
"""End of what is said of an MLflow server's address."""


def explain(message: str, root: type[msgspec.Struct]) -> str:
    """A decoder's `message` about data for `root`, with the nearest valid key where it complains of an unknown one."""
    unknown = re.match(r"Object contains unknown field `(.+?)`(?: - at `\$\.?(.*)`)?", message)
    if not unknown:
        return message
    key, place = unknown.group(1), unknown.group(2) or ""
    near = difflib.get_close_matches(key, _keys_at(place, root), n=1, cutoff=0.0)
    dotted = f"{place}.{key}" if place else key
    return f"unknown key `{dotted}`; the nearest valid key is `{near[0]}`." if near else f"unknown key `{dotted}`."


def _keys_at(place: str, root: Any) -> list[str]:
    section = root
    for name in filter(None, place.split(".")):
        section = {f.name: f.type for f in msgspec.structs.fields(section)}[name]
    return [f.name for f in msgspec.structs.fields(section)]


def yaml_fault(error: Exception) -> str:
    """What a YAML reader's `error` complains of, and where, as the end of a sentence."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + " ".join(str(problem or error).split()).rstrip(".")


def address_fault(address: str) -> str:
    """What is wrong with a server's address, as the end of a sentence that does not repeat it; "" for nothing."""
    if any(mark in address for mark in "@?#"):
        return "holds a user or a query"
    try:
        url = urlsplit(address)
        named = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # half of an IPv6 address, a port that is no number
        named = False
    plain = address.isprintable() and not any(c.isspace() for c in address)  # urlsplit drops line ends
    return "" if named and plain else "is no http(s) address"


def is_loopback(host: str) -> bool:
    """Whether `host` is a name or an address of this machine that others cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def on_this_machine(url: str) -> bool:
    """Whether `url` is this machine's own, which no proxy of the environment can reach."""
    return is_loopback(urlsplit(url).hostname or "")


def contradictions(p: Params) -> Iterator[str]:
    """Values that are valid alone and wrong together, or where they stand; found before hours are spent on them."""
    lessons = {"distilled": "hints", "sft_retry": "retry", "distilled_random": "random"}
    missing = [v for v in p.sft.variants if v in lessons and lessons[v] not in p.teach.variants]
    if missing:
        yield f"sft.variants has {missing}, but teach.variants lacks what they learn from ({lessons})."
    for key, named in {
        "teach.variants": p.teach.variants, "sft.variants": p.sft.variants, "sft.seeds": p.sft.seeds,
        "evaluate.policies": p.evaluate.policies,
    }.items():  # fmt: skip
        if twice := {name for name in named if named.count(name) > 1}:
            yield f"{key} names {', '.join(map(str, sorted(twice)))} more than once; DVC makes one stage of each."
    if not p.sft.seeds:
        yield "sft.seeds is empty; give at least one training seed, e.g. [0]."
    if p.coldstart.plain + p.coldstart.hinted > 1.0:
        yield "coldstart.plain + coldstart.hinted exceed 1."
    if p.hints.ranker == "embedding" and not p.hints.embedder:
        yield "hints.ranker is embedding; name hints.embedder."
    if p.hints.ranker == "lift" and not p.lift.hints:
        yield "hints.ranker is lift; set lift.hints, e.g. to 4."
    if p.model.engine == "scripted" and not p.model.script:
        yield "model.engine is scripted; set model.script."
    if p.training.launch == "one" and (count := p.training.processes or 1) > 1:
        yield f"training.launch is one, but training.processes is {count}; set it to null, or launch: auto."
    yield from _servers(p)


def calls_endpoint(p: Params) -> bool:
    """Whether some stage will call the served model; a name that nothing reads does not count."""
    writes = p.hints.extractor == "llm" and p.hints.llm.model == "endpoint"
    chooses = p.hints.ranker == "llm" and p.hints.ranker_model == "endpoint"
    return "endpoint" in (p.model.engine, p.model.teacher) or writes or chooses


def no_4_bits(quantize: str, cuda: bool) -> str:
    """Why a base cannot be trained on here as `sft.recipe.quantize` says, and what to do, in a sentence; else ""."""
    if quantize == "none" or (cuda and find_spec("bitsandbytes") is not None):
        return ""
    package = "the package bitsandbytes; `pip install bitsandbytes`"
    what = package if cuda else "a CUDA device; train on a machine that has one"
    return f"sft.recipe.quantize is {quantize}, which needs {what}, or set it to none."


def _servers(p: Params) -> Iterator[str]:
    e = p.endpoint
    if fault := address_fault(e.base_url):
        yield (
            f"endpoint.base_url {fault}; give https://host/v1, and put the key into the variable that "
            "endpoint.api_key_env names."
        )
    if p.model.engine == "endpoint" and p.sft.variants:
        yield (
            f"model.engine is endpoint, but a served model cannot play the students of sft.variants {p.sft.variants}; "
            "let it teach (model.teacher: endpoint) and set model.engine: auto or vllm, or empty sft.variants."
        )
    if calls_endpoint(p) and not (e.prices.prompt or e.prices.completion) and e.budget is not None:
        yield "endpoint.budget cannot be kept while endpoint.prices are 0; set the prices, or budget: null."
    if p.vllm.url is not None and (fault := address_fault(p.vllm.url)):
        yield f"vllm.url {fault}; give http://host:8000/v1, and put the key into the variable VLLM_API_KEY."
    if p.model.engine == "vllm" and p.vllm.url and (others := list(_other_weights(p))):
        yield (
            f"vllm.url serves one base, and {', '.join(others)} would be answered by it all the same; take that "
            "out, or set vllm.url: null."
        )
    if p.model.engine == "vllm" and p.vllm.url and p.model.dtype != "auto":
        yield "vllm.url serves in the precision it was started with; set model.dtype: auto, or vllm.url: null."
    if p.model.engine == "endpoint" and (others := list(_other_weights(p))):
        yield (
            f"model.engine is endpoint, and {', '.join(others)} would be answered by endpoint.model all the same; take "
            "that out, or set model.engine: auto or vllm."
        )
    if any(_holds_secret(arg) for arg in p.vllm.args):
        yield "vllm.args holds a secret; take it out: a server that is started gets a fresh key by itself."
    if p.track.uri not in (None, "env") and (fault := address_fault(p.track.uri)):
        yield f"track.uri {fault}; {TRACKING_REMEDY}"


def _other_weights(p: Params) -> Iterator[str]:
    """What plays or writes hints with weights that are neither the base's nor a student's."""
    if p.coldstart.enabled and "raw" in p.evaluate.policies:
        yield "raw (evaluate.policies, before the cold start)"
    if p.model.teacher not in (None, "endpoint"):
        yield f"model.teacher {p.model.teacher}"
    if p.hints.extractor == "llm" and p.hints.llm.model not in (None, "endpoint"):
        yield f"hints.llm.model {p.hints.llm.model}"
    if p.hints.ranker == "llm" and p.hints.ranker_model not in (None, "endpoint"):
        yield f"hints.ranker_model {p.hints.ranker_model}"


def _holds_secret(argument: str) -> bool:
    return argument.replace("_", "-").lower().startswith(_SECRET_ARGS)

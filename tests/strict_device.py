"""A device that is not there, computed on the CPU, which refuses what CUDA would: two devices in one operation.

Not a test: `python -m tests.strict_device MODEL_DIR` (a process of its own, as torch keeps a registered device) lets
the torch engine play on the CPU and on this device and prints what they said as JSON. Real values, so that the whole
engine runs: its cache, its plans, the model's forward and the draws.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from ragdistill.llm import Sampling
from ragdistill.llm.local import LocalEngine
from ragdistill.records import Message

import torch  # isort: skip  (after the engine, which prepares the process)
from torch.utils import _pytree as pytree  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip
from torch.utils.backend_registration import (  # isort: skip
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

DEVICE = torch.device("privateuseone:0")


class OnDevice(torch.Tensor):
    """A tensor of the device; its numbers are an ordinary tensor's."""

    inner: torch.Tensor  # pyright: ignore[reportIncompatibleMethodOverride]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """As any device gives it."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on the numbers inside; the result is where CUDA would have it."""
    if func is torch.ops.aten.copy_.default:  # the one operation between devices
        inside(args[0]).copy_(inside(args[1]))
        return args[0]
    leaves = pytree.tree_leaves((args, kwargs))
    homes = {type(x) is OnDevice for x in leaves if isinstance(x, torch.Tensor) and (x.dim() or type(x) is OnDevice)}
    if len(homes) == 2:
        raise RuntimeError(f"{func}: a tensor of the device and one of the CPU")
    asked = {x.type for x in leaves if isinstance(x, torch.device)}
    on_device = DEVICE.type in asked if asked else True in homes
    out = func(*pytree.tree_map(inside, args), **pytree.tree_map(inside, kwargs))
    if func._schema.name.endswith("_") or "out" in kwargs:  # in place
        return args[0]
    return pytree.tree_map(lambda x: OnDevice(x) if on_device and isinstance(x, torch.Tensor) else x, out)


def inside(x: Any) -> Any:
    """The numbers of a tensor of the device, the CPU instead of the device; anything else as it is."""
    if isinstance(x, torch.device) and x.type == DEVICE.type:
        return torch.device("cpu")
    return x.inner if type(x) is OnDevice else x


class Strict(TorchDispatchMode):
    """Also what has no tensor of the device among its arguments: factories, and moves to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Backend(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


async def play(model: LocalEngine) -> list[list[str]]:
    """Conversations of different lengths at once, greedy and sampled, two turns each."""

    async def one(number: int) -> list[str]:
        chat = [Message(role="user", content=f"You see a mug and {number}. " * (1 + 9 * number))]
        how = Sampling(max_tokens=8, temperature=0.9 * (number % 2), top_p=0.9 if number > 2 else 1.0, seed=number)
        first = await model.chat(chat, how, f"c{number}")
        chat += [Message(role="assistant", content=first.text), Message(role="user", content="open drawer 1")]
        return [first.text, (await model.chat(chat, how, f"c{number}")).text]

    return list(await asyncio.gather(*map(one, range(5))))


def main() -> None:
    """Play everywhere and print it."""
    model_dir = Path(sys.argv[1])
    said: dict[str, Any] = {}
    here = LocalEngine(model_dir, dtype="float32", device="cpu")
    said["cpu"] = asyncio.run(play(here))
    here.close()
    _setup_privateuseone_for_python_backend(backend_module=Backend())
    serve = LocalEngine._serve

    def strictly(engine: LocalEngine) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device) then moves its numbers where we see it
        with Strict():  # both are of the engine's thread
            serve(engine)

    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch, "inference_mode", torch.no_grad),  # which subclasses of tensors cannot live in
        mock.patch.object(LocalEngine, "_serve", strictly),
    ):
        for name, reference in (("device", False), ("device, reference", True)):
            with Strict():
                there = LocalEngine(model_dir, dtype="float32", device=str(DEVICE), reference=reference)
            assert type(next(there._runner._model.parameters()).data) is OnDevice
            said[name] = asyncio.run(play(there))
            there.close()
    with Strict():
        try:
            said["mixed"] = (torch.ones(2, device=DEVICE) + torch.ones(2)).tolist()
        except RuntimeError as e:
            said["mixed"] = str(e)
    print(json.dumps(said))


if __name__ == "__main__":
    main()

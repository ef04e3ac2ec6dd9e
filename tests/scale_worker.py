"""A training process for tests: float32, so that curves can be compared, and slow towards the end, to be killed there.

Micro-batches are small, so that a process has several of them. `RAGDISTILL_TEST_DTYPE` names another precision.
`RAGDISTILL_TEST_FSDP` makes accelerate offer FSDP on gloo, which it knows on GPUs only.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from ragdistill.training import hardware, once, worker


def slow_from(step: int):
    def say(_: str):
        def report(now: int, *rest: object) -> None:
            del rest
            time.sleep(0.5 if now >= step else 0)

        return report

    return say


def prepare() -> None:
    """For every process of a test's training, that which starts them included: what they have to agree on."""
    hardware.precision_for = lambda _: getattr(torch, os.environ.get("RAGDISTILL_TEST_DTYPE", "float32"))
    hardware.MICRO_TOKENS["cpu"] = 128


def fsdp_on_gloo() -> None:
    """Tell accelerate that the two CPU processes are GPUs; everything after the decision is its own."""
    from accelerate import state

    def gloo(*_: object) -> tuple[str, state.DistributedType]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", state.DistributedType.MULTI_GPU

    def cpu(self: state.PartialState) -> None:
        self.device = torch.device("cpu")

    state.PartialState._prepare_backend = gloo  # pyright: ignore[reportAttributeAccessIssue]
    state.PartialState.set_device = cpu


if __name__ == "__main__":
    worker.end_with_the_pipe()
    prepare()
    torch.set_num_threads(1)
    if "RAGDISTILL_TEST_SLOW_FROM" in os.environ:
        once.say = slow_from(int(os.environ["RAGDISTILL_TEST_SLOW_FROM"]))
    if "RAGDISTILL_TEST_FSDP" in os.environ:
        fsdp_on_gloo()
    raise SystemExit(worker.work(Path(sys.argv[1])))

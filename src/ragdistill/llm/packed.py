"""Linear layers with weights packed once for the processor's bfloat16 kernels.

torch lays plain bfloat16 weights out anew in every call; packed ones make products with few rows (decoding) about
1.5 times as fast. This module knows no model class.
"""

from __future__ import annotations

import torch


class PackedLinear(torch.nn.Module):
    """Drop-in for an inference-only `nn.Linear` in bfloat16 on the CPU."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T + bias."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


_ROWS = 32
"""Rows the layout is chosen for; measured: it hardly matters."""


def pack_linears(model: torch.nn.Module) -> None:
    """Replace every bfloat16 `nn.Linear` of `model` on the CPU, where this build of torch can."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return  # only speed is lost
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is not torch.nn.Linear or child.weight.dtype is not torch.bfloat16:
                continue
            if child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))

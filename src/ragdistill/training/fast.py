"""Three exact shortcuts that make LoRA training fast on a CPU: loss, LoRA layer and causal attention.

Each equals the textbook computation up to rounding (tested); what they save is memory traffic:
logits exist only at trained positions, a LoRA layer runs without casts and element-wise passes, and attention skips
the masked half. This module knows no data and no trainer.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

LOGIT_ROWS = 512
"""Positions whose logits exist at the same time (512 x 49k in float32 = 100 MB)."""
BLOCK = 256
"""Query rows per attention block: large enough for efficient products, small enough to skip the masked half."""
BLOCKS_LIMIT = 2048
"""Longer rows use PyTorch's flash attention: the blocks keep their probabilities, which grow quadratically."""
CAUSAL_BLOCKS = "causal_blocks"
"""Name of `causal_attention` in transformers' attention registry."""


class _HeadLoss(torch.autograd.Function):
    """Summed negative log-likelihood of a frozen head; the gradient is made in the forward, so no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for start in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            logits = torch.mm(hidden[rows], weight.t()).float()
            at = targets[rows].unsqueeze(1)
            picked = logits.gather(1, at)
            norm = logits.logsumexp(1, keepdim=True)
            total += (norm - picked).sum()
            if smoothing:  # (1 - s) * picked + s * mean instead of picked
                total += smoothing * (picked - logits.mean(1, keepdim=True)).sum()
            probs = logits.sub_(norm).exp_().scatter_add_(1, at, torch.full_like(picked, smoothing - 1.0))
            if smoothing:
                probs -= smoothing / probs.shape[1]
            grad[rows] = torch.mm(probs.to(weight.dtype), weight)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * outputs[0].to(grad.dtype), None, None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], in float32.

    With `smoothing` s the target is (1 - s) times the true token plus s spread evenly over the vocabulary.

    `hidden` (rows, width) are the states that predict `targets` (rows,); `weight` (vocabulary, width) is frozen.
    """
    return _HeadLoss.apply(hidden, weight, targets, smoothing)


class _LoraLinear(torch.autograd.Function):
    """x W' + scale (dropped A') B', with products that accumulate in place instead of casts, scalings and sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        source = rows if dropped is None else dropped.reshape(-1, x.shape[-1])
        low_a, low_b = a.to(x.dtype), (b * scale).to(x.dtype)
        low = torch.mm(source, low_a.t())
        out = torch.mm(rows, weight.t()).addmm_(low, low_b.t())
        ctx.save_for_backward(source, low, weight, low_a, low_b)
        ctx.scale, ctx.separate = scale, dropped is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        source, low, weight, low_a, low_b = ctx.saved_tensors
        shape = (*outputs[0].shape[:-1], source.shape[-1])
        grad = outputs[0].reshape(-1, outputs[0].shape[-1])
        grad_low = torch.mm(grad, low_b)
        grad_a = torch.mm(grad_low.t(), source).float()
        grad_b = torch.mm(grad.t(), low).float().mul_(ctx.scale)
        grad_x = torch.mm(grad, weight)
        if not ctx.separate:
            return grad_x.addmm_(grad_low, low_a).view(shape), None, None, grad_a, grad_b, None
        return grad_x.view(shape), torch.mm(grad_low, low_a).view(shape), None, grad_a, grad_b, None


def _lora_forward(layer: Any, x: Tensor) -> Tensor:
    name = layer.active_adapters[0]
    dropout = layer.lora_dropout[name]
    dropped = None if isinstance(dropout, torch.nn.Identity) or not layer.training else dropout(x)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoraLinear.apply(x, dropped, layer.base_layer.weight, a, b, layer.scaling[name])


def _added_forward(layer: Any, x: Tensor) -> Tensor:
    name = layer.active_adapters[0]
    low = linear(layer.lora_dropout[name](x), layer.lora_A[name].weight.to(x.dtype))
    return layer.base_layer(x) + linear(low, (layer.lora_B[name].weight * layer.scaling[name]).to(x.dtype))


def fuse_lora(model: torch.nn.Module) -> int:
    """Give every LoRA layer of `model` a forward in the precision of its input; returns how many are fused.

    Plain ones are. Layers with a bias or a base in 4 bits call their base and add the adapter, where peft would compute
    in the adapter's float32 and keep its input once more. For training only: such a layer has one active adapter that
    cannot be disabled.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    fused = 0
    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is torch.nn.Linear and layer.base_layer.bias is None:
            layer.forward = types.MethodType(_lora_forward, layer)
            fused += 1
        elif isinstance(layer, LoraLayer) and type(layer).__name__ in ("Linear", "Linear4bit"):
            setattr(layer, "forward", types.MethodType(_added_forward, layer))  # noqa: B010 - no type knows it
    return fused


class _CausalBlocks(torch.autograd.Function):
    """Causal grouped-query attention by blocks of queries, each against only the keys it may see."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, length, dim = q.shape
        groups = k.shape[1]
        q5 = (q * scale).view(batch, groups, heads // groups, length, dim)
        k3, v3 = k.reshape(-1, length, dim), v.reshape(-1, length, dim)
        out = torch.empty(batch, groups, heads // groups, length, dim, dtype=q.dtype, device=q.device)
        future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
        kept = []
        for start in range(0, length, BLOCK):
            end = min(length, start + BLOCK)
            queries = q5[:, :, :, start:end].reshape(batch * groups, -1, dim)
            scores = torch.bmm(queries, k3[:, :end].transpose(1, 2)).view(-1, end - start, end)
            scores[..., start:].masked_fill_(future[: end - start, : end - start], float("-inf"))
            probs = scores.softmax(-1).view(batch * groups, -1, end)
            out[:, :, :, start:end] = torch.bmm(probs, v3[:, :end]).view(batch, groups, -1, end - start, dim)
            kept.append(probs)
        ctx.save_for_backward(q5, k3, v3, *kept)
        ctx.scale = scale
        return out.view(batch, heads, length, dim)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q5, k3, v3, *kept = ctx.saved_tensors
        batch, groups, share, length, dim = q5.shape
        grad5 = outputs[0].reshape(q5.shape)
        grad_q = torch.empty_like(q5)
        grad_k = torch.zeros(k3.shape, dtype=torch.float32, device=k3.device)  # sums over blocks stay exact
        grad_v = torch.zeros_like(grad_k)
        for probs, start in zip(kept, range(0, length, BLOCK), strict=True):
            end = min(length, start + BLOCK)
            grad = grad5[:, :, :, start:end].reshape(batch * groups, -1, dim)
            queries = q5[:, :, :, start:end].reshape(batch * groups, -1, dim)
            grad_v[:, :end] += torch.bmm(probs.transpose(1, 2), grad)
            grad_probs = torch.bmm(grad, v3[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            rows = torch.bmm(grad_scores, k3[:, :end]).mul_(ctx.scale)
            grad_q[:, :, :, start:end] = rows.view(batch, groups, share, end - start, dim)
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), queries)
        to = (batch, groups, length, dim)
        shaped_q = grad_q.view(batch, groups * share, length, dim)
        return shaped_q, grad_k.view(to).to(k3.dtype), grad_v.view(to).to(v3.dtype), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax attention; `q` (batch, heads, length, dim), `k` and `v` with heads or fewer (grouped) heads."""
    return _CausalBlocks.apply(q, k, v, scale)


def _attention_interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None or query.shape[2] > BLOCKS_LIMIT:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    out = causal_attention(query, key, value, options.get("scaling") or query.shape[-1] ** -0.5)
    return out.transpose(1, 2).contiguous(), None


def attention_for(config: Any, device: str) -> str:
    """The attention implementation to load a model with: the blocks on a CPU when the model is plainly causal."""
    plain = all(not getattr(config, name, None) for name in ("sliding_window", "attn_logit_softcapping", "layer_types"))
    if device != "cpu" or not plain or getattr(config, "attention_dropout", 0.0):
        return "sdpa"
    from transformers import AttentionInterface

    AttentionInterface.register(CAUSAL_BLOCKS, _attention_interface)
    return CAUSAL_BLOCKS

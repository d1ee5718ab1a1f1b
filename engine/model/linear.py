"""Linear layers with weights in the order the CPU's matrix units read them."""

from __future__ import annotations

import torch
from torch import nn


def _gains(dtype: torch.dtype) -> bool:
    """float32 gains nothing; the narrow types need instructions of their own."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())


class PrepackedLinear(nn.Module):
    """An inference-only linear layer over a weight that oneDNN reordered once instead of at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def prepack(model: nn.Module) -> int:
    """Replaces the linear layers of a CPU model whose type gains from it; returns how many. The plain weights go."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and _gains(child.weight.dtype)
    ]
    for parent, name, child in found:
        setattr(parent, name, PrepackedLinear(child))
    return len(found)

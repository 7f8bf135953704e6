"""Fused operators of torch with norms inside, opened up so that the norms are seen.

`nn.TransformerEncoderLayer` in eval mode calls one operator for the whole layer. Its attention
stays one operator; the rest is what that operator's own source does, one step after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def _encoder_layer(
    src: Any,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Any,
    norm_bias_1: Any,
    norm_weight_2: Any,
    norm_bias_2: Any,
    ffn_weight_1: Any,
    ffn_bias_1: Any,
    ffn_weight_2: Any,
    ffn_bias_2: Any,
    mask: Any = None,
    mask_type: int | None = None,
) -> Any:
    """X + attention(x), x + ffn(x), each with its norm before (`norm_first`) or after."""

    def first(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    x = first(src) if norm_first else src
    projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    attended, _ = torch._native_multi_head_attention(
        x, x, x, embed_dim, num_heads, *projections, mask, False, True, mask_type
    )
    x = src + attended
    x = x if norm_first else first(x)
    h = F.linear(second(x) if norm_first else x, ffn_weight_1, ffn_bias_1)
    h = F.linear(F.gelu(h) if use_gelu else F.relu(h), ffn_weight_2, ffn_bias_2)
    return x + h if norm_first else second(x + h)


OPENED: dict[Any, Callable[..., Any]] = {torch._transformer_encoder_layer_fwd: _encoder_layer}

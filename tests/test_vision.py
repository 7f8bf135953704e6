"""Norms as torch, timm and papers spell them: at least one test for each line of the table.

A case is a model, its inputs and the sites that the report has to show for it. Whatever was found
has to compute what the model computes; models with batch statistics are differentiated too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_agrees
from models import roughened
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normfx

# The norms that have to be found, in the order of the list that they were collected in.
LINES = [
    "Llama/Mistral/Qwen RMSNorm",
    "T5LayerNorm",
    "Gemma 1-3",
    "Nemotron LayerNorm1P",
    "Megatron zero_centered_gamma",
    "Cohere",
    "QK-norm",
    "V-norm",
    "Sandwich / Gemma-2, peri-LN",
    "OLMo-2 reordered",
    "Parallel block (GPT-J, PaLM, Phi-2)",
    "DeepNorm",
    "ReZero / LayerScale",
    "Mamba-2 gated RMSNorm",
    "DyT",
    "AdaLN",
    "AdaIN / SPADE / FiLM",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm2d channels-first",
    "BatchNorm eval / FrozenBN",
    "SyncBN",
    "BatchRenorm",
    "GhostBN",
    "FRN(+TLU)",
    "GRN (ConvNeXt-V2)",
    "LocalResponseNorm",
    "ScaleNorm",
    "L2Norm / F.normalize",
    "weight norm",
    "spectral norm",
    "GraphNorm",
    "PairNorm, NodeNorm",
    "RMSNorm via SimpleNorm (timm)",
    "nGPT / cosine-norm",
]


class Case(NamedTuple):
    """A model and what the report has to say about it.

    Attributes:
        make: the model.
        inputs: its inputs, drawn after the seed is set.
        sites: kind, dims and eps (None: a tensor, or there is no place for one) of each, in the
            order of the graph; the number of groups as a fourth where it counts.
        batch: it has batch statistics, so it is differentiated too.
        missed: whether there are near misses; None: not compared.
        weighted: whether each site has a weight; None: not compared.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    sites: list[tuple[Any, ...]]
    batch: bool = False
    missed: bool | None = None
    weighted: bool | None = None


class Spelled(nn.Module):
    """A norm written out: `function(module, *inputs)`.

    What it holds is given by name: the shape of a parameter (of a buffer where the name begins with
    running), or a function that makes a module.
    """

    def __init__(self, function: Callable[..., Any], **held: Any):
        super().__init__()
        self.function = function
        for name, value in held.items():
            if isinstance(value, (int, tuple)):
                value = drawn(name, *(value if isinstance(value, tuple) else (value,)))
            if name.startswith("running"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value())

    def forward(self, *inputs):
        return self.function(self, *inputs)


def drawn(name, *shape):
    """Scales around one, shifts and matrices around zero, and statistics as of normal inputs."""
    if name in ("running_u", "running_v"):
        return F.normalize(torch.randn(shape), dim=-1)
    spread = {"bias": 1.0, "tau": 1.0, "matrix": 1.0, "running_mean": 0.1}.get(name)
    return torch.rand(shape) + 0.5 if spread is None else spread * torch.randn(shape)


def spelled(function, **held):
    return lambda: Spelled(function, **held)


D, C, G = 16, 8, 4  # width, channels, groups
OF_D = {"weight": D, "bias": D}
OF_C = {"weight": C, "bias": C}
RUNNING = {"running_mean": C, "running_var": C, **OF_C}


def tokens():
    return (torch.randn(4, 12, D),)


def heads():
    return (torch.randn(4, 12, 3, D),)


def images():
    return (torch.randn(4, C, 6, 5),)


def images_last():
    return (torch.randn(4, 6, 5, C),)


def rows():
    return (torch.randn(24, D),)


def half(inputs):
    return lambda: tuple(x.bfloat16() for x in inputs())


def with_gate():
    return torch.randn(4, 12, D), torch.randn(4, 12, D)


def with_condition(inputs):
    return lambda: (*inputs(), torch.randn(4, 6))


def wide(x):
    """x.float(), which leaves the float64 run alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(t):
    return t.view(1, -1, 1, 1)


def on_channels(m, x):
    return x * per_channel(m.weight) + per_channel(m.bias)


# -- RMSNorm and LayerNorm of language models ----------------------------------------------------


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(m, x):
    return m.weight * rms(wide(x)).to(x.dtype)


def t5(m, x):
    x = x * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + 1e-6)
    if m.weight.dtype in (torch.float16, torch.bfloat16):
        x = x.to(m.weight.dtype)
    return m.weight * x


def gemma(m, x):
    return (rms(wide(x)) * (1.0 + wide(m.weight))).to(x.dtype)


def layer_norm_1p(m, x):
    return F.layer_norm(x, (D,), m.weight + 1, m.bias, 1e-5)


def zero_centered_rms(m, x):
    return F.rms_norm(x, (D,), 1 + m.weight, 1e-5)


def zero_centered_layer_norm(m, x):
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * (1 + m.weight) + m.bias


def cohere(m, x):
    h = wide(x)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    return (wide(m.weight) * h).to(x.dtype)


def qk_norm(m, x):
    """Over the dims of each head, before the heads come first (Qwen3, Gemma3)."""
    q, k = (proj(x).view(4, 12, 4, 4) for proj in (m.q, m.k))
    q = (m.q_weight * rms(wide(q))).transpose(1, 2)
    k = (m.k_weight * rms(wide(k))).transpose(1, 2)
    return torch.softmax(q @ k.transpose(-1, -2) / 2, -1)


def qk_norm_all_heads(m, x):
    """Over all heads at once, before they are split (OLMo-2)."""
    q, k = m.q_weight * rms(m.q(x)), m.k_weight * rms(m.k(x))
    q, k = (t.view(4, 12, 4, 4).transpose(1, 2) for t in (q, k))
    return torch.softmax(q @ k.transpose(-1, -2) / 2, -1)


def qk_norm_chameleon(m, x):
    """A weight and a bias for each head."""
    q = F.layer_norm(m.q(x).view(-1, 4, 4), (4,), None, None, 1e-5) * m.weight + m.bias
    return q.view(4, 12, 4, 4).transpose(1, 2)


def v_norm(m, x):
    v = rms(m.v(x).view(4, 12, 4, 4)).transpose(1, 2)
    return torch.softmax(v @ v.transpose(-1, -2), -1) @ v


def sandwich(m, x):
    return x + m.after(m.f(m.before(x)))


def reordered(m, x):
    return x + m.norm(torch.relu(m.f(x)))


def parallel(m, x):
    h = m.norm(x)
    return x + m.attention(h) + m.down(F.gelu(m.up(h)))


def deep_norm(m, x):
    return m.norm((2 * 12) ** 0.25 * x + m.f(x))


def residual_scaled(m, x):
    return x + m.scale * torch.relu(m.f(x))


def gate_before(groups):
    def forward(m, x, z):
        h = x * F.silu(z)
        grouped = h.view(*h.shape[:-1], groups, D // groups)
        grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + 1e-5)
        return m.weight * grouped.view(h.shape)

    return forward


def gate_before_rstd(m, x, z):
    """As the reference of Mamba-2 has it, einops and all."""
    x = wide(x) * F.silu(wide(z))
    grouped = x.reshape(4, 12, G, D // G)
    rstd = 1 / torch.sqrt(grouped.square().mean(dim=-1, keepdim=True) + 1e-5)
    return (grouped * rstd).reshape(4, 12, D) * m.weight


def gate_after(m, x, z):
    h = m.weight * rms(wide(x)).to(x.dtype)
    return h * F.silu(wide(z)).to(x.dtype)


def dyt(m, x):
    return torch.tanh(m.alpha * x) * m.weight + m.bias


def dyt_channels_first(m, x):
    return torch.tanh(m.alpha * x) * m.weight[:, None, None] + m.bias[:, None, None]


# -- conditional norms ---------------------------------------------------------------------------


def adaptive(m, x, c):
    change, by = m.modulation(c).chunk(2, -1)
    return m.norm(x) * (1 + change.unsqueeze(1)) + by.unsqueeze(1)


def adaptive_by_hand(m, x, c):
    change, by = m.modulation(F.silu(c)).chunk(2, -1)
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) * (variance + 1e-6).rsqrt() * (1 + change[:, None]) + by[:, None]


def adaptive_zero(m, x, c):
    by, change, gate = m.modulation(F.silu(c)).chunk(3, -1)
    h = m.norm(x) * (1 + change.unsqueeze(1)) + by.unsqueeze(1)
    return x + gate.unsqueeze(1) * m.f(h)


def moments_of(x):
    """The mean and the (unbiased) deviation of each channel of each image."""
    flat = x.view(4, C, -1)
    return flat.mean(2).view(4, C, 1, 1), (flat.var(2) + 1e-5).sqrt().view(4, C, 1, 1)


def adain(m, content, style):
    style_mean, style_deviation = moments_of(style)
    mean, deviation = moments_of(content)
    normal = (content - mean.expand(content.shape)) / deviation.expand(content.shape)
    return normal * style_deviation.expand(content.shape) + style_mean.expand(content.shape)


def spade(m, x, segmentation):
    hidden = torch.relu(m.shared(segmentation))
    return m.norm(x) * (1 + m.gamma(hidden)) + m.beta(hidden)


def film(m, x, c):
    change, by = m.modulation(c).chunk(2, -1)
    return m.norm(x) * change[:, :, None, None] + by[:, :, None, None]


# -- GroupNorm, InstanceNorm, LayerNorm2d --------------------------------------------------------


def group_norm_flat(m, x):
    g = x.view(4, G, -1)
    mean, variance = g.mean(-1, keepdim=True), g.var(-1, unbiased=False, keepdim=True)
    return on_channels(m, ((g - mean) / torch.sqrt(variance + 1e-5)).view(x.shape))


def group_norm_five_dims(m, x):
    b, c, h, w = x.shape
    g = x.reshape(b, G, c // G, h, w)
    mean = g.mean((2, 3, 4), keepdim=True)
    variance = ((g - mean) ** 2).mean((2, 3, 4), keepdim=True)
    return on_channels(m, ((g - mean) * torch.rsqrt(variance + 1e-5)).reshape(b, c, h, w))


def group_norm_rows(m, x):
    g = x.reshape(4 * G, -1)
    mean = g.mean(1, keepdim=True)
    variance = (g * g).mean(1, keepdim=True) - mean * mean
    return on_channels(m, ((g - mean) / (variance + 1e-5).sqrt()).reshape(x.shape))


def group_norm_var_mean(m, x):
    g = x.unflatten(1, (G, C // G))
    variance, mean = torch.var_mean(g, (2, 3, 4), unbiased=False, keepdim=True)
    return on_channels(m, ((g - mean) * (variance + 1e-5).rsqrt()).flatten(1, 2))


def group_norm_affine_in_groups(m, x):
    """The affine part before the groups are joined."""
    g = x.view(4, G, C // G, -1)
    variance, mean = torch.var_mean(g, (2, 3), unbiased=False, keepdim=True)
    g = (g - mean) / (variance + 1e-5).sqrt()
    return (g * m.weight.view(1, G, -1, 1) + m.bias.view(1, G, -1, 1)).view(x.shape)


def group_norm_of_rows(m, x):
    """(N, C) as WGAN heads and transformers' adapters have it."""
    g = x.view(24, G, -1)
    variance, mean = torch.var_mean(g, -1, unbiased=False, keepdim=True)
    return ((g - mean) * (variance + 1e-5).rsqrt()).view(24, D) * m.weight + m.bias


def instance_norm(m, x):
    mean = x.mean((2, 3), keepdim=True)
    variance = x.var((2, 3), unbiased=False, keepdim=True)
    return on_channels(m, (x - mean) / torch.sqrt(variance + 1e-5))


def instance_norm_plain(m, x):
    variance, mean = torch.var_mean(x, (-2, -1), unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def instance_norm_flat(m, x):
    flat = x.view(4, C, -1)
    mean, variance = flat.mean(-1, keepdim=True), flat.var(-1, unbiased=False, keepdim=True)
    return on_channels(m, ((flat - mean) / (variance + 1e-5).sqrt()).view(x.shape))


def instance_norm_two_steps(m, x):
    mean = x.mean(-1, keepdim=True).mean(-2, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True).mean(-2, keepdim=True)
    return on_channels(m, (x - mean) * torch.rsqrt(variance + 1e-5))


def instance_norm_two_steps_squeezed(m, x):
    mean = x.mean(-1).mean(-1)
    square = (x * x).mean(-1).mean(-1)
    root = (square - mean * mean + 1e-5).sqrt()
    return (x - mean[:, :, None, None]) / root[:, :, None, None] * per_channel(m.weight)


def instance_norm_of_sequences(m, x):
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * m.weight[:, None] + m.bias[:, None]


def layer_norm_permuted(m, x):
    x = F.layer_norm(x.permute(0, 2, 3, 1), (C,), m.weight, m.bias, 1e-6)
    return x.permute(0, 3, 1, 2)


def layer_norm_convnext(m, x):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + 1e-6)
    return m.weight[:, None, None] * x + m.bias[:, None, None]


def layer_norm_var_mean(m, x):
    variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    return on_channels(m, (x - mean) * torch.rsqrt(variance + 1e-6))


# -- BatchNorm and its kin -----------------------------------------------------------------------


def frozen(eps):
    """torchvision's spelling."""

    def forward(m, x):
        w, b = m.weight.reshape(1, -1, 1, 1), m.bias.reshape(1, -1, 1, 1)
        factor = w * (m.running_var.reshape(1, -1, 1, 1) + eps).rsqrt()
        return x * factor + (b - m.running_mean.reshape(1, -1, 1, 1) * factor)

    return forward


def frozen_detectron(m, x):
    factor = m.weight * (m.running_var + 1e-5).rsqrt()
    by = m.bias - m.running_mean * factor
    return x * per_channel(factor) + per_channel(by)


def given_statistics(m, x):
    x = (x - per_channel(m.running_mean)) / torch.sqrt(per_channel(m.running_var) + 1e-5)
    return on_channels(m, x)


def tokens_permuted(m, x):
    return m.norm(x.transpose(1, 2)).transpose(1, 2)


def tokens_flattened(m, x):
    return m.norm(x.flatten(0, 1)).view(x.shape)


def track(m, mean, variance, count):
    """Running statistics, as torch has them."""
    with torch.no_grad():
        m.running_mean.mul_(0.9).add_(mean, alpha=0.1)
        m.running_var.mul_(0.9).add_(variance * (count / (count - 1)), alpha=0.1)


def batch_norm_scale_and_shift(m, x):
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    track(m, mean, variance, x.numel() / C)
    factor = m.weight * torch.rsqrt(variance + 1e-5)
    by = m.bias - mean * factor
    return x * factor.view(1, C, 1, 1) + by.view(1, C, 1, 1)


def batch_norm_textbook(m, x):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + 1e-5)
    track(m, mean.detach().flatten(), variance.detach().flatten(), x.numel() / C)
    return on_channels(m, normal)


def batch_norm_two_steps(m, x):
    mean = x.mean((2, 3)).mean(0)
    variance = (x - per_channel(mean)).square().mean((2, 3)).mean(0)
    return on_channels(m, (x - per_channel(mean)) * per_channel(torch.rsqrt(variance + 1e-5)))


def batch_norm_of_tokens(m, x):
    mean, variance = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * m.weight + m.bias


def batch_renorm(m, x):
    """Corrected towards the running statistics; the correction has no gradient."""
    if m.training:
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = x.var((0, 2, 3), unbiased=False, keepdim=True)
        deviation = (variance + 1e-5).sqrt()
        kept = (per_channel(m.running_var) + 1e-5).sqrt()
        r = (deviation.detach() / kept).clamp(1 / 3, 3)
        d = ((mean.detach() - per_channel(m.running_mean)) / kept).clamp(-5, 5)
        x = (x - mean) / deviation * r + d
        track(m, mean.detach().flatten(), variance.detach().flatten(), x.numel() / C)
        return on_channels(m, x)
    return given_statistics(m, x)


def ghost_chunks(m, x):
    if m.training:
        return torch.cat([m.norm(part) for part in x.chunk(3)])
    return m.norm(x)


def ghost_channels(m, x):
    """Sub-batches as channels, and the mean of their running statistics."""
    held = {"running_mean": m.running_mean.repeat(2), "running_var": m.running_var.repeat(2)}
    y = F.batch_norm(
        x.view(-1, 2 * C, 6, 5), *held.values(), m.weight.repeat(2), m.bias.repeat(2), True
    )
    with torch.no_grad():
        for name, repeated in held.items():
            getattr(m, name).copy_(repeated.view(2, C).mean(0))
    return y.view(x.shape)


def region(x, mask):
    """RN of one region: what is outside of it is filled with its mean."""
    count = mask.sum((0, 2, 3))
    count[count == 0] = 1
    mean = x.sum((0, 2, 3)) / count
    filled = x + (1 - mask) * mean[None, :, None, None]
    normal = F.batch_norm(filled, None, None, training=True)
    return normal * torch.sqrt(count / (x.numel() / C))[None, :, None, None]


def region_norm(m, x, mask):
    h = region(x * mask, mask) + region(x * (1 - mask), 1 - mask)
    gain = mask * (1 + per_channel(m.inside)) + (1 - mask) * (1 + per_channel(m.outside))
    return h * gain + per_channel(m.bias)


def with_mask():
    return torch.randn(4, C, 6, 5), (torch.rand(4, 1, 6, 5) > 0.4).float()


# -- statistics without a mean -------------------------------------------------------------------


def filter_response(m, x):
    factor = wide(x.square()).mean((2, 3), keepdim=True).add(1e-5).rsqrt().to(x.dtype)
    x = on_channels(m, x * factor.expand(x.shape))
    return torch.maximum(x, m.tau.reshape(1, -1, 1, 1))


def filter_response_learned_eps(m, x):
    square = torch.mean(x**2, dim=[2, 3], keepdim=True)
    x = x * torch.rsqrt(square + torch.abs(m.eps))
    return torch.max(on_channels(m, x), per_channel(m.tau))


def global_response_last(m, x):
    length = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    ratio = length / (length.mean(dim=-1, keepdim=True) + 1e-6)
    return m.weight * (x * ratio) + m.bias + x


def global_response_first(m, x):
    length = x.norm(p=2, dim=(2, 3), keepdim=True)
    ratio = length / (length.mean(dim=1, keepdim=True) + 1e-6)
    return x + torch.addcmul(per_channel(m.bias), per_channel(m.weight), x * ratio)


def scale_norm(m, x):
    return x * (m.scale / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-5))


def scale_norm_normalize(m, x):
    return F.normalize(x, dim=-1) * m.scale


def normalize_ssd(m, x):
    """With eps outside of the root, and a weight of each channel."""
    x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
    return x * per_channel(m.weight)


def power_norm_training(m, x):
    """PN-V on tokens: each channel by its RMS over the batch."""
    square = (x * x).mean((0, 1))
    return m.weight * (x / torch.sqrt(square + 1e-5)) + m.bias


def power_norm_of_images(m, x):
    square = x.pow(2).mean((0, 2, 3), keepdim=True)
    return on_channels(m, x * torch.rsqrt(square + 1e-5))


def unified_norm_warming_up(m, x):
    """As released: the statistic of flattened tokens divides an image of one column."""
    square = x.clone().reshape(-1, D).square().mean(0).view(1, D, 1, 1)
    h = x.permute(0, 2, 1).contiguous().unsqueeze(-1)
    h = on_channels(m, h / (square + 1e-5).sqrt())
    return h.squeeze(-1).permute(0, 2, 1).contiguous()


def unified_norm(m, x):
    return x / torch.sqrt(m.running_var + 1e-5) * m.weight + m.bias


def unified_norm_released(m, x):
    h = x.permute(0, 2, 1).contiguous().unsqueeze(-1)
    h = h / (m.running_var.view(1, D, 1, 1) + 1e-5).sqrt()
    h = per_channel(m.weight) * h + per_channel(m.bias)
    return h.squeeze(-1).permute(0, 2, 1).contiguous()


def group_scaling_repeated(x):
    """PowerNorm's, as released: (T, B, C)."""
    t, b, c = x.shape
    g = x.contiguous().reshape(t, b, G, c // G)
    square = torch.repeat_interleave((g * g).mean(3, keepdim=True), c // G, dim=-1)
    return x / torch.sqrt(square.contiguous().reshape(t, b, c) + 1e-5)


def group_scaling_tiled(x):
    t, b, c = x.shape
    g = x.view(t, b, G, c // G)
    square = (g * g).mean(3, keepdim=True).repeat(1, 1, 1, c // G)
    return x / torch.sqrt(square.view(t, b, c) + 1e-5)


def group_scaling_expanded(x):
    t, b, c = x.shape
    g = x.view(t, b, G, c // G)
    square = g.pow(2).mean(-1, keepdim=True).expand(t, b, G, c // G).reshape(t, b, c)
    return x / torch.sqrt(square + 1e-5)


def power_norm_eval(group_scaling):
    def forward(m, x):
        h = group_scaling(x).permute(1, 2, 0).contiguous().unsqueeze(-1)
        h = h / (m.running_phi + 1e-5).sqrt()
        h = m.weight.reshape(1, D, 1, 1) * h + m.bias.reshape(1, D, 1, 1)
        return h.reshape(12, D, 4).permute(2, 0, 1).contiguous()

    return forward


def power_norm(group_scaling):
    return spelled(power_norm_eval(group_scaling), running_phi=(1, D, 1, 1), **OF_D)


def compressed_rms(m, x):
    """The entry that was left out is minus the sum of the others."""
    left_out = x.sum(-1, keepdim=True)
    square = x.square().sum(-1, keepdim=True) + left_out.square()
    return x * torch.rsqrt(square / (x.shape[-1] + 1) + 1e-6)


def partial_rms(m, x):
    """As the authors of RMSNorm wrote it, with p = 1/4."""
    part, _ = torch.split(x, [D // 4, D - D // 4], dim=-1)
    root = part.norm(2, dim=-1, keepdim=True) * (D // 4) ** (-1.0 / 2)
    return m.weight * (x / (root + 1e-8))


def partial_rms_inside(m, x):
    return m.weight * x * torch.rsqrt(x[..., :4].pow(2).mean(-1, keepdim=True) + 1e-6)


def simple_rms_outside(m, x):
    return x / (x.norm(2, dim=-1, keepdim=True) * D ** (-1.0 / 2) + 1e-8)


def simple_rms_inside(m, x):
    return (wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def simple_norm(m, x):
    return x * torch.rsqrt(torch.var(x, dim=(-1,), keepdim=True) + 1e-6) * m.weight


def simple_norm_2d(m, x):
    return x * torch.rsqrt(x.var(1, keepdim=True) + 1e-6) * per_channel(m.weight)


# -- EvoNorm, as timm has it ---------------------------------------------------------------------


def instance_std(x, eps):
    root = wide(x).var((2, 3), unbiased=False, keepdim=True).add(eps).sqrt().to(x.dtype)
    return root.expand(x.shape)


def instance_rms(x, eps):
    root = wide(x).square().mean((2, 3), keepdim=True).add(eps).sqrt().to(x.dtype)
    return root.expand(x.shape)


def group_std(x, eps, flatten=False):
    b, c, h, w = x.shape
    g = x.reshape(b, G, -1) if flatten else x.reshape(b, G, c // G, h, w)
    dims = 2 if flatten else (2, 3, 4)
    root = wide(g).var(dims, unbiased=False, keepdim=True).add(eps).sqrt().to(x.dtype)
    return root.expand(g.shape).reshape(b, c, h, w)


def group_rms(x, eps):
    b, c, h, w = x.shape
    g = x.reshape(b, G, c // G, h, w)
    root = wide(g).square().mean((2, 3, 4), keepdim=True).add(eps).sqrt_().to(x.dtype)
    return root.expand(g.shape).reshape(b, c, h, w)


def batch_variance(m, x):
    if not m.training:
        return m.running_var
    variance = wide(x).var((0, 2, 3), unbiased=False)
    n = x.numel() / C
    m.running_var.copy_(m.running_var * 0.9 + variance.detach() * 0.1 * (n / (n - 1)))
    return variance


def evo_b0(m, x):
    left = batch_variance(m, x).add(1e-3).sqrt_().to(x.dtype).view(1, -1, 1, 1).expand_as(x)
    right = x * per_channel(m.slope) + instance_std(x, 1e-3)
    return on_channels(m, x / left.max(right))


def evo_b1(m, x):
    left = per_channel(batch_variance(m, x).to(x.dtype)).add(1e-5).sqrt_()
    right = (x + 1) * instance_rms(x, 1e-5)
    return on_channels(m, x / left.max(right))


def evo_b2(m, x):
    left = per_channel(batch_variance(m, x).to(x.dtype)).add(1e-5).sqrt_()
    right = instance_rms(x, 1e-5) - x
    return on_channels(m, x / left.max(right))


def evo_s0(m, x):
    return on_channels(m, x * (x * per_channel(m.slope)).sigmoid() / group_std(x, 1e-5))


def evo_s0a(m, x):
    root = group_std(x, 1e-3, flatten=True)
    x = x * (x * per_channel(m.slope)).sigmoid()
    return on_channels(m, x / root)


def evo_s1(m, x):
    return on_channels(m, F.silu(x) / group_std(x, 1e-5))


def evo_s2(m, x):
    return on_channels(m, F.silu(x) / group_rms(x, 1e-5))


# -- norms of weights ----------------------------------------------------------------------------


def weight_norm_with_hooks():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(D, C))


def weight_norm_by_hand(m, x):
    return F.linear(x, m.g * m.matrix / m.matrix.norm(dim=1, keepdim=True))


def weight_norm_of_conv(m, x):
    length = m.matrix.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
    return F.conv2d(x, m.matrix * (m.g.view(-1, 1, 1, 1) / length))


def spectral_norm_by_hand(m, x):
    sigma = torch.dot(m.running_u, torch.mv(m.matrix, m.running_v))
    return F.linear(x, m.matrix / sigma)


def scaled_std_conv(m, x):
    """timm: BatchNorm of the weight, with a learned gain and a number of the activation."""
    weight = F.batch_norm(
        m.matrix.view(1, C, -1), None, None, (m.gain * 0.2).view(-1), None, True, 0.0, 1e-6
    )
    return F.conv2d(x, weight.reshape_as(m.matrix), m.bias)


def std_conv(m, x):
    weight = F.batch_norm(
        m.matrix.reshape(1, C, -1), None, None, training=True, momentum=0.0, eps=1e-6
    )
    return F.conv2d(x, weight.reshape_as(m.matrix))


def std_conv_var_mean(m, x):
    variance, mean = torch.var_mean(m.matrix, (1, 2, 3), unbiased=False, keepdim=True)
    return F.conv2d(x, (m.matrix - mean) / torch.sqrt(variance + 1e-10))


def std_conv_two_steps(m, x):
    """As the authors of weight standardization wrote it: means one dim at a time, eps outside."""
    w = m.matrix
    mean = w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    centred = w - mean
    deviation = centred.view(C, -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return F.conv2d(x, centred / deviation.expand_as(w))


# -- graphs, cosines, masks ----------------------------------------------------------------------


def graph_norm(m, x):
    centred = x - x.mean(0, keepdim=True) * m.mean_scale
    variance = centred.pow(2).mean(0, keepdim=True)
    return m.weight * centred / (variance + 1e-5).sqrt() + m.bias


def graph_norm_of_graphs(m, x, graph):
    """Three graphs in a batch; `graph` has the number of each node's."""
    count = torch.zeros(3, 1, dtype=x.dtype).index_add(0, graph, torch.ones_like(x[:, :1]))

    def mean_of(t):
        return torch.zeros(3, D, dtype=x.dtype).index_add(0, graph, t) / count

    centred = x - mean_of(x).index_select(0, graph) * m.mean_scale
    root = (mean_of(centred.pow(2)) + 1e-5).sqrt().index_select(0, graph)
    return m.weight * centred / root + m.bias


def of_graphs():
    return torch.randn(24, D), torch.arange(24) % 3


def pair_norm(m, x):
    x = x - x.mean(0, keepdim=True)
    return x / (1e-5 + x.pow(2).sum(-1).mean()).sqrt()


def pair_norm_individually(m, x):
    x = x - x.mean(0, keepdim=True)
    return x / (1e-5 + x.norm(2, -1, keepdim=True))


def node_norm(m, x):
    mean = torch.mean(x, dim=1, keepdim=True)
    deviation = torch.sqrt(torch.var(x, unbiased=False, dim=1, keepdim=True) + 1e-6)
    return (x - mean) / deviation


def node_norm_of_variance(m, x):
    return x / torch.sqrt(torch.var(x, unbiased=False, dim=1, keepdim=True) + 1e-6)


def unit_length(x):
    return x / x.norm(p=2, dim=-1, keepdim=True)


def ngpt(m, x):
    """Weights and hidden states on the sphere, and a step between two points of it."""
    h = unit_length(x)
    proposed = unit_length(torch.relu(F.linear(h, unit_length(m.matrix))))
    return unit_length(h + torch.abs(m.rate * 2.0) * (proposed - h))


def masked_layer_norm(m, x, mask):
    mean = (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    variance = ((x - mean).pow(2) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * m.weight + m.bias


def masked_batch_norm(m, x, mask):
    count = mask.sum()
    mean = (x * mask).sum((0, 1)) / count
    variance = ((x - mean).square() * mask).sum((0, 1)) / count
    return (x - mean) / torch.sqrt(variance + 1e-5) * m.weight + m.bias


def joined(m, a, b):
    return torch.split(m.norm(torch.cat([a, b], -1)), [D, D], -1)


def joined_by_hand(m, a, b):
    h = torch.cat([a, b], -1)
    mean = h.mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + 1e-5)
    left, right = (h * m.weight + m.bias).chunk(2, -1)
    return left * torch.sigmoid(right)


def linear():
    return nn.Linear(D, D)


def layer_norm():
    return roughened(nn.LayerNorm(D))


def plain_layer_norm():
    return nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)


def modulation(width):
    return lambda: nn.Linear(6, width)


def on_batch(function):
    """A function that calls a BatchNorm1d."""
    return lambda: roughened(Spelled(function, norm=lambda: nn.BatchNorm1d(D)))


def in_eval(make):
    return lambda: roughened(make()).eval()


def in_bfloat16(make):
    return lambda: make().bfloat16()


QK = {"q": linear, "k": linear}
GEMMA = spelled(gemma, weight=D)
CONV = {"matrix": (C, C, 3, 3)}
EVO_B = {"running_var": C, **OF_C}

# Sites that come up in several cases.
RMS = ("RMSNorm", (-1,), 1e-6)
GROUPED = ("RMSNorm", (-1,), 1e-5, G)
LN = ("LayerNorm", (-1,), 1e-5)
ADA_LN = ("LayerNorm", (-1,), 1e-6)
LN_2D = ("LayerNorm", (1,), 1e-6)
GN = ("GroupNorm", (1, 2, 3), 1e-5, G)
GN_OF_ROWS = ("GroupNorm", (-1,), 1e-5, G)
IN = ("InstanceNorm", (-2, -1), 1e-5)
BN = ("BatchNorm", (0, 2, 3), 1e-5)
BN_OF_ROWS = ("BatchNorm", (0,), 1e-5)
BN_EVAL = ("BatchNorm", (), 1e-5)
FROZEN = ("FrozenBatchNorm", (), 1e-5)
UN = ("UnifiedNorm", (), 1e-5)
POWER = ("PowerNorm", (0, 1), 1e-5)
DYT = ("DyT", (), None)
UNIT = ("L2Norm", (-1,), 0.0)
WN = ("WeightNorm", (-1,), 0.0)
WN_CONV = ("WeightNorm", (-3, -2, -1), 0.0)
SN = ("SpectralNorm", (-2, -1), None)

TABLE = {
    "Llama/Mistral/Qwen RMSNorm": {
        "llama": Case(spelled(llama, weight=D), tokens, [RMS], weighted=True),
        "llama-bfloat16": Case(in_bfloat16(spelled(llama, weight=D)), half(tokens), [RMS]),
    },
    "T5LayerNorm": {
        "t5": Case(spelled(t5, weight=D), tokens, [RMS], weighted=True),
        "t5-bfloat16": Case(in_bfloat16(spelled(t5, weight=D)), half(tokens), [RMS]),
    },
    "Gemma 1-3": {
        "gemma": Case(GEMMA, tokens, [RMS], weighted=True),
        "gemma-bfloat16": Case(in_bfloat16(GEMMA), half(tokens), [RMS]),
    },
    "Nemotron LayerNorm1P": {"layer-norm-1p": Case(spelled(layer_norm_1p, **OF_D), tokens, [LN])},
    "Megatron zero_centered_gamma": {
        "zero-centered-rms": Case(
            spelled(zero_centered_rms, weight=D), tokens, [("RMSNorm", (-1,), 1e-5)]
        ),
        "zero-centered-layer-norm": Case(
            spelled(zero_centered_layer_norm, **OF_D), tokens, [LN], weighted=True
        ),
    },
    "Cohere": {
        "cohere": Case(spelled(cohere, weight=D), tokens, [LN], weighted=True),
        "cohere-per-head": Case(spelled(cohere, weight=(3, D)), heads, [LN], weighted=True),
    },
    "QK-norm": {
        "qk": Case(spelled(qk_norm, q_weight=4, k_weight=4, **QK), tokens, [RMS, RMS]),
        "qk-all-heads": Case(
            spelled(qk_norm_all_heads, q_weight=D, k_weight=D, **QK), tokens, [RMS, RMS]
        ),
        "qk-chameleon": Case(
            spelled(qk_norm_chameleon, q=linear, weight=(4, 4), bias=(4, 4)), tokens, [LN]
        ),
    },
    "V-norm": {"v": Case(spelled(v_norm, v=linear), tokens, [RMS], weighted=False)},
    "Sandwich / Gemma-2, peri-LN": {
        "sandwich": Case(
            spelled(sandwich, before=GEMMA, f=linear, after=GEMMA), tokens, [RMS, RMS]
        ),
        "peri-ln": Case(
            spelled(sandwich, before=layer_norm, f=linear, after=layer_norm), tokens, [LN, LN]
        ),
    },
    "OLMo-2 reordered": {
        "reordered": Case(
            spelled(reordered, f=linear, norm=spelled(llama, weight=D)), tokens, [RMS]
        ),
    },
    "Parallel block (GPT-J, PaLM, Phi-2)": {
        "parallel": Case(
            spelled(parallel, norm=layer_norm, attention=linear, up=linear, down=linear),
            tokens,
            [LN],
        ),
    },
    "DeepNorm": {
        "deep-norm": Case(spelled(deep_norm, norm=layer_norm, f=linear), tokens, [LN]),
    },
    "ReZero / LayerScale": {
        "re-zero": Case(spelled(residual_scaled, scale=1, f=linear), tokens, [], missed=False),
        "layer-scale": Case(spelled(residual_scaled, scale=D, f=linear), tokens, [], missed=False),
    },
    "Mamba-2 gated RMSNorm": {
        "gate-before": Case(
            spelled(gate_before(1), weight=D), with_gate, [("RMSNorm", (-1,), 1e-5)]
        ),
        "gate-before-grouped": Case(
            spelled(gate_before(G), weight=D), with_gate, [GROUPED], weighted=True
        ),
        "gate-before-rstd": Case(
            spelled(gate_before_rstd, weight=D), with_gate, [GROUPED], weighted=True
        ),
        "gate-after": Case(spelled(gate_after, weight=D), with_gate, [RMS], weighted=True),
    },
    "DyT": {
        "dyt": Case(spelled(dyt, alpha=1, **OF_D), tokens, [DYT], weighted=True),
        "dyt-channels-first": Case(spelled(dyt_channels_first, alpha=1, **OF_C), images, [DYT]),
    },
    "AdaLN": {
        "adaln": Case(
            spelled(adaptive, norm=plain_layer_norm, modulation=modulation(2 * D)),
            with_condition(tokens),
            [ADA_LN],
        ),
        "adaln-by-hand": Case(
            spelled(adaptive_by_hand, modulation=modulation(2 * D)),
            with_condition(tokens),
            [ADA_LN],
            weighted=True,
        ),
        "adaln-zero": Case(
            spelled(adaptive_zero, norm=plain_layer_norm, modulation=modulation(3 * D), f=linear),
            with_condition(tokens),
            [ADA_LN],
        ),
    },
    "AdaIN / SPADE / FiLM": {
        "adain": Case(spelled(adain), lambda: (*images(), *images()), [IN]),
        # an affine part for each pixel is as large as the value: it stays outside
        "spade": Case(
            spelled(
                spade,
                norm=lambda: nn.InstanceNorm2d(C),
                shared=lambda: nn.Conv2d(3, 4, 3, padding=1),
                gamma=lambda: nn.Conv2d(4, C, 3, padding=1),
                beta=lambda: nn.Conv2d(4, C, 3, padding=1),
            ),
            lambda: (*images(), torch.randn(4, 3, 6, 5)),
            [IN],
            weighted=False,
        ),
        "film": Case(
            in_eval(
                spelled(
                    film,
                    norm=lambda: nn.BatchNorm2d(C, affine=False),
                    modulation=modulation(2 * C),
                )
            ),
            with_condition(images),
            [BN_EVAL],
        ),
    },
    "GroupNorm": {
        "group-norm": Case(lambda: roughened(nn.GroupNorm(G, C)), images, [GN], weighted=True),
        "group-norm-of-rows": Case(lambda: roughened(nn.GroupNorm(G, D)), rows, [GN_OF_ROWS]),
        "group-norm-flat": Case(spelled(group_norm_flat, **OF_C), images, [GN], weighted=True),
        "group-norm-five-dims": Case(spelled(group_norm_five_dims, **OF_C), images, [GN]),
        "group-norm-joined-rows": Case(spelled(group_norm_rows, **OF_C), images, [GN]),
        "group-norm-var-mean": Case(spelled(group_norm_var_mean, **OF_C), images, [GN]),
        "group-norm-affine-in-groups": Case(
            spelled(group_norm_affine_in_groups, **OF_C), images, [GN]
        ),
        "group-norm-of-rows-by-hand": Case(spelled(group_norm_of_rows, **OF_D), rows, [GN_OF_ROWS]),
    },
    "InstanceNorm": {
        "instance-norm": Case(lambda: nn.InstanceNorm2d(C), images, [IN], weighted=False),
        "instance-norm-affine": Case(
            lambda: roughened(nn.InstanceNorm2d(C, affine=True)), images, [IN], weighted=True
        ),
        "instance-norm-tracked": Case(
            in_eval(lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True)),
            images,
            [("InstanceNorm", (), 1e-5)],
        ),
        "instance-norm-by-hand": Case(spelled(instance_norm, **OF_C), images, [IN], weighted=True),
        "instance-norm-plain": Case(spelled(instance_norm_plain), images, [IN]),
        "instance-norm-flat": Case(spelled(instance_norm_flat, **OF_C), images, [IN]),
        "instance-norm-two-steps": Case(spelled(instance_norm_two_steps, **OF_C), images, [IN]),
        "instance-norm-two-steps-squeezed": Case(
            spelled(instance_norm_two_steps_squeezed, weight=C), images, [IN]
        ),
        "instance-norm-of-sequences": Case(
            spelled(instance_norm_of_sequences, weight=12, bias=12),
            tokens,
            [("InstanceNorm", (-1,), 1e-5)],
        ),
    },
    "LayerNorm2d channels-first": {
        "layer-norm-2d-permuted": Case(
            spelled(layer_norm_permuted, **OF_C), images, [("LayerNorm", (-1,), 1e-6)]
        ),
        "layer-norm-2d-convnext": Case(
            spelled(layer_norm_convnext, **OF_C), images, [LN_2D], weighted=True
        ),
        "layer-norm-2d-var-mean": Case(spelled(layer_norm_var_mean, **OF_C), images, [LN_2D]),
        "group-norm-of-one-group": Case(
            lambda: roughened(nn.GroupNorm(1, C)), images, [("GroupNorm", (1, 2, 3), 1e-5, 1)]
        ),
    },
    "BatchNorm eval / FrozenBN": {
        "batch-norm": Case(in_eval(lambda: nn.BatchNorm2d(C)), images, [BN_EVAL]),
        "frozen-torchvision": Case(spelled(frozen(1e-5), **RUNNING), images, [FROZEN]),
        "frozen-torchvision-no-eps": Case(
            spelled(frozen(0.0), **RUNNING), images, [("FrozenBatchNorm", (), 0.0)]
        ),
        "frozen-detectron": Case(spelled(frozen_detectron, **RUNNING), images, [FROZEN]),
        "frozen-given-statistics": Case(spelled(given_statistics, **RUNNING), images, [FROZEN]),
        "tokens-permuted": Case(
            on_batch(tokens_permuted), tokens, [("BatchNorm", (0, 2), 1e-5)], batch=True
        ),
        "tokens-permuted-eval": Case(in_eval(on_batch(tokens_permuted)), tokens, [BN_EVAL]),
        "tokens-flattened": Case(on_batch(tokens_flattened), tokens, [BN_OF_ROWS], batch=True),
        "tokens-flattened-eval": Case(in_eval(on_batch(tokens_flattened)), tokens, [BN_EVAL]),
        "batch-norm-scale-and-shift": Case(
            spelled(batch_norm_scale_and_shift, **RUNNING), images, [BN], batch=True
        ),
        "batch-norm-textbook": Case(
            spelled(batch_norm_textbook, **RUNNING), images, [BN], batch=True
        ),
        "batch-norm-two-steps": Case(
            spelled(batch_norm_two_steps, **OF_C), images, [BN], batch=True
        ),
        "batch-norm-of-tokens": Case(
            spelled(batch_norm_of_tokens, **OF_D),
            tokens,
            [("BatchNorm", (0, 1), 1e-5)],
            batch=True,
        ),
    },
    "SyncBN": {"sync-batch-norm": Case(in_eval(lambda: nn.SyncBatchNorm(C)), images, [BN_EVAL])},
    "BatchRenorm": {
        "batch-renorm": Case(spelled(batch_renorm, **RUNNING), images, [BN], batch=True),
        "batch-renorm-eval": Case(in_eval(spelled(batch_renorm, **RUNNING)), images, [FROZEN]),
    },
    "GhostBN": {
        "ghost-chunks": Case(on_batch(ghost_chunks), rows, [BN_OF_ROWS] * 3, batch=True),
        "ghost-channels": Case(spelled(ghost_channels, **RUNNING), images, [BN], batch=True),
        "ghost-eval": Case(in_eval(on_batch(ghost_chunks)), rows, [BN_EVAL]),
    },
    "FRN(+TLU)": {
        "filter-response": Case(
            spelled(filter_response, tau=C, **OF_C),
            images,
            [("FilterResponseNorm", (-2, -1), 1e-5)],
            weighted=True,
        ),
        "filter-response-learned-eps": Case(
            spelled(filter_response_learned_eps, eps=1, tau=C, **OF_C),
            images,
            [("FilterResponseNorm", (-2, -1), None)],
        ),
    },
    "GRN (ConvNeXt-V2)": {
        "global-response-last": Case(
            spelled(global_response_last, weight=(1, 1, 1, C), bias=(1, 1, 1, C)),
            images_last,
            [("GlobalResponseNorm", (1, 2), 1e-6)],
        ),
        "global-response-first": Case(
            spelled(global_response_first, **OF_C),
            images,
            [("GlobalResponseNorm", (-2, -1), 1e-6)],
        ),
    },
    "LocalResponseNorm": {
        # (k + alpha * mean)^-beta: k stands where other norms have their eps
        "local-response": Case(
            lambda: nn.LocalResponseNorm(5, alpha=0.1, k=2.0),
            images,
            [("LocalResponseNorm", (1,), 2.0)],
        ),
    },
    "ScaleNorm": {
        "scale-norm": Case(
            spelled(scale_norm, scale=()), tokens, [("ScaleNorm", (-1,), 1e-5)], weighted=True
        ),
        "scale-norm-normalize": Case(
            spelled(scale_norm_normalize, scale=1), tokens, [("ScaleNorm", (-1,), 1e-12)]
        ),
    },
    "L2Norm / F.normalize": {
        "normalize": Case(
            spelled(lambda m, x: F.normalize(x, dim=-1)), tokens, [("L2Norm", (-1,), 1e-12)]
        ),
        "normalize-channels": Case(
            spelled(lambda m, x: F.normalize(x)), images, [("L2Norm", (1,), 1e-12)]
        ),
        "normalize-ssd": Case(
            spelled(normalize_ssd, weight=C), images, [("L2Norm", (1,), 1e-10)], weighted=True
        ),
    },
    "weight norm": {
        "weight-norm": Case(lambda: parametrizations.weight_norm(nn.Linear(D, C)), tokens, [WN]),
        "weight-norm-conv": Case(
            lambda: parametrizations.weight_norm(nn.Conv2d(C, 4, 3)), images, [WN_CONV]
        ),
        "weight-norm-hooks": Case(weight_norm_with_hooks, tokens, [WN]),
        "weight-norm-by-hand": Case(
            spelled(weight_norm_by_hand, g=(C, 1), matrix=(C, D)), tokens, [WN]
        ),
        "weight-norm-by-hand-conv": Case(
            spelled(weight_norm_of_conv, g=C, **CONV), images, [WN_CONV]
        ),
    },
    "spectral norm": {
        "spectral-norm": Case(
            in_eval(lambda: parametrizations.spectral_norm(nn.Linear(D, C))), tokens, [SN]
        ),
        "spectral-norm-conv": Case(
            in_eval(lambda: parametrizations.spectral_norm(nn.Conv2d(C, 4, 3))),
            images,
            [("SpectralNorm", (-4, -3, -2, -1), None)],
        ),
        "spectral-norm-by-hand": Case(
            spelled(spectral_norm_by_hand, running_u=C, running_v=D, matrix=(C, D)), tokens, [SN]
        ),
    },
    "GraphNorm": {
        # a mean square over the nodes, of x less a learned part of its mean
        "graph-norm": Case(
            spelled(graph_norm, mean_scale=D, **OF_D),
            rows,
            [("PowerNorm", (0,), 1e-5)],
            batch=True,
        ),
        # the statistics are of rows that another tensor picks, so they are over no dims of x
        "graph-norm-of-graphs": Case(
            spelled(graph_norm_of_graphs, mean_scale=D, **OF_D), of_graphs, [], missed=True
        ),
    },
    "PairNorm, NodeNorm": {
        # sqrt(eps + a mean of sums over D) = sqrt(D) sqrt(eps / D + mean square)
        "pair-norm": Case(spelled(pair_norm), rows, [("RMSNorm", (-2, -1), 1e-5 / D)]),
        "pair-norm-individually": Case(
            spelled(pair_norm_individually), rows, [("L2Norm", (-1,), 1e-5)]
        ),
        "node-norm": Case(spelled(node_norm), rows, [("LayerNorm", (-1,), 1e-6)]),
        "node-norm-of-variance": Case(
            spelled(node_norm_of_variance), rows, [("SimpleNorm", (-1,), 1e-6)]
        ),
    },
    "RMSNorm via SimpleNorm (timm)": {
        "simple-norm": Case(
            spelled(simple_norm, weight=D), tokens, [("SimpleNorm", (-1,), 1e-6)], weighted=True
        ),
        "simple-norm-2d": Case(
            spelled(simple_norm_2d, weight=C), images, [("SimpleNorm", (1,), 1e-6)]
        ),
    },
    "nGPT / cosine-norm": {
        "ngpt": Case(spelled(ngpt, matrix=(D, D), rate=D), tokens, [UNIT, WN, UNIT, UNIT]),
    },
    # -- beyond the list
    "EvoNorm": {
        # dims are those of one image; the statistics of the batch are beside them
        "evo-b0": Case(
            spelled(evo_b0, slope=C, **EVO_B), images, [("EvoNormB0", (-2, -1), 1e-3)], batch=True
        ),
        "evo-b1": Case(
            spelled(evo_b1, **EVO_B), images, [("EvoNormB1", (-2, -1), 1e-5)], batch=True
        ),
        "evo-b2": Case(
            spelled(evo_b2, **EVO_B), images, [("EvoNormB2", (-2, -1), 1e-5)], batch=True
        ),
        "evo-b0-eval": Case(
            in_eval(spelled(evo_b0, slope=C, **EVO_B)), images, [("EvoNormB0", (-2, -1), 1e-3)]
        ),
        "evo-b1-eval": Case(
            in_eval(spelled(evo_b1, **EVO_B)), images, [("EvoNormB1", (-2, -1), 1e-5)]
        ),
        "evo-b2-eval": Case(
            in_eval(spelled(evo_b2, **EVO_B)), images, [("EvoNormB2", (-2, -1), 1e-5)]
        ),
        "evo-s0": Case(
            spelled(evo_s0, slope=C, **OF_C), images, [("EvoNormS0", (1, 2, 3), 1e-5, G)]
        ),
        "evo-s0a": Case(
            spelled(evo_s0a, slope=C, **OF_C), images, [("EvoNormS0", (1, 2, 3), 1e-3, G)]
        ),
        "evo-s1": Case(spelled(evo_s1, **OF_C), images, [("EvoNormS1", (1, 2, 3), 1e-5, G)]),
        "evo-s2": Case(spelled(evo_s2, **OF_C), images, [("EvoNormS2", (1, 2, 3), 1e-5, G)]),
    },
    "PowerNorm": {
        "power-norm-training": Case(
            spelled(power_norm_training, **OF_D), tokens, [POWER], batch=True
        ),
        "power-norm-of-images": Case(
            spelled(power_norm_of_images, **OF_C),
            images,
            [("PowerNorm", (0, 2, 3), 1e-5)],
            batch=True,
        ),
        "power-norm-repeated": Case(power_norm(group_scaling_repeated), tokens, [GROUPED, UN]),
        "power-norm-tiled": Case(power_norm(group_scaling_tiled), tokens, [GROUPED, UN]),
        "power-norm-expanded": Case(power_norm(group_scaling_expanded), tokens, [GROUPED, UN]),
    },
    "Unified Normalization": {
        "unified-norm": Case(spelled(unified_norm, running_var=D, **OF_D), tokens, [UN]),
        "unified-norm-released": Case(
            spelled(unified_norm_released, running_var=D, **OF_D), tokens, [UN], weighted=True
        ),
        "unified-norm-warming-up": Case(
            spelled(unified_norm_warming_up, **OF_D), tokens, [POWER], batch=True
        ),
    },
    "Region Normalization": {
        "region-norm": Case(
            spelled(region_norm, inside=C, outside=C, bias=C), with_mask, [BN, BN], batch=True
        ),
    },
    "Pre-CRMSNorm": {
        "compressed-rms": Case(
            spelled(compressed_rms),
            lambda: (torch.randn(4, 12, D - 1),),
            [("CRMSNorm", (-1,), 1e-6)],
        ),
    },
    "Partial RMSNorm": {
        "partial-rms": Case(spelled(partial_rms, weight=D), tokens, [("RMSNorm", (-1,), 1e-8)]),
        "partial-rms-inside": Case(spelled(partial_rms_inside, weight=D), tokens, [RMS]),
    },
    "SimpleRMSNorm": {
        "simple-rms-outside": Case(
            spelled(simple_rms_outside), tokens, [("RMSNorm", (-1,), 1e-8)], weighted=False
        ),
        "simple-rms-inside": Case(spelled(simple_rms_inside), tokens, [RMS], weighted=False),
        "simple-rms-normalize": Case(
            spelled(lambda m, x: F.normalize(x, dim=-1) * D**0.5),
            tokens,
            [("RMSNorm", (-1,), 1e-12)],
        ),
        # sqrt(d) on the wrong side, as forks have it: d times too small, and a norm all the same
        "simple-rms-forked": Case(
            spelled(lambda m, x: F.normalize(x, dim=-1) * D**-0.5),
            tokens,
            [("RMSNorm", (-1,), 1e-12)],
        ),
    },
    "Weight standardization": {
        # x is the weight as it is viewed for the operator
        "scaled-std-conv": Case(
            spelled(scaled_std_conv, gain=(C, 1, 1, 1), bias=C, **CONV),
            images,
            [("WeightStandardization", (0, 2), 1e-6)],
            weighted=True,
        ),
        "std-conv": Case(
            spelled(std_conv, **CONV), images, [("WeightStandardization", (0, 2), 1e-6)]
        ),
        "std-conv-var-mean": Case(
            spelled(std_conv_var_mean, **CONV),
            images,
            [("WeightStandardization", (-3, -2, -1), 1e-10)],
        ),
        "std-conv-two-steps": Case(
            spelled(std_conv_two_steps, **CONV),
            images,
            [("WeightStandardization", (-3, -2, -1), 1e-5)],
        ),
    },
    "Masked statistics": {
        "masked-layer-norm": Case(
            spelled(masked_layer_norm, **OF_D),
            lambda: (*tokens(), (torch.rand(4, 12, D) > 0.3).float()),
            [],
            missed=True,
        ),
        "masked-batch-norm": Case(
            spelled(masked_batch_norm, **OF_D),
            lambda: (*tokens(), (torch.rand(4, 12, 1) > 0.3).float()),
            [],
            batch=True,
            missed=True,
        ),
    },
    "LayerNorm of joined inputs": {
        "joined": Case(spelled(joined, norm=lambda: nn.LayerNorm(2 * D)), with_gate, [LN]),
        "joined-by-hand": Case(
            spelled(joined_by_hand, weight=2 * D, bias=2 * D), with_gate, [LN], weighted=True
        ),
    },
}

CASES = {name: case for cases in TABLE.values() for name, case in cases.items()}


def check(case: Case, *, grad: bool) -> None:
    assert_agrees(case.make(), *case.inputs(), grad=grad)
    report = normfx.report()
    got = [(site.kind, site.dims, site.eps) for site in report.sites]
    wanted = [(kind, dims, _close(eps)) for kind, dims, eps, *_ in case.sites]
    assert got == wanted, f"near misses: {[(m.name, m.code.value) for m in report.near_misses]}"
    for site, expected in zip(report.sites, case.sites, strict=True):
        if len(expected) == 4:
            assert site.groups == expected[3]
    if case.missed is not None:
        assert bool(report.near_misses) is case.missed
    if case.weighted is not None:
        assert {site.weight for site in report.sites} == {case.weighted}


def _close(eps: float | None) -> Any:
    return None if eps is None else pytest.approx(eps, rel=1e-6, abs=0)


@pytest.mark.parametrize("case", CASES)
def test_found_as_what_it_is(case):
    check(CASES[case], grad=False)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.batch])
def test_found_in_training(case):
    check(CASES[case], grad=True)


@pytest.mark.parametrize("line", LINES)
def test_every_line_has_a_case(line):
    assert TABLE.get(line)

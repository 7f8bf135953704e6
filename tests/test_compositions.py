"""Models put together at random: whatever rules apply to them, they compute what they computed.

`python tests/test_compositions.py FIRST LAST [bfloat16] [grad] [inductor]` tries more than the tests do, and prints
those that fail.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from assertions import compiled, tensors_of
from torch import Tensor, nn

import normfx
from normfx.passes import RULES

WIDTH, ROWS, SIDE = 8, 6, 9
WIDTHS = (4, 6, 8, 12)


class Call(nn.Module):
    """A function of a tensor as a layer; what modules it needs are its children."""

    def __init__(self, function: Callable[..., Tensor], *children: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(children)

    def forward(self, x):
        return self.function(x, *self.inner)


class Free(nn.Module):
    """A parameter that is added, multiplied or put in front."""

    def __init__(self, shape, combine) -> None:
        super().__init__()
        self.free, self.combine = nn.Parameter(torch.randn(shape)), combine

    def forward(self, x):
        return self.combine(x, self.free)


class Taps(nn.Module):
    """A chain whose intermediate results are returned too, some of them."""

    def __init__(self, layers, taps) -> None:
        super().__init__()
        self.layers, self.taps = nn.ModuleList(layers), taps

    def forward(self, x):
        kept = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                kept.append(x)
        return x, kept


def norm_of(rng, width, *, images):
    """A norm over channels, with a scale that may be negative or zero, or with none."""
    affine = rng.random() < 0.8
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.GroupNorm(rng.choice([1, 2]), width, affine=affine),
        lambda: (
            nn.BatchNorm2d(width, affine=affine) if images else nn.BatchNorm1d(width, affine=affine)
        ),
        lambda: nn.BatchNorm2d(width) if images else nn.BatchNorm1d(width),
    ]
    over = [
        lambda: nn.LayerNorm(width, eps=rng.choice([1e-5, 1e-3]), elementwise_affine=affine),
        lambda: nn.LayerNorm(width, bias=False),
        lambda: nn.RMSNorm(width, elementwise_affine=affine),
        lambda: nn.RMSNorm(width),
    ]
    if images:
        made = rng.choice([*kinds, *kinds, *over])()
        if not isinstance(made, (nn.LayerNorm, nn.RMSNorm)):
            return made
        return Call(lambda x, n: n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), made)
    made = rng.choice([*kinds[1:], *over, *over])()
    if not isinstance(made, nn.BatchNorm1d):
        return made
    return Call(lambda x, n: n(x.mT).mT, made)


def roughen(model, rng):
    """Parameters as a hostile trainer leaves them: scales below zero and at it, statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    hostile = rng.random() < 0.3
    with torch.no_grad():
        for module in model.modules():
            if "Norm" not in type(module).__name__:
                continue
            for key, held in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if not held.dtype.is_floating_point:
                    continue
                low = (
                    -1.0 if "bias" in key or "mean" in key or (hostile and key == "weight") else 0.4
                )
                held.uniform_(low, 1.6, generator=generator)
                if hostile and key == "weight" and held.numel() > 3:
                    held[1] = 0.0
    return model


def activation(rng):
    return Call(
        rng.choice(
            [
                torch.relu,
                torch.relu,
                F.gelu,
                lambda x: F.leaky_relu(x, 0.1),
                torch.abs,
                F.silu,
                torch.sigmoid,
                lambda x: x.clamp(-2, 2),
                lambda x: F.relu_(x.clone()),
            ]
        )
    )


def image_layer(rng, width, depth):
    """A layer from `width` channels to (the layer, its channels), the image as large as before."""
    out = rng.choice(WIDTHS)
    kind = rng.randrange(13)
    if kind <= 2:
        taps = rng.choice([1, 3])
        groups = rng.choice([1, 1, 2]) if width % 2 == 0 and out % 2 == 0 else 1
        mode = rng.choice(["zeros", "zeros", "reflect", "circular", "replicate"])
        dilation = rng.choice([1, 2]) if taps == 3 else 1
        pads = dilation * (taps // 2)
        made = nn.Conv2d(
            width,
            out,
            taps,
            padding=pads,
            dilation=dilation,
            groups=groups,
            bias=rng.random() < 0.6,
            padding_mode=mode,
        )
        return made, out
    if kind == 3:
        return nn.Conv2d(width, width, 3, padding=1, groups=width, bias=rng.random() < 0.5), width
    if kind == 4:
        return nn.ConvTranspose2d(width, out, 3, padding=1, bias=rng.random() < 0.5), out
    if kind in (5, 6, 7):
        return norm_of(rng, width, images=True), width
    if kind == 8:
        return activation(rng), width
    if kind == 9:
        pool = rng.choice(
            [
                lambda x: F.max_pool2d(x, 3, 1, 1),
                lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=True),
                lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
                lambda x: F.interpolate(F.max_pool2d(x, 2), size=(SIDE, SIDE)),
                lambda x: F.pad(x, (1, 0, 0, 1))[..., 1:, :-1],
                lambda x: x - x.mean((2, 3), keepdim=True),
                lambda x: x.contiguous(memory_format=torch.channels_last),
                lambda x: x.flip(1),
                lambda x: x * 0.5,
                lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
            ]
        )
        return Call(pool), width
    if kind == 10:
        shape, combine = rng.choice(
            [
                ((width, 1, 1), torch.mul),
                ((width, 1, 1), torch.add),
                ((1, SIDE, 1), torch.add),
                ((), torch.mul),
            ]
        )
        return Free(shape, combine), width
    if depth == 0:
        return nn.Conv2d(width, out, 1), out
    inner, inside = image_chain(rng, width, depth - 1, rng.randint(1, 3))
    if kind == 11 and inside <= 12:
        return Call(lambda x, f: torch.cat([x, f(x)], 1), inner), width + inside
    if inside != width:
        inner = nn.Sequential(inner, nn.Conv2d(inside, width, 1, bias=rng.random() < 0.5))
    if rng.random() < 0.3:  # the same block twice
        return Call(lambda x, f: f(x + f(x)), inner), width
    return Call(lambda x, f: x + f(x), inner), width


def image_chain(rng, width, depth, length):
    layers = []
    for _ in range(length):
        layer, width = image_layer(rng, width, depth)
        layers.append(layer)
        if "Norm" in repr(layer) and rng.random() < 0.5:
            out = rng.choice(WIDTHS)
            layers.append(nn.Conv2d(width, out, 3, padding=1))
            width = out
    return nn.Sequential(*layers), width


def attend(x, q, k, v):
    heads = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q(x), k(x), v(x)))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def row_layer(rng, width, depth):
    """A layer of rows of `width` channels: (the layer, its channels)."""
    out = rng.choice(WIDTHS)
    kind = rng.randrange(13)
    if kind <= 2:
        return nn.Linear(width, out, bias=rng.random() < 0.6), out
    if kind == 3:
        return Free((width, out), torch.matmul), out
    if kind in (4, 5, 6):
        return norm_of(rng, width, images=False), width
    if kind == 7:
        return activation(rng), width
    if kind == 8:
        shape, combine = rng.choice(
            [
                ((width,), torch.mul),
                ((width,), torch.add),
                ((ROWS, width), torch.add),
                ((ROWS, 1), torch.add),
                ((width,), lambda x, p: x * (1 + p.tanh())),
                ((1, 1, width), lambda x, p: torch.cat([p.expand(len(x), 1, -1), x[:, 1:]], 1)),
                ((), torch.mul),
            ]
        )
        return Free(shape, combine), width
    if kind == 9:
        moved = rng.choice(
            [
                lambda x: x.roll(1, 1),
                lambda x: x.flip(-1),
                lambda x: torch.cat([x[..., width // 2 :], x[..., : width // 2]], -1),
                lambda x: x * (x[..., :1] > 0),
                lambda x: x.masked_fill(x[..., :1] > 0, 0.0),
                lambda x: x[:, torch.tensor([0, 2, 1, 3, 5, 4])],
                lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
                lambda x: x.add(x.mean(1, keepdim=True)),
                lambda x: x.clone().mul_(2.0),
                lambda x: x.softmax(-1),
                lambda x: x * x.sigmoid(),
                lambda x: x - x.mean(-1, keepdim=True),
                lambda x: F.dropout(x, 0.5, training=False),
            ]
        )
        return Call(moved), width
    if kind == 10:
        third = [nn.Linear(width, width, bias=rng.random() < 0.5) for _ in range(3)]
        return Call(attend, *third), width
    if depth == 0:
        return nn.Linear(width, out), out
    inner, inside = row_chain(rng, width, depth - 1, rng.randint(1, 3))
    if inside != width:
        inner = nn.Sequential(inner, nn.Linear(inside, width, bias=rng.random() < 0.5))
    form = rng.choice(
        [
            lambda x, f: x + f(x),
            lambda x, f: x + f(x),
            lambda x, f: f(x + f(x)),
            lambda x, f: x + 0.5 * f(x),
            lambda x, f: f(x) * x,
            lambda x, f: torch.cat([x[:, :2], f(x)[:, 2:]], 1),
            lambda x, f: x + torch.sigmoid(x) * f(x),
        ]
    )
    return Call(form, inner), width


def row_chain(rng, width, depth, length):
    layers = []
    for _ in range(length):
        layer, width = row_layer(rng, width, depth)
        layers.append(layer)
        if "Norm" in repr(layer) and rng.random() < 0.5:
            out = rng.choice(WIDTHS)
            layers.append(nn.Linear(width, out))
            width = out
    return nn.Sequential(*layers), width


def model_of(seed):
    """A random model and what it is called with."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    images = rng.random() < 0.5
    chain, width = (image_chain if images else row_chain)(rng, WIDTH, 2, rng.randint(5, 10))
    layers: list[nn.Module] = list(chain)
    if images:
        x = torch.randn(4, WIDTH, SIDE, SIDE)
        if rng.random() < 0.3:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(width, 5)]
    elif rng.random() < 0.5:  # a stream begins with a table
        layers = [nn.Embedding(20, WIDTH), *layers]
        x = torch.randint(0, 20, (16, ROWS))
    else:
        x = torch.randn(16, ROWS, WIDTH)
    taps = {i for i in range(len(layers) - 1) if rng.random() < 0.04}
    model = roughen(Taps(layers, taps), rng).eval()
    if rng.random() < 0.2:  # a tied weight
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        for other in linears[1:]:
            if other.weight.shape == linears[0].weight.shape:
                other.weight = linears[0].weight
    return model, x


def drawn(x, seed):
    """Other numbers, or other rows of the table."""
    generator = torch.Generator().manual_seed(seed)
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator).to(x.dtype)
    return torch.randint(0, 20, x.shape, generator=generator)


def ratio_of(model, fast, x, *, grad):
    """The largest ratio of an error to eager's, or to half a unit in the last place, as 2-norms; two is the limit."""
    exact_model = copy.deepcopy(model).double()
    runs = [
        _run(call, owner, given, grad)
        for call, owner, given in (
            (fast, model, x),
            (model, model, x),
            (exact_model, exact_model, x.double() if x.is_floating_point() else x),
        )
    ]
    largest = max((t.abs().max().item() for t in runs[-1] if t.numel()), default=0.0)
    found = [0.0]
    for mine, theirs, truth in zip(*runs, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        error, eagers = ((t.double() - truth).norm().item() for t in (mine, theirs))
        # what is in front of a norm has a true gradient of zero, beside those of the others
        size = largest * truth.numel() ** 0.5 if grad else truth.norm().item()
        allowed = max(eagers, torch.finfo(theirs.dtype).eps * size / 2)
        found.append(error / allowed if allowed else float(error > 0))
    return max(found)


def _run(call, owner, x, grad) -> list[Tensor]:
    owner.zero_grad()
    with torch.set_grad_enabled(grad):
        results = tensors_of(call(x))
    if not grad:
        return results
    total = torch.zeros((), dtype=torch.float64)
    for index, result in enumerate(results):
        generator = torch.Generator().manual_seed(index)
        probe = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        total = total + (result.double() * probe).sum()
    total.backward()
    return [p.grad.clone() for p in owner.parameters() if p.grad is not None]


def worst_of(seed, *, dtype=torch.float32, grad=False, lowering="eager"):
    """The ratio of a random model before and after its parameters change; a median where one is beyond two."""
    model, x = model_of(seed)
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    rules = [rule for rule in RULES if rule != "compress"] if grad else None  # recentre is named
    fast = compiled(model, dynamic=False, rules=rules, lowering=lowering)
    worst = 0.0
    for change in (1.0, 1.25):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(change)
        ratio = ratio_of(model, fast, x, grad=grad)
        if ratio > 2:  # a few numbers may be right by chance: what matters is that it is so always
            others = [ratio_of(model, fast, drawn(x, draw), grad=grad) for draw in range(6)]
            ratio = statistics.median([ratio, *others])
        worst = max(worst, ratio)
    return worst


@pytest.mark.parametrize("seed", range(20))
def test_a_random_model_keeps_the_contract(seed):
    assert worst_of(seed) <= 2


@pytest.mark.parametrize("seed", range(20, 26))
def test_a_random_model_keeps_the_contract_in_bfloat16(seed):
    assert worst_of(seed, dtype=torch.bfloat16) <= 2


@pytest.mark.parametrize("seed", range(30, 36))
def test_a_random_model_keeps_the_contract_with_gradients(seed):
    assert worst_of(seed, grad=True) <= 2


def main(first, last, *given):
    """Tries models; `bfloat16`, `float16`, `grad` and `inductor` may follow."""
    dtype = next((getattr(torch, name) for name in given if name.endswith("16")), torch.float32)
    lowering = "inductor" if "inductor" in given else "eager"
    actions: Counter[str] = Counter()
    for seed in range(int(first), int(last)):
        torch._dynamo.reset()
        normfx.reset()
        try:
            worst = worst_of(seed, dtype=dtype, grad="grad" in given, lowering=lowering)
        except Exception as error:
            print(seed, type(error).__name__, str(error)[:300].replace("\n", " "), flush=True)
            continue
        done = [action for site in normfx.report().sites for action in site.actions]
        actions.update(done)
        if worst > 2:
            print(seed, f"{worst:.2f} times eager's error", sorted(set(done)), flush=True)
    print(first, last, *given, dict(actions))


if __name__ == "__main__":
    main(*sys.argv[1:])

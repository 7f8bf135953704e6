"""The small models of the recordings, made of layers of normfx.nn, with the recordings' state names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from normfx.nn import CRMSNorm, MaskedBatchNorm, ZeroMeanOutputLinear


def attention(q, k, v, causal=False):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    def __init__(self, dim, heads, linear, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = linear(dim, dim)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.to_qkv(x).chunk(3, -1)
        )
        return self.to_out(attention(q, k, v, self.causal).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, width, linear):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, width), nn.GELU(), linear(width, dim))

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    def __init__(self, arguments, norm, linear, causal):
        super().__init__()
        dim, width = arguments["dim"], arguments["mlp"]

        def block():
            return nn.ModuleList(
                [
                    norm(),
                    Attention(dim, arguments["heads"], linear, causal),
                    norm(),
                    FeedForward(dim, width, linear),
                ]
            )

        self.layers = nn.ModuleList([block() for _ in range(arguments["depth"])])

    def forward(self, x):
        for before, attend, between, feed in self.layers:
            x = x + attend(before(x))
            x = x + feed(between(x))
        return x


def parts(arguments, kind):
    """The norm, what writes into the stream, and what is done to a parameter that begins it."""
    width, eps = arguments["dim"], arguments["eps"]
    if kind == "pre_ln":
        return (
            lambda: nn.LayerNorm(width, eps, elementwise_affine=False),
            nn.Linear,
            lambda value: value,
        )
    return (
        lambda: nn.RMSNorm(width, eps, elementwise_affine=False),
        ZeroMeanOutputLinear,
        lambda value: value - value.mean(-1, keepdim=True),
    )


class ToyViT(nn.Module):
    def __init__(self, arguments, kind):
        super().__init__()
        norm, linear, self.centred = parts(arguments, kind)
        dim, self.patch = arguments["dim"], arguments["patch"]
        side = arguments["image"] // self.patch
        self.pos_embedding = nn.Parameter(torch.zeros(1, side * side, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.to_patch_embedding = nn.Sequential(nn.Identity(), linear(2 * self.patch**2, dim))
        self.transformer = Transformer(arguments, norm, linear, causal=False)
        self.mlp_head = nn.Sequential(norm(), nn.Linear(dim, arguments["classes"]))

    def forward(self, x):
        p = self.patch
        # (batch, channels, rows, p, columns, p): the channels are innermost in a patch.
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)
        h = self.to_patch_embedding(patches.flatten(3).flatten(1, 2))
        h = h + self.centred(self.pos_embedding)
        h = torch.cat((self.centred(self.cls_token).expand(len(x), -1, -1), h), 1)
        return self.mlp_head(self.transformer(h)[:, 0])


class ToyGPT(nn.Module):
    def __init__(self, arguments, kind):
        super().__init__()
        norm, linear, self.centred = parts(arguments, kind)
        dim = arguments["dim"]
        self.wte = nn.Embedding(arguments["vocab"], dim)
        self.wpe = nn.Embedding(arguments["length"], dim)
        self.transformer = Transformer(arguments, norm, linear, causal=True)
        self.final_norm = norm()
        self.final_linear = nn.Linear(dim, arguments["vocab"])

    def forward(self, x):
        h = self.centred(self.wte(x) + self.wpe(torch.arange(x.shape[1])))
        return self.final_linear(self.final_norm(self.transformer(h)))


def four_ways(arguments, weights, x, kind):
    """The recorded transformer on given weights; `kind` says which norm it has."""
    width, eps = weights["cls_token"].shape[-1], arguments["eps"]
    norm = {
        "pre_ln": nn.LayerNorm(width, eps, elementwise_affine=False),
        "pre_rms": nn.RMSNorm(width, eps, elementwise_affine=False),
        "pre_crms": CRMSNorm(width, eps=eps),
    }[kind]

    def linear(h, name, layer=None):
        weight, bias = weights[f"{name}_weight"], weights[f"{name}_bias"]
        return (
            F.linear(h, weight, bias) if layer is None else F.linear(h, weight[layer], bias[layer])
        )

    h = linear(x, "patch_linear") + weights["pos_embedding"]
    h = torch.cat((weights["cls_token"].expand(len(x), -1, -1), h), 1)
    for layer in range(arguments["depth"]):
        q, k, v = (
            part.unflatten(-1, (arguments["heads"], -1)).transpose(1, 2)
            for part in linear(norm(h), "att_in_linear", layer).chunk(3, -1)
        )
        h = h + linear(attention(q, k, v).transpose(1, 2).flatten(2), "att_out_linear", layer)
        h = h + linear(F.gelu(linear(norm(h), "mlp_in_linear", layer)), "mlp_out_linear", layer)
    return linear(norm(h)[:, 0], "cls_head_linear")


class GraphAttention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.Q, self.K, self.V, self.proj_e = (nn.Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, h, e, src, dst):
        q, k, v, p = (
            layer(value).unflatten(-1, (self.heads, -1))
            for layer, value in ((self.Q, h), (self.K, h), (self.V, h), (self.proj_e, e))
        )
        edge = k[src] * q[dst] / q.shape[-1] ** 0.5 * p
        score = edge.sum(-1, keepdim=True).clamp(-5, 5).exp()
        summed = torch.zeros_like(v).index_add(0, dst, v[src] * score)
        total = torch.zeros_like(v[..., :1]).index_add(0, dst, score)
        return (summed / (total + 1e-6)).flatten(1), edge.flatten(1)


class GraphTransformerLayer(nn.Module):
    """graphdeeplearning/graphtransformer: a norm of nodes and of edges after each residual."""

    def __init__(self, arguments):
        super().__init__()
        width = arguments["width"]
        self.attention = GraphAttention(width, arguments["heads"], arguments["attention_bias"])
        self.O_h, self.O_e = nn.Linear(width, width), nn.Linear(width, width)
        for of in "he":
            setattr(self, f"FFN_{of}_layer1", nn.Linear(width, 2 * width))
            setattr(self, f"FFN_{of}_layer2", nn.Linear(2 * width, width))
            for place in "12":
                if arguments["layer_norm"]:
                    setattr(self, f"layer_norm{place}_{of}", nn.LayerNorm(width))
                if arguments["batch_norm"]:
                    batch_norm = MaskedBatchNorm(
                        width,
                        momentum=arguments["batch_norm_momentum"],
                        eps=arguments["eps"],
                    )
                    setattr(self, f"batch_norm{place}_{of}", batch_norm)

    def normalized(self, value, place, of):
        for kind in ("layer_norm", "batch_norm"):
            value = getattr(self, f"{kind}{place}_{of}", lambda same: same)(value)
        return value

    def forward(self, h, e, src, dst):
        attended = self.attention(h, e, src, dst)
        out = []
        for of, before, writer, new in zip(
            "he", (h, e), (self.O_h, self.O_e), attended, strict=True
        ):
            value = self.normalized(before + writer(new), 1, of)
            fed = getattr(self, f"FFN_{of}_layer1")(value).relu()
            out.append(self.normalized(value + getattr(self, f"FFN_{of}_layer2")(fed), 2, of))
        return out

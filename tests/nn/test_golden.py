"""Recordings of the released implementations, replayed through the layers of normfx.nn.

The manifest alone says what is replayed. NORMFX_GOLDEN is the folder of another recording of the same format.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from golden_models import GraphTransformerLayer, ToyGPT, ToyViT, four_ways
from safetensors.torch import load_file
from torch import nn

import normfx.nn as N

DEFAULT = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
FOLDER = Path(os.environ.get("NORMFX_GOLDEN", DEFAULT))

ABSENT = [] if (FOLDER / "manifest.json").is_file() else [f"no manifest.json in {FOLDER}"]
CASES = [] if ABSENT else json.loads((FOLDER / "manifest.json").read_text())["cases"]


def chosen(arguments, *names, **renamed):
    """Of the recorded arguments those that a constructor takes, under its names."""
    taken = {name: name for name in names} | {v: k for k, v in renamed.items()}
    return {taken[name]: value for name, value in arguments.items() if name in taken}


def channels_first(case):
    return case.get("layout", "").startswith("(batch, channels, height")


def unified(a, case):
    rest = chosen(a, "window", "warmup_steps", "outlier_filtration", "eps", "momentum")
    return N.UnifiedNorm(a["channels"], channel_dim=1 if channels_first(case) else -1, **rest)


def power(a, case):
    names = (
        "groups",
        "warmup_steps",
        "eps",
        "alpha_forward",
        "alpha_backward",
        "group_scaling_eps",
    )
    return N.PowerNorm(
        a["channels"],
        batch_first=case.get("layout", "").startswith("(batch, t"),
        channel_dim=1 if channels_first(case) else -1,
        **chosen(a, *names),
    )


def evonorm(a, case):
    return N.EvoNorm(
        a["channels"], a["variant"], **chosen(a, "eps", "momentum", "apply_act", "groups")
    )


def region(a, case):
    kind = a["kind"].split()[0].strip(",:")
    made = {
        "binary": N.RegionNormBinary,
        "basic": N.RegionNormBasic,
        "learnable": N.RegionNormLearnable,
    }[kind]
    return made(a["channels"], **chosen(a, "threshold", "kernel_size", "eps"))


def plain(torch_layer, image_layer):
    """A norm over the channels, at the end or in dim 1."""

    def build(a, case):
        width = a["channels"] if "channels" in a else a["width"]
        if a.get("axis") == 1:
            return image_layer(width, a["eps"])
        affine = {} if a.get("affine", True) else {"elementwise_affine": False}
        return torch_layer(width, a["eps"], **affine)

    return build


def convolution(layer):
    def build(a, case):
        names = ("stride", "groups", "padding", "bias", "eps", "gamma")
        sizes = a["in_channels"], a["out_channels"], a["kernel_size"]
        return layer(*sizes, **chosen(a, *names))

    return build


def unmix(a, case):
    renamed = {"batch_size": "batch_size_setting", "temperature": "softmax_temperature"}
    names = ("components", "batch_norm_momentum", "batch_size_max", "eps", "dims")
    made = N.UnMixTNS(a["channels"], **chosen(a, *names, **renamed))
    if "resulting_momentum" in a:
        assert made.momentum == pytest.approx(a["resulting_momentum"])
    return made


# layer -> what constructs it from the recorded arguments
LAYERS = {
    "UnifiedNorm": unified,
    "PowerNorm": power,
    "EvoNorm": evonorm,
    "RegionNorm": region,
    "RMSNorm": plain(nn.RMSNorm, N.RMSNorm2d),
    "SimpleNorm": plain(N.SimpleNorm, N.SimpleNorm2d),
    "LayerNorm": plain(nn.LayerNorm, N.LayerNorm2d),
    "GroupNorm": lambda a, case: nn.GroupNorm(a["groups"], a["channels"], a["eps"]),
    "GlobalResponseNorm": lambda a, case: N.GlobalResponseNorm(
        a["channels"], **chosen(a, "eps", "channels_last")
    ),
    "FilterResponseNorm": lambda a, case: N.FilterResponseNorm(
        a["channels"], **chosen(a, "eps", "thresholded_linear_unit")
    ),
    "StdConv2d": convolution(N.StdConv2d),
    "ScaledStdConv2d": convolution(N.ScaledStdConv2d),
    "UnMixTNS": unmix,
    "AlphaBN": lambda a, case: N.AlphaBatchNorm(
        a["channels"], **chosen(a, "weight_of_test_batch", "eps")
    ),
    "CRMSNorm": lambda a, case: N.CRMSNorm(a["width"], eps=a["eps"]),
    "LinearZeroMeanOutput": lambda a, case: N.ZeroMeanOutputLinear(
        a["in_features"], a["out_features"], a["bias"]
    ),
    "graph transformer layer (post-norm)": lambda a, case: GraphTransformerLayer(a),
}

# What is no layer: it has no forward pass to replay.
NO_LAYERS = {
    "AdamP": "an optimizer",
    "SGDP": "an optimizer",
}


class Comparison:
    """Holds tensors to the tolerance of a case; a failure names the step and the tensor."""

    def __init__(self, case) -> None:
        self.case = case

    def __call__(self, got, expected, what) -> None:
        name = self.case["name"]
        assert got.dtype == expected.dtype, f"{name}, {what}: {got.dtype}, not {expected.dtype}"
        torch.testing.assert_close(
            got.detach(),
            expected,
            **self.case["tolerance"],
            equal_nan=True,
            msg=lambda text: f"{name}, {what}: {text}",
        )


def named(ref, prefix):
    return {name.removeprefix(prefix): t for name, t in ref.items() if name.startswith(prefix)}


def case_parameters():
    for reason in ABSENT:
        yield pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")
    for case in CASES:
        yield pytest.param(case, id=case["name"])


@pytest.mark.parametrize("case", list(case_parameters()))
def test_recording(case):
    kind = case["layer"]
    if kind in NO_LAYERS:
        pytest.skip(f"{kind} is no layer: {NO_LAYERS[kind]}")
    ref = load_file(FOLDER / case["file"])
    if kind in MODELS:
        MODELS[kind](case, ref, Comparison(case))
        return
    assert kind in LAYERS, f"{kind}: no constructor; add it to LAYERS"
    replay(LAYERS[kind](case["arguments"], case), ref, Comparison(case))


def replay(layer, ref, same):
    """Every recorded step, and then the evaluation."""
    graph = "src" in ref
    inputs, masks = ("h", "e") if graph else ("x",), ("pad_mask", "mask")
    layer = layer.to(ref[inputs[0]].dtype)
    state = named(ref, "param/") | named(ref, "init/")
    layer.load_state_dict(state, strict=True)
    extra = [ref["src"], ref["dst"]] if graph else []
    layer.train()
    if "inner/standardized_weight" in ref:
        same(layer.standardized_weight(), ref["inner/standardized_weight"], "standardized weight")

    def run(pick):
        given = [pick(name).clone().requires_grad_() for name in inputs]
        layer.zero_grad(set_to_none=True)
        out = layer(*given, *extra, *(pick(m) for m in masks if pick(m) is not None))
        out = list(out) if graph else [out]
        return given, out

    def compare(given, out, what, pick):
        ups = ("dh", "de") if graph else ("dy",)
        suffix = [f"/{name}" for name in inputs] if graph else [""]
        for value, end in zip(out, suffix, strict=True):
            same(value, pick(f"y{end}"), f"{what}: y{end}")
        torch.autograd.backward(out, [pick(name) for name in ups])
        for value, end in zip(given, suffix, strict=True):
            same(value.grad, pick(f"dx{end}"), f"{what}: dx{end}")

    snapshots = ref["snapshot_steps"].tolist() if "snapshot_steps" in ref else []
    for step in range(len(ref[inputs[0]])):
        what = f"step {step + 1}"

        def pick(name, step=step):
            return ref[name][step] if name in ref else None

        compare(*run(pick), what, pick)
        for name, value in layer.named_parameters():
            if f"grad/{name}" in ref:
                same(value.grad, ref[f"grad/{name}"][step], f"{what}: grad of {name}")
        buffers = dict(layer.named_buffers())
        for name, values in named(ref, "each/").items():
            assert buffers[name].item() == values[step].item(), f"{what}: {name}"
        if step + 1 in snapshots:
            for name, values in named(ref, "buffer/").items():
                same(buffers[name], values[snapshots.index(step + 1)], f"{what}: {name}")

    if f"eval/{inputs[0]}" in ref:
        layer.eval()

        def pick_eval(name):
            return ref.get(f"eval/{name}")

        compare(*run(pick_eval), "evaluation", pick_eval)
        buffers = dict(layer.named_buffers())
        for name, value in named(ref, "eval/buffer/").items():
            same(buffers[name], value, f"after the evaluation: {name}")


def replay_toy(made):
    """The same raw parameters as Pre-LN and as Pre-RMSNorm with recentring in the forward pass."""

    def run(case, ref, same):
        for kind in ("pre_ln", "pre_rms"):
            model = made(case["arguments"], kind).to(ref["dy"].dtype)
            model.load_state_dict(named(ref, "param/"), strict=True)
            y = model(ref["x"])
            same(y, ref[f"{kind}/y"], f"{kind}: y")
            y.backward(ref["dy"])
            for name, value in model.named_parameters():
                same(value.grad, ref[f"{kind}/grad/{name}"], f"{kind}: grad of {name}")

    return run


def replay_four_ways(case, ref, same):
    """Recorded weights before and after each conversion give the recorded outputs."""
    weights = named(ref, "param/")
    recentred = weights | named(ref, "recentred/")
    compressed = weights | named(ref, "compressed/")
    for name, given, kind in (
        ("pre_ln", weights, "pre_ln"),
        ("pre_ln_recentred", recentred, "pre_ln"),
        ("pre_rms", recentred, "pre_rms"),
        ("pre_crms", compressed, "pre_crms"),
    ):
        same(four_ways(case["arguments"], given, ref["x"], kind), ref[f"y/{name}"], name)


MODELS = {
    "toy VIT": replay_toy(ToyViT),
    "toy GPT": replay_toy(ToyGPT),
    "Pre-LN, Pre-RMSNorm, Pre-CRMSNorm transformer": replay_four_ways,
}

"""What each of two processes does: its part of a batch, through layers that sum over the ranks."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import normfx.nn as N

C = 4
MASK = torch.arange(5).expand(4, 5) > torch.tensor([[3], [1], [4], [2]])

# name -> (constructor, whether the input is an image, further arguments for the whole batch)
LAYERS = {
    "unified": (
        lambda: N.UnifiedNorm(C, window=2, warmup_steps=2, outlier_filtration=True),
        False,
        (),
    ),
    "unified masked": (lambda: N.UnifiedNorm(C, window=2, warmup_steps=2), False, (MASK,)),
    "power": (lambda: N.PowerNorm(C, warmup_steps=2, batch_first=True), False, (MASK,)),
    "power exact": (lambda: N.PowerNorm(C, variant="PN-V", batch_first=True), False, ()),
    "batch norm": (lambda: N.MaskedBatchNorm(C), False, (MASK,)),
    "evonorm": (lambda: N.EvoNorm(C, "B0"), True, ()),
    "region": (lambda: N.RegionNormBasic(C), True, (torch.eye(5).expand(4, 1, 5, 5),)),
    "alpha": (lambda: N.AlphaBatchNorm(C), True, ()),
    "unmix": (lambda: N.UnMixTNS(C, components=1), True, ()),
}


def run(rank: int | None, sync: bool = True) -> dict[str, torch.Tensor]:
    """Outputs, gradients and states of all layers; on half of each batch where there is a rank."""
    found = {}
    for name, (build, image, further) in LAYERS.items():
        generator = torch.Generator().manual_seed(3)
        layer = build().double()
        layer.sync = sync
        part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        for index in range(5):
            shape = (4, C, 5, 5) if image else (4, 5, C)
            x, dy = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
            x = (x * (7 if index == 4 else 1))[part].requires_grad_()
            layer.zero_grad()
            call: nn.Module = layer
            if index == 3 and name in ("unified", "power", "batch norm"):
                call = torch.compile(layer, backend="aot_eager", fullgraph=True)
            y = call(x, *(f[part] for f in further))
            y.backward(dy[part])
            found |= {f"{name}/{index}/y": y.detach(), f"{name}/{index}/dx": x.grad}
            for parameter, value in layer.named_parameters():
                found[f"{name}/{index}/grad {parameter}"] = value.grad.clone()
        found |= {f"{name}/state {k}": v.clone() for k, v in layer.state_dict().items()}
    return found


if __name__ == "__main__":
    folder, this = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=this, world_size=2)
    save_file(run(this), f"{folder}/rank{this}.safetensors")
    save_file(run(this, sync=False), f"{folder}/alone{this}.safetensors")
    dist.destroy_process_group()
    assert load_file(f"{folder}/rank{this}.safetensors")

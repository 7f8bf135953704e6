"""Whole models: latency, memory and launches of a forward pass, and a step of training.

Each is measured as it stands, through Inductor, through normfx (exact), and with every norm turned
into a Unified Norm, which normfx folds away. Models have random weights: what they compute is no
language, and how long it takes does not depend on it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.devices import Device
from benchmarks.gpu.rows import Table
from benchmarks.gpu.timing import Bench
from benchmarks.models import Output

Inputs = dict[str, Tensor]
Compile = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Network:
    """A model and the calls that are measured.

    Attributes:
        name: of the rows.
        make: the model.
        calls: what it is called with, by name.
        trained: the call that a step of training has, or None.
    """

    name: str
    make: Callable[[], nn.Module]
    calls: dict[str, Callable[[], Inputs]]
    trained: Callable[[], Inputs] | None = None


def gpt2(size: dict[str, int]) -> nn.Module:
    """GPT-2 with a language model's head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return Output(GPT2LMHeadModel(GPT2Config(use_cache=False, **drop, **size)), "logits")


def llama(size: dict[str, int]) -> nn.Module:
    """Llama with a language model's head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return Output(LlamaForCausalLM(LlamaConfig(use_cache=False, **size)), "logits")


def vit(size: dict[str, int]) -> nn.Module:
    """ViT with a classifier."""
    from transformers import ViTConfig, ViTForImageClassification

    return Output(ViTForImageClassification(ViTConfig(**size)), "logits")


def swin(size: dict[str, Any]) -> nn.Module:
    """Swin with a classifier."""
    from transformers import SwinConfig, SwinForImageClassification

    return Output(SwinForImageClassification(SwinConfig(**size)), "logits")


def tokens(batch: int, count: int) -> Inputs:
    """Token numbers that every vocabulary has."""
    return {"input_ids": torch.randint(0, 50, (batch, count))}


def images(batch: int, size: int) -> Inputs:
    """Pictures of noise."""
    return {"pixel_values": torch.randn(batch, 3, size, size)}


# A decode step is one token without a cache of keys: it reads every weight and launches every
# kernel that a step with a cache does, but for the reading of the cache.
_DECODE = {
    "decode, batch 1": partial(tokens, 1, 1),
    "decode, batch 8": partial(tokens, 8, 1),
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16}

# In the order in which they are measured: what the clock cuts off is at the end.
FULL = (
    Network(
        "GPT-2 small",
        partial(gpt2, {}),
        {**_DECODE, "prefill 1 x 1024": partial(tokens, 1, 1024)},
        partial(tokens, 8, 1024),
    ),
    Network(
        "ViT-B/16",
        partial(vit, {}),
        {"1 image": partial(images, 1, 224), "64 images": partial(images, 64, 224)},
        partial(images, 64, 224),
    ),
    Network(
        "Llama-1B-shaped",
        partial(llama, LLAMA_1B),
        {**_DECODE, "prefill 1 x 2048": partial(tokens, 1, 2048)},
    ),
    Network(
        "GPT-2 medium",
        partial(gpt2, MEDIUM),
        {**_DECODE, "prefill 1 x 1024": partial(tokens, 1, 1024)},
    ),
    Network("Swin-T-like", partial(swin, {}), {"8 images": partial(images, 8, 224)}),
)
_FEW = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
TINY = (
    Network(
        "tiny GPT-2",
        partial(gpt2, _FEW),
        {"decode, batch 1": partial(tokens, 1, 1)},
        partial(tokens, 2, 8),
    ),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way of running a model.

    Attributes:
        name: of the rows.
        is_unified: whether its norms are Unified Norms.
        backend: of torch.compile, or None: eager.
        mode: of torch.compile.
    """

    name: str
    is_unified: bool = False
    backend: str | None = None
    mode: str | None = None


# In the order of their worth for the budget: max-autotune takes minutes a model.
FIRST = (
    Candidate("eager"),
    Candidate("inductor", backend="inductor"),
    Candidate("inductor, CUDA graphs", backend="inductor", mode="reduce-overhead"),
    Candidate("normfx exact, CUDA graphs", backend="normfx", mode="reduce-overhead"),
    Candidate("normfx UN-folded, CUDA graphs", True, "normfx", "reduce-overhead"),
)
LAST = (
    Candidate("inductor max-autotune", backend="inductor", mode="max-autotune"),
    Candidate("normfx exact, max-autotune", backend="normfx", mode="max-autotune"),
    Candidate("normfx UN-folded, max-autotune", True, "normfx", "max-autotune"),
)


def models(
    table: Table,
    bench: Bench,
    peak: Device | None,
    networks: tuple[Network, ...],
    candidates: tuple[Candidate, ...],
    compiled: Compile,
) -> None:
    """Latency, peak memory and launches of every call of every model."""
    for network in networks:
        for call_name, make_inputs in network.calls.items():
            case = f"{network.name}, {call_name}"
            floor = None
            if peak is not None and table.left_s() > 0:
                floor = table.attempt(
                    case, "floor", partial(_floor, network, make_inputs, bench.device, peak)
                )
            for candidate in candidates:
                table.attempt(
                    case,
                    candidate.name,
                    partial(
                        _inference,
                        table,
                        bench,
                        network,
                        case,
                        make_inputs,
                        candidate,
                        compiled,
                        floor,
                    ),
                )
                _free(bench)


def _free(bench: Bench) -> None:
    torch.compiler.reset()
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


def _built(network: Network, device: str, *, is_unified: bool, **options: Any) -> nn.Module:
    """The model in bfloat16, the same weights for every candidate."""
    import normfx

    torch.manual_seed(0)
    with torch.device(device):  # random numbers come faster on a GPU
        model = network.make().to(torch.bfloat16)
    if is_unified:
        normfx.convert(model, "unified", **options)
    return model


def _inference(
    table: Table,
    bench: Bench,
    network: Network,
    case: str,
    make_inputs: Callable[[], Inputs],
    candidate: Candidate,
    compiled: Compile,
    floor_us: float | None,
) -> None:
    model = _built(network, bench.device, is_unified=candidate.is_unified).eval()
    inputs = _placed(make_inputs(), bench.device)
    function: Any = model
    if candidate.backend is not None:
        function = compiled(model, backend=candidate.backend, mode=candidate.mode)

    def call() -> None:
        with torch.inference_mode(False), torch.no_grad():
            function(**inputs)

    us = bench.medians_us({"": call}, most=100)[""]
    peak = bench.peak_bytes(call)
    launches = bench.launches(call)
    note = f"{launches} {'launches' if bench.device == 'cuda' else 'operators'}"
    note += "" if peak is None else f", peak {peak / 2**20:.0f} MiB"
    more = {"launches": launches, "peak_bytes": peak}
    table.add(case, candidate.name, us=us, floor_us=floor_us, note=note, more=more)


def _floor(network: Network, make_inputs: Callable[[], Inputs], device: str, peak: Device) -> float:
    """Every weight is read once, but for the rows that an embedding does not ask for."""
    from torch.utils.flop_counter import FlopCounterMode

    model = _built(network, device, is_unified=False).eval()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    read = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    weights = {id(p): p.nbytes for p in model.parameters() if id(p) not in tables - read}
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**_placed(make_inputs(), device))
    return peak.floor_us(sum(weights.values()), counter.get_total_flops())


def _placed(inputs: Inputs, device: str) -> Inputs:
    return {
        name: (t.to(torch.bfloat16) if t.is_floating_point() else t).to(device)
        for name, t in inputs.items()
    }


# ------------------------------------------------------------------------- training


STEPS = (
    Candidate("eager, LayerNorm"),
    Candidate("eager, UN", is_unified=True),
    Candidate("inductor, LayerNorm", backend="inductor"),
    Candidate("normfx, LayerNorm", backend="normfx"),
    Candidate("normfx, UN", True, "normfx"),
)


def training(table: Table, bench: Bench, networks: tuple[Network, ...], compiled: Compile) -> None:
    """A forward and a backward pass, and the memory that they take beyond model and gradients."""
    for network in networks:
        if network.trained is None:
            continue
        for candidate in STEPS:
            table.attempt(
                f"{network.name}, training step",
                candidate.name,
                partial(_step, table, bench, network, candidate, compiled),
            )
            _free(bench)


def _step(
    table: Table, bench: Bench, network: Network, candidate: Candidate, compiled: Compile
) -> None:
    model = _built(network, bench.device, is_unified=candidate.is_unified).train()
    assert network.trained is not None
    inputs = _placed(network.trained(), bench.device)
    function: Any = model
    if candidate.backend is not None:
        function = compiled(model, backend=candidate.backend, mode=candidate.mode)

    def step() -> None:
        function(**inputs).float().square().mean().backward()

    step()  # from here on the gradients exist
    peak = bench.peak_bytes(step)
    us = bench.medians_us({"": step}, most=30)[""]
    note = "" if peak is None else f"peak {peak / 2**20:.0f} MiB"
    table.add(
        f"{network.name}, training step",
        candidate.name,
        us=us,
        note=note,
        more={"peak_bytes": peak},
    )

"""Kernels compiled for a GPU that is not there: to a cubin or an hsaco, and what it takes.

Not in a process of the interpreter: TRITON_INTERPRET must not be set when Triton is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True, slots=True)
class Build:
    """One configuration of a kernel.

    Attributes:
        label: what tells it from the others.
        kernel: the function that `triton.jit` made.
        arguments: each by its name: a dtype for a pointer to numbers of it, "i32" for an integer
            (a multiple of 16), an integer that is known (a stride of 1), None for a pointer that
            is not given, and the constants' values.
        num_warps: warps of a program.
        num_stages: stages of a software pipeline.
        targets: the names in `TARGETS` that it is for.
    """

    label: str
    kernel: Any
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spills: bytes of registers that a thread writes to memory.
        shared_bytes: shared memory of a program.
        code_bytes: size of the cubin or hsaco.
    """

    registers: int
    spills: int
    shared_bytes: int
    code_bytes: int


def build(what: Build, target: str) -> Footprint:
    """Compiles one configuration for one target.

    Raises:
        ValueError: an argument of the kernel is missing, or is none of it.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    names = list(what.kernel.arg_names)
    if set(names) != set(what.arguments):
        odd = sorted(set(names) ^ set(what.arguments))
        raise ValueError(f"{what.label}: missing from, or unknown to, the kernel: {odd}")
    for index, (name, parameter) in enumerate(zip(names, what.kernel.params, strict=True)):
        value = what.arguments[name]
        if parameter.is_constexpr or value is None or isinstance(value, int):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        signature[name] = _POINTERS[value] if isinstance(value, torch.dtype) else value
        attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(what.kernel, signature, constants, attrs)
    options = {
        "num_warps": what.num_warps,
        "num_stages": what.num_stages,
        "enable_fp_fusion": True,  # what a launch does; said here, as Triton 3.9 warns otherwise
    }
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        registers, spills = _of_cubin(compiled.asm["cubin"], compiled.asm["ptx"], target)
        return Footprint(registers, spills, shared, len(compiled.asm["cubin"]))
    registers, spills = _of_hsaco(compiled.asm["amdgcn"])
    return Footprint(registers, spills, shared, len(compiled.asm["hsaco"]))


def _of_cubin(cubin: bytes, ptx: str, target: str) -> tuple[int, int]:
    """Registers and bytes of local memory, as `cuobjdump` reads them from a cubin."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage is not None, text
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _of_hsaco(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch of a kernel, from the metadata in its assembly."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    assert registers is not None
    assert spills is not None
    return int(registers[1]), 4 * int(spills[1])

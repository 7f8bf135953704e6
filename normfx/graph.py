"""Helpers over `torch.fx` graphs: what a node's dtype, shape, storage and provenance are.

Metadata sits under `val` in the captured graph and under `example_value` in dynamo's; every stage
reads it through the functions below, so that no pass depends on where it came from.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from normfx.torch_internals import fake_mode_of, is_fake, is_module_state

_FRAME = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.*)')
# The functions of torch itself (`nn.functional.rms_norm`) are not the user's lines.
_TORCH = os.path.dirname(torch.__file__)
_MODULE_STEP = re.compile(
    r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\['?([^\]']+)'?\]|\.(\w+)"
)


def value(node: Any) -> Any:
    """The fake value of a node (a tensor, a symbolic number, a tuple), or None if it has none."""
    if not isinstance(node, fx.Node):
        return None
    meta = node.meta
    return meta["val"] if "val" in meta else meta.get("example_value")


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node holds, or None if the argument is no node or holds no tensor."""
    held = value(node)
    return held if isinstance(held, torch.Tensor) else None


def shape(node: Any) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a node's tensor, or None."""
    held = tensor(node)
    return None if held is None else tuple(held.shape)


def dtype(node: Any) -> torch.dtype | None:
    """The dtype of a node's tensor, or None."""
    held = tensor(node)
    return None if held is None else held.dtype


def storage(node: Any) -> int | None:
    """An identity of the storage behind a node's tensor: equal for a tensor and its views."""
    held = tensor(node)
    return None if held is None else memory(held)


def memory(held: torch.Tensor) -> int | None:
    """An identity of a tensor's storage, or None."""
    if held.layout != torch.strided:
        return None
    try:
        return held.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage of its own
        return None


def fake_mode(node: fx.Node) -> Any:
    """The fake mode of a node's value, to compute the value of a new node under."""
    return fake_mode_of([value(node)])


def is_call(node: Any, *targets: object) -> bool:
    """Whether the argument is a call of one of these targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def packet(node: Any) -> torch._ops.OpOverloadPacket | None:
    """The ATen operator that a node calls, without its overload, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target is torch.ops.aten.view.dtype:
        return None  # a view as another dtype shares its name with views of another shape
    return target.overloadpacket


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by the names of its schema, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload), target
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def permutation(node: fx.Node, rank: int) -> list[int]:
    """The order in which `permute`, `transpose` and their kin put the dims of their input."""
    target: Any = node.target
    numbered = torch.empty(list(range(2, rank + 2)), device="meta")  # a size for each dim
    return [size - 2 for size in target(numbered, *node.args[1:], **node.kwargs).shape]


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes whose storage this node may write to; all of its inputs where nothing is known."""
    target: Any = node.target
    if node.op == "call_method":
        return list(node.all_input_nodes) if target.endswith("_") else []
    if node.op != "call_function":
        return []
    if not isinstance(target, torch._ops.OpOverload):
        return list(node.all_input_nodes) if _may_write(target) else []
    if not target._schema.is_mutable and target.overloadpacket not in _WRITES_BUFFERS:
        return []
    written = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given: Any = (
                node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            )
            several = given if isinstance(given, (list, tuple)) else [given]
            written += [a for a in several if isinstance(a, fx.Node)]
    if target.overloadpacket in _WRITES_BUFFERS:
        written += _running_statistics(node)
    return written


# Operators with bodies that are functions of their operands. Others (a Triton kernel) may write.
_FUNCTIONAL_BODIES = frozenset(
    {"tag_activation_checkpoint", "invoke_subgraph", "cond", "flex_attention", "scan", "map_impl"}
)


def _may_write(target: Any) -> bool:
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.__name__ not in _FUNCTIONAL_BODIES
    home = str(getattr(target, "__module__", "")).partition(".")[0]
    return home not in ("torch", "normfx", "_operator", "builtins", "math")


# Composite operators whose schema hides that they update running statistics in training.
_WRITES_BUFFERS = frozenset({torch.ops.aten.batch_norm, torch.ops.aten.instance_norm})


def _running_statistics(node: fx.Node) -> list[fx.Node]:
    bound = arguments(node)
    if not bound.get("training", bound.get("use_input_stats")):
        return []
    return [
        bound[name] for name in ("running_mean", "running_var") if isinstance(bound[name], fx.Node)
    ]


def written_storages(graph: fx.Graph) -> set[int | None]:
    """The storages that some node of the graph writes to."""
    return {storage(argument) for node in graph.nodes for argument in mutated_arguments(node)}


def state_placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Inputs that are parameters, buffers or tensors of a module, and are not written to."""
    written = written_storages(graph)
    return [
        node
        for node in graph.find_nodes(op="placeholder")
        if is_module_state(node)
        and is_fake(value(node))
        and storage(node) is not None
        and storage(node) not in written
    ]


def is_pure(node: fx.Node) -> bool:
    """Whether a call only computes: no writes, no random numbers, nothing unknown."""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not mutated_arguments(node) and torch.Tag.nondeterministic_seeded not in target.tags
    spec: Any = node.kwargs.get("spec")  # of a canonical node
    return target is operator.getitem or (spec is not None and spec.statistic != "batch")


_TRAINED = "normfx_trained"


def mark_trained(placeholders: Iterable[fx.Node]) -> None:
    """Notes the inputs that gradients are wanted of, where the graph is differentiated."""
    for node in placeholders:
        node.meta[_TRAINED] = True


def has_frozen(graph: fx.Graph) -> bool:
    """Whether there are parameters that no gradients are wanted of."""
    return any(
        isinstance(tensor(node), torch.nn.Parameter) and not node.meta.get(_TRAINED)
        for node in state_placeholders(graph)
    )


def is_trained(*nodes: fx.Node) -> bool:
    """Whether one of these is made of parameters alone, of some of which gradients are wanted."""
    for node in nodes:
        inputs = [found for found in behind([node]) if found.op == "placeholder"]
        trained = any(found.meta.get(_TRAINED) for found in inputs)
        if trained and all(map(is_module_state, inputs)):
            return True
    return False


_UNDEFINED = frozenset({torch.ops.aten.empty, torch.ops.aten.empty_strided, None})


def parameter_only(graph: fx.Graph, *, frozen: bool = False) -> set[fx.Node]:
    """The nodes whose value depends on parameters, buffers and constants alone, and these too.

    A value whose storage is written to somewhere in the graph does not count.

    Args:
        graph: the graph.
        frozen: leave out what gradients are wanted of: the rest is constant in training too.
    """
    written = written_storages(graph)
    state = set(state_placeholders(graph))
    if frozen:
        state = {node for node in state if not node.meta.get(_TRAINED)}
    for node in graph.nodes:
        if node.op == "get_attr" and tensor(node) is not None and storage(node) not in written:
            state.add(node)
        elif is_pure(node) and (storage(node) not in written or _is_made(node)):
            inputs = node.all_input_nodes
            if inputs and all(i in state for i in inputs):
                state.add(node)
            elif not inputs and packet(node) not in _UNDEFINED:  # arange, full, zeros
                state.add(node)
    return state


def _is_made(node: fx.Node) -> bool:
    """Whether a rule made a node, and gave it no value: nobody writes to it."""
    return value(node) is None and bool(node.meta.get("normfx_rule"))


def behind(nodes: list[fx.Node]) -> set[fx.Node]:
    """These nodes and everything they are computed from."""
    seen, pending = set(nodes), list(nodes)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return seen


def location(node: fx.Node) -> str:
    """`file:line` of the user's line that made this node, or an empty string."""
    lines = str(node.meta.get("stack_trace") or "").splitlines()
    found = [m for m in map(_FRAME.search, lines) if m]
    users = [m for m in found if not m["file"].startswith(_TORCH)]
    return f"{users[-1]['file']}:{users[-1]['line']}" if users else ""


def user_frames(trace: str) -> list[tuple[str, int, str, str]]:
    """The user's frames of a stack trace, the innermost last: file, line, function, source line."""
    lines = trace.splitlines()
    frames = [(i, m) for i, m in enumerate(map(_FRAME.search, lines)) if m]
    return [
        (m["file"], int(m["line"]), m["function"], "".join(lines[i + 1 : i + 2]).strip())
        for i, m in frames
        if not m["file"].startswith(_TORCH)
    ]


def module_path(node: fx.Node) -> str:
    """The qualified name of the module that made this node (`layers.0.norm`), or ""."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return clean_path(path)


def clean_path(source: str) -> str:
    """`L['self']._modules['layers']._modules['0'].norm` as `layers.0.norm`."""
    steps = [
        next(part for part in match if part)
        for match in _MODULE_STEP.findall(source.removeprefix("L"))
    ]
    return ".".join(steps[1:])


# Where a node comes from: the user's line, the modules around it, and their calls.
PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")


def inherit_provenance(new: fx.Node, old: fx.Node) -> None:
    """Gives a node the user's line and module of another."""
    new.meta.update((key, old.meta[key]) for key in PROVENANCE if key in old.meta)


def inherit_meta(new: fx.Node, old: fx.Node) -> None:
    """Gives a node the value and provenance of the node it stands for."""
    new.meta.update((key, old.meta[key]) for key in ("val", "tensor_meta") if key in old.meta)
    inherit_provenance(new, old)


def erase_dead(nodes: Iterable[fx.Node], order: dict[fx.Node, int]) -> None:
    """Erases those of the nodes that nothing reads any more, latest first, also from the order."""
    left = [node for node in nodes if node in order]
    for node in sorted(left, key=order.__getitem__, reverse=True):
        if not node.users and node.op in ("call_function", "get_attr"):
            node.graph.erase_node(node)
            del order[node]

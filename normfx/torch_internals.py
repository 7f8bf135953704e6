"""The private and version-sensitive parts of torch that normfx relies on, behind names of our own.

No other file imports an underscore name of dynamo, AOTAutograd or the proxy tracer. Checked on
torch 2.11 and 2.13.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    set_proxy_slot,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves


def fused_multiply_add() -> Any:
    """The operator a*b + c that dynamo makes of in-place `addcmul`, or None before torch has it."""
    from torch._inductor import inductor_prims

    made = getattr(inductor_prims, "fma", None)
    return getattr(made, "overloadpacket", made)


def fake_mode_of(values: Any) -> FakeTensorMode:
    """The fake mode of these values: dynamo's, not the one its tracing context then holds."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def real_tensors_allowed(mode: FakeTensorMode) -> Iterator[None]:
    """Lets real tensors (constants of the graph) meet fake ones for the duration."""
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


@contextmanager
def symbolic_meta_functions(mode: FakeTensorMode) -> Iterator[None]:
    """Lets operators run on fake tensors: on symbolic sizes some need torch's own dispatcher."""
    with real_tensors_allowed(mode), mode, enable_python_dispatcher():
        yield


def trace_pre_dispatch(function: Any, inputs: list[Any]) -> fx.GraphModule:
    """The ATen graph that `function` runs on these fake inputs, before autograd and autocast."""
    return make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)


def tracer() -> Any:
    """The tracer of the running `trace_pre_dispatch`."""
    mode = get_proxy_mode()
    assert mode is not None, "no trace is running"
    return mode.tracer


def proxy_of(traced: Any) -> Any:
    """A traced value (tensor or symbolic number) as the argument of a new node."""
    return tracer().unwrap_proxy(traced)


def give_value(held: Any, proxy: fx.Proxy) -> Any:
    """Binds a fake value to a node, so that later operations on the value refer to the node."""
    track_tensor_tree(held, proxy, constant=None, tracer=tracer())
    return held


def bind(held: torch.Tensor, node: fx.Node) -> None:
    """As `give_value`, without a copy: for a fake tensor that has no symbolic sizes."""
    node.meta["val"] = held
    set_proxy_slot(held, tracer(), _ProxyTensor(fx.Proxy(node, tracer()), None))


def node_of(held: torch.Tensor) -> fx.Node | None:
    """The node of the running trace that a fake value stands for, or None."""
    slot = get_proxy_slot(held, tracer(), None)
    return None if slot is None else slot.proxy.node


def is_traced(held: torch.Tensor) -> bool:
    """Whether a fake value stands for some node of the running trace."""
    return get_proxy_slot(held, tracer(), None) is not None


def cannot_be_traced(error: BaseException) -> bool:
    """Whether an operator failed under fake tensors because its result depends on the data."""
    return isinstance(
        error,
        (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode),
    )


def is_fake(held: Any) -> TypeGuard[FakeTensor]:
    """Whether a value is a fake tensor."""
    return isinstance(held, FakeTensor)


def is_module_state(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter, a buffer or a tensor attribute of a module."""
    source: Any = getattr(node, "_dynamo_source", None)
    if source is None:
        return False
    guard_source: Any = source.guard_source
    if callable(guard_source):  # a method up to 2.11
        guard_source = guard_source()
    return guard_source.is_unspecialized_nn_module() or guard_source.is_specialized_nn_module()


def source_name(node: fx.Node) -> str:
    """Where dynamo found an input: `L['self']._modules['norm']._parameters['weight']`, or ""."""
    source: Any = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name: Any = source.name
    return str(name() if callable(name) else name)  # a method before 2.13


def copy_placeholder(new: fx.Node, old: fx.Node) -> None:
    """Gives a captured placeholder what dynamo knows of it: its source, that it is static."""
    for key, held in old.meta.items():
        new.meta.setdefault(key, held)
    if hasattr(old, "_dynamo_source"):
        # AOTAutograd reads it from the node
        new._dynamo_source = old._dynamo_source  # pyright: ignore[reportAttributeAccessIssue]


def tracing_context() -> ExitStack:
    """Keeps user lines and module paths on the nodes of a trace."""
    stack = ExitStack()
    stack.enter_context(fx_traceback.preserve_node_meta())
    return stack


def copy_graph_meta(new: fx.GraphModule, old: fx.GraphModule) -> None:
    """Gives a captured graph what tells AOTAutograd that it is dynamo's.

    AOTAutograd then reads the metadata of its placeholders. Without it no input counts as static,
    and CUDA graphs copy every parameter at every call.
    """
    new.meta.update(old.meta)
    sources = getattr(old, "_param_name_to_source", None)
    if sources is not None:
        # under freezing, dynamo makes parameters attributes of the graph; capture renames them
        owners = {id(t): sources[name] for name, t in _state(old) if name in sources}
        given = {name: owners[id(t)] for name, t in _state(new) if id(t) in owners}
        new._param_name_to_source = {**sources, **given}  # pyright: ignore[reportArgumentType]


def _state(gm: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by its name, as AOTAutograd looks for them."""
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def _name_constants(gm: fx.GraphModule) -> None:
    """Gives constants of the graph (`torch.tensor([1, 2])`) a source: AOTAutograd wants one of all.

    Dynamo has none for them, as in its graph they are still calls.
    """
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is None:
        return
    from torch._dynamo.source import ConstantSource

    named = {name: sources.get(name) or ConstantSource(name) for name, _ in _state(gm)}
    gm._param_name_to_source = {**sources, **named}  # pyright: ignore[reportArgumentType]


def mark_static(placeholder: fx.Node) -> None:
    """Marks an input of our own as static, as dynamo marks parameters."""
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    placeholder._dynamo_source = None  # pyright: ignore[reportAttributeAccessIssue]


def compile_alone(
    model: Any, backend: Any, dynamic: bool | None, *, fullgraph: bool = False
) -> Any:
    """torch.compile, so that what is compiled does not count towards the recompile limit of others.

    Before torch 2.12 it does: dynamo then stops after some eight calls on one model.
    """
    settings: Any = {"isolate_recompiles": True}
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        settings = {}
    return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph, **settings)


def dynamo_error() -> type[Exception]:
    """The base of what dynamo raises where it cannot make one graph of a call."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


@contextmanager
def unwrapped(*ours: type[Exception]) -> Iterator[None]:
    """Raises exceptions of these types as they are, without what dynamo wraps a backend's in."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, ours):
            raise error.inner_exception from None
        raise


@contextmanager
def every_call_compiled(otherwise: Exception) -> Iterator[None]:
    """Raises an exception where dynamo would stop to compile, and run the code as it is."""
    import torch._dynamo.config as config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        with config.patch(fail_on_recompile_limit_hit=True):
            yield
    except FailOnRecompileLimitHit as error:
        raise otherwise from error


def fakes_for_aot(values: Any) -> list[Any]:
    """Fake tensors like these in the fake mode that AOTAutograd will trace under."""
    context = TracingContext.try_get()
    mode = (
        context.fake_mode
        if context is not None and context.fake_mode is not None
        else FakeTensorMode()
    )
    with mode:
        return [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values
        ]


def inductor_settings(
    mode: str | None, options: dict[str, Any], dynamic: bool | None = None
) -> dict[str, Any]:
    """Inductor's settings for a `mode=` of torch.compile and a mapping of options."""
    from torch._inductor import list_mode_options

    patches = dict(list_mode_options(mode, dynamic)) if mode and mode != "default" else {}
    return {**patches, **options}


def compile_with_inductor(gm: fx.GraphModule, inputs: list[Any], settings: dict[str, Any]) -> Any:
    """Inductor's callable for a graph.

    AOTAutograd asks for the source of every buffer of a graph that is dynamo's. Constants that the
    capture or a rule put there have none.
    """
    from torch._inductor.compile_fx import compile_fx

    _name_constants(gm)
    return compile_fx(gm, inputs, config_patches=settings)


def compile_apart(gm: fx.GraphModule, inputs: list[Any], settings: dict[str, Any]) -> Any:
    """As `compile_with_inductor`, while another graph is being compiled: dynamo holds its lock.

    AOTAutograd would take the fake mode and the parameters of that graph for its own. And it would
    compile the backward pass when that is first run: on a GPU by a thread of the autograd engine,
    which would wait for the lock for ever.
    """
    from torch._functorch import config

    with tracing(None), config.patch(force_non_lazy_backward_lowering=True):
        return compile_with_inductor(gm, inputs, settings)


def log_artifact(name: str, payload: dict[str, Any]) -> None:
    """Puts a JSON artifact into TORCH_TRACE, where that is on."""
    import json

    try:
        from torch._logging import trace_structured

        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "json"},
            payload_fn=lambda: json.dumps(payload),
        )
    except (
        ImportError,
        TypeError,
        AttributeError,
    ):  # a private API: its loss costs a log entry, nothing else
        return


def is_traceable(held: Any) -> bool:
    """Whether a fake value can stand for a node: a batched tensor of functorch cannot."""
    leaves = tree_leaves(held)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return bool(leaves) and all(is_fake(leaf) for leaf in tensors)


def is_symbolic(number: Any) -> bool:
    """Whether a number is known only as a symbol."""
    return isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast on a device; nothing where there is none in any case, as on `meta`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def size_hint(size: Any, unknown: int = 1) -> int:
    """A size, or what it was in the run that is compiled; no guard comes of it."""
    if not is_symbolic(size):
        return size
    hint = size.node.hint
    return unknown if hint is None else int(hint)


def same_random_numbers(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Leaves the generators as they are, so that a second run draws the same numbers."""
    devices = {p.device for p in (*model.parameters(), *model.buffers())}
    return torch.random.fork_rng(devices=[d.index for d in devices if d.type == "cuda"])


def is_transformed(held: torch.Tensor) -> bool:
    """Whether a tensor is one of `torch.func.vmap` or its kin."""
    return torch._C._functorch.is_functorch_wrapped_tensor(held)  # pyright: ignore


def in_backward() -> bool:
    """Whether the autograd engine is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


# What a module has of hooks; a handle finds its hook in the same dict, wherever that hangs.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def share_hooks(new: torch.nn.Module, old: torch.nn.Module) -> None:
    """Gives one module the hooks of another: handles that exist remove them from both."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


@dataclass(frozen=True, slots=True)
class Bypass:
    """A switch of a module of torch that was turned: `undo` turns it back."""

    module: Any
    switch: str
    before: Any

    def undo(self) -> None:
        """Turns it back."""
        setattr(self.module, self.switch, self.before)


def without_bypass(model: torch.nn.Module, changed: list[torch.nn.Module]) -> list[Bypass]:
    """Stops torch's encoder layers from reading the parameters of norms past their modules.

    `nn.TransformerEncoderLayer` in evaluation hands the weights of its norms to one fused operator,
    which computes LayerNorms whatever modules stand there.

    Args:
        model: the whole model.
        changed: modules some of whose norms are no LayerNorms any more.
    """
    turned: list[Bypass] = []

    def turn(module: Any, switch: str, value: Any) -> None:
        turned.append(Bypass(module, switch, getattr(module, switch)))
        setattr(module, switch, value)

    layers = [m for m in changed if isinstance(m, torch.nn.TransformerEncoderLayer)]
    for layer in dict.fromkeys(layers):
        turn(layer, "activation_relu_or_gelu", 0)
    for module in model.modules():
        if isinstance(module, torch.nn.TransformerEncoder) and set(module.layers) & set(layers):
            turn(module, "use_nested_tensor", False)
    return turned

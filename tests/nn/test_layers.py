"""What every layer of normfx.nn promises: one graph, no sync, autocast, dynamic sizes, checkpoints, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from every_layer import LAYERS, MOVES_AT_TEST_TIME, assert_same, made, step
from torch.utils.checkpoint import checkpoint

import normfx.nn

every_layer = pytest.mark.parametrize("name", LAYERS)
STATEFUL = [name for name, (build, _, _) in LAYERS.items() if dict(build().named_buffers())]


def assert_same_step(name, got, expected, what):
    """The same bits where a state depends on them; AOT may put torch's own operators otherwise."""
    assert_same(got, expected, what, exact=name in STATEFUL)


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_and_eager_state(name, training):
    layer, example, further = made(name)
    layer.train(training)
    other = copy.deepcopy(layer)
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    for index in range(7):
        x = example() * (1 + 8 * (index == 5))
        got, expected = step(fast, other, x, further), step(layer, layer, x, further)
        assert_same_step(name, got, expected, f"step {index}")
        assert_same(other.state_dict(), layer.state_dict(), f"state after step {index}")


@pytest.mark.parametrize("name", STATEFUL)
def test_state_without_gradients(name):
    layer, example, further = made(name)
    other = copy.deepcopy(layer)
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for index in range(4):
            x = example()
            assert_same({"y": fast(x, *further)}, {"y": layer(x, *further)}, f"call {index}")
    assert_same(other.state_dict(), layer.state_dict(), "state")


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in MOVES_AT_TEST_TIME])
@pytest.mark.parametrize("where", ["eager", "inside"])
def test_checkpointing_counts_a_batch_once(name, where):
    layer, example, further = made(name)
    other = copy.deepcopy(layer)

    def call(x, *rest):
        return checkpoint(other, x, *rest, use_reentrant=False)

    if where == "inside":
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    for index in range(5):
        x = example()
        got, expected = step(call, other, x, further), step(layer, layer, x, further)
        assert_same_step(name, got, expected, f"step {index}")
        assert_same(other.state_dict(), layer.state_dict(), f"state after step {index}")


@every_layer
@torch._dynamo.config.patch(error_on_recompile=True)
def test_dynamic_sizes(name):
    layer, example, further = made(name)
    other = copy.deepcopy(layer)
    fast = torch.compile(other, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 4, 7):
        x = example()
        x = torch.cat((x, x, x))[:size]
        rest = tuple(torch.cat((f, f, f))[:size] for f in further)
        if name == "PowerNorm":
            x = x.transpose(0, 1).contiguous()
        got, expected = step(fast, other, x, rest), step(layer, layer, x, rest)
        assert_same_step(name, got, expected, f"size {size}")
        assert_same(other.state_dict(), layer.state_dict(), f"state, size {size}")


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_autocast(name, training):
    layer, example, further = made(name)
    layer = layer.float().train(training)
    for _ in range(3):
        x = example().bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x, *further)
        y.float().sum().backward()
        assert y.isfinite().all()
    for buffer in layer.buffers():
        assert buffer.dtype in (torch.float32, torch.int64)
        assert buffer.isfinite().all()


@pytest.mark.parametrize("name", ["UnifiedNorm", "PowerNorm", "MaskedBatchNorm", "EvoNorm B0"])
def test_autocast_compiled(name):
    layer, example, further = made(name)
    layer = layer.float()
    other = copy.deepcopy(layer)
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    for index in range(5):
        x = example().bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = fast(x, *further), layer(x, *further)
        got.float().square().sum().backward()
        expected.float().square().sum().backward()
        assert_same({"y": got}, {"y": expected}, f"call {index}")
    assert_same(other.state_dict(), layer.state_dict(), "state", exact=False)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype):
    layer, example, further = made(name)
    layer = layer.to(dtype)
    further = tuple(f if f.dtype == torch.bool else f.to(dtype) for f in further)
    for _ in range(4):
        y = layer(example().to(dtype).requires_grad_(), *further)
        y.sum().backward()
        assert y.dtype == dtype
        assert y.isfinite().all()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == dtype


@every_layer
def test_copies_and_saves(name):
    layer, example, further = made(name)
    for _ in range(2):
        step(layer, layer, example(), further)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = made(name)[0]
    restored.load_state_dict(torch.load(file), strict=True)
    copies = {"deepcopy": copy.deepcopy(layer), "state dict": restored}
    if name != "WeightCompander":  # a parametrized module cannot be pickled, torch says
        copies["pickle"] = pickle.loads(pickle.dumps(layer))
    x = example()
    expected = step(layer, layer, x, further)
    for how, other in copies.items():
        assert_same(step(other, other, x, further), expected, how)
        assert_same(other.state_dict(), layer.state_dict(), how)


@every_layer
def test_strided_input(name):
    layer, example, further = made(name)
    for training in (True, False):
        layer.train(training)
        x = example()
        strided = torch.stack((x, x), -1)[..., 0]
        other = copy.deepcopy(layer)
        got, expected = step(other, other, strided, further), step(layer, layer, x, further)
        assert_same(got, expected, name, exact=False)
        assert got["y"].dtype == x.dtype


CHANNELLED = [n for n in LAYERS if "Conv" not in n and "Linear" not in n and "Compander" not in n]


@pytest.mark.parametrize("name", CHANNELLED)
def test_wrong_width_is_an_error_that_says_what_to_do(name):
    layer, example, further = made(name)
    x = example()
    wide = x.repeat(*(2 if size == 6 else 1 for size in x.shape))
    with pytest.raises(ValueError, match=r"expected .*6.*got .*12"):
        layer(wide, *further)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.endswith("masked")])
def test_wrong_mask_is_an_error_that_says_what_to_do(name):
    layer, example, (mask,) = made(name)
    for wrong in (mask[:, :-1], mask.float(), mask.flatten()):
        with pytest.raises(ValueError, match="expected a boolean mask of shape"):
            layer(example(), wrong)


def test_names():
    assert normfx.nn is __import__("normfx").nn
    for name in normfx.nn.__all__:
        assert getattr(normfx.nn, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
        normfx.nn.Unknown  # noqa: B018


@pytest.mark.parametrize("name", [n for n in CHANNELLED if "Binary" not in n])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_numbers_that_are_not_real(name, dtype):
    layer, example, further = made(name)
    for training in (True, False):
        with pytest.raises(ValueError, match="expected a real floating-point input"):
            layer.train(training)(example().to(dtype), *further)


@pytest.mark.parametrize("name", ["UnifiedNorm", "PowerNorm"])
@pytest.mark.parametrize("warm", [True, False])
def test_what_overflowed_does_not_stay(name, warm):
    layer, example, _ = made(name)
    for _ in range(1 if warm else 6):
        step(layer, layer, example(), ())
    before = copy.deepcopy(layer.state_dict())
    y = layer(example().requires_grad_())
    y.backward(torch.full_like(y, torch.inf))  # what a loss scaler then skips
    layer(example() * torch.nan).sum().backward()
    for key in ("ema_gz", "buffer_gz"):
        if key in before:
            torch.testing.assert_close(layer.state_dict()[key], before[key])
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert all(value.isfinite().all() for value in step(layer, layer, example(), ()).values())

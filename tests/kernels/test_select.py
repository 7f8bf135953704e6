"""Which norms become kernels: the option, the choice by (false) times, what it is kept by, what the report says."""

from __future__ import annotations

import json

import pytest
import torch
from assertions import assert_agrees, compiled
from torch import nn

import normfx
from normfx.kernels import kernels, select
from normfx.kernels.select import Contest, Selector, Verdict
from normfx.kernels.timing import step_of
from normfx.options import Options
from normfx.pipeline import rewrite
from normfx.record import Journal

pytestmark = pytest.mark.usefixtures("interpreter")

CPU = torch.device("cpu")


class Times:
    """A timer that knows how long each side takes, and counts how often it is asked."""

    def __init__(self, kernel_us: float, inductor_us: float):
        self.kernel_us, self.inductor_us, self.asked = kernel_us, inductor_us, []

    def __call__(self, graph, operands, grad, settings):
        targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        is_kernel = any(t.startswith("normfx.") for t in targets)
        self.asked.append([tuple(t.shape) for t in operands])
        graph(*operands)  # both sides run on what they are timed with
        return self.kernel_us if is_kernel else self.inductor_us


class Block(nn.Module):
    """Residual add, norm, activation."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, branch):
        stream = x + branch
        return stream, nn.functional.gelu(self.norm(stream))


def chosen(model, *inputs, selector, grad=False):
    """(the kernels in the graph, the journal) after the last stage."""
    seen: list = []

    def backend(gm, example_inputs):
        journal = Journal()
        rewritten = rewrite(gm, Options(), journal, inputs=example_inputs, selector=selector)
        names = [str(n.target) for n in rewritten.module.graph.nodes]
        seen.append(([n.split(".")[1] for n in names if n.startswith("normfx.")], journal))
        return gm

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(*inputs)
    return seen[-1]


def auto(times, folder):
    return Selector("auto", times, {}, folder, devices=("cpu",))


def test_a_faster_kernel_is_used_and_the_report_says_by_how_much(tmp_path):
    names, journal = chosen(
        Block(nn.LayerNorm(8)), torch.randn(6, 8), torch.randn(6, 8),
        selector=auto(Times(10.0, 15.0), tmp_path),
    )  # fmt: skip
    assert names == ["add_row_norm"]
    record = journal.sites[0].records[-1]
    assert (record.stage, record.rule, record.changed) == ("lower", "use-kernel", True)
    assert record.detail == "add_row_norm: kernel 10.0 us, Inductor 15.0 us (1.50 times)"


@pytest.mark.parametrize("kernel_us", [9.9, 10.0, 20.0])
def test_a_kernel_that_is_not_faster_is_not_used(kernel_us, tmp_path):
    """Nor one that is faster by less than two runs of one program differ."""
    names, journal = chosen(
        nn.LayerNorm(8), torch.randn(6, 8), selector=auto(Times(kernel_us, 10.0), tmp_path)
    )
    assert names == []
    assert journal.sites[0].refusals[-1] == "kernel-slower"
    assert f"kernel {kernel_us} us, Inductor 10.0 us" in journal.sites[0].records[-1].detail


def test_times_are_kept(tmp_path):
    times = Times(10.0, 15.0)
    x = torch.randn(6, 8)
    chosen(nn.LayerNorm(8), x, selector=auto(times, tmp_path))
    asked = len(times.asked)
    assert asked == 4  # both sides, twice
    names, _ = chosen(nn.LayerNorm(8), x, selector=auto(times, tmp_path))
    assert names == ["row_norm"]
    assert len(times.asked) == asked
    # without a timer, as in explain, what is on disk is known
    assert chosen(nn.LayerNorm(8), x, selector=auto(None, tmp_path))[0] == ["row_norm"]
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert (kept["operator"], kept["kernel_us"], kept["inductor_us"]) == ("row_norm", 10.0, 15.0)


def test_sizes_in_one_bucket_share_a_measurement(tmp_path):
    times = Times(10.0, 15.0)
    for rows, measurements in ((5, 1), (8, 1), (9, 2)):
        torch._dynamo.reset()
        chosen(nn.LayerNorm(8), torch.randn(rows, 8), selector=auto(times, tmp_path))
        assert len(times.asked) == 4 * measurements
    assert times.asked[0][0] == (8, 8)
    assert times.asked[-1][0] == (16, 8)


@pytest.mark.parametrize(
    "other",
    [
        {"form": "b"},
        {"operands": (((8, 9), torch.float32),)},
        {"operands": (((8, 8), torch.float16),)},
        {"grad": True},
        {"operator": "add_row_norm"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_contest_is_another_measurement(other, tmp_path):
    facts = {
        "operator": "row_norm", "form": "a", "operands": (((8, 8), torch.float32),),
        "device": CPU, "grad": False, "graphs": lambda: (None, None),
    }  # fmt: skip
    selector = Selector("auto", lambda *_: 1.0, {}, tmp_path)
    selector.verdict(Contest(**facts))
    selector.verdict(Contest(**{**facts, **other}))
    assert len(list(tmp_path.iterdir())) == 2


def test_other_sources_versions_devices_and_settings_are_another_measurement(tmp_path, monkeypatch):
    contest = Contest("row_norm", "a", (((8, 8), torch.float32),), CPU, False, lambda: (None, None))

    def measured(settings=None):
        Selector("auto", lambda *_: 1.0, settings or {}, tmp_path).verdict(contest)
        return len(list(tmp_path.iterdir()))

    assert measured() == measured() == 1
    assert measured({"max_autotune": True}) == 2
    for number, name in enumerate(("source_hash", "_versions", "_device_name"), 3):
        monkeypatch.setattr(select, name, lambda *_: "another")
        assert measured() == number


@pytest.mark.parametrize("text", ["", "{", "{}", '{"kernel_us": "fast", "inductor_us": 1}', "[]"])
def test_a_file_that_cannot_be_read_is_measured_again(text, tmp_path):
    x = torch.randn(6, 8)
    chosen(nn.LayerNorm(8), x, selector=auto(Times(10.0, 15.0), tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    times = Times(10.0, 15.0)
    assert chosen(nn.LayerNorm(8), x, selector=auto(times, tmp_path))[0] == ["row_norm"]
    assert times.asked
    assert json.loads(path.read_text())["kernel_us"] == 10.0


def test_a_measurement_that_fails_leaves_inductor(tmp_path):
    def timer(*_):
        raise RuntimeError("out of memory\nand more")

    names, journal = chosen(nn.LayerNorm(8), torch.randn(6, 8), selector=auto(timer, tmp_path))
    assert names == []
    assert journal.sites[0].refusals[-1] == "kernel-not-timed"
    assert journal.sites[0].records[-1].detail.endswith("not timed: RuntimeError: out of memory")
    assert list(tmp_path.iterdir()) == []


def test_nobody_has_timed_it(tmp_path):
    names, journal = chosen(nn.LayerNorm(8), torch.randn(6, 8), selector=auto(None, tmp_path))
    assert names == []
    assert journal.sites[0].refusals[-1] == "kernel-not-timed"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    selector = auto(Times(10.0, 15.0), tmp_path / "file")
    assert chosen(nn.LayerNorm(8), torch.randn(6, 8), selector=selector)[0] == ["row_norm"]


def test_on_a_cpu_auto_asks_nothing(monkeypatch):
    """Not even the table: choosing costs a CPU nothing."""
    from normfx.passes import use_kernel

    monkeypatch.setattr(use_kernel, "kernels", lambda: pytest.fail("asked"))
    names, journal = chosen(nn.LayerNorm(8), torch.randn(6, 8), selector=None)
    assert names == []
    assert "lower" not in [r.stage for r in journal.sites[0].records]


def test_the_folder_is_beside_inductors(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert select.default_folder() == tmp_path / "normfx-kernels"


def test_a_verdict_in_words():
    assert str(Verdict()) == "not timed"
    assert str(Verdict(2.0, 1.0)) == "kernel 2.0 us, Inductor 1.0 us (0.50 times)"
    assert not Verdict(0.0, None).kernel_wins


@pytest.mark.inductor
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_timed_is_compiled_apart_from_the_model(grad, tmp_path):
    """Inside of the compilation of the model, which leaves its own state alone and goes on."""
    seen = []

    def timer(graph, operands, grad, settings):
        results = step_of(graph, operands, grad, settings)()
        seen.append([tuple(t.shape) for t in results])
        return 1.0

    model = nn.LayerNorm(8)
    fast = torch.compile(model, backend=backend_with(auto(timer, tmp_path)))
    with torch.set_grad_enabled(grad):
        x = torch.randn(6, 8)
        torch.testing.assert_close(fast(x), model(x))
    gradients = [(8, 8), (8,), (8,)]  # of x in a bucket, weight and bias
    assert seen == [gradients if grad else [(8, 8)]] * 4


def backend_with(selector):
    def backend(gm, example_inputs):
        rewritten = rewrite(gm, Options(), Journal(), inputs=example_inputs, selector=selector)
        return rewritten.hoisted is None and rewritten.module

    return backend


# -- forced ----------------------------------------------------------------------------------------


FORCED = {"kernels": "triton"}


def kernels_of(model, *inputs, grad=False):
    return chosen(model, *inputs, selector=Selector("triton"), grad=grad)[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_forced_results_and_gradients_are_right(norm, grad):
    model = Block(norm(24))
    x, branch = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    assert_agrees(model, x, branch, grad=grad, options=FORCED)
    (site,) = normfx.report().sites
    assert site.actions[-1] == "use-kernel"


class OfTwo(nn.Module):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1), nn.functional.layer_norm(x, x.shape[-2:])


def test_forced_l2_and_a_norm_over_two_dims():
    model = OfTwo()
    assert kernels_of(model, torch.randn(2, 3, 8)) == ["row_norm", "row_norm"]
    assert_agrees(model, torch.randn(2, 3, 8), options=FORCED)


def test_forced_with_dynamic_rows():
    model = nn.LayerNorm(24)
    fast = compiled(model, dynamic=True, kernels="triton")
    with torch.no_grad():
        for rows in (3, 7):
            x = torch.randn(rows, 24)
            torch.testing.assert_close(fast(x), model(x))
    assert len(normfx.report().graphs) == 1


@pytest.mark.parametrize(
    ("model", "inputs", "found"),
    [
        # the sum is read before the norm: it is made where it stands
        (lambda x, y: (n := x + y, m := n * 2, nn.functional.layer_norm(n, (8,)) + m), 2, ["row_norm"]),
        (lambda x, y: nn.functional.layer_norm(x + y[:, :1], (8,)), 2, ["row_norm"]),
        (lambda x, y: nn.functional.layer_norm(torch.add(x, y, alpha=2), (8,)), 2, ["row_norm"]),
        (lambda x: (n := nn.functional.layer_norm(x, (8,)), n.relu()), 1, ["row_norm"]),
    ],
    ids=["read before", "broadcast", "alpha", "activation read elsewhere"],
)  # fmt: skip
def test_what_is_not_taken_into_the_kernel(model, inputs, found):
    given = [torch.randn(6, 8) for _ in range(inputs)]
    assert kernels_of(model, *given) == found
    for mine, theirs in zip(compiled(model, kernels="triton")(*given), model(*given), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("model", "x", "detail"),
    [
        (nn.GroupNorm(2, 8), torch.randn(2, 8, 3), "its dims are not the last ones, of known size"),
        (nn.LayerNorm(8), torch.randn(8, 6).t(), "its input is not dense"),
        (nn.LayerNorm(8).double(), torch.randn(6, 8).double(), "no kernel for float64"),
    ],
    ids=["groups", "strides", "dtype"],
)
def test_where_there_is_no_kernel_a_code_says_so(model, x, detail):
    names, journal = chosen(model, x, selector=Selector("triton"))
    assert names == []
    record = journal.sites[0].records[-1]
    assert record.code.value == "no-kernel"
    assert record.detail == detail


def test_skip_leaves_a_norm_to_inductor():
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8)), torch.randn(6, 8)
    with torch.no_grad():
        compiled(model, kernels="triton", skip=["lower@0"])(x)
    first, second = normfx.report().sites
    assert "use-kernel" not in first.actions
    assert "use-kernel" in second.actions


def test_inductor_asks_nobody():
    names, journal = chosen(nn.LayerNorm(8), torch.randn(6, 8), selector=Selector("inductor"))
    assert names == []
    assert "lower" not in [r.stage for r in journal.sites[0].records]


def test_the_scale_of_a_row_for_defer_scale():
    """RMSNorm in front of a product: the scale goes past it, and the add makes it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 4, bias=False)

        def forward(self, x, y):
            stream = x + y
            return stream, self.linear(nn.functional.rms_norm(stream, (64,), eps=0.5)).sigmoid()

    seen = []

    def backend(gm, inputs):
        journal = Journal()
        options = Options.parse({"rules": ["defer-scale"]})
        rewritten = rewrite(gm, options, journal, inputs=inputs, selector=Selector("triton"))
        seen.extend(str(n.target) for n in rewritten.module.graph.nodes)
        return rewritten.module

    with torch.no_grad():
        model, x, y = Model(), torch.randn(16, 6, 64), torch.randn(16, 6, 64)
        got = torch.compile(model, backend=backend)(x, y)
    assert "normfx.add_row_scale.default" in seen
    for mine, theirs in zip(got, model(x, y), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_table_is_there():
    assert {"row_norm", "add_row_norm", "add_row_scale"} <= {k.name for k in kernels()}

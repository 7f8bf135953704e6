"""The report: what it holds, how it prints, and that asking for one changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import torch
from assertions import compiled
from expecttest import assert_expected_inline
from models import head, roughened
from torch import nn

import normfx
from normfx.record import Journal, Site


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.final = nn.RMSNorm(8, eps=1e-6)

    def forward(self, x):
        x = self.up(self.norm(x))
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        near = x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5)
        return self.final(x), y + near


def small_report():
    with torch.no_grad():
        compiled(roughened(Small()))(torch.randn(8, 8))
    return normfx.report()


def test_sites():
    norm, spelled, final = small_report().sites
    assert (norm.name, norm.kind, norm.dims, norm.eps, norm.dtype) == (
        "norm",
        "LayerNorm",
        (-1,),
        1e-5,
        "float32",
    )
    assert (norm.weight, norm.bias, norm.origin) == (True, True, "layer_norm")
    assert (norm.actions, norm.refusals) == (
        ["fold-affine-into-linear"],
        ["writer-not-linear"],  # x is an input of the model
    )
    assert (spelled.kind, spelled.eps, spelled.origin) == ("RMSNorm", 1e-5, "algebra")
    assert (spelled.weight, spelled.bias) == (False, False)
    assert (final.name, final.actions, final.refusals) == ("final", [], ["extra-user"])
    for site in (norm, spelled, final):
        file, line = site.location.rsplit(":", 1)
        assert file == __file__
        assert int(line) > 0


def test_locations_are_the_lines_of_the_user():
    norm, spelled, _ = small_report().sites
    with open(__file__) as file:
        lines = file.read().splitlines()
    assert "self.up(self.norm(x))" in lines[int(norm.location.rsplit(":", 1)[1]) - 1]
    assert "y = x * torch.rsqrt" in lines[int(spelled.location.rsplit(":", 1)[1]) - 1]


def test_near_misses():
    (miss,) = small_report().near_misses
    assert miss.code is normfx.Refusal.BROADCAST
    assert miss.location.startswith(__file__)


def test_text():
    text = str(small_report())
    lines = [
        line.rsplit(":", 1)[0] if "test_report.py:" in line else line for line in text.splitlines()
    ]
    assert_expected_inline(
        "\n".join(line.rstrip() for line in lines) + "\n",
        """\
graph 0: 3 norms found, 1 rewritten, 1 near misses, 2 tensors hoisted (0.0 MiB)
site   kind       dims  eps    dtype    actions                  refused            line
norm   LayerNorm  -1    1e-05  float32  fold-affine-into-linear  writer-not-linear  tests/test_report.py
mul    RMSNorm    -1    1e-05  float32  -                        no-affine          tests/test_report.py
final  RMSNorm    -1    1e-06  float32  -                        extra-user         tests/test_report.py
near miss  broadcast-axis-differs  rsqrt_1  tests/test_report.py
           A statistic is broadcast along another axis than the one it belongs to.

extra-user: What would change is read elsewhere too: by the output, a residual or another operator. The affine part must stay for that reader.
no-affine: The norm has no weight and no bias. Nothing to do.
writer-not-linear: What makes the norm's input is no linear operator or convolution, or of another dtype. Nothing to do; the norm stays.
""",
    )


def test_a_page_has_every_norm_decision_and_code(tmp_path):
    report = small_report()
    page = report.to_html(tmp_path / "report.html").read_text()
    for site in report.sites:
        assert site.kind in page
        assert all(action in page for action in site.actions)
        assert all(f"<dt>{code}</dt>" in page for code in site.refusals)
    assert "Near miss" in page
    assert "http" not in page  # nothing is loaded


def test_a_page_escapes_names(tmp_path):
    site = Site("<b>norm</b>", "LayerNorm", (-1,), 1e-5, "float32", '<script>".py:1')
    page = normfx.Report((Journal(sites=[site]),)).to_html(tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert "<script>" not in page
    assert "&lt;b&gt;norm" in page


def test_a_page_without_graphs(tmp_path):
    assert "No graph" in normfx.report().to_html(tmp_path / "report.html").read_text()


def test_text_without_graphs():
    assert str(normfx.report()) == "normfx compiled no graph since the last reset.\n"


def test_text_is_plain():
    assert "\x1b" not in str(small_report())


def test_json():
    report = small_report()
    (graph,) = json.loads(report.to_json())["graphs"]
    assert graph["name"] == "graph 0"
    assert graph["training"] is False
    assert graph["fallback"] == ""
    assert graph["hoisted_tensors"] == 2
    assert graph["hoisted_bytes"] == 4 * (8 * 8 + 8)
    assert set(graph["stage_ms"]) == {"capture", "recognise", "rewrite", "fold", "hoist", "lower"}
    assert [site["kind"] for site in graph["sites"]] == [site.kind for site in report.sites]
    assert graph["sites"][0]["actions"] == ["fold-affine-into-linear"]
    assert graph["near_misses"][0]["code"] == "broadcast-axis-differs"
    assert graph["near_misses"][0]["meaning"]


def test_json_with_numbers_that_are_none():
    class Infinite(nn.Module):
        def forward(self, x):
            return nn.functional.layer_norm(x, (8,), eps=float("inf"))

    compiled(Infinite())(torch.randn(4, 8))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(normfx.report().to_json(), parse_constant=refuse)


def test_reset():
    small_report()
    normfx.reset()
    assert normfx.report().graphs == ()


def test_graphs_are_numbered_across_models():
    small_report()
    torch._dynamo.reset()
    assert [graph.name for graph in small_report().graphs] == ["graph 0", "graph 1"]


def test_a_report_does_not_grow():
    report = small_report()
    torch._dynamo.reset()
    small_report()
    assert len(report.graphs) == 1


def test_explain_agrees_with_report():
    model, x = roughened(Small()), torch.randn(8, 8)
    with torch.no_grad():
        explained = normfx.explain(model)(x)
        compiled(model)(x)
    assert explained.sites == normfx.report().sites


def test_explain_touches_nothing(monkeypatch):
    import torch._inductor.compile_fx

    def compile_fx(*_, **__):
        raise AssertionError("Inductor was started")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    model, x = head(), torch.randn(8, 8)
    before = {name: held.clone() for name, held in model.state_dict().items()}
    with torch.no_grad():
        report = normfx.explain(model)(x)
    assert len(report.sites) == 1
    assert normfx.report().graphs == ()
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_explain_leaves_compiled_code_valid():
    model, x = head(), torch.randn(8, 8)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        normfx.explain(model)(x)
        fast(x)
    assert len(normfx.report().graphs) == 1


def test_explain_often_and_then_compile():
    """Each explain() compiles once more; that must not use up dynamo's limit for the model."""
    model, x = head(), torch.randn(8, 8)
    with torch.no_grad():
        for _ in range(12):
            assert len(normfx.explain(model)(x).sites) == 1
        compiled(model)(x)
    assert len(normfx.report().graphs) == 1


def test_explain_with_keyword_arguments_and_graph_breaks():
    def broken(x, *, twice):
        x = nn.functional.layer_norm(x, (8,))
        torch._dynamo.graph_break()
        return nn.functional.layer_norm(x * twice, (8,))

    report = normfx.explain(broken)(torch.randn(4, 8), twice=2)
    assert [len(graph.sites) for graph in report.graphs] == [1, 1]


SCRIPT = """
import torch
from torch import nn
model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
with torch.no_grad():
    torch.compile(model, backend="normfx", options={"lowering": "eager", "strict": True})(torch.randn(3, 8))
print("imported" if "normfx" in __import__("sys").modules else "")
"""


def run_script(**environment):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_torch_logs():
    done = run_script(TORCH_LOGS="+normfx")
    assert "fold-affine-into-linear" in done.stderr
    assert "graph 0: 1 norms" in done.stderr
    assert done.stdout.strip() == "imported"


def test_the_journal_is_in_the_trace(tmp_path):
    run_script(TORCH_TRACE=str(tmp_path))
    (log,) = tmp_path.glob("dedicated_log_torch_trace_*.log")
    lines = log.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if '"normfx_journal"' in line]
    # a payload stands under the line that it belongs to, each of its lines after a tab
    payload = itertools.takewhile(lambda line: line.startswith("\t"), lines[at + 1 :])
    text = "\n".join(line[1:] for line in payload)
    (site,) = json.loads(text)["sites"]
    assert site["actions"] == ["fold-affine-into-linear"]
    assert "graph 0: 1 norms found" in str(normfx.Report.from_json(text))


def test_says_nothing_by_default():
    assert run_script().stderr == ""

"""The command line, in process: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from normfx.cli import main

MODELS = """
import torch
from torch import nn

def net():
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    return model, torch.randn(8, 16)

def with_keywords():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
        def forward(self, x, *, scale):
            return self.norm(x) * scale
    return Model(), (torch.randn(2, 8),), {"scale": 2.0}

module = nn.Sequential(nn.LayerNorm(8))
bare = lambda: nn.LayerNorm(8)
batches = lambda: [torch.randn(8, 16) for _ in range(3)]

def broken():
    raise RuntimeError("no weights here\\nand more")

class Wrong(nn.Module):
    def forward(self, x):
        return x @ x

wrong = lambda: (Wrong(), torch.randn(2, 3))
number = lambda: 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a user's file of models, in which commands run."""
    (tmp_path / "mine.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


def test_explain(capsys):
    assert main(["explain", "mine:net"]) == 0
    out, err = capsys.readouterr()
    assert "recentre, fold-affine-into-linear" in out
    assert err == ""
    assert "\x1b" not in out  # no colours where there is no terminal


def test_explain_as_json_and_back(capsys, folder):
    assert main(["explain", "mine:net", "--json"]) == 0
    text = capsys.readouterr().out
    (site,) = json.loads(text)["graphs"][0]["sites"]
    assert site["actions"][:2] == ["recentre", "fold-affine-into-linear"]
    (folder / "saved.json").write_text(text)
    assert main(["report", "saved.json", "--json"]) == 0
    assert capsys.readouterr().out == text
    (folder / "journal.json").write_text(json.dumps(json.loads(text)["graphs"][0]))
    assert main(["report", "journal.json"]) == 0
    assert "1 norms found, 1 rewritten" in capsys.readouterr().out


def test_rules_options_dtype_and_training(capsys):
    assert main(["explain", "mine:net", "--rules", "recentre,hoist", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16" in out
    assert "rule-off" in out
    assert main(["explain", "mine:net", "--option", 'skip=["recentre@1"]', "--dynamic"]) == 0
    assert "recentre" not in capsys.readouterr().out
    assert main(["explain", "mine:net", "--train"]) == 0
    assert "graph 0 (training)" in capsys.readouterr().out


def test_keyword_arguments():
    assert main(["verify", "mine:with_keywords"]) == 0


def test_explain_writes_a_page(capsys, folder):
    assert main(["explain", "mine:net", "--html", "page.html"]) == 0
    assert capsys.readouterr().err == "wrote page.html\n"


def test_diff(capsys):
    assert main(["diff", "mine:net", "--after", "rewrite", "--context", "0"]) == 0
    out = capsys.readouterr().out
    assert "capture -> rewrite" in out
    assert "RMSNorm" in out
    assert main(["diff", "mine:net", "--json", "--html", "page.html"]) == 0
    out, err = capsys.readouterr()
    assert err == "wrote page.html\n"
    held = json.loads(out)
    assert [stage["stage"] for stage in held["stages"]][::5] == ["capture", "lower"]
    assert main(["diff", "mine:net", "--after", "lowered"]) == 2
    assert "there is no stage 'lowered'" in capsys.readouterr().err


def test_verify(capsys):
    assert main(["verify", "mine:net", "--html", "page.html"]) == 0
    out, err = capsys.readouterr()
    assert "recognise" in out
    assert err == "wrote page.html\n"
    assert main(["verify", "mine:net", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_violation_is_a_finding(monkeypatch, capsys):
    from normfx.passes import recentre

    original = recentre._biased
    monkeypatch.setattr(recentre, "_biased", lambda node: original(node)._replace(eps=0.1))
    assert main(["verify", "mine:net"]) == 1
    assert 'skip": ["recentre@1"]' in capsys.readouterr().out


def test_calibrate(capsys, folder):
    assert main(["calibrate", "mine:net", "mine:batches", "-o", "s.safetensors", "--batches", "2"]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert out == "1 norms measured over 2 batches\nto replace: 1\n"
    assert err == "wrote s.safetensors\n"
    assert main(["explain", "mine:net", "--option", "statistics=s.safetensors"]) == 0
    assert "calibrated-norm" in capsys.readouterr().out


@pytest.mark.inductor
def test_bench(capsys, folder):
    command = ["bench", "mine:net", "--rounds", "3", "--chart", "times.svg"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["eager", "inductor", "normfx"]
    assert err == "wrote times.svg\n"
    assert "<svg" in (folder / "times.svg").read_text()
    assert main([*command[:4], "--json", "--train"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["train"] is True
    assert len(held["backends"]["normfx"]["seconds"]) == 3


def test_a_model_of_the_hub_without_a_network(capsys):
    pytest.importorskip("transformers")
    assert main(["explain", "hf:gpt2"]) == 0
    assert "h.1.ln_2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["explain", "nothing:net"], 2, "normfx explain: there is no module 'nothing' here ("),
        (["explain", "mine:nett"], 2, "normfx explain: module 'mine' has no 'nett'"),
        (["explain", "mine"], 2, "normfx explain: expected package.module:factory or hf:FAMILY[:SIZE], got 'mine'"),
        (["explain", "mine:bare"], 2, "normfx explain: mine:bare gives a model without inputs"),
        (["explain", "mine:module"], 2, "normfx explain: mine:module gives a model without inputs"),
        (["explain", "mine:number"], 2, "normfx explain: mine:number gives int, expected a model"),
        (["explain", "mine:broken"], 3, "normfx explain: mine:broken() failed: RuntimeError: no weights here"),
        (["verify", "mine:wrong"], 3, "normfx verify: running mine:wrong failed: RuntimeError: mat1 and mat2"),
        (["explain", "hf:gpt2:huge"], 2, "normfx explain: hf:gpt2:huge: expected a size of tiny, small, base"),
        (["explain", "hf:gpt3"], 2, "normfx explain: hf:gpt3: transformers has no family 'gpt3'; did you mean"),
        (["verify", "mine:net", "--option", "skipp=1"], 2, "unknown option 'skipp'. Did you mean 'skip'?"),
        (["verify", "mine:net", "--option", "skip"], 2, "--option: expected KEY=VALUE, got 'skip'"),
        (["explain", "mine:net", "--rules", "recenter"], 2, "unknown rule 'recenter'. Did you mean 'recentre'?"),
        (["explain", "mine:net", "--device", "nowhere"], 2, "normfx explain: --device nowhere: "),
        (["bench", "mine:net", "--chart", "x.txt"], 2, "--chart: expected a .png, .svg or .pdf, got 'x.txt'"),
        (["calibrate", "mine:net", "mine:number", "-o", "x"], 2, "mine:number gives int, expected an iterable"),
        (["report", "mine.py"], 2, "normfx report: mine.py is no report"),
        (["report", "gone.json"], 2, "normfx report: [Errno 2] No such file or directory: 'gone.json'"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments, status, message, capsys):
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_more_of_an_error(capsys):
    assert main(["explain", "mine:broken", "--traceback"]) == 3
    err = capsys.readouterr().err
    assert 'raise RuntimeError("no weights' in err
    assert err.splitlines()[-1].startswith("normfx explain: mine:broken() failed")


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["explain"], ["bench", "m:n", "--rounds", "0"]])  # fmt: skip
def test_wrong_usage_is_what_argparse_says(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: normfx" in capsys.readouterr().err


def test_interrupted(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("normfx.cli.commands.run", stop)
    assert main(["explain", "mine:net"]) == 130
    assert capsys.readouterr().err == "normfx explain: interrupted\n"


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "normfx", "--version"], capture_output=True, text=True, check=True)  # fmt: skip
    import normfx

    assert done.stdout == f"normfx {normfx.__version__}\n"


def test_help_names_every_command_and_status(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in (
        "explain",
        "diff",
        "verify",
        "bench",
        "calibrate",
        "report",
        "exit status",
        "hf:FAMILY",
    ):
        assert name in out


def test_dtype_and_inputs_agree():
    from normfx.cli.models import load

    loaded = load("mine:net", device="cpu", dtype="float64", train=False, needs_inputs=True)
    assert loaded.args[0].dtype == loaded.model[0].weight.dtype == torch.float64
    assert not loaded.model.training

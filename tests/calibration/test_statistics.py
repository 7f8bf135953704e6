"""Statistics: the file, what is refused of it, and choices of sites."""

from __future__ import annotations

import json

import pytest
import torch
from calibrated_models import NAMES, batches, net
from safetensors.torch import load_file, save_file

from normfx import Statistics, StatisticsError, calibrate
from normfx.calibration.statistics import VERSION


@pytest.fixture
def measured() -> Statistics:
    return calibrate(net(), batches(6), window=2, filtration=True, weights=True, mask=None)


def test_a_file_is_the_same_value(measured, tmp_path):
    path = tmp_path / "statistics.safetensors"
    measured.save(path)
    loaded = Statistics.load(str(path))
    assert loaded == measured
    assert hash(loaded) == hash(measured)
    assert loaded.fingerprint == measured.fingerprint
    assert loaded.using(["final"]).chosen == ("final",)
    assert loaded.using(["final"]) != measured
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    tensors = load_file(path)
    assert {held.dtype for held in tensors.values()} == {torch.float64}
    assert "final/mean" in tensors


def test_saving_fails_whole(measured, tmp_path, monkeypatch):
    path = tmp_path / "statistics"
    measured.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        measured.using(["final"]).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def damaged(path, change) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    about, tensors = json.loads(header["normfx-statistics"]), load_file(path)
    change(about, tensors)
    save_file(tensors, path, {"normfx-statistics": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, tensors: about.update(version=VERSION + 1), "install a later one"),
        (lambda about, tensors: about.pop("state"), "no file of normfx.Statistics, or a damaged"),
        (lambda about, tensors: tensors.pop("final/mean"), "KeyError: 'final/mean'"),
        (
            lambda about, tensors: tensors.update({"final/mean": torch.zeros(9)}),
            r"final/mean: torch.float32\[9\], expected float64 of 8",
        ),
        (lambda about, tensors: about["sites"]["final"]["form"].pop("eps"), "a damaged one"),
        (lambda about, tensors: about.update(form="best"), "form 'best'"),
    ],
)
def test_a_damaged_file_is_refused(measured, tmp_path, change, message):
    path = tmp_path / "statistics"
    measured.save(path)
    damaged(path, change)
    with pytest.raises(StatisticsError, match=message):
        Statistics.load(path)


def test_another_file_is_refused(measured, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"something else")
    with pytest.raises(StatisticsError, match="or a damaged one"):
        Statistics.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(StatisticsError, match="but not one of"):
        Statistics.load(path)
    measured.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StatisticsError, match="or a damaged one"):
        Statistics.load(path)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "nothing")


def test_names_and_patterns(measured):
    assert measured.resolve(None) == tuple(NAMES)
    assert measured.resolve(["blocks.*.norm", "final"]) == (NAMES[0], NAMES[2], NAMES[4])
    assert measured.using(["final"]).resolve(None) == ("final",)
    with pytest.raises(StatisticsError, match=r"no site 'finale'. Did you mean 'final'\?"):
        measured.resolve(["finale"])


def test_for_people(measured):
    assert repr(measured).startswith("Statistics(5 sites, 6 batches, ")
    assert "5 sites over 6 batches (complete)" in str(measured)
    assert "final: a LayerNorm over 8 channels, eps 1e-05, 48 rows" in str(measured)

"""Eight threads, eight models: right answers, and a report that mixes nothing up."""

from __future__ import annotations

import copy
import threading

import torch
from assertions import assert_within_contract, compiled
from models import head

import normfx

THREADS = 8


def in_threads(task):
    """Runs task(0) ... task(7) at once; raises what any of them raised."""
    start, errors, results = threading.Barrier(THREADS), [], [None] * THREADS

    def run(index):
        try:
            start.wait()
            results[index] = task(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_eight_models():
    models = [head(width=8 + index) for index in range(THREADS)]
    inputs = [torch.randn(64, 8 + index) for index in range(THREADS)]

    def task(index):
        with torch.no_grad():
            return compiled(models[index])(inputs[index])

    with torch.no_grad():
        for got, model, x in zip(in_threads(task), models, inputs, strict=True):
            assert_within_contract(got, model(x), copy.deepcopy(model).double()(x.double()))
    report = normfx.report()
    assert [graph.name for graph in report.graphs] == [f"graph {index}" for index in range(THREADS)]
    assert all(len(graph.sites) == 1 for graph in report.graphs)
    assert all(site.actions == ["fold-affine-into-linear"] for site in report.sites)


def test_one_model_called_by_eight_threads():
    model, x = head(), torch.randn(64, 8)
    fast = compiled(model)
    with torch.no_grad():
        expected = fast(x)

    def task(index):
        with torch.no_grad():
            return [fast(x) for _ in range(20)]

    for results in in_threads(task):
        assert all(torch.equal(result, expected) for result in results)


def test_first_call_in_eight_threads():
    model, x = head(), torch.randn(64, 8)
    fast = compiled(model)

    def task(index):
        with torch.no_grad():
            return fast(x)

    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        for got in in_threads(task):
            assert_within_contract(got, model(x), exact)


def test_explain_in_threads():
    models = [
        torch.nn.Sequential(*[head(8, 8) for _ in range(index + 1)]) for index in range(THREADS)
    ]
    x = torch.randn(64, 8)

    def task(index):
        with torch.no_grad():
            return normfx.explain(models[index])(x)

    for index, report in enumerate(in_threads(task)):
        assert len(report.sites) == index + 1
    assert normfx.report().graphs == ()


def test_reset_while_others_compile():
    def task(index):
        with torch.no_grad():
            if index % 2:
                normfx.reset()
                return str(normfx.report())
            return compiled(head(width=8 + index))(torch.randn(64, 8 + index))

    results = in_threads(task)
    assert all(result.shape == (64, 4) for result in results[::2])

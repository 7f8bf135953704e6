"""Every test starts from the same state: no compiled code, no reports, the same random numbers."""

from __future__ import annotations

import os

# Two xdist workers on a small machine: more threads than cores make each operator slower, not faster.
os.environ["OMP_NUM_THREADS"] = "1"
# Inductor's pool of compile processes costs seconds to start, and the tests compile small graphs.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
import torch

import normfx

# Without a GPU, the kernels run in Triton's interpreter. Triton reads this when it is imported, so it holds for the
# session; nothing but Triton's own decorator reads it. What has to be compiled is, in a process without it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_state():
    torch._dynamo.reset()
    normfx.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_inductor_cache(request):
    """A test that compiles does compile: nothing comes from the cache of an earlier run."""
    if request.node.get_closest_marker("inductor") is None:
        yield
        return
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield

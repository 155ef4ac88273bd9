"""Settings of the whole suite."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, slowly; to be set before Triton is imported
    try:
        from triton.runtime import interpreter
    except ImportError:
        pass
    else:
        patch_tensor = interpreter._patch_lang_tensor

        def patch_tensor_for_new_numpy(tensor, scope):
            """NumPy 2.4 makes no number of an array of one element, as Triton 3.6's interpreter wants it to."""
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patch_tensor_for_new_numpy


def pytest_configure(config):
    torch.set_num_threads(1)  # small matrices: a second thread only waits


def pytest_collection_modifyitems(config, items):
    skip_slow = pytest.mark.skip(reason="slow: run with -m slow")
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    skip_multi = pytest.mark.skip(reason="needs several CUDA devices")
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(skip_slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
            item.add_marker(skip_multi)

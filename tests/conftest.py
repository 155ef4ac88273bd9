"""Settings of the whole suite."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(1)  # small matrices: a second thread only waits


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    skip_multi = pytest.mark.skip(reason="needs several CUDA devices")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if item.get_closest_marker("multigpu") and torch.cuda.device_count() < 2:
            item.add_marker(skip_multi)

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked ranks inherit no thread pool
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import torch

torch.set_num_threads(1)
STARTS_RAY = ("test_local_cluster.py", "test_launch.py")  # beside all of end_to_end


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with the tiny data set, made once."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n 2 --dist loadgroup`: a file stays in one process, and all that start Ray in the same one, for two Ray clusters that
    start on one machine find each other."""
    for item in items:
        ray = item.path.parent.name == "end_to_end" or item.path.name in STARTS_RAY
        item.add_marker(pytest.mark.xdist_group("ray" if ray else item.path.name))

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked ranks inherit no thread pool
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with the tiny data set, made once."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder)
    return folder

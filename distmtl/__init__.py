"""distmtl: a distributed trainer for multi-task recommendation models.

from distmtl import load_config, train, evaluate, export, Predictor
result = train(load_config("configs/synthetic.yaml"))   # in this process; the command line puts it under Ray
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmtl.config import Config
    from distmtl.config_file import load_config
    from distmtl.errors import DistmtlError
    from distmtl.evaluation import evaluate
    from distmtl.exporting.writer import export
    from distmtl.loop import train
    from distmtl.serving.predictor import Predictor

_HOME = {
    "Config": "config",
    "DistmtlError": "errors",
    "Predictor": "serving.predictor",
    "evaluate": "evaluation",
    "export": "exporting.writer",
    "load_config": "config_file",
    "train": "loop",
}

__all__ = ["Config", "DistmtlError", "Predictor", "evaluate", "export", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import distmtl` stays fast."""
    if name in _HOME:
        return getattr(import_module(f"distmtl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'distmtl' has no attribute {name!r}")

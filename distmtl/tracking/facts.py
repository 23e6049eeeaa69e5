"""What a tracker is told of a run once: the config, and what the run was made with."""

from __future__ import annotations

from distmtl.config import Config
from distmtl.config_file import flat
from distmtl.storage import absolute
from distmtl.versions import git_commit, versions


def parameters(config: Config) -> dict[str, str]:
    """Dotted key → value of the resolved config, but where it is tracked. Brackets that MLflow takes in no name are left out."""
    tree = flat(config.model_dump(mode="json", exclude={"tracking"}))
    return {key.replace("(", "").replace(")", ""): str(value) for key, value in tree.items()}


def tags(config: Config) -> dict[str, str]:
    return {
        "run_dir": absolute(config.run_dir),
        "git": git_commit() or "no checkout",
        **{f"version.{name}": version for name, version in versions().items()},
    }

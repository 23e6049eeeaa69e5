"""Configs in the documentation: a whole one must be valid by itself, a part of one where it is laid over configs/synthetic.yaml."""

from __future__ import annotations

from typing import Any, get_args

from distmtl.config import Feature
from distmtl.config.leaderboard import LeaderboardConfig
from distmtl.config.tuning import TuningConfig
from distmtl.config_file import merge, parse_as, parse_config, parse_yaml, read_mapping
from distmtl.serving.fusion import parse_fusion
from documentation.blocks import ROOT, Block


def check(block: Block) -> None:
    """
    Raises:
        DistmtlError: the mistakes in it.
        YAMLError: it is no YAML, or gives a key twice.
    """
    content = parse_yaml(block.text)
    if isinstance(content, list):
        content = {"features" if content[0]["kind"] in _kinds(Feature) else "tasks": content}
    if "heads" in content:
        parse_as(LeaderboardConfig, {"name": "my", "data": {"any": "any.yaml"}, **content}, block.where)
    elif "space" in content:
        parse_as(TuningConfig, {"name": "my", **content}, block.where)
    elif content.keys() == {"fusion"}:
        parse_fusion(content["fusion"])
    elif {"data", "features", "tasks"} <= content.keys():
        parse_config({"name": "my", **content}, block.where)
    else:
        parse_config(_laid_over(read_mapping(ROOT / "configs" / "synthetic.yaml"), content), block.where)


def _laid_over(base: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Whole lists replace the base's; elements without a kind change the one of their name."""
    whole = {k for k, v in part.items() if isinstance(v, list) and all("kind" in e for e in v)}
    return merge({k: v for k, v in base.items() if k not in whole}, part)


def _kinds(union: Any) -> set[str]:
    return {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(union)[0])}

"""What the documentation tells its reader to run: commands, Python, configs; found by the blocks of Markdown that they are in.

A labelled block is what its label says: in one of `sh` every line is a command. An indented block, or one without a label, is a transcript
if a line in it starts as commands do; what else is in it is their output. It is Python if it starts with an import, a config if it is one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from yaml import YAMLError

from distmtl.config import Config
from distmtl.config.leaderboard import LeaderboardConfig
from distmtl.config.tuning import TuningConfig
from distmtl.config_file import parse_yaml

ROOT = Path(__file__).parents[1]
SHELL = ("sh", "bash", "shell", "console")
PROGRAMS = (
    "distmtl|make|python3?|pip|pytest|torchrun|ray|curl|wget|kubectl|helm|docker|git|ssh|export|unset|source|kill|touch|mkdir|cp|mv|rm|cat|tail|cd|"
    "tensorboard|mlflow|wandb|prometheus|grafana-server|nvidia-smi"
)
COMMAND = re.compile(rf"(\$ )?([A-Z_]+=\S* +)*(({PROGRAMS})(\s|$)|(\./)?(\.venv|launch|\.ci)/)")
# Keys by which a block is known to be of a config.
FRAGMENT = {*Config.model_fields, *LeaderboardConfig.model_fields, *TuningConfig.model_fields, "fusion"}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str  # command, python, yaml
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def plain(self) -> str:
        """A command without the comment behind it."""
        return re.sub(r"\s+#\s.*$", "", self.text) if "\n" not in self.text else self.text


def pages() -> list[Path]:
    """What is run: README first, as people do. Its translation says the same, and docs/reference/config.md has nothing to run."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page != ROOT / "docs" / "reference" / "config.md"]


def notebooks() -> list[Path]:
    return sorted((ROOT / "docs").rglob("*.ipynb"))


def blocks_of(page: Path) -> Iterator[Block]:
    name = str(page.relative_to(ROOT))
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map
        line, label, text = token.map[0] + 1 + (token.type == "fence"), token.info.split(" ")[0], token.content
        kind = "command" if label in SHELL else {"python": "python", "py": "python", "yaml": "yaml", "yml": "yaml"}.get(label, "")
        kind = kind or (_kind_of(text) if not label else "")
        if kind == "command":
            yield from _commands(name, line, text, every_line=bool(label))
        elif kind:
            yield Block(name, line, kind, text)


def _kind_of(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    if any(COMMAND.match(line) for line in lines):
        return "command"
    if lines and re.match(r"(from [\w.]+ import|import) \w", lines[0]):
        return "python"
    try:
        content = parse_yaml(text)
    except YAMLError:
        return ""
    if isinstance(content, list):
        return "yaml" if all(isinstance(c, dict) and "kind" in c for c in content) else ""
    return "yaml" if isinstance(content, dict) and content.keys() <= FRAGMENT else ""


def _commands(page: str, line: int, text: str, every_line: bool) -> Iterator[Block]:
    """Lines that belong together (a quotation, a backslash, a document <<) are one command."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        first = at
        whole = lines[at].strip().removeprefix("$ ")
        at += 1
        if not whole or whole.startswith("#") or not (every_line or COMMAND.match(whole)):
            continue
        while at < len(lines) and _goes_on(whole):
            whole += "\n" + lines[at]
            at += 1
        yield Block(page, line + first, "command", whole)


def _goes_on(command: str) -> bool:
    if document := re.search(r"<<-? *['\"]?(\w+)", command):
        return not re.search(rf"^\s*{document[1]}$", command, flags=re.M)
    if command.endswith("\\"):
        return True
    try:
        shlex.split(command, comments=True)
    except ValueError:  # a quotation is open
        return True
    return False

"""The pages that teach: guides say configs that load and name what exists, pictures are drawn, the Chinese README keeps in step."""

from __future__ import annotations

import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from distmtl.__main__ import parse
from distmtl.config.leaderboard import LeaderboardConfig
from distmtl.config_file import parse_as, parse_config, parse_yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = sorted((DOCS / "guides").glob("*.md"))
CJK = re.compile(r"[\u4e00-\u9fff]")


def files_of(page: Path) -> dict[str, str]:
    """What a reader writes by `cat > NAME << 'EOF'`."""
    return dict(re.findall(r"^cat > (\S+) << 'EOF'\n(.*?)^EOF$", page.read_text(encoding="utf-8"), flags=re.M | re.S))


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.stem)
def test_a_guide_is_whole(page):
    """Its configs are valid, its scripts compile, its commands parse and read files that it has written before."""
    text, files = page.read_text(encoding="utf-8"), files_of(page)
    for name, content in files.items():
        if name.endswith(".py"):
            compile(content, name, "exec")
        elif "heads" in (raw := parse_yaml(content)):
            parse_as(LeaderboardConfig, raw, name)
        else:
            parse_config(raw, name)
    commands = re.findall(r"^    (distmtl (?:.*\\\n)*.*)", text, flags=re.M)
    assert sum(name.endswith(".yaml") for name in files) >= 1 and len(commands) >= 3
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        parse(words[1:])
        for name in {w for w in words if re.fullmatch(r"[\w-]+\.(yaml|py)", w)}:
            assert text.index(f"cat > {name} ") < text.index(command), f"{name} is used before it is written"


def test_links_and_anchors_lead_somewhere():
    """Of every page in docs/ and of both READMEs; an anchor is a heading as code hosts and the site spell it."""
    for page in (*PAGES, ROOT / "README.md", ROOT / "README.zh.md"):
        for target, anchor in re.findall(r"\]\(([^)\s:#]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
            to = (page.parent / target).resolve() if target else page
            assert to.exists(), f"{page.relative_to(ROOT)} links to {target}"
            if anchor and to.suffix == ".md":
                assert anchor in anchors(to), f"{page.relative_to(ROOT)}: {to.name} has no heading #{anchor}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h).lower()).strip().replace(" ", "-") for h in headings}


def test_every_page_can_be_found():
    """From docs/index.md and the READMEs' last sections."""
    for start, base in ((DOCS / "index.md", DOCS), (ROOT / "README.md", ROOT)):
        linked = {(base / target).resolve() for target in re.findall(r"\]\(([^)\s:#]+)", start.read_text(encoding="utf-8"))}
        own = {p for p in PAGES if p.parent in (DOCS, DOCS / "guides")} - {DOCS / "index.md"}
        assert not own - linked, f"{start.name} leads to no {sorted(p.name for p in own - linked)}"


def test_pictures_are_well_formed_and_said_in_words():
    drawn = sorted((DOCS / "pictures").glob("*.svg"))
    shown = re.findall(r"!\[([^]]+)\]\(pictures/(\w+\.svg)\)", (DOCS / "concepts.md").read_text(encoding="utf-8"))
    assert sorted(name for _, name in shown) == [p.name for p in drawn] and all(len(words) > 20 for words, _ in shown)
    for path in drawn:
        root = ET.parse(path).getroot()
        assert {child.tag.split("}")[1] for child in root} >= {"title", "desc"} and float(root.get("width", 0)) <= 900


def steps(page: str) -> tuple[list[str], list[str], list[str]]:
    """Code blocks without the comments behind commands, links and inline code, headings' levels."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.M)
    prose = re.sub(r"^    .*\n", "", text, flags=re.M)
    named = [n for n in re.findall(r"\]\(([^)]+)\)|`([^`]+)`", prose) if n[0] not in ("README.md", "README.zh.md")]
    return [re.sub(r"\s+#\s.*", "", b).strip() for b in blocks if b.strip()], named, re.findall(r"^#+(?= )", text, flags=re.M)


def test_the_chinese_readme_keeps_in_step():
    original, translated = steps("README.md"), steps("README.zh.md")
    for what, one, other in zip(("code block", "link or inline code", "heading"), original, translated, strict=True):
        for a, b in zip(one, other, strict=False):
            assert a == b, f"README.zh.md, {what}: {b!r} instead of {a!r}"
        assert len(one) == len(other), f"README.zh.md has {len(other)} {what}s, README.md {len(one)}"
    text = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    for paragraph in re.split(r"\n\n(?=\S)", re.sub(r"^    .*\n", "", text, flags=re.M))[2:]:
        assert CJK.search(paragraph), f"not translated: {paragraph[:60]!r}"

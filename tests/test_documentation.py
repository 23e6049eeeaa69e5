"""What `make docs-check` will run: found whole, cut into short parts, and every config in the documentation is valid."""

from __future__ import annotations

import shlex

import pytest

from distmtl.__main__ import parse
from documentation import check, fragments
from documentation.blocks import ROOT, blocks_of, pages
from documentation.excused import EXCUSED

PAGE = """\
    distmtl synth --out log     # a log
    curl -s localhost:8000 -d '{
      "a": 1}'

    wrote 600,000 rows to log

```sh
cat > a.yaml << EOF
name: a
EOF
anything at all \\
  goes on
```

    weighting: {kind: pcgrad}

and in Python

    import distmtl

```text
distmtl is not run here
```
"""
WORLD_S, PARTS = 25, 24  # to make the world; as .ci/run cuts them


def test_blocks_are_what_they_look_like(tmp_path, monkeypatch):
    monkeypatch.setattr("documentation.blocks.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    found = [(b.line, b.kind, b.plain) for b in blocks_of(tmp_path / "page.md")]
    assert found == [
        (1, "command", "distmtl synth --out log"),
        (2, "command", "curl -s localhost:8000 -d '{\n  \"a\": 1}'"),
        (8, "command", "cat > a.yaml << EOF\nname: a\nEOF"),
        (11, "command", "anything at all \\\n  goes on"),
        (15, "yaml", "weighting: {kind: pcgrad}\n"),
        (19, "python", "import distmtl\n"),
    ]


def test_every_command_parses_and_every_config_is_valid():
    configs = set()
    for page in pages():
        for block in blocks_of(page):
            if block.kind == "yaml":
                fragments.check(block)
                configs.add(block.page)
            words = shlex.split(block.plain, comments=True) if block.kind == "command" else []
            if words and words[0].endswith("distmtl"):
                parse([w for w in words[1:] if w != "&"])
    assert configs >= {f"docs/{name}.md" for name in ("data", "leaderboard", "serving", "tracking", "tune")}


def test_every_excuse_is_of_a_command_that_is_there():
    assert not check.unmatched() and all(EXCUSED.values())


def test_parts_are_short_and_miss_nothing():
    units = check.units()
    parts = [check.part_of(units, i, PARTS) for i in range(1, PARTS + 1)]
    assert [u for part in parts for u in part] == units
    longest = max(sum(u.seconds for u in part) for part in parts)
    assert longest + WORLD_S <= 150, f"a part takes {longest} s; cut the documentation into more of them, in .ci/run and here"
    assert f"% {PARTS} + 1))/{PARTS}" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.skipif(not (ROOT / "README.zh.md").exists(), reason="there is no translation")
def test_the_translation_says_to_run_the_same():
    original, translation = ([b.plain for b in blocks_of(ROOT / name)] for name in ("README.md", "README.zh.md"))
    assert original == translation

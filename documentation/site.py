"""The hook of mkdocs.yml: what Markdown on a code host has and mkdocs has not.

- Links out of docs/ (../README.md, ../benchmarks/results/suite.md) work: the files that they lead to, and those that these lead to in turn,
  are in the site, below repository/.
- Notebooks are pages, by nbconvert, with the outputs that were saved in them; a link to NAME.ipynb leads to its page.
- A mermaid block is drawn while the site is built: pages load no script from elsewhere, and need none.
"""

from __future__ import annotations

import logging
import posixpath
import re
from html import escape
from pathlib import Path
from typing import Any

import mermaidx
import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.plugins.distmtl")  # a warning is an error under --strict
ROOT = Path(__file__).parents[1]
OUTSIDE = "repository"  # folder of the site that holds what lies outside docs/
PROJECT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")  # there whether or not a page links to them
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for notebook in [f for f in files if f.src_uri.endswith(".ipynb")]:
        name = posixpath.basename(notebook.src_uri).removesuffix(".ipynb")
        exporter = nbconvert.MarkdownExporter(exclude_output_prompt=True)
        text, pictures = exporter.from_filename(notebook.abs_src_path, {"unique_key": name})
        page = File.generated(config, _in_site(f"docs/{notebook.src_uri}"), content=text)
        files.append(page)
        for name, content in pictures["outputs"].items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(page.src_uri), name), content=content))
    for name in PROJECT:
        files.append(File.generated(config, _in_site(name), abs_src_path=str(ROOT / name)))
    waiting = [f for f in files if f.is_documentation_page()]
    for file in waiting:  # it grows
        for target in _targets(file.content_string, _in_repository(file.src_uri)):
            uri = _in_site(target)
            if uri not in files.src_uris and (ROOT / target).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
                if target.endswith(".md"):
                    waiting.append(files.src_uris[uri])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = _resolved(link[2], _in_repository(here))
        if target is None or _in_site(target) not in files.src_uris:
            return link[0]  # mkdocs warns where there is nothing
        return f"{link[1]}{posixpath.relpath(_in_site(target), posixpath.dirname(here))}{link[3]}"

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    for elsewhere in re.findall(r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=\"?(https?:[^\" >]+)", output):
        LOG.warning("%s loads %s; a page can be read without a network", page.file.src_uri, elsewhere)


def drawing(source: str, language: str, css_class: str, options: Any, md: Any, **rest: Any) -> str:
    """A mermaid block as SVG, for pymdownx.superfences."""
    svg = mermaidx.render(source, theme="neutral").svg()
    return f'<figure class="diagram" role="img" aria-label="{escape(source, quote=True)}">{_own_names(svg)}</figure>'


_drawn = 0


def _own_names(svg: str) -> str:
    """Names of an SVG are those of the whole page it stands in: every drawing gets its own."""
    global _drawn
    _drawn += 1
    return svg.replace("my-svg", f"diagram-{_drawn}")


def _targets(markdown: str, page: str) -> list[str]:
    return [t for link in LINK.finditer(markdown) if (t := _resolved(link[2], page))]


def _resolved(link: str, page: str) -> str | None:
    """Path in the repository that a link on a page of the repository leads to."""
    if re.match(r"[a-z]+:|/", link):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return None if target.startswith("..") else target


def _in_site(path: str) -> str:
    """Where the site has a file of the repository; a notebook's page, not the notebook."""
    if not path.startswith("docs/"):
        return f"{OUTSIDE}/{path}"
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def _in_repository(uri: str) -> str:
    return uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else f"docs/{uri}"

"""What `make docs` does beside MkDocs: pages from the root of the repository, and links to files beside the pages.

A link such as `../examples/tune` works where the repository is browsed. The site has no such page, so it shows the
path. A link to a file that does not exist raises PluginError, in the pages and in every README.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}  # in the root: in the site
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_pre_build(config: Any) -> None:
    """Check the links of files that are no pages."""
    for file in (ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md"))):
        for _, target, _ in LINK.findall(file.read_text()):
            if not (file.parent / target).exists():
                raise PluginError(f"{file.relative_to(ROOT)} links to {target}, which does not exist")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the root that are pages. Their links begin at the root, those of a page in docs/."""
    for name, page in PAGES.items():
        text = LINK.sub(lambda m: f"[{m[1]}]({_from_docs(m[2])}{m[3] or ''})", (ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Show the path of a file that is no page, and check that the file exists."""

    def shown(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        if not target.startswith("../"):
            return match[0]
        path = target.removeprefix("../")
        if path in PAGES:
            return f"[{words}]({PAGES[path]}{anchor or ''})"
        if not (ROOT / path).exists():
            raise PluginError(f"docs/{page.file.src_uri} links to {target}, which does not exist")
        return f"`{path}`" if words.strip("`") == path else f"{words} (`{path}`)"

    return LINK.sub(shown, markdown)


def _from_docs(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"

"""What MkDocs calls while it builds the site: it adds the pages that are made, and changes links and formulas."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import formulas
import links
import llms
import reference
import tutorials
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import sophq_func

ROOT = Path(__file__).parents[2]
FETCHED = re.compile(r'<(?:script|link rel="stylesheet")[^>]+(?:src|href)="(?:https?:)?//[^"]*')
LOG = logging.getLogger("mkdocs.hooks.sophq_func")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no file of ``docs/``."""
    for path, content in made():
        files.append(File.generated(config, path, content=content))
    return files


def made() -> Iterator[tuple[str, str | bytes]]:
    """Path on the site and content of each file that is made."""
    for source, page in links.PAGES.items():
        yield page, (ROOT / source).read_text()
    for name, text in reference.pages(sophq_func).items():
        yield f"reference/{name}", text
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        LOG.info("Running %s", path.name)
        text, pictures, notebook = tutorials.make(path)
        yield f"tutorials/{path.stem}.md", text
        yield f"tutorials/{path.stem}.ipynb", notebook
        yield from ((f"tutorials/{name}", png) for name, png in pictures.items())


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **kwargs: Any) -> str:
    """Links and formulas as the site shows them."""
    shown_at = page.file.src_uri
    written_at = {page: source for source, page in links.PAGES.items()}.get(shown_at, f"docs/{shown_at}")
    repository = (config.repo_url or "").rstrip("/")
    return formulas.as_mathml(links.resolved(markdown, written_at, shown_at, ROOT, repository))


def on_post_page(output: str, page: Page, **kwargs: Any) -> None:
    """Warn of what a reader's browser would fetch from another host before it shows the page."""
    for found in FETCHED.finditer(output):
        LOG.warning("%s fetches %s", page.file.src_uri, found[0])


def on_env(env: object, config: MkDocsConfig, files: Files) -> None:
    """Add llms.txt, when all pages are read and none is written."""
    pages = [llms.Entry(_section(page), str(page.title), page.url, page.markdown or "") for page in _in_order(files)]
    text = llms.text(config.site_name, config.site_description or "", pages)
    files.append(File.generated(config, "llms.txt", content=text))


def _in_order(files: Files) -> Iterator[Page]:
    """The pages of the navigation, from the first to the last."""
    page = next((file.page for file in files.documentation_pages() if file.page and file.page.is_homepage), None)
    while page is not None:
        yield page
        page = page.next_page


def _section(page: Page) -> str:
    """The title of the outermost section that a page is in, or its own."""
    return str(page.ancestors[-1].title if page.ancestors else page.title)

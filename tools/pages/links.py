"""Links of the pages, as the site has them.

Pages are written to be read in the repository, where a link may lead to any file. On the site a link to a file that is
no page leads to the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

FENCED = re.compile(r"^ *```.*?^ *```$|`+[^`]*`+", flags=re.MULTILINE | re.DOTALL)
"""Code, in blocks and in lines, in which nothing is changed."""

LINK = re.compile(r"\]\(([^()\s#]+)(#[^()\s]*)?\)")

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's root that are pages of the site."""


def outside_code(text: str, change: re.Pattern[str], by: Callable[[re.Match[str]], str]) -> str:
    """Substitute in all of a page but its code.

    Example:
      >>> outside_code("$a$ and `$b$`", re.compile("[$]"), lambda found: "!")
      '!a! and `$b$`'
    """
    out, end = [], 0
    for code in FENCED.finditer(text):
        out += [change.sub(by, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*out, change.sub(by, text[end:])])


def resolved(text: str, written_at: str, shown_at: str, root: Path, repository: str) -> str:
    """A page's Markdown with the links that it has on the site.

    Args:
      text: the page's Markdown.
      written_at: path of the file from the repository's root; its links are relative to it.
      shown_at: path of the page on the site.
      root: the repository's root.
      repository: address of the repository.
    """
    branch = f"{repository}/blob/main/"
    folder, shown_in = posixpath.dirname(written_at), posixpath.dirname(shown_at) or "."

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if ":" in target and not target.startswith(branch):
            return found[0]
        path = target.removeprefix(branch) if ":" in target else posixpath.normpath(posixpath.join(folder, target))
        page = on_site(path)
        if page is not None:
            return f"]({posixpath.relpath(page, shown_in)}{anchor})"
        # A link to nothing stays as it is: the build reports it.
        return f"]({branch}{path}{anchor})" if (root / path).exists() else found[0]

    return outside_code(text, LINK, link)


def on_site(path: str) -> str | None:
    """Where the site has a file of the repository, or ``None``.

    Example:
      >>> on_site("README.md"), on_site("docs/rules.md"), on_site("docs/tutorials/research.py"), on_site("examples/demo.py")
      ('index.md', 'rules.md', 'tutorials/research.md', None)
    """
    if path in PAGES:
        return PAGES[path]
    if not path.startswith("docs/"):
        return None
    return re.sub(r"\.py$", ".md", path.removeprefix("docs/"))

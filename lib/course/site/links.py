"""The links between a site's pages, followed, and its pictures, asked for words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
IN_STYLES = re.compile(r"""(?:@import\s+|url\()["']?((?:https?:)?//[^\s"')]+)""")


@dataclass
class Page(HTMLParser):
    """What one page has and what it asks for."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)  # that a reader may follow
    loads: list[str] = field(default_factory=list)  # that it needs to be seen
    wordless: list[str] = field(default_factory=list)  # pictures without alt text

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif found.get(LOADS.get(tag)):
            self.loads.append(found[LOADS[tag]])
        if tag == "img" and not (found.get("alt") or "").strip():
            self.wordless.append(found.get("src", "?"))


def faults(site: Path) -> Iterator[str]:
    """One line for each link to no page or place of the site, each picture without alt
    text, and each script, style, picture or frame from elsewhere.

    Links to other sites are not followed: the build is offline.
    """
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = page = Page()
        page.feed(path.read_text(encoding="utf-8"))
    if not pages:
        yield f"expected pages in {site}, found none"
    for path in sorted([*pages, *(path.resolve() for path in site.rglob("*.css"))]):
        for target in IN_STYLES.findall(path.read_text(encoding="utf-8")):
            name = path.relative_to(site.resolve()).as_posix()
            yield f"{name}: expected nothing from another site, got {target}"
    for path, page in pages.items():
        name = path.relative_to(site.resolve()).as_posix()
        for source in page.wordless:
            yield f"{name}: expected alt text, got none: {source}"
        for target in page.loads:
            if urlsplit(target).netloc:
                yield f"{name}: expected nothing from another site, got {target}"
        for target in page.links + page.loads:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file():
                yield f"{name}: leads nowhere: {target}"
            # As a browser looks: for what is written, then for what it stands for.
            places = {parts.fragment, unquote(parts.fragment)} - {""}
            if there in pages and places and not places & pages[there].ids:
                yield f"{name}: leads to no place of that page: {target}"

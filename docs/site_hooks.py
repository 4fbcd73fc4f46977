"""Hooks of mkdocs.yml, so that the pages that GitHub shows become a site as they are.

- The navigation follows docs/index.md: a section for each heading, in it the pages that it links to, in that order.
  Other pages are added to the section of their folder.
- A link that leaves docs/ leads to a page with the contents of that file, under repository/.
- A Mermaid diagram of imports becomes a table: Mermaid's script would have to be fetched from another host.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
CODE = r"(?P<code>^(?P<fence>[ ]*```+).*?^(?P=fence)[ ]*$|`[^`\n]+`)"
LINK = re.compile(
    CODE + r"|(?P<before>\]\(|(?:src|href)=\")(?P<path>[^)\s#\":]+)(?P<anchor>#[^)\s\"]*)?(?=[)\"])", re.S | re.M
)
SECTION = re.compile(r"^(?:## |\*\*)(?P<title>[\w ,]+)", re.M)
MERMAID = re.compile(r"^```mermaid\n(?P<source>.*?)^```$", re.S | re.M)
# Files outside docs/ that are in the navigation, whether a page links to them or not.
PROJECT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
HIGHLIGHTED = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def replace_links(text: str, replace: Callable[[str], str]) -> str:
    """`text` with the path of each relative link outside code replaced; anchors are kept."""

    def one(match: re.Match[str]) -> str:
        if match["code"] is not None:
            return match[0]
        return f"{match['before']}{replace(match['path'])}{match['anchor'] or ''}"

    return LINK.sub(one, text)


def page_of(path: str) -> str:
    """The source name on the site of a file of the repository, or of a folder's README.md."""
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    inside = path.removeprefix("docs/")
    if inside != path:
        return inside
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def file_of(page: str) -> str:
    """The file of the repository that a Markdown page of the site shows."""
    return page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"


def for_the_site(text: str, path: str) -> str:
    """The text of a Markdown file of the repository with its links changed for the site."""
    here = posixpath.dirname(page_of(path))

    def replace(link: str) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        return posixpath.relpath(page_of(target), here) if (ROOT / target).exists() else link

    return replace_links(text, replace)


def links_of(path: str) -> list[str]:
    """The existing files and folders that a Markdown file of the repository links to."""
    found: list[str] = []

    def note(link: str) -> str:
        found.append(posixpath.normpath(posixpath.join(posixpath.dirname(path), link)))
        return link

    replace_links((ROOT / path).read_text(encoding="utf-8"), note)
    return [target for target in found if (ROOT / target).exists()]


def shown(path: str) -> str:
    """A file or folder of the repository as a Markdown page."""
    if (ROOT / path).is_dir():
        names = sorted(file.name for file in (ROOT / path).glob("*.md"))
        return f"# {Path(path).name.capitalize()}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = HIGHLIGHTED.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text}````\n"


def as_table(source: str) -> str:
    """A Mermaid flowchart as a table: box, and the boxes that its arrows lead to."""
    arrows: dict[str, list[str]] = {}
    for start, end in re.findall(r"^ *(\w+) --> (\w+)$", source, re.M):
        arrows.setdefault(start, []).append(end)
    packages = re.findall(r"subgraph (\w+)_ ", source)
    names = {}
    for name, label in re.findall(r'^ *(\w+)\["(.+)"\]$', source, re.M):
        package = next(p for p in sorted(packages, key=len, reverse=True) if name == p or name.startswith(f"{p}_"))
        names[name] = label if name == package else f"{package}/{label}"
    rows = (f"| {names[box]} | {', '.join(names[end] for end in ends)} |\n" for box, ends in arrows.items())
    return "| folder | imports |\n|---|---|\n" + "".join(rows)


def pages_in(text: str, folder: str = "") -> list[str]:
    """The pages that a page in `folder` links to, in order."""
    return [posixpath.join(folder, link) for link in re.findall(r"\]\(([^)#\s:]+\.md)", text)]


def sections(texts: dict[str, str]) -> list[dict[str, Any]]:
    """The navigation of pages (name -> text): in the order of index.md, by its sections; the others by folder, in the
    order of the index.md there."""
    parts = SECTION.split(texts["index.md"])
    named = zip(parts[1::2], parts[2::2], strict=True)
    found = {title: [page for page in pages_in(text) if page in texts] for title, text in named}
    listed = {"index.md", *(page for names in found.values() for page in names)}
    for folder in sorted({posixpath.dirname(page) for page in texts}):
        index = posixpath.join(folder, "index.md")
        order = [index, *pages_in(texts.get(index, ""), folder)]
        rest = [page for page in texts if posixpath.dirname(page) == folder and page not in listed]
        rest.sort(key=lambda page: (order.index(page) if page in order else len(order), page))
        same = (title for title, names in found.items() if folder in map(posixpath.dirname, names))
        found.setdefault(next(same, folder.capitalize() or "More"), []).extend(rest)
    found["Project"] = [page_of(path) for path in PROJECT]
    return [{"Home": "index.md"}, *({title: list(dict.fromkeys(names))} for title, names in found.items() if names)]


def on_config(config: Any) -> Any:
    docs = Path(config.docs_dir)
    texts = {path.relative_to(docs).as_posix(): path.read_text(encoding="utf-8") for path in docs.rglob("*.md")}
    config.nav = sections(texts)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ that are in the navigation or that pages link to."""
    waiting = [*PROJECT, *(file_of(file.src_uri) for file in files.documentation_pages())]
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        if path.endswith(".md"):
            waiting += links_of(path)
        if files.get_file_from_path(page_of(path)) is None:
            files.append(File.generated(config, page_of(path), content=shown(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    path = file_of(page.file.src_uri)
    markdown = MERMAID.sub(lambda match: as_table(match["source"]), markdown)
    return for_the_site(markdown, path) if (ROOT / path).exists() else markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Mark the reference, whose tables site.css lays out."""
    return f'<div class="reference">{html}</div>' if page.file.src_uri.startswith("reference/") else html

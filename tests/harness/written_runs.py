"""For tests of reports and comparisons: run folders and results written by hand, and a reader of HTML pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from lit_eval.model.eval_model import ModelFacts
from lit_eval.score.results import Result, Results

VOID = {"meta", "link", "br", "img", "input", "hr"}


def write_run(folder: Path, rows: Sequence[Mapping[str, object]], settings: Mapping[str, Any] | None = None) -> Path:
    """A run folder with a metrics.csv and a config.yaml. A value of None is left empty."""
    folder.mkdir(parents=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join("" if row.get(c) is None else str(row[c]) for c in columns) for row in rows]
    (folder / "metrics.csv").write_bytes("".join(f"{line}\r\n" for line in [",".join(columns), *lines]).encode())
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings or {"seed": 1}), allow_unicode=True))
    return folder


def write_results(
    file: Path, name: str, items: Mapping[str, Sequence[float]], *, step: int | None = None, sha256: str = "same"
) -> Path:
    """A file of results: for each task the items' scores, and their mean as `accuracy`."""
    tasks = {
        task: Result(
            "pairs", len(some), {"accuracy": sum(some) / len(some)}, items=list(some), source={"sha256": sha256}
        )
        for task, some in items.items()
    }
    facts = ModelFacts("nowhere", name, 1000, "checksum", step=step, tokens=None if step is None else step * 100)
    Results(facts, tasks).write(file)
    return file


@dataclass
class Element:
    """An element of a page."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """The elements below with a tag, and a class."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (kind is None or kind in child.attributes.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, kind)
        return found

    def with_id(self, id: str) -> Element:
        for child in self.children:
            if isinstance(child, Element):
                if child.attributes.get("id") == id:
                    return child
                try:
                    return child.with_id(id)
                except KeyError:
                    pass
        raise KeyError(id)


class Page(HTMLParser):
    """Parses a page; asserts that its tags are balanced, its ids unique, and that it names no other resource."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("root", {})
        self._open = [self.root]
        self.ids: set[str] = set()
        self.feed(html)
        assert [e.tag for e in self._open] == ["root"], [e.tag for e in self._open]
        assert len(html.encode()) < 2_000_000

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        for name, value in element.attributes.items():
            if name in ("src", "href", "action", "data", "srcset", "poster"):
                assert value.startswith("#") or value == "data:,", (tag, name, value)
            assert not name.startswith("on"), (tag, name)
        if id := element.attributes.get("id"):
            assert id not in self.ids
            self.ids.add(id)
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)

    def table(self, caption: str) -> list[list[str]]:
        """The rows of a table, its head first."""
        for table in self.root.all("table"):
            if table.all("caption")[0].text == caption:
                return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.all("tr")]
        raise KeyError(caption)

    def chart(self, id: str) -> dict[str, Any]:
        """The values that a chart carries."""
        facts: dict[str, Any] = json.loads(self.root.with_id(id).all("script")[0].text)
        return facts

    def line(self, id: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(line for line in self.chart(id)["lines"] if line["name"] == name)
        return found

    def tiles(self) -> dict[str, str]:
        """Label -> value of the large numbers at the top."""
        shown = self.root.all("dl", "tiles")
        return {d.all("dt")[0].text: d.all("b")[0].text for d in shown[0].all("div")} if shown else {}

"""What every page must be: well-formed, whole in itself, with headings, table headings and words for its pictures."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"br", "meta"}


class Page(HTMLParser):
    """Reads a page and fails on what it must not be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.pictures: list[str] = []
        self.captions: list[str] = []
        self.tooltips: list[str] = []
        self.rows: list[list[str]] = []
        self.losing: list[list[str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(set(self.ids)) == len(self.ids), "an id is there twice"
        assert all(link.startswith("#") and link[1:] in self.ids for link in self.links), self.links

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        assert len(about) == len(attrs), f"<{tag}> has an attribute twice"
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base", "form"}, f"<{tag}>"
        assert not {"src", "srcset", "xlink:href"} & set(about) and not any(name.startswith("on") for name in about)
        assert "url(" not in (about.get("style") or "")
        if about.get("id"):
            self.ids.append(str(about["id"]))
        if tag == "a":
            self.links.append(str(about["href"]))
        if tag == "svg":
            assert about.get("aria-hidden") == "true" or (about.get("role") == "img" and about.get("aria-label"))
            self.pictures += [str(about["aria-label"])] if "aria-label" in about else []
        if tag == "th":
            assert about.get("scope") in ("col", "row"), "a heading of a table without a scope"
        if tag == "tr":
            self.rows.append([])
            if about.get("class") == "loses":
                self.losing.append(self.rows[-1])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> outside a picture"
        assert len(dict(attrs)) == len(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        within = self.open[-1] if self.open else ""
        if within == "style":
            assert "http" not in data and "@import" not in data and "url(" not in data
            return
        if within in ("th", "td"):
            self.rows[-1][-1] += data
        for name, found in (("caption", self.captions), ("h1", self.headings), ("h2", self.headings)):
            if within == name:
                found.append(data)
        if within == "title" and "svg" in self.open:
            self.tooltips.append(data)
        self.words += data + "\n"


def measure(folder: Path, latency: float, dense: float, *, score: float | None = None, imposed: bool = False) -> None:
    """Writes a run's benchmark.json: one batch, a dense path and a subnetwork."""
    rows: list[dict[str, Any]] = []
    for name, kind, ms in (("torch fp32", "dense", dense), ("blocks:8x2 fp32", "subnetwork", latency)):
        speeds = {"p50_ms": ms, "p90_ms": ms, "sentences_per_second": 1.0, "tokens_per_second": 8.0}
        rows.append({"variant": name, "kind": kind, "status": "ok", "speedup": dense / ms, **speeds})
    rows.append({"variant": "openvino fp32", "kind": "against", "status": "failed", "reason": "no <such> thing"})
    case = {
        "case": "1 x 8",
        "kind": "full",
        "rows": rows,
        "best_dense": "torch fp32",
        "best_subnetwork": "blocks:8x2 fp32",
        "speedup": dense / latency,
        "verdict": "said plainly",
    }
    conditions = {
        "date": "2030-01-02",
        "command": "python -m sparsebert.benchmark run",
        "device": "cpu",
        "hardware": {"cpu": "A fine CPU"},
        "threads": 1,
    }
    report = {
        "schema": 1,
        "subject": {"imposed": imposed},
        "conditions": conditions,
        "cases": [case],
        "variants": [],
        "left_out": {"compact": "nothing to leave out"},
        "accuracy": {} if score is None else {"metric": "accuracy", "scores": {"blocks:8x2 fp32": {"accuracy": score}}},
        "layers": [],
        "break_even": [],
        "what_if": [],
    }
    (folder / "benchmark.json").write_text(json.dumps(report), encoding="utf-8")

"""The style sheet of the report: light and dark, one column on a phone, nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["STYLE"]

# Every colour of a line has a contrast of at least 4.5 to its page.
_LINES_LIGHT = ("#0b5fae", "#b3470f", "#0a7355", "#8436a0", "#7a5a00", "#b0265a", "#35617f", "#4a4a4a")
_LINES_DARK = ("#6cb4ff", "#ffa066", "#4ecfa6", "#d79bf0", "#e6c04a", "#ff8fb5", "#9cc3dd", "#c4c4c4")
_HEAT_LIGHT = (
    "#f2f7fd",
    "#dceafa",
    "#c5ddf6",
    "#abcef2",
    "#8fbdec",
    "#2b76be",
    "#216ab1",
    "#17599b",
    "#0f4984",
    "#08396b",
)
_HEAT_DARK = (
    "#1a2430",
    "#1d3147",
    "#1f3e5e",
    "#204b76",
    "#21588e",
    "#5c9fe0",
    "#78b2ea",
    "#95c5f2",
    "#b3d7f8",
    "#d3e9fd",
)


def _colours(lines: Sequence[str], heat: Sequence[str], inks: tuple[str, str]) -> str:
    words = [f"--c{at}:{colour}" for at, colour in enumerate(lines)]
    words += [f"--h{at}:{colour}" for at, colour in enumerate(heat)]
    words += [f"--i{at}:{inks[at >= len(heat) // 2]}" for at in range(len(heat))]
    return ";".join(words)


_LIGHT = (
    "color-scheme:light;--page:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#57606a;--rule:#d0d7de;--link:#0b5fae;"
    "--bad:#b3261e;--bad-ground:#fdeceb;" + _colours(_LINES_LIGHT, _HEAT_LIGHT, ("#1b1f24", "#fff"))
)
_DARK = (
    "color-scheme:dark;--page:#12161c;--card:#1a2029;--ink:#e8ebef;--soft:#a6b0bb;--rule:#38424e;--link:#79b8ff;"
    "--bad:#ff9c94;--bad-ground:#3a1f1f;" + _colours(_LINES_DARK, _HEAT_DARK, ("#e8ebef", "#0d1117"))
)

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink)}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:76rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem;padding-top:.5rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
p{margin:.4rem 0;max-width:48rem;overflow-wrap:anywhere}
a{color:var(--link)}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:1rem 0;padding:0}
nav a{display:inline-block;padding:.2rem 0}
code,pre{font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--rule);border-radius:6px}
pre{padding:.6rem .8rem;overflow-x:auto;margin:.5rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.8rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.note,.missing,.key{color:var(--soft);font-size:.9rem}
.missing{border-left:3px solid var(--rule);padding-left:.7rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:.5rem 0;padding:.8rem}
figure{background:var(--card);border:1px solid var(--rule);border-radius:8px;max-width:34rem}
figcaption{font-size:.85rem;color:var(--soft);margin-bottom:.4rem}
figcaption strong{display:block;color:var(--ink);font-size:.95rem}
svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line polyline,.line line,.line path{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round}
.line .full{fill:var(--c)}.line .hollow{fill:var(--card)}
.line polygon,.line rect{fill:var(--c);fill-opacity:.16;stroke:none}
.upright line{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}.upright rect{fill:var(--soft);fill-opacity:.14}
.upright text{fill:var(--soft)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem .9rem;margin:.4rem 0 0;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.35rem}
.swatch{width:26px;flex:none}
.scroll{overflow:auto;max-height:36rem;margin:.7rem 0;border:1px solid var(--rule);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.5rem .7rem;font-weight:600;position:sticky;left:0}
th,td{padding:.3rem .7rem;text-align:right;white-space:nowrap;border-top:1px solid var(--rule)}
th{font-weight:600}thead th{color:var(--soft);background:var(--page);font-weight:500;vertical-align:bottom}
thead th{position:sticky;top:0;z-index:1}
th.text,td.text{text-align:left}
tbody th.text{font-weight:500}
tr.loses td,tr.loses th{background:var(--bad-ground)}tr.loses td:last-child{color:var(--bad);font-weight:600}
.heat th,.heat td{text-align:center;padding:.25rem .4rem}
.heat tbody th{text-align:right}.heat thead th{white-space:normal}.heat thead th:first-child{width:3rem}
@media (max-width:30rem){.heat th,.heat td{padding:.25rem .15rem}}
.heat+.key{padding:0 .7rem}
.key span{display:inline-flex;vertical-align:middle;margin:0 .3rem}.key i{width:.9rem;height:.8rem}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr));gap:.8rem}
.name{margin:0;font-size:.85rem}
.heads{max-width:none}
details{border:1px solid var(--rule);border-radius:8px;margin:.5rem 0;padding:0 .8rem}
summary{cursor:pointer;padding:.5rem 0;font-weight:500;overflow-wrap:anywhere}
details[open]{padding-bottom:.6rem}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
footer{margin-top:3rem;padding-bottom:2rem;color:var(--soft);font-size:.85rem}
.scroll tbody th{position:sticky;left:0;background:var(--page)}
tr.loses th{background:var(--bad-ground)!important}
@media (max-width:30rem){h1{font-size:1.4rem}figure{padding:.6rem .5rem}}
@media (max-width:30rem){th,td{padding:.3rem .45rem}table{font-size:.82rem}}
@media (max-width:30rem){.scroll tbody th.text{white-space:normal;min-width:7rem;overflow-wrap:break-word}}
@media print{.scroll{overflow:visible;max-height:none}}
"""

_CLASSES = "".join(f".s{at}{{--c:var(--c{at})}}" for at in range(len(_LINES_LIGHT)))
_SHADES = "".join(
    f"td.h{at},i.h{at}{{background:var(--h{at});color:var(--i{at})}}rect.h{at}{{fill:var(--h{at})}}"
    for at in range(len(_HEAT_LIGHT))
)

STYLE = (
    f":root{{{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + _RULES.strip()
    + "\n"
    + _CLASSES
    + _SHADES
)
"""For a `<style>` element."""

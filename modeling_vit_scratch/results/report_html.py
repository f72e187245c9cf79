"""The pieces of which report.html is made: the page with its style, tiles, tables and text."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .record import printable

# One picture serves light and dark: SVG takes its colours from these variables.
STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --text: #1f2328; --muted: #59636e;
  --line: #d8dee4; --accent: #0072b2; --second: #d55e00; --warning: #fff4e5; --bar: #cfe4f3; --heat: #08306b; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --muted: #9198a1;
  --line: #2d333b; --accent: #56b4e9; --second: #f0883e; --warning: #2b2117; --bar: #1d3b53; --heat: #a5d6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 0.5rem; }
p { margin: 0 0 0.75rem; max-width: 46rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin-top: 1.25rem; font-size: 0.875rem; }
.lead, .note { color: var(--muted); }
.note { font-size: 0.875rem; margin: 0.5rem 0 0.75rem; }
.warning { max-width: none; margin: 1.25rem 0 0; padding: 0.75rem 1rem; background: var(--warning);
  border-left: 4px solid var(--second); border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 0.75rem;
  margin-top: 1.25rem; }
.tile, figure, .scroll, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 0.75rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 0.875rem; }
.tile:first-child { border-color: var(--accent); }
figure { margin: 0; padding: 0.5rem; max-width: 100%; }
figcaption { font-size: 0.875rem; line-height: 1.35; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 0.75rem; }
.curves h3, .side h3 { margin-top: 0; }
.curves figure { padding: 0.75rem; }
.key { color: var(--muted); font-size: 0.8125rem; }
.key i { display: inline-block; width: 1.25rem; height: 0; margin: 0 0.4rem 0.25rem 0; border-top: 3px solid; }
.key i.second { margin-left: 1rem; border-color: var(--second); }
.key i.first { border-color: var(--accent); }
svg { display: block; font-size: 11px; font-variant-numeric: tabular-nums; }
.curves svg { width: 100%; height: auto; }
svg text { fill: var(--muted); }
svg text.name, svg text.count { fill: var(--text); }
svg text.deep { fill: var(--card); }
svg line, svg path { fill: none; stroke: var(--line); vector-effect: non-scaling-stroke; }
svg .first { stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
svg .second { stroke: var(--second); stroke-width: 2; stroke-linejoin: round; }
svg .faint { stroke-width: 1; opacity: 0.35; }
svg circle { fill: var(--second); }
svg circle.first { fill: var(--accent); }
svg .ideal { stroke: var(--muted); stroke-dasharray: 4 4; }
svg .bar { fill: var(--accent); }
svg .gap { fill: none; stroke: var(--second); stroke-width: 2; }
svg .cell { fill: var(--heat); }
svg .frame { fill: none; stroke: var(--line); }
.side { display: flex; flex-wrap: wrap; gap: 0.75rem 2rem; align-items: flex-start; }
.side > * { max-width: 100%; }
.side .note { max-width: 24rem; }
figure.wide { overflow-x: auto; width: fit-content; }
.wide svg { max-width: 100%; height: auto; }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0.75rem; }
.shots.pairs { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.shots img, .mosaic img { display: block; width: 100%; height: auto; border-radius: 4px; margin-bottom: 0.4rem; }
.shots.pairs div { display: grid; grid-template-columns: 1fr 1fr; gap: 0.4rem; }
img.pixels { image-rendering: pixelated; }
.mosaic { width: min(24rem, 100%); }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9375rem; }
th, td { padding: 0.4rem clamp(0.4rem, 2vw, 0.9rem); text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
table.facts th { white-space: nowrap; }
table.facts td { overflow-wrap: anywhere; min-width: 8rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.share { background: linear-gradient(to left, var(--bar) var(--share), transparent var(--share)); }
@media (max-width: 30rem) { table { font-size: 0.8125rem; } }
pre { margin: 0; padding: 0.75rem 1rem; overflow-x: auto; white-space: pre-wrap; font-size: 0.875rem; }
pre span { white-space: nowrap; }
summary { cursor: pointer; margin: 0.75rem 0; color: var(--accent); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 1.5rem;
  align-items: start; }
.columns .scroll { width: auto; }
.columns table { width: 100%; }
"""


class Section(NamedTuple):
    """A part of the page with a heading of its own; `key` is where links lead."""

    key: str
    title: str
    body: str


def document(title: str, opening: str, sections: Sequence[Section]) -> str:
    """The whole page as text: well-formed as XML too, with the sections listed at its top."""
    links = "".join(f'<a href="#{section.key}">{text(section.title)}</a>' for section in sections)
    parts = [
        f'<section id="{section.key}"><h2>{text(section.title)}</h2>\n{section.body}\n</section>'
        for section in sections
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{opening}\n"
        f'<nav aria-label="Sections">{links}</nav>\n' + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """The value as text of a page: names of classes and folders come from strangers."""
    return html.escape(printable(value))


def note(value: str) -> str:
    return f'<p class="note">{text(value)}</p>'


def tile(number: str, label: str) -> str:
    return f'<div class="tile"><b>{text(number)}</b><span>{text(label)}</span></div>'


def folded(summary: str, body: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


# ---------------------------------------------------------------- tables


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], first_number: int = 1) -> str:
    """A table whose columns from `first_number` on are numbers, set to the right."""
    body = [table_row([row_header(row[0]), *cells("td", row[1:], first_number - 1)]) for row in rows]
    return framed_table(body, headers, first_number)


def framed_table(body: Iterable[str], headers: Sequence[str] = (), first_number: int = 1) -> str:
    """The rows as a table that scrolls by itself where a screen is too narrow for it; without headers, of facts."""
    head = f"<thead>{table_row(cells('th', headers, first_number))}</thead>" if headers else ""
    opening = "<table>" if headers else '<table class="facts">'
    return f'<div class="scroll">{opening}{head}<tbody>{"".join(body)}</tbody></table></div>'


def table_row(row: Iterable[str]) -> str:
    return f"<tr>{''.join(row)}</tr>"


def row_header(value: Any) -> str:
    return f'<th scope="row">{text(value)}</th>'


def cells(tag: str, values: Sequence[Any], first_number: int) -> list[str]:
    """The values as cells, from `first_number` on as numbers."""
    plain = [f"<{tag}>{text(value)}</{tag}>" for value in values[:first_number]]
    return plain + [f'<{tag} class="number">{text(value)}</{tag}>' for value in values[first_number:]]


def share_cell(share: float | None) -> str:
    """A share of one as a cell with a bar behind it; a dash for None."""
    if share is None:
        return '<td class="number">–</td>'
    return f'<td class="number share" style="--share: {100 * share:.1f}%">{100 * share:.1f}%</td>'


def fact_table(facts: dict[str, Any]) -> str:
    """Names and values."""
    return framed_table(table_row([row_header(name), *cells("td", [value_text(facts[name])], 1)]) for name in facts)


def value_text(value: Any) -> str:
    """A recorded value for people: numbers grouped, what is not set as a dash, lists and tables as JSON."""
    if value is None:
        return "–"
    if isinstance(value, (dict, list, bool)):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:,}" if isinstance(value, int) else str(value)

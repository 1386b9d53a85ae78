"""A report as one HTML file that needs nothing else: no script, no style sheet, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from rim_dist.report.document import Part, Picture, Report
from rim_dist.table import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d0d7de; padding-bottom: .2rem; }
nav a { margin-right: 1rem; color: #0550ae; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; vertical-align: top; }
th { background: #f6f8fa; font-weight: 600; }
td { white-space: nowrap; } .words td { white-space: normal; overflow-wrap: anywhere; }
th.l, td.l, caption { text-align: left; }
figure { margin: 1rem 0; } figcaption { color: #57606a; font-size: .9rem; } img { max-width: 100%; height: auto; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
.example { border-left: 3px solid #d0d7de; margin: .8rem 0; padding: .1rem .8rem; }
.answer { display: inline-block; margin: .1rem .4rem .1rem 0; padding: 0 .5rem; border-radius: .3rem; background: #ffebe9; }
.answer.right { background: #dafbe1; } .target { color: #57606a; }
pre { white-space: pre-wrap; margin: .3rem 0; font-size: .85rem; }
"""


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>\n"
    if isinstance(part, Table):
        return f'<div class="wide">{part.html()}</div>\n'
    if isinstance(part, Picture):
        data = base64.b64encode(part.png).decode("ascii")
        title = escape(part.title)
        return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"><figcaption>{title}</figcaption></figure>\n'
    inside = "".join(map(_example, part.answers))
    return f"<details><summary>{escape(part.title)}</summary>\n{inside}</details>\n"


def _example(answer: dict[str, Any]) -> str:
    answers = "".join(
        f'<span class="answer{" right" if right else ""}">{k}: {escape(text)} {"&#10003;" if right else "&#10007;"}</span>'
        for k, (text, right) in enumerate(zip(answer["answers"], answer["correct"], strict=True), 1)
    )
    question, target = escape(answer["question"]), escape(answer["target"])
    return (
        f'<div class="example"><p>{question} <span class="target">target: {target}</span></p>\n'
        f"<p>{answers}</p>\n<pre>{escape(answer['text'])}</pre></div>\n"
    )


def render_html(report: Report) -> str:
    """The whole page."""
    titles = [escape(title) for title in report.sections]
    links = "".join(f'<a href="#s{i}">{title}</a>' for i, title in enumerate(titles))
    body = "".join(
        f'<section id="s{i}"><h2>{title}</h2>\n{"".join(map(_part, parts))}</section>\n'
        for i, (title, parts) in enumerate(zip(titles, report.sections.values(), strict=True))
    )
    title = escape(report.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Without an icon of its own a browser asks the server for one.
        f'<link rel="icon" href="data:,"><title>{title}</title>\n<style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n<nav>{links}</nav>\n{body}</body>\n</html>\n"
    )

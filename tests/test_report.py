"""The report: what it gathers, that the page needs nothing from elsewhere, and that it opens in a browser."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tiny_export import write_model

from rim_dist.cli import main
from rim_dist.recipe import flatten
from rim_dist.report.build import build_report
from rim_dist.report.collect import RunFolder, collect_all, differences
from rim_dist.report.document import Examples, Report
from rim_dist.report.html import render_html
from rim_dist.report.markdown import render_markdown
from rim_dist.table import Table

NASTY = '<script>alert("x")</script> | a\nb & "c" ![p](http://example.org/p.png)'


def write_run(folder: Path, method: str, learning_rate: float, questions: list[dict]) -> None:
    """A run's folder as training leaves it, as far as a report reads it."""
    report = folder / "report"
    report.mkdir(parents=True)
    recipe = {
        "method": method,
        "run": {"name": folder.name},
        "model": {"init_from": "base", "config": None},
        "memory": {"blocks": 3, "tokens_per_block": 2},
        "curriculum": {"stage1": {"learning_rate": learning_rate}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [
        {
            "kind": "train",
            "stage": f"stage{1 + (step > 2)}",
            "step": step,
            "samples": 16 * step,
            "loss": 2 / step,
            "seconds": 9.0,
            "tokens_per_second": 100 * step,
            "operations": 1e12 * step,
        }
        for step in range(1, 5)
    ]
    lines.append({"kind": "evaluation", "step": 4, "samples": 64, "accuracy": 0.5, "operations": 4e12})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    shares = [sum(q["correct"][k] for q in questions) / len(questions) for k in range(len(questions[0]["correct"]))]
    figures = {
        "questions": len(questions),
        "accuracy": shares[-1],
        "per_block": shares,
        "any_block": 1.0,
        "data": "test.jsonl",
        "rules": {"strict": 0.25, "flexible": 0.5, "coconut": 0.75, "codi": 1.0},
        "latency": {
            "batch": 1,
            "first_token_seconds": 0.010,
            "first_token_seconds_iqr": 0.001,
            "answer_start_seconds": 0.010 if method == "rim" else 0.1,
            "answer_start_seconds_iqr": 0.001,
            "answer_seconds": 0.2,
            "new_tokens": 3.5,
        },
    }
    (report / "evaluation.json").write_text(json.dumps(figures))
    (report / "answers.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))


def question(number: int, rights: list[bool], text: str = "#### 7") -> dict:
    answers = ["7" if right else "8" for right in rights]
    return {"question": f"Question {number}?", "target": "7", "answers": answers, "correct": rights, "text": text}


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    rim = [question(i, [False, i % 3 == 0, i % 4 != 0]) for i in range(20)]
    rim[0]["question"] = NASTY
    direct = [{**q, "answers": ["8"], "correct": [False], "text": NASTY} for q in rim]
    direct[1] = {**direct[1], "answers": ["7"], "correct": [True]}
    write_run(tmp_path / "rim", "rim", 1e-3, rim)
    write_run(tmp_path / "direct", "direct", 5e-4, direct)
    return [str(tmp_path / "rim"), str(tmp_path / "direct")]


class References(HTMLParser):
    """Everything in a page that a browser would fetch, run or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]


def references(page: str) -> References:
    parser = References()
    parser.feed(page)
    return parser


def test_report_of_two_runs(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["report", *runs, "--output", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for section in ("Runs", "Accuracy", "Latency", "Pairs on the same questions", "Training", "Configuration differences"):
        assert f"<h2>{section}</h2>" in page
        assert f"## {section}\n" in text
    assert "| rim | test.jsonl | 20 | 75.0 ± 9.7 |" in text
    assert "| curriculum.stage1.learning_rate | 0.001 | 0.0005 |" in text
    assert "| method | rim | direct |" in text
    # 14 questions RiM alone answers right (15 minus question 1), none direct alone.
    assert "| rim | direct | 75.0 | 5.0 | +70.0 (+50.0 to +90.0) | 14 / 0 | 0.00012 |" in text
    assert "rim: right, 5 of 15" in page
    assert "rim: wrong, 5 of 5" in page
    assert "1: 8 &#10007;</span>" in page
    assert 'class="answer right">3: 7 &#10003;</span>' in page
    pictures = {p.name for p in (out / "pictures").iterdir()}
    assert pictures == {"training.png", "blocks.png", "latency.png"}
    assert {f"pictures/{name}" for name in pictures} == set(re.findall(r"\]\((pictures/[^)]*)\)", text))
    seen = references(page)
    inlined = [r for r in seen.found if r.startswith("data:image/png;base64,")]
    assert len(inlined) == 3
    assert {base64.b64decode(r.partition(",")[2]) for r in inlined} == {p.read_bytes() for p in (out / "pictures").iterdir()}


def test_page_refers_to_nothing_outside(runs: list[str]) -> None:
    page = render_html(build_report(collect_all(runs)))
    seen = references(page)
    assert all(r.startswith(("data:", "#")) for r in seen.found)
    assert not set(seen.tags) & {"script", "iframe", "object", "embed", "base", "form"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert NASTY not in page
    assert page.count("&lt;script&gt;") >= 2


def test_markdown_cells_stay_in_their_row() -> None:
    table = Table(["a", "b"], [[NASTY, "x"]])
    answer = {"question": NASTY, "target": "7", "answers": [NASTY], "correct": [True], "text": "text"}
    text = render_markdown(Report("t", {"s": ["p", table, Examples("some", [answer])]}))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3, 4, 4, 4]


def test_differences_of_recipes() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}
    runs = [
        RunFolder("x", {"run": {"name": "x"}, "a": 1, "m": {"n": 2}}),
        RunFolder("y", {"run": {"name": "y"}, "a": 1, "m": None}),
    ]
    assert differences(runs) == {"m.n": [2, None]}
    assert differences(runs[:1] * 2) == {}


def test_what_evaluation_commands_wrote(tmp_path: Path) -> None:
    """Folders of evaluate, blocks and analyse in a run's report/, and one alone; sections appear for what there is."""
    model = str(write_model(tmp_path / "hf"))
    run = tmp_path / "run"
    short = ["synthetic", "--samples", "12", "--max-new-tokens", "3"]
    evaluated = run / "report" / "evaluation-step-00000001"
    assert main(["evaluate", model, *short, "--timed", "2", "--output", str(evaluated)]) == 0
    for command in ("blocks", "sweep"):  # the second is the first one's earlier name, whose files stay readable
        assert main([command, model, *short, "--timed", "2", "--output", str(run / "report" / command)]) == 0
    assert main(["analyse", model, *short, "--output", str(run / "report" / "analysis")]) == 0
    assert main(["report", str(run), str(evaluated), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "Accuracy",
        "Latency",
        "Pairs on the same questions",
        "Block budgets",
        "What blocks do",
        "Samples",
    ]
    assert "| run: evaluation-step-00000001 | synthetic | 12 |" in text
    assert "| evaluation-step-00000001 | synthetic | 12 |" in text
    names = {p.name for p in (tmp_path / "out" / "pictures").iterdir()}
    assert {
        "run--blocks-blocks.png",
        "run--sweep-sweep.png",
        "run--analysis-states.png",
        "run--analysis-attention.png",
    } <= names


def test_what_is_refused(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken" / "report"
    shutil.copytree(Path(runs[0]) / "report", broken)
    (broken / "evaluation.json").write_text("{")
    for arguments, message in (
        ([str(tmp_path / "none")], "none: no such folder"),
        ([str(tmp_path / "empty")], "neither a run"),
        ([str(tmp_path / "broken")], "evaluation.json: not valid JSON"),
        ([runs[0], runs[0] + "/"], "the same folder is given twice"),
        ([*runs, "--output", "/proc/none"], "--output: /proc/none cannot be written"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    # Two runs of one name are told apart by their folders.
    other = tmp_path / "more" / "rim"
    shutil.copytree(runs[0], other)
    assert [run.name for run in collect_all([runs[0], str(other)])] == [f"{tmp_path.name}/rim", "more/rim"]


# ---- in a browser --------------------------------------------------------------------------------------------


def browse(page: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Console messages and requested addresses of a page in headless Chromium."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        f"--log-net-log={folder / 'net.json'}",
        # Chromium's own errands are not the page's.
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--virtual-time-budget=2000",
        f"--screenshot={folder / 'page.png'}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    log = json.loads((folder / "net.json").read_text())
    parameters = [event.get("params") for event in log["events"]]
    urls = {p["url"] for p in parameters if isinstance(p, dict) and "url" in p}
    own = ("google.com", "googleapis.com", "gvt1.com")
    return console, sorted(u for u in urls if not re.match(rf"https?://[^/]*({'|'.join(map(re.escape, own))})[:/]", u))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (apt-get install chromium)")
def test_in_a_browser(runs: list[str], tmp_path: Path) -> None:
    """No console message, no request; a page that has both shows that they would be seen."""
    assert main(["report", *runs, "--output", str(tmp_path / "out")]) == 0
    console, urls = browse(tmp_path / "out" / "report.html", tmp_path)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert (console, urls) == ([], [])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/none.png"
        bad = tmp_path / "bad.html"
        bad.write_text(f'<!doctype html><img src="{address}"><script>console.error("seen")</script>')
        console, urls = browse(bad, tmp_path)
        server.shutdown()
    assert any("seen" in line for line in console)
    assert address in urls

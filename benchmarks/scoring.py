"""The scoring rules against lm-evaluation-harness' own code, on GSM8K's test targets in 12 phrasings.

    RIM_DIST_DATA=FOLDER python benchmarks/scoring.py [--quick]

Needs `rim_dist[eval]` and FOLDER/gsm8k/test.jsonl. Every target is put into 12 texts, as it is (to be called right) and one
off (to be called wrong). The harness' verdict is that of its gsm8k task: its YAML, its filters, its exact_match. Counted:
how many of the targets each rule accepts, and how often the project's copies of the harness' rules, and its own, agree with it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from common import publish
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters import build_filter_ensemble

from rim_dist.config import ColumnsSection
from rim_dist.data.samples import BadSample
from rim_dist.data.sources import read_file
from rim_dist.evaluation.rules import RULES
from rim_dist.evaluation.scoring import extract_answer, same_answer
from rim_dist.table import Table

PHRASINGS: dict[str, Callable[[str], str]] = {
    "#### 72": lambda n: f"#### {n}",
    "chain of equations, #### 72": lambda n: f"<<48/2=24>>\n<<24+48={n}>>\n#### {n}",
    "####72": lambda n: f"####{n}",
    "#### 1,072": lambda n: f"#### {int(n):,}",
    "#### $72": lambda n: f"#### ${n}",
    "#### 72.": lambda n: f"#### {n}.",
    "#### 72.00": lambda n: f"#### {n}.00",
    "#### 72 dollars": lambda n: f"#### {n} dollars",
    "#### 72, then another question": lambda n: f"#### {n}\n\nQuestion: How many days has a week?\nAnswer: #### 7",
    "The answer is 72.": lambda n: f"The answer is {n}.",
    "72": lambda n: n,
    "sentence with \\boxed{72}": lambda n: f"24 and 48 make \\boxed{{{n}}} in all.",
}


def harness_verdicts(texts: list[str], targets: list[str]) -> dict[str, list[bool]]:
    """Right or wrong by both filters of the harness' gsm8k task; `targets` are GSM8K's own solutions."""
    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    metric = {k: v for k, v in task["metric_list"][0].items() if k not in ("metric", "aggregation", "higher_is_better")}
    instances = [Instance(request_type="generate_until", doc={}, arguments=("", {}), idx=0, resps=[text]) for text in texts]
    verdicts: dict[str, list[bool]] = {}
    for entry in task["filter_list"]:
        components: list[Any] = [[f["function"], {k: v for k, v in f.items() if k != "function"}] for f in entry["filter"]]
        build_filter_ensemble(entry["name"], components).apply(instances)
        found = [instance.filtered_resps[entry["name"]] for instance in instances]
        verdicts[entry["name"].partition("-")[0]] = [
            bool(exact_match_fn(predictions=[f], references=[t], **metric)["exact_match"])
            for f, t in zip(found, targets, strict=True)
        ]
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first 100 targets, nothing written")
    quick = parser.parse_args().quick
    if "RIM_DIST_DATA" not in os.environ:
        print("scoring: RIM_DIST_DATA is not set; it names the folder with gsm8k/test.jsonl", file=sys.stderr)
        return 2
    path = Path(os.environ["RIM_DIST_DATA"]) / "gsm8k" / "test.jsonl"
    answers = [row.answer for row in read_file(path, "gsm8k", ColumnsSection()) if not isinstance(row, BadSample)]
    answers = answers[:100] if quick else answers
    solutions = [f"...\n#### {int(answer):,}" for answer in answers]  # as GSM8K writes them
    names = ["ours", *RULES]
    accepted: dict[str, dict[str, int]] = {}
    wrongly: dict[str, int] = dict.fromkeys([*names, "harness strict", "harness flexible"], 0)
    same = {"strict": 0, "flexible": 0, "ours as strict": 0, "ours as flexible": 0, "ours as either": 0}
    total = 0
    for name, phrase in PHRASINGS.items():
        for off in (0, 1):
            texts = [phrase(str(int(answer) + off)) for answer in answers]
            harness = harness_verdicts(texts, solutions)
            own = {rule: [judge(t, a) for t, a in zip(texts, answers, strict=True)] for rule, judge in RULES.items()}
            own["ours"] = [same_answer(extract_answer(t, a), a) for t, a in zip(texts, answers, strict=True)]
            total += len(texts)
            for kind in ("strict", "flexible"):
                same[kind] += sum(map(bool.__eq__, own[kind], harness[kind]))
                same[f"ours as {kind}"] += sum(map(bool.__eq__, own["ours"], harness[kind]))
            either = [a or b for a, b in zip(harness["strict"], harness["flexible"], strict=True)]
            same["ours as either"] += sum(map(bool.__eq__, own["ours"], either))
            counts = {**{rule: sum(own[rule]) for rule in names}, **{f"harness {k}": sum(v) for k, v in harness.items()}}
            if off:
                wrongly = {rule: wrongly[rule] + counts[rule] for rule in wrongly}
            else:
                accepted[name] = counts
    head = ["text", *accepted["72"]]
    text = f"{len(answers)} targets of GSM8K's test set, lm_eval {lm_eval.__version__}. Right answers that are accepted:\n\n"
    text += Table(head, [[name, *(counts[rule] for rule in head[1:])] for name, counts in accepted.items()]).markdown()
    text += f"\nAnswers one off, {total // 2} in all, that are accepted:\n\n"
    text += Table(head, [["", *(wrongly[rule] for rule in head[1:])]]).markdown()
    text += f"\nThe same verdict as the harness on {total} texts, right and wrong ones:\n\n"
    text += Table(
        ["rule", "the same"], [[f"`{k}`" if " " not in k else k, f"{v} ({100 * v / total:.2f} %)"] for k, v in same.items()]
    ).markdown()
    figures = {
        "targets": len(answers),
        "texts": total,
        "accepted": accepted,
        "one_off_accepted": wrongly,
        "same_as_harness": same,
    }
    publish("scoring", "Scoring rules", text, figures, quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())

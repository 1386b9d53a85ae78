"""Run as a file in a process of its own: logits of an exported folder in plain transformers, nothing of rim_dist loaded.

    python plain_logits.py HF_DIR TASK.json OUT.safetensors

TASK.json: {"questions": [...], "blocks": [...]}; the result has `ids/I/K` and `logits/I/K`.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, task_file: str, out: str) -> None:
    with open(task_file, encoding="utf-8") as file:
        task = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if task["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, task["adapter"])
    results = {}
    for i, question in enumerate(task["questions"]):
        for blocks in task["blocks"]:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                **({} if blocks is None else {"rim_blocks": blocks}),
            )["input_ids"]
            with torch.no_grad():
                results[f"logits/{i}/{blocks}"] = model(ids).logits[0].float().contiguous()
            results[f"ids/{i}/{blocks}"] = ids[0].contiguous()
    assert "rim_dist" not in sys.modules
    save_file(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

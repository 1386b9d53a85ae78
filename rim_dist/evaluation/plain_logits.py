"""Run as a file in a process of its own: logits of an exported folder in plain transformers, nothing of rim_dist loaded.

    python plain_logits.py HF_DIR TASK.json OUT.safetensors

TASK.json: {"questions": [...], "blocks": [...], "adapter": FOLDER or null, "thoughts": N, "markers": [begin, end]}; the result
has `ids/I/K` and `logits/I/K`, with N continuous thoughts between the markers after the prompt if there are any.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def logits_after(model: Any, ids: torch.Tensor, thoughts: int, markers: list[int]) -> torch.Tensor:
    """Logits of a row of ids; with `thoughts`: with so many hidden states of its last layer fed back between the markers."""
    if not thoughts:
        return model(ids).logits[0].float()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # the model inside peft's wrapper
    embed = inner.get_input_embeddings()
    begin, end = (embed(torch.tensor([[marker]])) for marker in markers)
    states = torch.cat([embed(ids), begin], dim=1)
    for _ in range(thoughts):
        states = torch.cat([states, inner.base_model(inputs_embeds=states, use_cache=False)[0][:, -1:]], dim=1)
    return inner(inputs_embeds=torch.cat([states, end], dim=1)).logits[0].float()


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
                results[f"logits/{i}/{blocks}"] = logits_after(model, ids, task["thoughts"], task["markers"]).contiguous()
            results[f"ids/{i}/{blocks}"] = ids[0].contiguous()
    assert "rim_dist" not in sys.modules
    save_file(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Chat templates: what is trained is what plain transformers renders from the export, for every way to write a template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils
from conftest import TINY_MODEL
from tiny_tokenizers import byte_tokenizer, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rim_dist.checkpoint.start import requirements_of
from rim_dist.cli import main
from rim_dist.config import MemorySection
from rim_dist.data.encoding import DataReport, encode
from rim_dist.data.samples import Sample
from rim_dist.errors import ModelError
from rim_dist.evaluation.loading import load_for_evaluation
from rim_dist.recipe import load_recipe
from rim_dist.tokens import add_memory_tokens, prompt_ids, set_chat_template

Make = Callable[..., Path]
QUESTIONS = ["What is 3 + 4?", "Zwölf Äpfel,\n  geteilt durch 3?", "{{ 7 }} {% if %} 'quoted' \"twice\" \\ back"]
BLOCKS = 2
TURN = "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
LOOP = "{% for message in messages %}" + TURN + "{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PARTS = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
)

TEMPLATES = {
    "turns": LOOP + HEADER,
    "parts only": PARTS + HEADER,
    "parts only, after lines": "\n\n  {% if true %}\n" + PARTS + "\n  {% endif %}\n" + HEADER,
    "the first part": "{{ bos_token }}user: {{ messages[0]['content'][0]['text'] }}\nassistant:",
    "text or parts": "{% for message in messages %}{% if message['content'] is string %}" + TURN + "{% else %}"
    "{{ message['content'][0]['text'] }}{% endif %}{% endfor %}" + HEADER,
    "alternating roles": "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}" + TURN + "{% endfor %}",
    "a system turn of its own": "{% if messages[0]['role'] != 'system' %}<|system|>Be brief.<|end|>{% endif %}" + LOOP + HEADER,
    "the first turn apart": "{{ messages[0]['content'] }}{% for message in messages[1:] %}" + TURN + "{% endfor %}",
    "trimmed": "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}\n{% endfor %}" + HEADER,
    "a line's end after": LOOP + HEADER + "\n",
    "two line ends after": LOOP + "<|assistant|>\n\n",
    "a line's end of Windows": LOOP + "<|assistant|>\r\n",
    "a space after": LOOP + "Answer: ",
    "blanks on a line of their own": LOOP + "<|assistant|>\n    ",
    "a tag and blanks": LOOP + "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}\n  \t",
    "stripped ends": "  {%- for message in messages -%}  " + TURN + "  {%- endfor -%}  \n" + HEADER.replace("%}", "-%}"),
    "a prompt's own switch": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    + LOOP
    + HEADER,
    "a macro": "{% macro turn(message) %}"
    + TURN
    + "{% endmacro %}{% for message in messages %}{{ turn(message) }}{% endfor %}",
    "begin of text": "{{ bos_token }}" + LOOP + HEADER,
    "generation": LOOP + "{% if add_generation_prompt %}<|assistant|>{% generation %}{% endgeneration %}{% endif %}",
    "an open thought": LOOP + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "none": None,
}
TAKES_PARTS = {"parts only", "parts only, after lines", "the first part"}


def trained_ids(tokenizer: PreTrainedTokenizerFast, recipe_file: Make, questions: list[str]) -> list[list[int]]:
    """Token ids of questions as training has them, memory blocks included."""
    recipe = load_recipe(recipe_file(memory={"blocks": BLOCKS}))
    tokens = add_memory_tokens(tokenizer, recipe.memory)
    set_chat_template(tokenizer, recipe.memory, BLOCKS)
    samples = [Sample(question, (), "1", line) for line, question in enumerate(questions, 1)]
    encoded = encode(recipe, samples, tokenizer, tokens, 10**6, DataReport())
    return [[*sample.question, *tokens.block * BLOCKS] for sample in encoded]


def asked(question: str, parts: bool = False) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": question}] if parts else question}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_ids_are_serving_ids(name: str, recipe_file: Make, tmp_path: Path) -> None:
    """The export's template in plain transformers, the question as text and, if the model's own takes them, as parts."""
    template = TEMPLATES[name]
    tokenizer = byte_tokenizer(template)
    trained = trained_ids(tokenizer, recipe_file, QUESTIONS)
    tokenizer.save_pretrained(tmp_path / "export")
    served = AutoTokenizer.from_pretrained(tmp_path / "export")
    plain = byte_tokenizer(template or "{{ bos_token }}{{ messages[0]['content'] }}{{ '\n' }}")
    block = served.convert_tokens_to_ids(["<|mem_begin|>", *["<|mem|>"] * 2, "<|mem_end|>"])
    for question, ids in zip(QUESTIONS, trained, strict=True):
        for parts in {False, name in TAKES_PARTS}:
            messages = asked(question, parts)
            assert served.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
            text = served.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, rim_blocks=0)
        own = plain.apply_chat_template(asked(question, name in TAKES_PARTS), add_generation_prompt=True, tokenize=False)
        assert text == own
        assert ids == plain(own, add_special_tokens=False)["input_ids"] + block * BLOCKS
        assert question in own


def test_templates_of_another_turn_are_left_alone(tmp_path: Path) -> None:
    """In a longer conversation a template that takes parts gets text of all turns as parts, and keeps what else a turn has."""
    own = PARTS.replace("<|end|>", "{{ message['mood'] }}<|end|>") + HEADER
    tokenizer = byte_tokenizer(own)
    add_memory_tokens(tokenizer, MemorySection(blocks=BLOCKS))
    set_chat_template(tokenizer, MemorySection(blocks=BLOCKS), BLOCKS)
    turns = [{"role": role, "content": role[0], "mood": "calm"} for role in ("user", "assistant", "user")]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<|user|>ucalm<|end|><|assistant|>acalm<|end|><|user|>ucalm<|end|>"
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}], "mood": ""}]
    expected = byte_tokenizer(own).apply_chat_template(image, tokenize=False)
    assert tokenizer.apply_chat_template(image, tokenize=False) == expected
    again = tokenizer.chat_template
    set_chat_template(tokenizer, MemorySection(blocks=BLOCKS), BLOCKS)
    assert tokenizer.chat_template == again  # a run that starts from an export


class _Later(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # noqa: ARG003 - datetime's signature
        return datetime.datetime(2031, 2, 3)


DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}<|system|>Today is {{ day }}.<|end|>"
)


def test_a_template_that_knows_the_date_is_pinned(recipe_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DATED + LOOP + '{{ strftime_now( "%H:%M" ) }}'
    tokenizer = byte_tokenizer(own)
    trained = trained_ids(tokenizer, recipe_file, QUESTIONS)
    tokenizer.save_pretrained(tmp_path / "export")
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", _Later)
    assert "2031" in byte_tokenizer(own).apply_chat_template(asked("q"), tokenize=False)
    assert trained_ids(byte_tokenizer(own), recipe_file, QUESTIONS) == trained  # a run that goes on on another day
    served = AutoTokenizer.from_pretrained(tmp_path / "export")
    for question, ids in zip(QUESTIONS, trained, strict=True):
        prompt = served.apply_chat_template(asked(question), add_generation_prompt=True, return_dict=False)
        assert prompt == ids
        text = f"<|system|>Today is 26 Jul 2024.<|end|><|user|>{question}<|end|>00:00"
        assert served.apply_chat_template(asked(question), tokenize=False) == text


def test_pinning_is_said(recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer(DATED + PARTS).save_pretrained(tmp_path / "dated")
    notes = requirements_of(load_recipe(recipe_file(model={"tokenizer": str(tmp_path / "dated")}))).notes
    assert [("parts" in note, "26 July 2024" in note) for note in notes] == [(True, False), (False, True)]
    assert requirements_of(load_recipe(recipe_file())).notes == []


REFUSED = {
    "{{ raise_exception('A system turn comes first.') }}" + LOOP: "refuses a question: A system turn comes first.",
    "{{ messages[1]['content'] }}": "refuses a question: list object has no element 1",
    "{% for message in messages if message['role'] == 'system' %}" + TURN + "{% endfor %}": "leaves a question",
    "Ask me anything!": "leaves a question",
    "{% for message in messages %}{{ message['text'] }}{% endfor %}": "leaves a question",
    "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}": "leaves a question",
    "{% for message in messages %}": "refuses a question: Unexpected end of template",
    "{{ messages[0]['content'] }}{{ strftime_now('%d' ~ '%m') }}": "date in a way that cannot be pinned",
    LOOP + "{{ range(1000) | random }}": "draws at random",
    "{% set add_generation_prompt = false %}" + LOOP: "cannot end with memory blocks",
    LOOP + "{{ 1 // 0 }}": "refuses a question: integer division or modulo by zero",
}


@pytest.mark.parametrize("template", [*REFUSED, "named", "number"])
def test_templates_that_are_refused(
    template: str, recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says why, in the template's own words, and writes nothing."""
    named = {"rag": LOOP, "tool_use": LOOP}
    byte_tokenizer(named if template == "named" else template).save_pretrained(tmp_path / "tokenizer")
    if template == "number":
        (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
        settings = tmp_path / "tokenizer" / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": 5}))
    recipe = recipe_file(model={"tokenizer": str(tmp_path / "tokenizer")})
    assert main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rim-dist: model.tokenizer: ")
    other = {
        "named": "chat templates named rag, tool_use, and none named default",
        "number": "its chat template is int, not text",
    }
    assert (REFUSED | other)[template] in said
    assert len(said.splitlines()) <= 3
    assert not (tmp_path / "runs").exists()


def test_questions_that_a_template_refuses_are_bad_samples(
    recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = (
        "{% if '?' not in messages[0]['content'] %}{{ raise_exception('Ask with a question mark.') }}{% endif %}"
        "{{ messages[0]['content'][:30] }}"
    )
    byte_tokenizer(template).save_pretrained(tmp_path / "tokenizer")
    questions = ["What is 1 + 1?", "Add 1 and 1.", "What is this and that and what is left of it?", "What is 2 + 2?"]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"question": question, "answer": "2"}) + "\n" for question in questions))
    sections = {"model": {"tokenizer": str(tmp_path / "tokenizer")}, "data": {"source": "jsonl", "path": str(file)}}
    assert main(["data", str(recipe_file(**sections))]) == 2
    assert f"{file}:2: it cannot be tokenised (the chat template refuses a question: Ask with" in capsys.readouterr().err
    sections["data"]["on_bad_sample"] = "skip"
    assert main(["data", str(recipe_file(**sections))]) == 0
    assert "4 rows, 2 used, 2 left out" in capsys.readouterr().out
    file.write_text(json.dumps({"question": questions[2], "answer": "2"}))
    assert main(["data", str(recipe_file(**sections))]) == 2
    assert "1 rows: it cannot be tokenised" in capsys.readouterr().err


def test_begin_of_text_without_unknown_tokens_and_without_a_template(
    recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words that the vocabulary lacks raise an error of the tokenizer's: a bad sample. BOS comes once."""
    word_tokenizer("<s> </s> red blue hall ####").save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "d.jsonl"
    file.write_text('{"question": "red blue", "answer": "hall"}\n{"question": "green", "answer": "hall"}\n')
    sections = {"model": {"tokenizer": str(tmp_path / "tokenizer")}, "data": {"source": "jsonl", "path": str(file)}}
    assert main(["data", str(recipe_file(**sections))]) == 2
    assert f"{file}:2: it cannot be tokenised (the tokenizer cannot encode a question" in capsys.readouterr().err
    recipe = load_recipe(recipe_file(**sections))
    requirements = requirements_of(recipe)
    samples = [Sample("red blue", (), "hall", 1), Sample("red", (), "hall", 2)]
    encoded = list(encode(recipe, samples, requirements.tokenizer, requirements.tokens, 99, DataReport()))
    assert [sample.question for sample in encoded] == [[0, 2, 3], [0, 2]]
    assert encoded[0].answer == [5, 4, 1]


def test_questions_that_all_become_one_prompt_are_refused(
    recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word_tokenizer("<s> </s> <unk> hall ####", unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "d.jsonl"
    file.write_text('{"question": "eins plus zwei", "answer": "hall"}\n{"question": "drei mal vier", "answer": "hall"}\n')
    sections = {"model": {"tokenizer": str(tmp_path / "tokenizer")}, "data": {"source": "jsonl", "path": str(file)}}
    assert main(["data", str(recipe_file(**sections))]) == 2
    assert f"{file}: the tokenizer makes the same prompt of every question" in capsys.readouterr().err


def test_a_model_of_others_is_asked_in_the_form_its_template_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate` and `generate` of a folder that is no export."""
    folder = tmp_path / "hf"
    tokenizer = byte_tokenizer(PARTS + HEADER)
    fields = {name: value for name, value in TINY_MODEL.items() if name != "model_type"}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = load_for_evaluation(folder)
    plain = AutoTokenizer.from_pretrained(folder)
    expected = [
        plain.apply_chat_template(asked(q, parts=True), add_generation_prompt=True, return_dict=False) for q in QUESTIONS
    ]
    assert loaded.prompts(QUESTIONS) == expected
    assert "lists of parts" in capsys.readouterr().err
    plain.chat_template = "{{ raise_exception('Not today.') }}"
    plain.save_pretrained(folder)
    assert main(["generate", str(folder), "What is 1 + 1?"]) == 2
    assert f"{folder}: the chat template refuses a question: Not today." in capsys.readouterr().err


def test_an_unusable_question_is_said_where_it_is_asked() -> None:
    tokenizer = byte_tokenizer("{{ messages[0]['content'][:20] }}")
    with pytest.raises(ModelError, match="leaves a question, or a part of it, out of the prompt: 'What is this and"):
        prompt_ids(tokenizer, ["Fine?", "What is this and that and all the rest?"])

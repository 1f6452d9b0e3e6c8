"""Texts that a template looks into and tokenizers that look over borders, case by case; `test_families` tries hundreds."""

from pathlib import Path

import pytest
from conftest import CHATML, train_tokenizer
from template_examples import FAMILIES, IMAGE, KINDS, make_tokenizer

from pipeline.core.errors import ARTEFACT, BAD_ROWS, PipelineError
from pipeline.params import LanguageModel
from pipeline.records.record import ImageSlot, Turn
from pipeline.text import template_faults
from pipeline.text.builder import PromptBuilder
from pipeline.text.template import DATE

THOUGHT = "<think>\nA tail, so\na cat.\n</think>\n\nIt is a cat."


def builder_of(folder: Path, name: str, kind: str = "byte-level") -> PromptBuilder:
    make_tokenizer(FAMILIES[name], kind).save_pretrained(folder)
    return PromptBuilder(str(folder), image_token=IMAGE, tokens=2)


def spell(builder: PromptBuilder, turns: list[Turn]) -> tuple[str, list[str]]:
    """The whole text, and what of it is supervised."""
    prompt = builder.build(turns)
    decode = builder.tokenizer.decode
    return decode(prompt.ids), [decode(prompt.ids[start:end]) for start, end in prompt.spans]


def test_a_thought_in_the_last_answer_is_the_models_own_block(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "Qwen3")
    whole, answers = spell(builder, [Turn("user", ("What?",)), Turn("assistant", (THOUGHT,))])
    assert whole == f"<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{THOUGHT}<|im_end|>"
    assert answers == [f"{THOUGHT}<|im_end|>"]
    ids = builder.build([Turn("user", ("What?",)), Turn("assistant", (THOUGHT,))]).ids.tolist()
    assert ids.count(builder.tokenizer.convert_tokens_to_ids("<think>")) == 1, "a token, not its letters"


def test_a_thought_of_an_earlier_turn_is_left_out_as_the_template_does(tmp_path: Path) -> None:
    talk = [Turn("user", ("What?",)), Turn("assistant", (THOUGHT,)), Turn("user", ("Sure?",)), Turn("assistant", ("Yes.",))]
    _, answers = spell(builder_of(tmp_path, "Qwen3"), talk)
    assert answers == ["It is a cat.<|im_end|>", "Yes.<|im_end|>"]


def test_an_empty_thought_is_the_prompts_and_not_supervised(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "Qwen3")
    talk = [Turn("user", ("What?",)), Turn("assistant", ("<think>\n\n</think>\n\nA cat.",))]
    prompt, asked = builder.build(talk), builder.build_question(talk[:1])
    assert spell(builder, talk)[1] == ["A cat.<|im_end|>"]
    assert asked.ids.tolist() == prompt.ids[: prompt.spans[0][0]].tolist()


def test_edge_blanks_are_trimmed_or_kept_as_the_template_does(tmp_path: Path) -> None:
    talk = [Turn("user", ("  What?\n",)), Turn("assistant", ("\n A cat. ",))]
    assert spell(builder_of(tmp_path / "1", "Llama 3"), talk)[1] == ["A cat.<|eot_id|>"]
    assert spell(builder_of(tmp_path / "2", "Phi-4"), talk)[1] == ["\n A cat. <|im_end|>"]


def test_a_picture_beside_blanks_is_no_edge(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "Llama 3")
    whole, _ = spell(builder, [Turn("user", (" ", ImageSlot(0), "\nWhat? ")), Turn("assistant", ("A cat.",))])
    assert f"\n\n{IMAGE}{IMAGE}\nWhat?<|eot_id|>" in whole


@pytest.mark.parametrize("name", ["Vicuna", "Llama 2", "TinyLlama", "Mistral v1"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_word_behind_a_prompt_is_the_one_that_generation_must_give(tmp_path: Path, name: str, kind: str) -> None:
    builder = builder_of(tmp_path, name, kind)
    talk = [Turn("user", (ImageSlot(0), "\nWhat is this?")), Turn("assistant", ("It is red.",))]
    prompt, asked = builder.build(talk), builder.build_question(talk[:1])
    ((start, end),) = prompt.spans
    assert asked.ids.tolist() == prompt.ids[:start].tolist()
    assert builder.decode(prompt.ids[start:end]).strip() == "It is red."
    assert prompt.ids[end - 1] == builder.tokenizer.eos_token_id


def test_what_a_system_turn_decides_is_the_templates_business(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, "SmolLM3")
    said = [Turn("system", ("Be brief. /think",)), Turn("user", ("What?",)), Turn("assistant", ("A cat.",))]
    whole, answers = spell(builder, said)
    assert "Reasoning Mode: /think" in whole
    assert "Be brief.\n\n<|im_end|>" in whole
    assert answers == ["A cat.<|im_end|>"]


REFUSED = {
    "is changed": ("m['content'] | upper if 'zebra' in m['content'] else m['content']", "a zebra", "changes a text"),
    "is measured": ("m['content'] ~ (m['content'] | length if 'zebra' in m['content'] else '')", "a zebra", "cannot be followed"),
    "is said twice": ("m['content'] ~ (m['content'] if 'zebra' in m['content'] else '')", "a zebra", "twice"),
    "is left out": ("('' if 'zebra' in m['content'] else m['content'])", "a zebra", "drops turns"),
    "has marks": ("m['content']", " \U0010fff0", "private characters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_text_that_cannot_be_followed_is_one_bad_row(tmp_path: Path, case: str) -> None:
    written, text, reason = REFUSED[case]
    tokenizer = train_tokenizer("embedded")
    tokenizer.chat_template = CHATML.replace("message['content']", f"({written.replace('m[', 'message[')})")
    tokenizer.save_pretrained(tmp_path)
    builder = PromptBuilder(str(tmp_path), image_token="<image>", tokens=2)
    with pytest.raises(PipelineError, match=reason) as caught:
        builder.build_batch([[Turn("user", ("What?",)), Turn("assistant", (text,))]])
    assert caught.value.code == BAD_ROWS
    assert len(builder.build([Turn("user", ("What?",)), Turn("assistant", ("A dog.",))]).spans) == 1


@pytest.mark.parametrize("name", ["DeepSeek R1 (distilled)", "gpt-oss", "GLM-4"])
def test_a_family_that_cannot_be_trained_is_known_before_anything_is_encoded(tmp_path: Path, name: str) -> None:
    make_tokenizer(FAMILIES[name], KINDS[0]).save_pretrained(tmp_path)
    (fault,) = template_faults(LanguageModel(model=str(tmp_path), revision="", image_token=IMAGE, date=DATE))
    assert fault.code == ARTEFACT
    assert "docs/templates.md" in fault.line()


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_that_can_be_has_no_fault(tmp_path: Path, kind: str) -> None:
    make_tokenizer(FAMILIES["Llama 3.2"], kind).save_pretrained(tmp_path)
    assert template_faults(LanguageModel(model=str(tmp_path), revision="", image_token=IMAGE, date=DATE)) == []


@pytest.mark.parametrize("name", ["Vicuna", "Llama 3"])
def test_an_answer_that_is_not_trained_is_read_and_not_supervised(tmp_path: Path, name: str) -> None:
    builder = builder_of(tmp_path, name)
    talk = [
        Turn("user", ("What?",)),
        Turn("assistant", ("A cat.",), trained=False),
        Turn("user", ("Sure?",)),
        Turn("assistant", ("Yes.",)),
    ]
    half, both = builder.build(talk), builder.build([Turn(turn.role, turn.parts) for turn in talk])
    assert half.ids.tolist() == both.ids.tolist()
    assert (len(both.spans), half.spans) == (2, both.spans[1:])

"""Prompts that the tokenizer makes equal or cuts: named before anything is made, and in the card."""

import dataclasses
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from ubgen.core.classes import ClassList, load_classes
from ubgen.core.config import resolve_path
from ubgen.core.errors import UserError, Warned
from ubgen.dataset.card import CardFacts, card_text
from ubgen.synth.config import SynthConfig
from ubgen.synth.prompts import check_prompts, class_prompts

LIMIT = 16
ENGINE = {"engine": {"networks": {"text_encoder": {"signature": {"inputs": [{"shape": [{}, LIMIT]}]}}}}}
CRANES = ClassList(("bird", "machine", "ox"), ("crane", "crane", "ox"))


@pytest.fixture
def config(tmp_path: Path) -> SynthConfig:
    tokenizer = resolve_path("ubgen:miniature/weights/stable-diffusion/tokenizer")
    shutil.copytree(tokenizer, tmp_path / "engine" / "tokenizer")
    return SynthConfig(tmp_path / "engine", "classes.txt", per_class=1, out="")


def test_distinct_short_prompts_have_nothing_to_say(config: SynthConfig) -> None:
    classes = load_classes("miniature")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_prompts(config, classes, class_prompts(classes, "{name}", None), ENGINE) == []


def test_two_classes_of_one_name_are_refused_unless_it_is_meant(config: SynthConfig) -> None:
    prompts = class_prompts(CRANES, "{name}", None)
    with pytest.raises(
        UserError, match=r"classes bird and machine have the same prompt.*--prompts.*--same-prompts"
    ):
        check_prompts(config, CRANES, prompts, ENGINE)
    allowed = dataclasses.replace(config, same_prompts=True)
    with pytest.warns(Warned, match="classes bird and machine have the same prompt|Classes bird and machine"):
        notes = check_prompts(allowed, CRANES, prompts, ENGINE)
    assert notes == ["Classes bird and machine have the same prompt, so that their images cannot differ."]
    facts = CardFacts("t", 3, 3, 1, "jpg", 1, "s", 0, "p", "k", notes=notes)
    assert "## Prompts\n\n- Classes bird and machine have the same prompt" in card_text(facts, CRANES.names)
    assert "## Prompts" not in card_text(dataclasses.replace(facts, notes=()), CRANES.names)


def test_overrides_that_make_two_prompts_equal_are_refused(config: SynthConfig, tmp_path: Path) -> None:
    (tmp_path / "prompts.tsv").write_text("ox\tcrane bird\nbird\tcrane bird\n")
    config = dataclasses.replace(config, prompts=tmp_path / "prompts.tsv")
    with pytest.raises(UserError, match="classes bird and ox have the same prompt"):
        check_prompts(config, CRANES, class_prompts(CRANES, "{name}", config.prompts), ENGINE)


def test_a_shipped_list_with_equal_names_is_warned_of(config: SynthConfig) -> None:
    classes = load_classes("imagenet1k")
    config = dataclasses.replace(config, classes="imagenet1k")
    wide = {"engine": {"networks": {"text_encoder": {"signature": {"inputs": [{"shape": [{}, 77]}]}}}}}
    prompts = class_prompts(classes, "{name}", None)
    with pytest.warns(Warned, match="2 such pairs"):
        notes = check_prompts(config, classes, prompts, wide)
    assert [note for note in notes if "same prompt" in note] == notes
    templated = dataclasses.replace(config, prompt="a {name}")
    with pytest.raises(UserError, match="have the same prompt"):
        check_prompts(templated, classes, class_prompts(classes, "a {name}", None), wide)


def test_the_words_that_a_long_prompt_loses_are_named(config: SynthConfig) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(config.engine / "tokenizer")
    name = "a very long name that no sixteen tokens can hold"
    classes = ClassList(("long", "ox"), (name, "ox"))
    with pytest.warns(Warned, match="The prompt of long is cut after 16 tokens"):
        (note,) = check_prompts(config, classes, classes.names, ENGINE)
    lost = note.split("lost: '")[1].removesuffix("'.")
    assert name.endswith(lost)
    kept = tokenizer(name, truncation=True, max_length=LIMIT)["input_ids"]
    again = tokenizer(name[: -len(lost)].strip())["input_ids"]
    assert len(again) == LIMIT
    assert again[:-2] == kept[:-2]  # the last of them may end in the middle of a word


def test_prompts_that_differ_only_beyond_the_cut_are_equal(config: SynthConfig) -> None:
    start = "a very long name that no sixteen tokens can hold"
    classes = ClassList(("a", "b"), (f"{start} bird", f"{start} machine"))
    with pytest.warns(Warned), pytest.raises(UserError, match="classes a and b have the same prompt"):
        check_prompts(config, classes, classes.names, ENGINE)

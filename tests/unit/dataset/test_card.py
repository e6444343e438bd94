"""README.md: read by Hugging Face, harmless whatever the classes are called."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st

from ubgen.core.errors import UserError
from ubgen.dataset import CardFacts, dataset_stats, open_dataset, write_card
from ubgen.dataset.card import card_text, licence_fields, read_classes, stated_licence
from ubgen.dataset.text import escape, plain, safe_names

FACTS = CardFacts(
    title="miniature",
    images=2000,
    classes=2,
    shards=12,
    extension="jpg",
    per_class=1000,
    sampler="PNDM, 50 steps, guidance 2.0",
    seed=3,
    prompt="the class name",
    engine_key="abc123",
    lora_hash="sha256:77",
    base_model="stable-diffusion-v1-5",
    licence="cc-by-4.0",
)


def test_hugging_face_reads_it(tmp_path: Path, make: Callable[..., Path]) -> None:
    out = make(tmp_path / "d")
    write_card(out, replace(FACTS, stats=dataset_stats(open_dataset(out))))
    card = DatasetCard.load(out / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.annotations_creators == ["machine-generated"]
    assert card.data.size_categories == ["1K<n<10K"]
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "shard-*.tar"}]
    assert "synthetic" in card.data.tags
    for fact in (
        "PNDM, 50 steps",
        "abc123",
        "sha256:77",
        "stable-diffusion-v1-5",
        "All images are synthetic",
    ):
        assert fact in card.text
    assert "| images drawn again | 2 \\(constant: 2\\) |" in card.text
    assert "| Q-Align score, 1 \\(bad\\) to 5 \\(excellent\\) | " in card.text
    assert "shard-{000000..000011}.tar" in card.text


@settings(deadline=None)
@given(title=st.text(), name=st.text(), licence=st.text(), key=st.text())
def test_no_text_breaks_out_of_its_place(title: str, name: str, licence: str, key: str) -> None:
    facts = replace(FACTS, title=title, licence=licence, engine_key=key, prompt=name, base_model=name)
    ours = card_text(FACTS, ["a"])
    text = card_text(facts, [name])
    text.encode()
    card = DatasetCard(text)
    assert card.data.pretty_name == (plain(title) or "")
    assert len(text.split("\n")) == len(ours.split("\n")) + len(licence_fields(licence)) - 1
    for line in text.split("\n## Reading it")[0].splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


@pytest.mark.parametrize(
    "hostile", ["<script>", "<img src=x onerror=y>", "[a](javascript:b)", "`x`", "https://evil"]
)
def test_markup_is_escaped(hostile: str) -> None:
    text = card_text(replace(FACTS, title=hostile, licence=hostile), [hostile])
    assert hostile not in text.partition("\n---\n")[2]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {"license": "unknown"}),
        ("CC BY 4.0", {"license": "cc-by-4.0"}),
        ("CreativeML OpenRAIL-M", {"license": "creativeml-openrail-m"}),
        ("ours, ask us", {"license": "other", "license_name": "ours-ask-us"}),
        (
            "https://x.org/l",
            {"license": "other", "license_name": "https-x.org-l", "license_link": "https://x.org/l"},
        ),
    ],
)
def test_licences_of_free_text(text: str, fields: dict[str, str]) -> None:
    assert licence_fields(text) == fields


@pytest.mark.parametrize("text", ["", "cc-by-4.0", "ours-ask-us", "https://x.org/l"])
def test_the_licence_of_a_card_is_found_again(tmp_path: Path, text: str) -> None:
    assert stated_licence(tmp_path) == ""
    (tmp_path / "README.md").write_text(card_text(replace(FACTS, licence=text), ["a"]))
    assert stated_licence(tmp_path) == text


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- gpl-3.0\ntags: [a]\n---\n", "mit"),
        ("---\ntags: [a]\n---\nlicense: mit\n", ""),
        ("license: mit\n", ""),
        ("---\nlicense:\ntags: [a]\n---\n", ""),
    ],
)
def test_licences_in_cards_of_others(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert stated_licence(tmp_path) == licence


@settings(deadline=None)
@given(st.text(), st.integers(1, 50))
def test_plain_text_is_one_printable_line(text: str, limit: int) -> None:
    line = plain(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert escape(text).count("<") == 0


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.text(), st.sampled_from(["a", "A", "class-000001", ".", "..", "con", "a/b"])), max_size=8
    )
)
def test_file_names_of_classes_are_safe_and_their_own(ids: list[str]) -> None:
    names = safe_names(ids)
    assert len({name.lower() for name in names}) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and len(name) <= 100 for name in names)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[1]", '[{"index":1,"id":"a","name":"b"}]', '[{"index":0,"id":"a"}]']
)
def test_a_broken_class_list_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=r"classes\.json is not a list of classes"):
        read_classes(tmp_path)

"""What the measures find in a dataset whose features, copies and bad images are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ubgen.cli.dataset_stats import Measured, stats
from ubgen.core.errors import UserError, Warned
from ubgen.dataset import CardFacts, open_dataset, write_card, write_croissant
from ubgen.dataset.tools.features import Joined
from ubgen.dataset.tools.measured import Features, compare_with, measure, measured_by_kept_features

NAMES = ["crane", "heron", "digger", "<b>tree"]


def feature(position: int) -> np.ndarray:
    """Class p % 4; half of the cranes look like herons, half like diggers."""
    rng = np.random.default_rng(position % 120)  # 120 and later are copies of the ones before
    label = position % 4
    kind = (1 if position % 8 else 2) if label == 0 else label
    row = rng.normal(size=6) * 0.05
    row[kind] += 1
    row[5] += label == 0
    return row / np.linalg.norm(row)


@pytest.fixture
def dataset(tmp_path: Path, make: Callable[..., Path]) -> Path:
    def change(position: int, sample: dict[str, Any]) -> None:
        sample["features"] = feature(position)
        if position == 7:
            sample["image"] = Image.new("RGB", (16, 16))

    return make(tmp_path / "d", NAMES, shards=4, per_shard=32, change=change)


def test_what_is_found(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats(str(dataset), str(tmp_path / "look"), 2, Measured(measures=True, images="all", near=0.9999))
    found = json.loads((tmp_path / "look" / "stats.json").read_text())
    measures, inspection = found["measures"], found["inspection"]
    assert found["images"] == measures["images"] == 128
    assert [entry["images"] for entry in measures["classes"]] == [32] * 4
    by_class = {entry["name"]: entry for entry in measures["classes"]}
    assert by_class["heron"]["agreement"][0] == pytest.approx(1)
    for entry in measures["classes"]:
        for figure in ("rke", "vendi", "variance", "agreement"):
            value, low, high = entry[figure]
            assert low <= value <= high
    near = measures["near_duplicates"]["within_classes"]
    assert sorted(pair[:2] for pair in near["pairs"]) == [[i, i + 120] for i in range(8)]
    assert near["images"] == 16
    (meaning,) = measures["two_meanings"]
    assert meaning["name"] == "crane"
    assert {cluster["near"] for cluster in meaning["clusters"]} == {"heron", "digger"}
    for cluster in meaning["clusters"]:
        heron = cluster["near"] == "heron"
        assert {bool(place % 8) for place in cluster["examples"]} == {heron}
        assert cluster["prompt_line"] == f"n000\tcrane, similar to {cluster['near']}"
    assert measures["encoder_is_the_reward"]
    low, high = measures["agreement"]["share"][1:]
    assert 0.5 < low < high <= 1
    assert inspection["kinds"]["blank"]["first"] == [7]
    assert (inspection["images"], inspection["of"]) == (128, 128)
    pictures = {path.name for path in (tmp_path / "look").glob("*.png")}
    assert {"two-meanings.png", "near-duplicates.png", "bad-images.png"} <= pictures
    text = capsys.readouterr().out
    assert "n000\tcrane, similar to heron" in text
    assert "the encoder was the reward" in "".join(text.replace("│", "").split("\n")).replace("  ", "")


def test_card_and_croissant_say_it(dataset: Path) -> None:
    opened = open_dataset(dataset)
    measures = measured_by_kept_features(opened)
    facts = CardFacts("t", 128, 4, 4, "jpg", 32, "PNDM", 0, "name", "key", measures=measures)
    write_card(dataset, facts)
    card = (dataset / "README.md").read_text()
    value, low, high = measures["diversity"]["rke"]
    assert f"| RKE | {value:.2f} \\[{low:.2f}, {high:.2f}\\] |" in card
    assert "- crane: near " in card
    assert "<b>" not in card
    write_croissant(dataset, facts)
    document = json.loads((dataset / "croissant.json").read_text())
    assert f"RKE: {value:.2f} [{low:.2f}, {high:.2f}]" in document["rai:dataBiases"][-1]


def test_a_run_ends_without_measures(tmp_path: Path, make: Callable[..., Path]) -> None:
    assert measured_by_kept_features(open_dataset(make(tmp_path / "none"))) == {}
    out = make(tmp_path / "zero", change=lambda _, sample: sample.update(features=np.zeros(4)))
    with pytest.warns(Warned, match="no measures in the dataset's card: .* zero"):
        assert measured_by_kept_features(open_dataset(out)) == {}


def test_without_features(tmp_path: Path, make: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="has no features; run ubgen-dataset features"):
        stats(str(make(tmp_path / "d")), measured=Measured(measures=True))


def test_against_itself_and_another(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.stack([feature(i) for i in range(128)])
    ours = Features(rows, "A", "sha256:a")
    found = compare_with(ours, Features(-rows, "A", "sha256:a"))
    assert found["probe_accuracy"][0] > 0.9
    assert found["coverage"][0] == 0
    with pytest.raises(UserError, match="features are by A, the reference's by B"):
        compare_with(ours, Features(rows, "B", "sha256:b"))
    stats(str(dataset), measured=Measured(reference=str(dataset)))
    assert "128 of each" in capsys.readouterr().out


def test_features_in_parts_are_as_one() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float16)
    joined = Joined([rows[:4], rows[4:5], rows[5:]])
    places = np.array([0, 3, 4, 5, 29])
    np.testing.assert_array_equal(joined[places], rows[places])
    np.testing.assert_array_equal(joined[3:20], rows[3:20])
    assert len(joined) == 30
    labels = np.arange(30) % 3
    in_parts, whole = (measure(Features(x, "", ""), labels, "abc", "abc") for x in (joined, rows))
    assert in_parts == whole


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Measured(images=-1), "--images must be"),
        (Measured(near=0), "--near must be"),
        (Measured(reference_features=Path("x")), "--reference-features needs --reference"),
    ],
)
def test_options(dataset: Path, wanted: Measured, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stats(str(dataset), measured=wanted)

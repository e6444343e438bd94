"""Conversions: the same samples in every layout, resumable, and safe whatever a tar holds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ubgen.core.errors import UserError
from ubgen.core.locks import hold
from ubgen.dataset import is_marked_synthetic, open_dataset, open_store
from ubgen.dataset.tools.convert import Format, convert
from ubgen.dataset.tools.formats import directory_names, unique_names
from ubgen.dataset.tools.verify import verify

Make = Callable[..., Path]
FORMATS: tuple[Format, ...] = ("folder", "parquet", "webdataset")


def content(out: Path, to: Format) -> list[tuple[str, int, bytes, str]]:
    """Key, label, stored image and prompt of every sample of a conversion, in order."""
    if to == "webdataset":
        dataset = open_dataset(out)
        return [
            (f"{i:09d}", sample.label, dataset.encoded(i)[0], sample.meta["prompt"])
            for i, sample in enumerate(dataset)
        ]
    if to == "parquet":
        rows = [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        return [(row["key"], row["label"], row["image"]["bytes"], row["prompt"]) for row in rows]
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return [
        (Path(s["file_name"]).stem, s["label"], (out / s["file_name"]).read_bytes(), s["prompt"])
        for s in lines
    ]


@pytest.mark.parametrize("extension", ["jpg", "png"])
@pytest.mark.parametrize("to", FORMATS)
def test_the_same_samples_in_every_layout(
    tmp_path: Path, make: Make, hostile: list[str], to: Format, extension: str
) -> None:
    source = make(tmp_path / "d", hostile, shards=3, per_shard=10, extension=extension)
    seen: list[tuple[int, int]] = []
    assert convert(source, tmp_path / "out", to, 7, lambda done, total: seen.append((done, total))) == (
        30,
        True,
    )
    dataset = open_dataset(source)
    want = [(f"{i:09d}", s.label, dataset.encoded(i)[0], s.meta["prompt"]) for i, s in enumerate(dataset)]
    if to != "webdataset":  # lone surrogates cannot be stored as UTF-8
        want = [(*row[:3], row[3].encode(errors="replace").decode()) for row in want]
    assert content(tmp_path / "out", to) == want
    assert seen[0] == (0, 30)
    assert seen[-1] == (30, 30)
    assert {p.name for p in tmp_path.iterdir()} == {"d", "out"}
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [entry["name"] for entry in classes] == hostile
    assert "## Reading it" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_new_shards_are_a_whole_dataset_with_its_ledger(tmp_path: Path, make: Make) -> None:
    convert(make(tmp_path / "d"), tmp_path / "out", "webdataset", 5)
    result = verify(tmp_path / "out")
    assert result.problems == []
    assert (result.shards, result.images, result.rejected) == (3, 12, 2)
    scores = [(e.key, e.scores) for e in open_dataset(tmp_path / "out").entries()]
    assert scores == [(e.key, e.scores) for e in open_dataset(tmp_path / "d").entries()]


@pytest.mark.parametrize("to", FORMATS)
def test_an_interrupted_conversion_continues(tmp_path: Path, make: Make, to: Format) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise Stop

    source, out, straight = make(tmp_path / "d"), tmp_path / "out", tmp_path / "straight"
    with pytest.raises(Stop):
        convert(source, out, to, 4, stop)
    assert not (out / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".jpg", ".parquet", ".tar")}
    assert len(kept) == {"folder": 8, "parquet": 2, "webdataset": 2}[to]
    if to == "folder":
        (out / "n000" / "000000010.jpg").write_bytes(b"torn by a kill")
    assert convert(source, out, to, 4) == (12, True)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    convert(source, straight, to, 4)
    assert tree(out) == tree(straight)


def test_a_folder_begun_with_other_directories_is_not_finished(tmp_path: Path, make: Make) -> None:
    """As an earlier version did, which called a class's directory "train"."""
    source, out = make(tmp_path / "d", ids=["cat", "train"]), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, "folder", 6, stop)
    part = out / ".part-000000.jsonl"
    part.write_text(part.read_text().replace("class-000001/", "train/"))
    with pytest.raises(UserError, match="earlier version of ubgen, which called a directory 'train'"):
        convert(source, out, "folder", 6)


def tree(out: Path) -> dict[str, bytes]:
    """The manifest holds the time."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }


def test_a_damaged_part_is_made_again(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    convert(source, out, "parquet", 4)
    (out / "manifest.json").unlink()
    part = out / "train-00001-of-00003.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    convert(source, out, "parquet", 4)
    assert part.read_bytes() == whole


def test_an_output_that_holds_something_else_is_refused(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    (out / "photos").mkdir(parents=True)
    with pytest.raises(UserError, match=r"not a directory of ubgen-dataset convert \(it holds photos\)"):
        convert(source, out, "folder")
    (out / "photos").rmdir()
    convert(source, out, "folder")
    with pytest.raises(
        UserError, match=r"a finished run with another configuration .shard_size was 1000, now 3"
    ):
        convert(source, out, "folder", 3)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"an unfinished run .*to was 'folder', now 'parquet'.*another OUT"):
        convert(source, out, "parquet")
    with pytest.raises(UserError, match="the dataset itself"):
        convert(source, source, "folder")
    with pytest.raises(UserError, match="--shard-size"):
        convert(source, tmp_path / "new", "folder", 0)


def test_shards_hold_one_kind_of_images(tmp_path: Path, make: Make) -> None:
    """Hugging Face takes the columns from the first: it would drop the images of the other kind."""
    source = make(tmp_path / "d", extension="png")
    make(tmp_path / "jpg", shards=1)
    for file in (tmp_path / "jpg").glob("shard-000000.*"):
        file.replace(source / file.name)
    with pytest.raises(UserError, match=r"holds \.jpg and \.png images.*--to folder or parquet"):
        convert(source, tmp_path / "out", "webdataset", 6)
    assert convert(source, tmp_path / "folder", "folder") == (12, True)


def test_a_finished_conversion_is_left_as_it_is(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    convert(source, out, "folder")
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    assert convert(source, out, "folder") == (12, False)
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_shards_made_anew_are_a_source_again(tmp_path: Path, make: Make) -> None:
    convert(make(tmp_path / "d"), tmp_path / "shards", "webdataset", 5)
    convert(tmp_path / "d", tmp_path / "straight", "parquet")
    convert(tmp_path / "shards", tmp_path / "out", "parquet")
    assert content(tmp_path / "out", "parquet") == content(tmp_path / "straight", "parquet")
    with pytest.raises(UserError, match="is a conversion to parquet; expected WebDataset shards"):
        convert(tmp_path / "out", tmp_path / "again", "folder")


def test_only_one_converts_at_a_time(tmp_path: Path, make: Make) -> None:
    source, out = make(tmp_path / "d"), tmp_path / "out"
    out.mkdir()
    with hold(open_store(out)), pytest.raises(UserError, match="another process is writing"):
        convert(source, out, "folder")
    assert [p.name for p in out.iterdir()] == [".lock"]


def test_an_unfinished_or_damaged_source_is_refused(tmp_path: Path, make: Make) -> None:
    source = make(tmp_path / "d")
    (source / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        convert(source, tmp_path / "out", "folder")
    assert not (tmp_path / "out").exists()


@settings(deadline=None)  # the first call imports timm
@given(
    st.lists(
        st.one_of(st.text(max_size=5), st.from_regex(r"[a-cA-C]?[0-9]{1,3}", fullmatch=True)), max_size=30
    )
)
def test_directories_sort_as_the_labels(ids: list[str]) -> None:
    from timm.data.readers.reader_image_folder import natural_key

    names = directory_names(ids)
    assert len({name.lower() for name in names}) == len(ids)
    assert names == sorted(names) == sorted(names, key=natural_key)


def test_ids_that_sort_well_stay_as_they_are() -> None:
    assert directory_names(["n01440764", "n01443537", "n02000000"]) == ["n01440764", "n01443537", "n02000000"]
    assert directory_names(["n2", "n10"]) == ["0_n2", "1_n10"]


@settings(deadline=None)
@given(st.lists(st.text(max_size=3), max_size=10))
def test_label_names_differ(names: list[str]) -> None:
    classes = [{"name": name, "id": str(i % 2)} for i, name in enumerate(names)]
    assert len(set(unique_names(classes))) == len(names)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_a_smaller_copy_keeps_all_but_the_size(tmp_path: Path, make: Make, extension: str) -> None:
    def wide(position: int, sample: dict) -> None:
        sample["image"] = sample["image"].resize((64, 40) if position else (10, 8))

    source = make(tmp_path / "d", extension=extension, change=wide)
    convert(source, tmp_path / "out", "webdataset", short_side=20)
    assert verify(tmp_path / "out").problems == []
    before, after = open_dataset(source), open_dataset(tmp_path / "out")
    assert [s.image.size for s in after] == [(10, 8), *[(32, 20)] * 11]
    assert [s.label for s in after] == [s.label for s in before]
    assert [s.meta for s in after] == [s.meta for s in before]
    assert [e.scores for e in after.entries()] == [e.scores for e in before.entries()]
    assert after.encoded(0) == before.encoded(0)
    assert all(is_marked_synthetic(after.encoded(i)[0]) for i in range(12))
    for small, large in zip(list(after)[1:], list(before)[1:], strict=True):
        expected = np.asarray(large.image.resize((32, 20), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(np.asarray(small.image) - expected).mean() < 2
    with pytest.raises(UserError, match="another configuration"):
        convert(source, tmp_path / "out", "webdataset", short_side=21)
    with pytest.raises(UserError, match="--short-side"):
        convert(source, tmp_path / "other", "webdataset", short_side=0)


def test_fiftyone_finds_the_columns_of_parquet(tmp_path: Path, make: Callable[..., Path]) -> None:
    import pyarrow.parquet as pq
    import yaml

    out = tmp_path / "out"
    convert(make(tmp_path / "d"), out, "parquet")
    settings = yaml.safe_load((out / "fiftyone.yml").read_text())
    assert settings["format"] == "ParquetFilesDataset"
    schema = pq.read_schema(next(out.glob("*.parquet")))
    named = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert named[settings["default_media_fields"]["filepath"]]["_type"] == "Image"
    assert [named[field]["_type"] for field in settings["classification_fields"]] == ["ClassLabel"]

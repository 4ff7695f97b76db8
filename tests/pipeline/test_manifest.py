import dataclasses
import errno
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vivit.pipeline.errors import DataError, StorageError
from vivit.pipeline.manifest import Clip, Manifest

GOOD = Clip(clip_id="a", split="train", video="x.mp4", start_sec=1.0, end_sec=2.0, labels={"action": 1})
HEADS = {"action": ["run", "walk"]}

times = st.none() | st.floats(0, 1e4)
clips = st.builds(
    lambda clip_id, split, video, start, length, label: Clip(
        clip_id=clip_id,
        split=split,
        video=video,
        start_sec=start,
        end_sec=None if length is None else (start or 0.0) + length,
        labels={"action": label},
        source={"note": clip_id[::-1]},
    ),
    st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable()),
    st.sampled_from(["train", "validation", "test"]),
    st.sampled_from(["x.mp4", "y z/ü#1.mp4"]),
    times,
    st.none() | st.floats(0.01, 100),
    st.integers(-1, 1),
)


@given(st.lists(clips, max_size=20, unique_by=lambda clip: (clip.split, clip.clip_id)))
def test_a_manifest_comes_back_equal_from_parquet(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Clip]
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.parquet"
    manifest = Manifest("demo", rows, heads=HEADS, sources={"a.csv": "00"})
    manifest.write(path)
    back = Manifest.read(path)
    assert back.clips == manifest.clips
    assert (back.dataset, back.heads, back.sources) == ("demo", HEADS, {"a.csv": "00"})
    assert back.sha256 == manifest.sha256


def test_rows_are_sorted_by_split_video_and_start() -> None:
    rows = [
        dataclasses.replace(GOOD, clip_id=name, video=video, start_sec=start, end_sec=9.0)
        for name, video, start in [("1", "y", 0.0), ("2", "x", 5.0), ("3", "x", None), ("4", "x", 1.0)]
    ]
    assert [clip.clip_id for clip in Manifest("d", rows, heads=HEADS).clips] == ["3", "4", "2", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"end_sec": 1.0}, r"a \(train\): end_sec 1.0 is not after start_sec 1.0", id="end-before-start"
        ),
        pytest.param({"start_sec": -1.0}, "start_sec -1.0 is negative", id="negative"),
        pytest.param({"end_sec": float("nan")}, "must be finite", id="nan"),
        pytest.param(
            {"labels": {"action": 2}}, "label/action is 2, but there are 2 classes", id="label-too-large"
        ),
        pytest.param({"labels": {"verb": 0}}, "label/verb is 0, but there are 0 classes", id="unknown-head"),
        pytest.param({"split": "val"}, "split is 'val', not one of train, validation, test", id="split"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Manifest("d", [dataclasses.replace(GOOD, **change)], heads=HEADS)  # type: ignore[arg-type]


def test_every_bad_row_is_named_and_so_is_a_repeated_id() -> None:
    bad = dataclasses.replace(GOOD, clip_id="b", end_sec=0.5)
    with pytest.raises(
        DataError, match=r"(?s)2 bad rows.*b \(train\): end_sec.*a \(train\): the id stands 2 times"
    ):
        Manifest("d", [GOOD, GOOD, bad], heads=HEADS)


def test_the_same_id_may_stand_in_two_splits() -> None:
    assert len(Manifest("d", [GOOD, dataclasses.replace(GOOD, split="test")], heads=HEADS)) == 2


def test_labels_do_not_change_the_digest_but_times_do() -> None:
    base = Manifest("d", [GOOD], heads=HEADS).sha256
    assert Manifest("d", [dataclasses.replace(GOOD, labels={"action": 0})], heads=HEADS).sha256 == base
    assert Manifest("d", [dataclasses.replace(GOOD, end_sec=2.5)], heads=HEADS).sha256 != base


def test_a_csv_with_class_names_gets_ids_in_sorted_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "clip_id,split,video,label/action\r\n007,train,a.mp4,walk\r\n8,test,b.mp4,run\r\n9,test,c.mp4,\r\n"
    )
    manifest = Manifest.read(path)
    assert manifest.heads == {"action": ["run", "walk"]}
    assert {clip.clip_id: clip.labels["action"] for clip in manifest.clips} == {"007": 1, "8": 0, "9": -1}
    assert manifest.dataset == "mine"
    assert manifest.clips[0].end_sec is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("clip_id,video\n1,a.mp4\n", "lacks the column split", id="no-split"),
        pytest.param("clip_id,split,video\n,train,a.mp4\n", "row 1: clip_id is", id="empty-id"),
        pytest.param(
            "clip_id,split,video,start_sec\n1,train,a.mp4,now\n",
            "start_sec is 'now', not a number",
            id="time",
        ),
        pytest.param("clip_id,split,video,label/x\n1,train,a.mp4,0.5\n", "use class ids", id="float-label"),
        pytest.param("clip_id,split,video\n1,train\n", "cannot be read as a manifest", id="ragged"),
        pytest.param(
            "clip_id,split,video,label/x\n1,train,a,3000000000\n",
            "m.csv: label/x holds 3000000000, but ids without class names end at 1000000",
            id="huge-label",
        ),
        pytest.param(
            "clip_id,split,video,video\n1,train,a,b\n", "m.csv has more than one column video", id="repeated"
        ),
        pytest.param("clip_id,split,video,é\n1,train,a,b\n", "m.csv is not UTF-8", id="latin-1-header"),
        pytest.param("clip_id,split,video\n1,train,é\n", "m.csv cannot be read.*UTF8", id="latin-1-video"),
        pytest.param(
            "clip_id,split,video,x\n1,train,a,é\n", r"m.csv is not UTF-8 text \(column x", id="latin-1-x"
        ),
        pytest.param("", "m.csv cannot be read as a manifest: Empty CSV file", id="empty"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        Manifest.read(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("labels", "heads", "ids"),
    [
        pytest.param(["NA", "null", "nan"], {"x": ["NA", "nan", "null"]}, [0, 2, 1], id="names-like-null"),
        pytest.param(["", "", ""], {"x": []}, [-1, -1, -1], id="all-unknown"),
        pytest.param(["2", "", "0"], {"x": ["0", "1", "2"]}, [2, -1, 0], id="ids"),
    ],
)
def test_only_an_empty_csv_field_is_null(
    tmp_path: Path, labels: list[str], heads: dict[str, list[str]], ids: list[int]
) -> None:
    rows = "".join(f"{at},test,a.mp4,{label}\n" for at, label in enumerate(labels))
    (tmp_path / "m.csv").write_text("clip_id,split,video,label/x\n" + rows)
    manifest = Manifest.read(tmp_path / "m.csv")
    assert (manifest.heads, manifest.labels("test")["x"].tolist()) == (heads, ids)


def test_every_bad_row_of_a_file_is_named_whatever_is_wrong_with_it() -> None:
    table = pa.table(
        {
            "clip_id": ["a", "", None, "d", "e", "f"],
            "split": ["train", "train", "train", "train", "train", "val"],
            "video": ["x.mp4"] * 6,
            "start_sec": ["1", "1", "1", "soon", "1", "1"],
            "label/action": ["run", "run", "run", "run", "fly", "run"],
        }
    )
    about = vivit_metadata('{"heads": {"action": ["run"]}}')
    with pytest.raises(DataError) as caught:
        Manifest.from_table(table.replace_schema_metadata(about), name="m", default_dataset="m")
    assert str(caught.value).splitlines() == [
        "m has 5 bad rows:",
        "  row 2: clip_id is ''; every row needs one",
        "  row 3: clip_id is None; every row needs one",
        "  row 4: start_sec is 'soon', not a number of seconds",
        "  row 5: label/action is 'fly', which is not among its 1 classes",
        "  f (val): split is 'val', not one of train, validation, test",
    ]


def test_at_most_20_bad_rows_of_a_file_are_shown() -> None:
    table = pa.table({"clip_id": [""] * 30, "split": ["train"] * 30, "video": ["x.mp4"] * 30})
    with pytest.raises(DataError, match=r"(?s)30 bad rows.*row 20: .*\.\.\. and 10 more"):
        Manifest.from_table(table, name="m", default_dataset="m")


def vivit_metadata(text: str) -> dict[bytes, bytes]:
    return {b"vivit": text.encode()}


@pytest.mark.parametrize(
    "about",
    [
        pytest.param("{heads", id="not-json"),
        pytest.param("[]", id="not-an-object"),
        pytest.param('{"heads": ["action"]}', id="heads-a-list"),
        pytest.param('{"heads": {"action": "run"}}', id="names-a-string"),
        pytest.param('{"heads": {"action": [1, 2]}}', id="names-numbers"),
        pytest.param('{"dataset": 3}', id="dataset-a-number"),
        pytest.param('{"sources": {"a.csv": null}}', id="digest-null"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, about: str) -> None:
    table = Manifest("d", [GOOD], heads=HEADS).to_table().replace_schema_metadata(vivit_metadata(about))
    pa_parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"m.parquet: its metadata 'vivit' is damaged"):
        Manifest.read(tmp_path / "m.parquet")


def test_a_parquet_file_with_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    latin = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"clip_id": latin, "split": ["train"], "video": ["x.mp4"]})
    pa_parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"m.parquet is not UTF-8 text"):
        Manifest.read(tmp_path / "m.parquet")


def test_a_write_that_fails_leaves_the_old_manifest_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.parquet"
    Manifest("old", [GOOD], heads=HEADS).write(path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        Manifest("new", [GOOD], heads=HEADS).write(path)
    assert (Manifest.read(path).dataset, list(tmp_path.iterdir())) == ("old", [path])


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        Manifest.read(tmp_path / "m.parquet")
    with pytest.raises(DataError, match="does not exist"):
        Manifest.read(tmp_path / "none.parquet")


def test_the_parquet_file_has_the_documented_columns(tmp_path: Path) -> None:
    Manifest("d", [GOOD], heads=HEADS).write(tmp_path / "m.parquet")
    schema = pa_parquet.read_schema(tmp_path / "m.parquet")
    assert schema.names == ["clip_id", "split", "video", "start_sec", "end_sec", "label/action"]
    assert schema.field("start_sec").type == pa.float64()
    assert schema.field("label/action").type == pa.int32()


def test_missing_videos_are_listed_once(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").touch()
    rows = [
        dataclasses.replace(GOOD, clip_id=str(i), video=video)
        for i, video in enumerate(["x.mp4", "y.mp4", "y.mp4"])
    ]
    assert Manifest("d", rows, heads=HEADS).missing_videos(tmp_path) == ["y.mp4"]


@pytest.mark.parametrize(
    "video",
    [
        pytest.param("a\0b.mp4", id="zero-byte"),
        pytest.param("n" * 300 + ".mp4", id="name-too-long"),
        pytest.param("d/" * 4000 + "x.mp4", id="path-too-long"),
    ],
)
def test_a_path_that_no_file_can_have_is_missing(tmp_path: Path, video: str) -> None:
    rows = [dataclasses.replace(GOOD, video=video)]
    assert Manifest("d", rows, heads=HEADS).missing_videos(tmp_path) == [video]


def test_absolute_paths_and_parent_folders_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").touch()
    rows = [
        dataclasses.replace(GOOD, clip_id=video, video=video)
        for video in (str(tmp_path / "x.mp4"), "../x.mp4", "../y.mp4")
    ]
    (tmp_path / "root").mkdir()
    assert Manifest("d", rows, heads=HEADS).missing_videos(tmp_path / "root") == ["../y.mp4"]

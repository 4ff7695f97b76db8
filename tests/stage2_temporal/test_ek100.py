"""EPIC-KITCHENS-100 by its official numbers and files, on its real annotation rows."""

import csv
import io
import json
import pickle
import pickletools
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vivit.pipeline.datasets import read_dataset
from vivit.pipeline.errors import ConfigError, DataError
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.stage2_temporal.challenge_files import log_probabilities, submission_json, write_results
from vivit.stage2_temporal.ek100_metrics import ClipSubsets, official_numbers
from vivit.stage2_temporal.evaluation import Evaluation
from vivit.stage2_temporal.metrics import log_softmax
from vivit.stage2_temporal.report_options import ReportOptions
from vivit.stage2_temporal.reporting import ScoredSplit, check_clips, check_options, report

Shared = Callable[[str], Path]
ANNOTATIONS = "annotations/epic-kitchens-100"
LEVELS = {"sls_pt": 2, "sls_tl": 3, "sls_td": 4}


@pytest.fixture(scope="module")
def golden(shared: Shared) -> dict[str, Any]:
    """Scores of 400 clips, and the numbers that the official script gives them."""
    with np.load(shared("golden/ek100_metrics.npz")) as scores:
        arrays = {name: scores[name] for name in ("verb_output", "noun_output", "narration_id")}
    return {**json.loads(shared("golden/ek100_metrics.json").read_text()), **arrays}


@pytest.fixture(scope="module")
def manifest(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The real validation rows, through the file that a cache keeps."""
    folder = tmp_path_factory.mktemp("ek100")
    made, _ = read_dataset("ek100", folder, shared(ANNOTATIONS))
    made.write(folder / "m.parquet")
    return Manifest.read(folder / "m.parquet")


@pytest.fixture(scope="module")
def scored(manifest: Manifest, golden: dict[str, Any]) -> ScoredSplit:
    return scored_split(manifest, golden["narration_id"], golden["verb_output"], golden["noun_output"])


def scored_split(
    manifest: Manifest, ids: npt.NDArray[Any], verb: npt.NDArray[Any], noun: npt.NDArray[Any]
) -> ScoredSplit:
    place = {clip_id: at for at, clip_id in enumerate(ids.tolist())}
    clips = manifest.of_split("validation")
    rows = np.array([row for row, clip in enumerate(clips) if clip.clip_id in place])
    order = [place[clips[row].clip_id] for row in rows]
    found = [ClipRecord(clip_id=c.clip_id, outcome="ok" if c.clip_id in place else "missing") for c in clips]
    return ScoredSplit(
        manifest=manifest,
        split="validation",
        rows=rows,
        logits={"verb": verb[order], "noun": noun[order]},
        records=found,
        num_views=1,
    )


def reported(scored: ScoredSplit, folder: Path, **options: Any) -> Evaluation:
    about = {"run": "r", "cache": "", "cache_identity": "", "average": "logits", "epoch": 1}
    return report(scored, ReportOptions(**options), folder, **about)


def assert_official(found: Evaluation, wanted: dict[str, float], counts: dict[str, int]) -> None:
    assert found.official.keys() == wanted.keys()
    for name, value in wanted.items():
        number = found.official[name]
        assert abs(number.percent - value) < 1e-9, name
        assert number.num_clips == counts[name.split("_accuracy")[0]], name
        assert number.interval[0] <= number.percent <= number.interval[1]


def test_the_twelve_numbers_are_those_of_the_official_script(
    scored: ScoredSplit, golden: dict[str, Any], tmp_path: Path
) -> None:
    found = reported(scored, tmp_path)
    assert_official(found, golden["metrics"], golden["row_counts"])
    assert found.notes[0].startswith("9268 of 9668 clips of validation are missing: P")
    assert json.loads((tmp_path / "validation.json").read_text()) == found.to_dict()


def test_the_twelve_numbers_of_the_whole_validation_split(
    manifest: Manifest, golden: dict[str, Any], shared: Shared, tmp_path: Path
) -> None:
    with (shared(ANNOTATIONS) / "EPIC_100_validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rng, count = np.random.default_rng(100), len(rows)
    verb = 2 * rng.standard_normal((count, 97), np.float32)
    noun = 2 * rng.standard_normal((count, 300), np.float32)
    hit = np.flatnonzero(rng.random(count) < 0.4)
    for scores, column in ((verb, "verb_class"), (noun, "noun_class")):
        classes = np.array([int(row[column]) for row in rows])[hit]
        scores[hit, classes] += rng.uniform(3, 9, len(hit)).astype(np.float32)
    ids = np.array([row["narration_id"] for row in rows])
    found = reported(scored_split(manifest, ids, verb, noun), tmp_path)
    whole = golden["full_validation"]
    assert_official(found, whole["metrics"], whole["row_counts"])
    assert found.notes == []


def test_numbers_that_nothing_is_known_for_are_left_out_with_the_reason(
    scored: ScoredSplit, shared: Shared, golden: dict[str, Any], tmp_path: Path
) -> None:
    def without(clip: Clip) -> Clip:
        kept = {key: value for key, value in clip.source.items() if key == "participant_id"}
        return Clip(**{**vars(clip), "source": kept})

    old = Manifest("ek100", [without(clip) for clip in scored.manifest.clips], heads=scored.manifest.heads)
    of_old = ScoredSplit(**{**vars(scored), "manifest": old})
    found = reported(of_old, tmp_path)
    assert set(found.official) == {name for name in golden["metrics"] if name.startswith("all")}
    assert [note.split(" accuracy")[0] for note in found.notes[1:]] == [
        "unseen verb, noun, action",
        "tail verb, noun, action",
    ]
    assert "Pass --annotations FOLDER" in found.notes[1]
    again = reported(of_old, tmp_path, annotations=shared(ANNOTATIONS))
    assert_official(again, golden["metrics"], golden["row_counts"])


def test_a_group_without_clips_is_left_out_with_the_reason() -> None:
    logits = {"verb": np.eye(3), "noun": np.eye(3)}
    nobody, all_rare = np.zeros(3, bool), np.ones(3, bool)
    subsets = ClipSubsets(unseen=nobody, tail_verb=all_rare, tail_noun=nobody)
    numbers, notes = official_numbers(logits, np.arange(3), np.array([0, 1, -1]), subsets)
    assert numbers["tail_action_accuracy_at_1"].num_clips == 2
    assert numbers["tail_verb_accuracy_at_1"].num_clips == 3
    assert [note.partition(" is left out: ")[::2] for note in notes] == [
        ("unseen verb, noun, action accuracy", "no evaluated clip belongs to it"),
        ("tail noun accuracy", "no evaluated clip belongs to it"),
    ]


def test_the_submission_is_that_of_the_official_script(shared: Shared, golden: dict[str, Any]) -> None:
    wanted = json.loads(shared("golden/ek100_submission_3rows.json").read_text())
    rows = [golden["narration_id"].tolist().index(clip_id) for clip_id in wanted["results"]]
    scores = {"verb": golden["verb_output"][rows], "noun": golden["noun_output"][rows]}
    text = "".join(submission_json(list(wanted["results"]), scores, LEVELS))
    assert text == json.dumps(wanted)


def test_a_submission_holds_log_probabilities_and_is_the_same_file_each_time(
    scored: ScoredSplit, tmp_path: Path
) -> None:
    files = [tmp_path / "a" / "out.zip", tmp_path / "b" / "out.zip"]
    for file in files:
        reported(scored, tmp_path, submission=file, allow_partial=True, supervision="1,3,3")
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [file.name for file in files[0].parent.iterdir()] == ["out.zip"]
    with zipfile.ZipFile(files[0]) as archive:
        (member,) = archive.infolist()
        found = json.loads(archive.read(member))
    assert (member.filename, member.compress_type) == ("test.json", zipfile.ZIP_DEFLATED)
    assert list(found) == ["version", "challenge", "sls_pt", "sls_tl", "sls_td", "results"]
    assert [found[level] for level in LEVELS] == [1, 3, 3]
    assert list(found["results"]) == [clip.clip_id for clip in scored.clips]
    for head, logits in scored.logits.items():
        stored = np.array([list(by_head[head].values()) for by_head in found["results"].values()])
        np.testing.assert_array_equal(stored, log_softmax(logits).astype(np.float32))
        np.testing.assert_allclose(np.exp(stored).sum(axis=1), 1, rtol=1e-5)


def test_a_submission_is_written_without_holding_its_text() -> None:
    ids = [f"P01_101_{row}" for row in range(1000)]
    scores = {head: np.zeros((1000, classes), np.float32) for head, classes in (("verb", 97), ("noun", 300))}
    tracemalloc.start()
    length = sum(map(len, submission_json(ids, scores, LEVELS)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000 < length / 10


def test_scores_that_are_not_numbers_are_not_submitted() -> None:
    logits = {"verb": np.zeros((2, 97), np.float32), "noun": np.zeros((2, 300), np.float32)}
    logits["noun"][1, 5] = np.nan
    with pytest.raises(DataError, match=r"the noun scores of b .* are not finite"):
        log_probabilities(logits, ["a", "b"])


def official_loader(path: Path) -> dict[str, npt.NDArray[Any]]:
    """As C1-Action-Recognition reads results: a pickle of a dict of arrays, or of a list of dicts."""
    with path.open("rb") as file:
        results = pickle.load(file)
    if isinstance(results, list):
        results = {name: np.stack([result[name] for result in results]) for name in results[0]}
    assert isinstance(results, dict)
    return results


def official_top1(results: dict[str, npt.NDArray[Any]], labels: dict[str, tuple[int, int]]) -> list[float]:
    """Verb, noun and action top-1 as the official script gets them: one softmax over the whole matrix, in its dtype."""

    def softmax(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
        shifted = np.exp(scores - scores.max())
        return np.asarray(shifted / shifted.sum())

    wanted = np.array([labels[str(clip_id)] for clip_id in results["narration_id"]])
    verb, noun = softmax(results["verb_output"]), softmax(results["noun_output"])
    best = (verb[:, :, None] * noun[:, None, :]).reshape(len(verb), -1).argmax(axis=1)
    right = [verb.argmax(1) == wanted[:, 0], noun.argmax(1) == wanted[:, 1]]
    right.append(best == wanted[:, 0] * noun.shape[1] + wanted[:, 1])
    return [float(values.mean() * 100) for values in right]


def test_the_results_file_is_read_by_code_that_follows_the_official_loader(
    scored: ScoredSplit, golden: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "out.pkl"
    reported(scored, tmp_path, results=path, allow_partial=True)
    results = official_loader(path)
    labels = {c.clip_id: (c.labels["verb"], c.labels["noun"]) for c in scored.clips}
    wanted = [golden["metrics"][f"all_{head}_accuracy_at_1"] for head in ("verb", "noun", "action")]
    assert official_top1(results, labels) == pytest.approx(wanted, abs=1e-9)
    assert {name: (values.dtype.kind, values.shape) for name, values in results.items()} == {
        "verb_output": ("f", (400, 97)),
        "noun_output": ("f", (400, 300)),
        "narration_id": ("U", (400,)),
    }
    assert all(values.flags.writeable for values in results.values())


def test_a_results_file_calls_nothing_that_an_older_numpy_lacks(tmp_path: Path) -> None:
    scores = {"verb": np.zeros((2, 97), np.float32), "noun": np.ones((2, 300), np.float32)}
    write_results(tmp_path / "r.pkl", ["a", "bc"], scores)
    texts: list[Any] = []
    called = set()
    for opcode, argument, _ in pickletools.genops(io.BytesIO((tmp_path / "r.pkl").read_bytes())):
        if opcode.name == "STACK_GLOBAL":
            called.add(tuple(texts[-2:]))
        if isinstance(argument, str):
            texts.append(argument)
    assert called == {("numpy", "ndarray"), ("builtins", "bytearray")}


def test_clips_that_are_missing_or_unknown_are_named_and_not_submitted(
    scored: ScoredSplit, shared: Shared, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"9268 of 9668 clips of validation are missing: P.* and 9258 more"
    ) as caught:
        reported(scored, tmp_path, submission=tmp_path / "out.zip")
    assert "pass --allow-partial" in str(caught.value)
    assert not (tmp_path / "out.zip").exists()
    stranger = Clip(clip_id="P99_01_0", split="validation", video="v.mp4", labels={"verb": 1, "noun": 1})
    fewer = Manifest("ek100", [*scored.manifest.clips[:-2], stranger], heads=scored.manifest.heads)
    rows = np.arange(len(fewer))
    gone = {clip.clip_id for clip in scored.manifest.clips[-2:]}
    (said,) = check_clips(ReportOptions(), fewer, "validation", rows)
    assert "the manifest has 9667 clips of validation, and the official list 9668" in said
    missing, extra = check_clips(ReportOptions(annotations=shared(ANNOTATIONS)), fewer, "validation", rows)
    assert missing.startswith("2 of 9668 clips of validation are missing: ")
    assert set(missing.split(": ")[1].split(", ")) == gone
    assert extra == "1 clips are not in EPIC_100_validation.csv: P99_01_0"


def test_the_test_split_is_submitted_without_labels(shared: Shared, tmp_path: Path) -> None:
    for name in ("verb_classes", "noun_classes", "unseen_participant_ids_test"):
        file = shared(f"{ANNOTATIONS}/EPIC_100_{name}.csv")
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = shared(f"{ANNOTATIONS}/EPIC_100_test_timestamps.head200.csv").read_bytes()
    (tmp_path / "EPIC_100_test_timestamps.csv").write_bytes(rows)
    manifest, _ = read_dataset("ek100", tmp_path)
    clips = manifest.of_split("test")
    scored = ScoredSplit(
        manifest=manifest,
        split="test",
        rows=np.arange(200),
        logits={"verb": np.ones((200, 97), np.float32), "noun": np.ones((200, 300), np.float32)},
        records=[ClipRecord(clip_id=clip.clip_id, outcome="ok") for clip in clips],
        num_views=1,
    )
    with pytest.raises(DataError, match="has 200 clips of test, and the official list 13092"):
        reported(scored, tmp_path, submission=tmp_path / "s.zip")
    found = reported(scored, tmp_path, submission=tmp_path / "s.zip", annotations=tmp_path)
    assert (found.scores, found.official, found.notes) == ({}, {}, [])
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        ids = json.loads(archive.read("test.json"))["results"].keys()
    assert ids == {line.split(b",")[0].decode() for line in rows.splitlines()[1:]}


@pytest.mark.parametrize("option", ["submission", "results", "annotations"])
def test_options_of_ek100_are_refused_for_other_heads(option: str, tmp_path: Path) -> None:
    other = Manifest("toy", [], heads={"verb": ["a", "b"], "noun": ["c"]})
    files = {"submission": "a.zip", "results": "a.pkl", "annotations": "a"}
    given: dict[str, Any] = {option: tmp_path / files[option]}
    with pytest.raises(ConfigError, match=f"--{option} is for EPIC-KITCHENS-100 .* heads are verb 2, noun 1"):
        check_options(ReportOptions(**given), other, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"submission": Path("a.json")}, r"--submission a.json must end in \.zip"),
        ({"results": Path("a.pt")}, r"--results a.pt must end in \.pkl"),
        ({"supervision": "2,3"}, "three levels from 0 to 5"),
        ({"supervision": "2,3,6"}, "three levels from 0 to 5"),
        ({"fusion": 1.5}, r"fusion must be in \[0, 1\]"),
    ],
    ids=["zip", "pkl", "two levels", "level 6", "fusion"],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReportOptions(**options)


def test_a_folder_without_the_lists_is_refused(scored: ScoredSplit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has none of EPIC-KITCHENS-100's lists"):
        reported(scored, tmp_path, annotations=tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tail_verbs", "verb\n97\n", "97 is not a verb class: ids are 0 to 96"),
        ("tail_nouns", "noun\nfork\n", "a class id is not a whole number"),
        ("unseen_participant_ids_test", "id\nP33\n", "lacks the column participant_id: it has id"),
    ],
)
def test_a_bad_list_is_named(shared: Shared, tmp_path: Path, name: str, text: str, message: str) -> None:
    for file in shared(ANNOTATIONS).glob("EPIC_100_[vnu]*_*s.csv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    test_rows = shared(f"{ANNOTATIONS}/EPIC_100_test_timestamps.head200.csv").read_bytes()
    (tmp_path / "EPIC_100_test_timestamps.csv").write_bytes(test_rows)
    (tmp_path / f"EPIC_100_{name}.csv").write_text(text)
    with pytest.raises(DataError, match=rf"EPIC_100_{name}\.csv.*{message}"):
        read_dataset("ek100", tmp_path)

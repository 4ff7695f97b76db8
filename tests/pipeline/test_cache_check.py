import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vivit.pipeline.cache_check import CacheCheck, check_cache
from vivit.pipeline.cache_settings import Backbone, CacheSettings
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.ledger import ClipRecord
from vivit.pipeline.manifest import Clip, Manifest
from vivit.pipeline.storage import Location, location
from vivit.pipeline.views import ViewSpec

CLIPS = [
    Clip(clip_id=f"c{i:02d}", split="train" if i < 10 else "validation", video=f"{i:02d}.mp4")
    for i in range(15)
]
MANIFEST = Manifest("toy", CLIPS)
SETTINGS = CacheSettings(
    dataset="toy",
    manifest_sha256=MANIFEST.sha256,
    backbone=Backbone(name="tiny", weights="random:0", weights_sha256="00", embed_dim=6),
    views=ViewSpec(num_frames=3, train_views=2, test_clips=2, test_crops=1),
    block_size=4,
)
FAILED = 5
"""Row of each split whose clip has no features."""


def make_cache(path: Location, codec: str = "none") -> FeatureCache:
    cache = FeatureCache.create(path, MANIFEST, replace(SETTINGS, codec=codec))
    rng = np.random.default_rng(0)
    for split in cache.splits:
        features = rng.normal(size=cache.shape(split)).astype(np.float16)
        records = [ClipRecord(clip_id=clip.clip_id, outcome="ok") for clip in MANIFEST.of_split(split)]
        if len(records) > FAILED:
            features[FAILED] = 0
            records[FAILED] = replace(records[FAILED], outcome="missing")
        for block in range(cache.num_blocks(split)):
            rows = slice(*cache.rows(split, block))
            cache.commit(split, block, features[rows], records[rows])
    return cache


@pytest.fixture(params=["none", "zstd"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make_cache(tmp_path / "toy.zarr", request.param)
    return tmp_path / "toy.zarr"


def checked(path: Location) -> CacheCheck:
    return check_cache(FeatureCache.open(path, allow_partial=True), threads=2, is_shown=False)


def test_a_sound_cache_is_whole_and_counted(path: Path) -> None:
    check = checked(path)
    assert check.is_whole
    assert (check.findings, check.leftovers, check.missing) == ([], [], "")
    train = check.splits["train"]
    assert (train.clips, train.blocks, train.shards, train.without_features) == (10, 3, 6, 1)
    assert train.size_bytes == sum(p.stat().st_size for p in (path / "train").rglob("c/*/*/*/*"))


def change_byte(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def change_entry(path: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    file = path / "ledger/train/000001.json"
    entry = json.loads(file.read_bytes())
    change(entry)
    file.write_text(json.dumps(entry))


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


SHARD = "train/features/c/1/0/0/0"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-7]), [f"train block 1 view 0: {SHARD} has ", "7 fewer than"]),
    "bit of the features": (lambda p: change_byte(p / SHARD, 9), [f"{SHARD} has another sha256 than the ledger says"]),
    "bit of the index": (lambda p: change_byte(p / SHARD, -30), ["has another sha256 than the ledger says: its index is damaged"]),
    "deleted": (lambda p: (p / SHARD).unlink(), [f"{SHARD} is missing"]),
    "shards swapped": (lambda p: swap(p / SHARD, p / SHARD.replace("/1/0/0/0", "/1/1/0/0")), ["block 1 view 0", "block 1 view 1"]),
    "ledgers swapped": (
        lambda p: swap(p / "ledger/train/000000.json", p / "ledger/train/000001.json"),
        ["is about rows 4 to 8, not 0 to 4", "'c00' in place of 'c04'", "does not list train/features/c/1/0/0/0"],
    ),
    "id changed": (lambda p: change_entry(p, lambda e: e["clips"][2].update(clip_id="x")), ["'x' in place of 'c06'"]),
    "outcome changed to ok": (lambda p: change_entry(p, lambda e: e["clips"][1].update(outcome="ok")), ["nothing but zeros for a clip with features: c05 (ok)"]),
    "outcome changed to failed": (lambda p: change_entry(p, lambda e: e["clips"][0].update(outcome="timeout")), ["features for a clip without: c04 (timeout)"]),
    "clip lost": (lambda p: change_entry(p, lambda e: e["clips"].pop()), ["has 3 clips, the manifest 4"]),
    "shard not listed": (lambda p: change_entry(p, lambda e: e["shards"].pop(SHARD)), [f"does not list {SHARD}"]),
    "entry cut short": (lambda p: change_entry(p, lambda e: e.pop("clips")), ["000001.json cannot be parsed", "lacks 1 of 3 blocks"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_named(path: Path, case: str) -> None:
    damage, texts = DAMAGE[case]
    damage(path)
    check = checked(path)
    assert not check.is_whole
    said = "\n".join([*map(str, check.findings), check.missing])
    for text in texts:
        assert text in said
    blocks = {finding.block for finding in check.findings}
    assert blocks == ({0, 1} if case == "ledgers swapped" else {1})
    assert all(finding.ledger for finding in check.findings)
    assert check.splits["validation"].findings == 0


def test_a_wrong_array_description_is_found(path: Path) -> None:
    file = path / "train/features/zarr.json"
    file.write_text(file.read_text().replace("float16", "float32"))
    assert "wrong: data_type" in str(checked(path).findings[0])


def test_infinities_that_were_written_are_found(tmp_path: Path) -> None:
    path = tmp_path / "toy.zarr"
    make_cache(path)
    data = bytearray((path / SHARD).read_bytes())
    data[0:2] = b"\x00\x7c"
    (path / SHARD).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    change_entry(path, lambda e: e["shards"][SHARD].update(sha256=digest))
    assert "values that are not finite: c04 (ok)" in str(checked(path).findings[0])


def test_what_belongs_to_no_block_is_named_and_harmless(path: Path) -> None:
    (path / "ledger/train/000002.json").unlink()
    (path / "ledger/train/.000002.json.17.partial").write_text("{")
    (path / "notes.txt").write_text("mine")
    (path / ".lock").write_text("")
    check = checked(path)
    assert check.findings == []
    assert check.missing == "train lacks 1 of 3 blocks (2 of 10 clips)"
    assert [line.partition(": ")[::2] for line in check.leftovers] == [
        ("ledger/train/.000002.json.17.partial", "half of a write that was interrupted"),
        ("notes.txt", "not of this cache"),
        ("train/features/c/2/0/0/0", "of no committed block; it is written anew with its block"),
        ("train/features/c/2/1/0/0", "of no committed block; it is written anew with its block"),
    ]


def test_a_ledger_entry_of_no_block_is_a_finding(path: Path) -> None:
    (path / "ledger/train/000009.json").write_bytes((path / "ledger/train/000000.json").read_bytes())
    (finding,) = checked(path).findings
    assert finding.ledger == "ledger/train/000009.json"
    assert "is of no block: train has 3" in finding.problem


def test_a_cache_in_an_object_store_is_checked_alike() -> None:
    cache = make_cache(location("memory://check/toy.zarr"))
    check = check_cache(FeatureCache.open(cache.path), is_shown=False)
    assert (check.is_whole, check.splits["train"].shards, check.leftovers) == (True, 6, [])
    (cache.path / SHARD).write_bytes((cache.path / SHARD).read_bytes()[:-7])
    (cache.path / "train/features/c/2/1/0/0").unlink()
    check = check_cache(FeatureCache.open(cache.path, allow_partial=True), is_shown=False)
    assert {finding.block for finding in check.findings} == {1, 2}
    for finding in check.findings:
        assert finding.ledger is not None
        cache.withdraw(finding.ledger)
    assert checked(cache.path).missing == "train lacks 2 of 3 blocks (6 of 10 clips)"

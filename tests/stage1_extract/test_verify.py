import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vivit.pipeline.errors import CacheError, ConfigError, DataError, WeightsError
from vivit.pipeline.feature_cache import FeatureCache
from vivit.pipeline.manifest import Manifest
from vivit.pipeline.views import ViewSpec
from vivit.stage1_extract.config import ExtractConfig
from vivit.stage1_extract.extract import extract
from vivit.stage1_extract.verify import VerifyConfig, VerifyReport, verify

VIEWS = ViewSpec(num_frames=4, stride=3, resize=40, crop_size=32, train_views=2, test_clips=2, test_crops=1)


def config_for(root: Path, cache: Path) -> ExtractConfig:
    return ExtractConfig(
        cache=cache, data_root=root, backbone="vit_ti16", weights="random", views=VIEWS, device="cpu", batch_size=6,
        block_size=3, decode_threads=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def untouched(video_folder: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "plain.zarr"
    extract(config_for(video_folder, cache), manifest)
    return cache


@pytest.fixture
def cache(untouched: Path, tmp_path: Path) -> Path:
    shutil.copytree(untouched, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def verified(cache: Path, **options: object) -> VerifyReport:
    return verify(VerifyConfig(cache=cache, is_shown=False, device="cpu", **options))  # type: ignore[arg-type]


def without_timings(path: Path) -> bytes:
    if path.parent.parent.name != "ledger":
        return path.read_bytes()
    entry = json.loads(path.read_bytes())
    return json.dumps({**entry, "about": None}).encode()


def files_of(cache: Path) -> dict[str, bytes]:
    """All files but locks, and timings in the ledger."""
    files = (p for p in sorted(cache.rglob("*")) if p.is_file() and not p.name.startswith(".lock"))
    return {p.relative_to(cache).as_posix(): without_timings(p) for p in files}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated shard": lambda p: (p / "train/features/c/1/0/0/0").write_bytes(b"short"),
    "bit of the features": lambda p: flip(p / "train/features/c/1/1/0/0", 100),
    "bit of the index": lambda p: flip(p / "train/features/c/1/1/0/0", -20),
    "deleted shard": lambda p: (p / "train/features/c/1/0/0/0").unlink(),
    "ledger of another block": lambda p: shutil.copy(
        p / "ledger/train/000000.json", p / "ledger/train/000001.json"
    ),
    "entry of no block": lambda p: shutil.copy(
        p / "ledger/train/000000.json", p / "ledger/train/000007.json"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_and_the_same_extraction_give_the_untouched_cache(
    video_folder: Path, manifest: Manifest, untouched: Path, cache: Path, damage: str
) -> None:
    DAMAGE[damage](cache)
    found = verified(cache)
    assert found.check.findings
    assert not found.repaired
    repaired = verified(cache, repair=True)
    assert [str(f) for f in repaired.check.findings] == [str(f) for f in found.check.findings]
    assert repaired.repaired == [f"ledger/train/00000{7 if 'no block' in damage else 1}.json"]
    assert extract(config_for(video_folder, cache), manifest).blocks_done == (
        0 if "no block" in damage else 1
    )
    assert verified(cache).is_whole
    assert files_of(cache) == files_of(untouched)


def test_a_cache_in_work_is_checked_but_not_repaired(cache: Path) -> None:
    with FeatureCache.open(cache).lock():
        assert verified(cache).is_whole
        with pytest.raises(CacheError, match="is being written by another process"):
            verified(cache, repair=True)


def test_a_sample_comes_out_the_same_bit_for_bit(cache: Path, video_folder: Path) -> None:
    report = verified(cache, sample=100, data_root=video_folder)
    assert report.is_whole
    assert len(report.sample) == 11
    assert all(made.is_equal and made.must_be_equal for made in report.sample)


def test_the_choice_of_the_sample_is_the_seeds(cache: Path, video_folder: Path) -> None:
    samples = [
        [made.clip_id for made in verified(cache, sample=4, data_root=video_folder, seed=seed).sample]
        for seed in (1, 1, 2)
    ]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 4


def rewrite(cache: Path, change: Callable[[np.ndarray], np.ndarray], about: dict[str, object]) -> None:
    """Commit block 0 of the training clips once more, changed, as another machine could have made it."""
    writer = FeatureCache.open(cache)
    rows = range(*writer.rows("train", 0))
    records = [record for record in writer.records("train")[: rows.stop] if record is not None]
    features = change(writer.read("train", rows).astype(np.float32)).astype(np.float16)
    made = dict(writer.entries("train", range(2))[0].about)
    writer.commit("train", 0, features, records, made | about)


def test_a_wrong_clip_is_found_by_computing_it_anew(cache: Path, video_folder: Path) -> None:
    rewrite(cache, lambda features: features[[1, 0, 2]], {"versions": {"torch": "another"}})
    report = verified(cache, sample=100, data_root=video_folder)
    assert {finding.block for finding in report.check.findings} == {0}
    assert {made.clip_id for made in report.sample if made.problem} == {"train/a/clip0", "train/a/clip2"}
    assert "at least 0.9999 is asked for" in str(report.check.findings[0])


def test_last_bits_may_differ_on_another_machine_only(cache: Path, video_folder: Path) -> None:
    rewrite(cache, lambda features: features * 1.001, {"processor": "another"})
    report = verified(cache, sample=100, data_root=video_folder)
    assert report.is_whole
    assert sum(not made.is_equal for made in report.sample) == 3
    rewrite(cache, lambda features: features, {"processor": verified_processor(cache)})
    report = verified(cache, sample=100, data_root=video_folder)
    assert "the same machine and versions must give the same bits" in str(report.check.findings[0])


def verified_processor(cache: Path) -> object:
    return FeatureCache.open(cache).entries("train", range(2))[1].about["processor"]


def test_a_video_that_is_gone_or_another_is_no_proof(
    cache: Path, video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    root = tmp_path / "videos"
    shutil.copytree(video_folder, root)
    gone, other = (manifest.of_split("train")[row].video for row in (0, 1))
    (root / gone).unlink()
    shutil.copy(root / manifest.of_split("train")[5].video, root / other)
    report = verified(cache, sample=100, data_root=root)
    assert [made.unread.split(":")[0] for made in report.sample if made.unread] == ["missing"]
    assert ["frames now, the ledger says" in finding.problem for finding in report.check.findings] == [True]


def test_a_sample_needs_videos_and_the_right_weights(
    cache: Path, video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="Pass --data-root"):
        verified(cache, sample=1)
    with pytest.raises(DataError, match="none of the 11 videos is below"):
        verified(cache, sample=1, data_root=tmp_path)
    with pytest.raises(WeightsError, match=r"do not exist|does not exist"):
        verified(cache, sample=1, data_root=video_folder, weights="gone.pth")
    with pytest.raises(ConfigError, match="sample must be at least 0"):
        VerifyConfig(cache=cache, sample=-1)


def test_other_weights_are_refused(cache: Path, video_folder: Path, tmp_path: Path) -> None:
    import safetensors.torch

    from vivit.pipeline.backbones import load_backbone

    state = load_backbone("vit_ti16", weights="random", crop_size=32).model.state_dict()
    state["norm.bias"] += 1
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"is not the encoder that made .*backbone.weights_sha256"):
        verified(cache, sample=1, data_root=video_folder, weights=str(tmp_path / "other.safetensors"))


def test_the_file_of_the_weights_is_found_again(
    video_folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    import safetensors.torch

    from vivit.pipeline.backbones import load_backbone

    state = load_backbone("vit_ti16", weights="random", crop_size=32).model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "mine.safetensors")
    few = Manifest("few", manifest.of_split("train")[:1], heads=manifest.heads)
    config = replace(
        config_for(video_folder, tmp_path / "c.zarr"), weights=str(tmp_path / "mine.safetensors")
    )
    extract(config, few)
    report = verified(tmp_path / "c.zarr", sample=1, data_root=video_folder)
    assert [made.is_equal for made in report.sample] == [True]


def test_a_block_of_two_machines_is_not_held_to_the_bits_of_one(
    cache: Path, manifest: Manifest, video_folder: Path
) -> None:
    """Clips that were tried again elsewhere do not vouch for the machine of the others."""
    entry = cache / "ledger" / "train" / "000000.json"
    values = json.loads(entry.read_bytes())
    values["about"]["processor"] = "another"
    values["clips"][0] |= {"outcome": "missing"}
    entry.write_text(json.dumps(values))
    extract(replace(config_for(video_folder, cache), retry_failed=True), manifest)
    about = json.loads(entry.read_bytes())["about"]
    assert "processor" not in about
    assert about["device"] == "cpu"

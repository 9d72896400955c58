"""The feature cache: nothing is encoded twice, nothing stale is used."""

import json
import shutil

import pytest
import torch

from vjepa_qwen import EventSegmenter, VJepaQwenProcessor
from vjepa_qwen.training.feature_cache import FeatureCache, encode, fingerprint

from conftest import make_model  # isort: skip


@pytest.fixture
def samples(clips):
    return [{"name": f"row {index}", "videos": [clip]} for index, clip in enumerate(clips)]


@pytest.fixture
def processor(processor, model):
    return processor.bind(model)


def test_the_cache_holds_what_segment_finds(processor, samples, tmp_path):
    assert encode(samples, tmp_path, processor) == 3
    cache = FeatureCache(tmp_path, processor)
    cache.check(samples)
    for sample in samples:
        found, cached = processor.segment(sample["videos"])[0], cache[sample["videos"][0]]
        assert torch.equal(cached["frame_features"], found.frame_features)
        assert torch.equal(cached["frame_event_ids"], found.frame_event_ids)
        assert cached["timestamps"].tolist() == found.timestamps.tolist()


def test_encoding_goes_on_where_it_stopped(processor, samples, tmp_path, monkeypatch):
    segment, seen = processor.segment, []

    def stop_at_the_third(video):
        seen.append(video)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return segment(video)

    monkeypatch.setattr(processor, "segment", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode(samples, tmp_path, processor, videos_per_shard=1)
    (tmp_path / "half.partial").write_bytes(b"written when the machine went down")
    assert encode(samples, tmp_path, processor, videos_per_shard=1) == 1
    assert seen[2] == seen[3] and len(seen) == 4
    FeatureCache(tmp_path, processor).check(samples)
    assert encode(samples, tmp_path, processor) == 0


def test_the_same_video_twice_is_encoded_once_and_may_be_moved(processor, samples, clips, tmp_path):
    moved = str(shutil.copy(clips[0], tmp_path / "moved.mp4"))
    assert encode([*samples, *samples], tmp_path / "cache", processor) == 3
    cache = FeatureCache(tmp_path / "cache", processor)
    assert torch.equal(cache[moved]["frame_features"], cache[clips[0]]["frame_features"])
    with open(clips[0], "rb") as file:
        assert torch.equal(cache[file.read()]["frame_features"], cache[clips[0]]["frame_features"])


def test_a_video_that_was_exchanged_is_missed_by_name(processor, clips, tmp_path):
    path = shutil.copy(clips[0], tmp_path / "clip.mp4")
    samples = [{"name": "row", "videos": [str(path)]}]
    encode(samples, tmp_path / "cache", processor)
    shutil.copy(clips[1], path)
    cache = FeatureCache(tmp_path / "cache", processor)
    with pytest.raises(ValueError, match="1 videos are not in the cache .*clip.mp4"):
        cache.check(samples)
    with pytest.raises(ValueError, match="clip.mp4 is not in the cache"):
        cache[str(path)]


def change_tower(processor, tokenizer):
    processor.bind(make_model(tokenizer, seed=1))


def change_segmentation(processor, tokenizer):
    processor.segmenter = EventSegmenter(**{**vars(processor.segmenter), "min_events": 3})


def change_frames(processor, tokenizer):
    processor.video_processor.image_mean = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_tower, "vision_tower"),
        (change_segmentation, "event_segmentation"),
        (change_frames, "video_processor"),
    ],
)
def test_a_stale_cache_is_refused_by_name(processor, tokenizer, samples, tmp_path, change, name):
    encode(samples, tmp_path, processor)
    change(processor, tokenizer)
    for use in (lambda: FeatureCache(tmp_path, processor), lambda: encode(samples, tmp_path, processor)):
        with pytest.raises(ValueError, match=rf"feature cache \({tmp_path}\) is stale: {name} changed"):
            use()


def test_a_folder_that_is_no_cache_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="must hold cache.json"):
        FeatureCache(tmp_path, processor)


def test_fingerprint_is_the_same_in_every_form_of_the_same_processor(processor, tiny_checkpoint):
    loaded = VJepaQwenProcessor.from_pretrained(tiny_checkpoint)
    assert fingerprint(loaded) == fingerprint(processor) == json.loads(json.dumps(fingerprint(processor)))

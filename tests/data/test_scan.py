"""What `tworeel check` finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from media_files import encode_video
from PIL import Image

from tworeel.config.schema import DataConfig
from tworeel.data.buckets import usable_lengths
from tworeel.data.scan import scan
from tworeel.demo.clips import write_clips
from tworeel.errors import UserError
from tworeel.models.family import Traits
from tworeel.workers import SilentObserver

MakeConfig = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_clips(folder)
    return folder


@pytest.fixture
def dataset(tmp_path: Path, good_video: Path) -> Path:
    """Two good clips, a damaged one, and one without a caption."""
    for name in ("a", "b", "cut"):
        shutil.copy(good_video, tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    data = good_video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    shutil.copy(good_video, tmp_path / "silent.mp4")
    return tmp_path


class Counting(SilentObserver):
    """Counts what it sees."""

    total = done = 0

    def start(self, title: str, total: int) -> None:
        self.total = total

    def advance(self) -> None:
        self.done += 1


def test_a_good_dataset_becomes_clips_in_order(demo: Path, data_config: MakeConfig, traits: Traits) -> None:
    watched = Counting()
    found = scan(data_config(demo), traits, observer=watched)
    found.raise_problems()
    assert [clip.name for clip in found.clips] == [*(f"0/clip_{k}.mp4" for k in range(6)), "0/image.png"]
    assert (watched.total, watched.done) == (7, 7)
    assert all(len(clip.frame_indices) == clip.bucket.frames for clip in found.clips)
    assert found.clips[-1].bucket.frames == 1
    assert {clip.bucket.frames for clip in found.clips[:-1]} == {17}
    assert scan(data_config(demo), traits).clips == found.clips


def test_all_problems_are_found_in_one_pass(dataset: Path, data_config: MakeConfig, traits: Traits) -> None:
    found = scan(data_config(dataset, dataset / "nowhere", frames=(1, 16)), traits)
    with pytest.raises(UserError) as error:
        found.raise_problems()
    text = str(error.value)
    assert all(word in text for word in ("cut.mp4", "silent.mp4", "nowhere", "16 is not 4k+1"))
    assert len(error.value.problems) == 4


def test_broken_clips_are_left_out_on_request_and_never_replaced(
    dataset: Path, data_config: MakeConfig, traits: Traits
) -> None:
    found = scan(data_config(dataset, skip_broken=True), traits)
    found.raise_problems()
    assert [clip.path.name for clip in found.clips] == ["a.mp4", "b.mp4"]
    assert len(found.skipped) == 2


def test_skipping_does_not_hide_what_is_wrong_with_the_dataset_itself(
    dataset: Path, data_config: MakeConfig, traits: Traits
) -> None:
    assert len(scan(data_config(dataset, dataset / "nowhere", skip_broken=True), traits).problems) == 1


def test_nothing_usable_is_an_error_that_says_why(
    tmp_path: Path, data_config: MakeConfig, traits: Traits
) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError) as error:
        scan(data_config(tmp_path, skip_broken=True), traits)
    assert "is empty" in str(error.value) and "nothing is left" in str(error.value)


def test_a_clip_that_is_too_short_says_found_resampled_and_allowed(
    tmp_path: Path, data_config: MakeConfig, traits: Traits
) -> None:
    encode_video(tmp_path / "one.mp4", frames=1)
    encode_video(tmp_path / "fast.mp4", frames=90, rate=60, size=(32, 32))
    for name in ("one", "fast"):
        (tmp_path / f"{name}.txt").write_text("x")
    with pytest.raises(UserError) as error:
        scan(data_config(tmp_path, frames=(81,)), traits)
    fast, one = error.value.problems[:2]
    assert "90 frames at 60 a second are 24 at 16 a second" in fast and "allowed (data.frames): 81" in fast
    assert "1 frames" in one and "are 1 at 16" in one


def test_windows_have_names_of_their_own(demo: Path, data_config: MakeConfig, traits: Traits) -> None:
    found = scan(data_config(demo, clip_rule="windows", windows=2, frames=(5,)), traits)
    names = [clip.name for clip in found.clips]
    assert names[:2] == ["0/clip_0.mp4#0", "0/clip_0.mp4#1"] and len(set(names)) == len(names)


def test_unused_parts_are_told(demo: Path, data_config: MakeConfig, traits: Traits) -> None:
    first = scan(data_config(demo), traits).truncated[0]
    assert (first.name, first.available, first.bucket.frames) == ("0/clip_0.mp4", 24, 17)
    assert not scan(data_config(demo, clip_rule="uniform"), traits).truncated


def test_the_configured_frame_rate_replaces_the_models(
    demo: Path, data_config: MakeConfig, traits: Traits
) -> None:
    clip = scan(data_config(demo, frame_rate=8.0), traits).clips[0]
    assert clip.frame_indices == tuple(range(0, 18, 2))


def test_several_datasets_keep_their_index_and_repeated_files_their_own_name(
    dataset: Path, data_config: MakeConfig, traits: Traits
) -> None:
    table = dataset / "meta.csv"
    table.write_text("path,caption\na.mp4,one\na.mp4,two\n")
    found = scan(data_config(table, table), traits)
    assert [clip.name for clip in found.clips] == ["0/a.mp4", "0/a.mp4~2", "1/a.mp4", "1/a.mp4~2"]
    assert [clip.source for clip in found.clips] == [0, 0, 1, 1]


@pytest.fixture
def conditioned(dataset: Path) -> Path:
    Image.new("RGB", (64, 48), "red").save(dataset / "first.png")
    (dataset / "bad.png").write_text("no image")
    images = {"a.mp4": "first.png", "b.mp4": "bad.png"}
    lines = [{"path": path, "caption": "x", "first_image": image} for path, image in images.items()]
    table = dataset / "meta.jsonl"
    table.write_text("\n".join(json.dumps(line) for line in lines))
    return table


def test_condition_images_are_checked_where_the_model_takes_them(
    conditioned: Path, data_config: MakeConfig, traits: Traits
) -> None:
    found = scan(data_config(conditioned), traits)
    assert [clip.images["first_image"].name for clip in found.clips] == ["first.png"]
    assert len(found.problems) == 1 and "bad.png" in found.problems[0]
    found = scan(data_config(conditioned), replace(traits, image_inputs=()))
    assert not found.problems and all(not clip.images for clip in found.clips)


def test_only_the_window_at_the_head_takes_the_first_image(
    conditioned: Path, data_config: MakeConfig, traits: Traits
) -> None:
    found = scan(data_config(conditioned, clip_rule="windows", frames=(9,), skip_broken=True), traits)
    assert [sorted(clip.images) for clip in found.clips] == [["first_image"], []]


def test_an_image_dataset_is_fine_for_a_model_that_can_do_without_an_image(
    tmp_path: Path, data_config: MakeConfig, traits: Traits
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    [clip] = scan(data_config(tmp_path, frames=(81,)), traits).clips
    assert clip.bucket.frames == 1 and clip.frame_indices == (0,)


def test_what_an_image_to_video_model_would_be_given_whole_is_refused(
    demo: Path, data_config: MakeConfig, traits: Traits
) -> None:
    """It would be shown what it has to make, and learn to copy it."""
    needs_image = replace(traits, variant="wan2.2-i2v-a14b", image_optional=False)
    found = scan(data_config(demo), needs_image)
    [problem] = found.problems
    assert problem.startswith(f"{demo / 'image.png'}: an image, but wan2.2-i2v-a14b is trained on clips")
    assert len(found.clips) == 6 and all(clip.bucket.frames > 1 for clip in found.clips)
    assert usable_lengths((1, 17), needs_image) == (17,)


def test_clips_of_slower_videos_are_those_that_repeat_frames(
    tmp_path: Path, data_config: MakeConfig, traits: Traits
) -> None:
    for rate in (8, 16, 24):
        encode_video(tmp_path / f"at_{rate:02}.mp4", frames=2 * rate, rate=rate)
        (tmp_path / f"at_{rate:02}.txt").write_text("x")
    found = scan(data_config(tmp_path), traits)
    assert [clip.path.name for clip in found.repeating] == ["at_08.mp4"]


def test_an_observer_that_raises_stops_the_scan(demo: Path, data_config: MakeConfig, traits: Traits) -> None:
    class Stopping(SilentObserver):
        def advance(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(data_config(demo), traits, observer=Stopping())

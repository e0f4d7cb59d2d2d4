"""What is kept on disk: whole or not there, found again only where nothing changed, and equal to what it stands for."""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from generation.data import CheckedData, check_data
from generation.training.cache import TensorStore, content_key
from generation.training.encoding import LatentEncoder, PromptEncoder
from generation.training.training_set import EncodedSet, SampleOptions, samples_of
from mmalign.errors import InputError

KEY = "ab" * 32
CPU = torch.device("cpu")


class Counting:
    """An encoder that writes down what it is asked, and fails at a given call."""

    def __init__(self, encoder: Any, fail_at: int | None = None) -> None:
        self._encoder, self.fail_at, self.calls = encoder, fail_at, []  # type: ignore[var-annotated]
        self.fingerprint = encoder.fingerprint

    def encode(self, *arguments: Any) -> Any:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(arguments)
        return self._encoder.encode(*arguments)


Build = Callable[..., tuple[EncodedSet, Counting, Counting]]


@pytest.fixture
def build(checked_pairs: CheckedData, latent_encoder: LatentEncoder, prompt_encoder: PromptEncoder) -> Build:
    """A set of the pairs at 64 px with encoders that count."""

    def make(
        store: Path | None,
        checked: CheckedData = checked_pairs,
        *,
        resolution: int = 64,
        unit: str = "pairs",
        buckets: bool = False,
        latents: Any = None,
        prompts: Any = None,
        fail_at: int | None = None,
        **options: Any,
    ) -> tuple[EncodedSet, Counting, Counting]:
        samples = samples_of(checked.examples, resolution, unit=unit, buckets=buckets)
        images, texts = Counting(latents or latent_encoder, fail_at), Counting(prompts or prompt_encoder)
        chosen = SampleOptions(seed=0, num_train_timesteps=1000, **options)
        return EncodedSet(checked, samples, chosen, images, texts, store), images, texts  # type: ignore[arg-type]

    return make


def fill(made: tuple[EncodedSet, Counting, Counting], **arguments: Any) -> tuple[int, int]:
    """Encode what is missing; how many images and captions that were."""
    made[0].encode_all(workers=1, progress=False, **arguments)
    return len(made[1].calls), len(made[2].calls)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_read_is_what_writing_returned(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    value = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    assert KEY not in store
    written = store.write(KEY, {"latent": value}, torch.float16, "row 1")
    assert KEY in store
    assert torch.equal(store.read(KEY)["latent"], written["latent"])
    assert torch.equal(written["latent"], value.half())
    (made,) = files(tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    assert made.stat().st_mode & 0o777 == 0o666 & ~umask  # others may share the cache


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "zeros", "list", "number", "nested", "huge", "gone"])
def test_a_damaged_file_is_not_there(tmp_path: Path, damage: str) -> None:
    store = TensorStore(tmp_path)
    store.write(KEY, {"latent": torch.ones(4, 8, 8)}, torch.float32, "row 1")
    (path,) = files(tmp_path)
    whole = path.read_bytes()

    def framed(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header

    content = {
        "cut": whole[:-1],
        "longer": whole + b"x",
        "empty": b"",
        "zeros": bytes(len(whole)),
        "list": framed(b"[1, 2] "),
        "number": framed(b'{"a": 1}'),
        "nested": framed(b"[" * 60_000),
        "huge": (2**62).to_bytes(8, "little") + whole[8:],
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    assert KEY not in store
    with pytest.raises(InputError, match="run the same command again") as caught:
        store.read(KEY)
    assert "\n" not in str(caught.value)
    store.write(KEY, {"latent": torch.ones(4, 8, 8)}, torch.float32, "row 1")
    assert path.read_bytes() == whole
    assert KEY in store


def test_no_part_of_a_file_is_ever_seen_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TensorStore(tmp_path)
    seen = []

    def interrupted(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        seen.append(KEY in store)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.write(KEY, {"latent": torch.ones(100)}, torch.float32, "row 1")
    assert seen == [False]
    assert KEY not in store
    assert files(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.write(KEY, {"latent": torch.ones(10)}, torch.float32, "row 1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written .*make room .* or set cache_dir") as caught:
            store.write("cd" * 32, {"latent": torch.ones(100_000)}, torch.float32, "row 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert KEY in store
    assert len(files(tmp_path)) == 1


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be written .*cache_dir"):
        TensorStore(tmp_path / "cache").write(KEY, {"latent": torch.ones(1)}, torch.float32, "row 1")


def test_every_named_value_changes_a_key() -> None:
    keys = {content_key(**parts) for parts in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": None}, {"a": [1, 2]})}
    assert len(keys) == 6
    assert content_key(a=1, b=(1, 2)) == content_key(b=(1, 2), a=1)


def test_a_value_too_large_for_the_dtype_is_refused_by_name(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    large = {"latent": torch.tensor([1.0, 70_000.0])}
    with pytest.raises(InputError, match=r"^metadata.jsonl line 3: latent is not finite in float16"):
        store.write(KEY, large, torch.float16, "metadata.jsonl line 3")
    assert KEY not in store
    store.write(KEY, large, torch.float32, "metadata.jsonl line 3")
    assert KEY in store


def test_a_vae_that_fails_on_one_image_names_its_row(
    build: Build, latent_encoder: LatentEncoder, tmp_path: Path
) -> None:
    class Overflowing:
        fingerprint = latent_encoder.fingerprint

        def encode(self, image: Tensor, key: str) -> Tensor:
            latent = latent_encoder.encode(image, key)
            Overflowing.calls += 1
            return latent * float("nan") if Overflowing.calls == 6 else latent

        calls = 0

    with pytest.raises(InputError, match=r"^metadata.jsonl line 3: latent is not finite"):
        fill(build(tmp_path, latents=Overflowing()))
    assert len(files(tmp_path)) == 5
    Overflowing.calls = 5
    with pytest.raises(InputError, match=r"^metadata.jsonl line 1: latent is not finite"):
        build(None, latents=Overflowing())[0].assemble([0], [0])


def test_a_second_filling_encodes_nothing(build: Build, tmp_path: Path) -> None:
    assert fill(build(tmp_path)) == (16, 9)  # and the unconditional embedding
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert fill(build(tmp_path)) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == before
    assert fill(build(None)) == (0, 0)


def test_an_interrupted_filling_goes_on_where_it_stopped(build: Build, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(build(tmp_path, fail_at=11))
    assert len(files(tmp_path)) == 11
    (lost, cut, *_) = files(tmp_path)
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-3])
    assert fill(build(tmp_path)) == (7, 9)
    assert fill(build(tmp_path)) == (0, 0)


def test_processes_share_the_work_without_overlap(build: Build, tmp_path: Path) -> None:
    parts = [fill(build(tmp_path), part=(number, 3)) for number in range(3)]
    assert [sum(column) for column in zip(*parts, strict=True)] == [16, 9]
    assert max(images for images, _ in parts) < 16
    assert fill(build(tmp_path)) == (0, 0)


@pytest.mark.parametrize(
    ("change", "images", "texts"),
    [
        ({"resolution": 72}, 16, 0),
        ({"buckets": True, "resolution": 128}, 16, 0),
        ({"random_flip": True}, 16, 0),
        ({"dtype": torch.float32}, 16, 9),
        ({"latents": "other"}, 16, 0),
        ({"prompts": "other"}, 0, 9),
        ({"unit": "winners"}, 4, 0),  # those that had been stretched to image 0's shape
        ({"caption_dropout": 0.5, "max_pixels": 10**6}, 0, 0),
    ],
)
def test_what_changes_a_tensor_changes_its_key(
    build: Build, tmp_path: Path, tiny_sdxl: Any, change: dict[str, Any], images: int, texts: int
) -> None:
    fill(build(tmp_path))
    change = dict(change)
    if "latents" in change:
        vae = copy.deepcopy(tiny_sdxl.vae)
        vae.register_to_config(scaling_factor=0.5)
        change["latents"] = LatentEncoder(vae, CPU)
    if "prompts" in change:
        encoder = copy.deepcopy(tiny_sdxl.text_encoder_2)
        next(encoder.parameters()).data[0, 0] += 0.1
        parts = {**tiny_sdxl.components, "text_encoder_2": encoder}
        change["prompts"] = PromptEncoder(type(tiny_sdxl)(**parts), CPU)
    made = build(tmp_path, **change)
    assert fill(made) == (images, texts)


def test_the_same_image_at_another_crop_is_another_latent(photo_pairs: Path, build: Build, tmp_path: Path) -> None:
    """One image as image 1 of rows whose images 0 have other shapes, and once more in the same shape."""
    rows = [json.loads(line) for line in (photo_pairs / "metadata.jsonl").read_text().splitlines()]
    folder = tmp_path / "data"
    shutil.copytree(photo_pairs, folder)
    lines = [{**rows[i], "jpg_1": "5-1.png"} for i in (0, 1, 4)]  # rows 0 and 4 have one shape
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    checked = check_data(folder, progress=False)
    made = build(tmp_path / "cache", checked)
    shapes = {sample.placement for sample in made[0].samples}
    assert len(shapes) == 2
    assert fill(made) == (3 + 2, 4)


def test_whatever_of_the_geometry_changes_pixels_makes_another_latent(build: Build, tmp_path: Path) -> None:
    data, images, _ = build(tmp_path)
    first = data.samples[0]
    assert first.placement.resized == (64, 85)
    assert first.placement.crop_top_left == (0, 10)
    changes = ({"resized": (64, 84)}, {"target": (64, 56)}, {"crop_top_left": (0, 11)}, {"original": (240, 320)})
    for change in changes:
        data.samples.append(replace(first, placement=replace(first.placement, **change)))
    data.encode_all(workers=1, progress=False)
    assert len(images.calls) == 16 + 3 * 2  # the original size is told to the model, it makes no other latent


def test_equal_images_and_captions_are_encoded_once(photo_pairs: Path, build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, source in {"a": "0-0", "b": "0-1", "copy-of-a": "0-0", "c": "4-0"}.items():
        shutil.copy(photo_pairs / f"{source}.png", folder / f"{name}.png")
    lines = [
        {"winner": "a.png", "loser": "b.png", "caption": "one"},
        {"winner": "copy-of-a.png", "loser": "c.png", "caption": "one"},
        {"winner": "c.png", "loser": "b.png", "caption": "two"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    checked = check_data(folder, progress=False)
    assert len(checked.examples) == 3
    made = build(tmp_path / "cache", checked)
    assert fill(made) == (3, 3)  # a, b, c; one, two, unconditional
    assert len(files(tmp_path / "cache")) == 6
    batch = made[0].assemble([0, 1], [0, 1])
    assert torch.equal(batch.latents[0], batch.latents[1])


def test_an_image_that_changed_since_the_check_is_refused(photo_pairs: Path, build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(photo_pairs, folder)
    checked = check_data(folder, progress=False)
    with Image.open(folder / "2-0.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(folder / "2-0.png")
    with pytest.raises(InputError, match=r"metadata.jsonl line 3 has changed since it was checked"):
        fill(build(tmp_path / "cache", checked))
    with pytest.raises(InputError, match=r"metadata.jsonl line 3 has changed since it was checked"):
        build(None, checked)[0].assemble([2], [0])


@pytest.mark.parametrize(
    ("unit", "options"),
    [
        ("pairs", {}),
        ("pairs", {"random_flip": True, "caption_dropout": 0.5}),
        ("pairs", {"buckets": True, "resolution": 128, "dtype": torch.float32}),
        ("winners", {"random_flip": True, "buckets": True, "resolution": 96}),
        ("images", {"caption_dropout": 0.5}),
    ],
)
def test_cached_batches_equal_uncached_ones_bit_for_bit(
    build: Build, tmp_path: Path, unit: str, options: dict[str, Any]
) -> None:
    cached, fresh = build(tmp_path, unit=unit, **options), build(None, unit=unit, **options)
    fill(cached)
    encoded = len(cached[1].calls), len(cached[2].calls)
    for indices, ordinals in one_canvas_each(cached[0]):
        one, other = (made[0].assemble(indices, ordinals) for made in (cached, fresh))
        assert one.names == other.names
        for name in ("latents", "noise", "timesteps", "rewards"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        for name in ("prompt_embeds", "pooled_prompt_embeds", "time_ids"):
            assert torch.equal(getattr(one.conditioning, name), getattr(other.conditioning, name)), name
    assert (len(cached[1].calls), len(cached[2].calls)) == encoded
    assert len(fresh[1].calls) > 0


def one_canvas_each(data: EncodedSet) -> list[tuple[Sequence[int], Sequence[int]]]:
    by_canvas: dict[tuple[int, int], list[int]] = {}
    for number, sample in enumerate(data.samples):
        by_canvas.setdefault(sample.placement.target, []).append(number)
    return [(indices, [100 * n + i for i in indices]) for n, indices in enumerate(by_canvas.values())]

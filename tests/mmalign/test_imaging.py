"""Decoding and preprocessing against Pillow, open_clip and timm, which are the encoders' own pipelines."""

from __future__ import annotations

import hashlib
import io
import json
import math
import resource
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageFile
from timm.data import create_transform
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from mmalign.errors import InputError
from mmalign.imaging import FLAGS, FileContent, ImagePreprocessing, read_file, read_image

PHOTOS = sorted((Path(__file__).parents[1] / "data" / "photos").glob("*.jpg"))
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
NORMALISE = {"mean": MEAN, "std": STD}
ONE_LEVEL = 1 / 255 / min(STD) + 1e-5


@pytest.fixture(scope="module")
def photos() -> list[tuple[torch.Tensor, Image.Image]]:
    """A dozen photos as we read them, and as Pillow does."""
    return [(read_image(path).pixels, Image.open(path).convert("RGB")) for path in PHOTOS[:12]]


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


# --- Decoding


def test_photos_equal_pillows_full_decode() -> None:
    assert len(PHOTOS) >= 12
    for path in PHOTOS:
        decoded = read_image(path)
        reference = as_tensor(np.asarray(Image.open(path).convert("RGB")))
        assert decoded.pixels.shape == reference.shape
        assert (decoded.pixels.int() - reference.int()).abs().max() <= 1
        assert decoded.format == "JPEG"
        assert set(decoded.flags) <= {"grayscale"}


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 40}])
def test_kinds_of_jpeg_equal_pillow(options: dict[str, object]) -> None:
    image = Image.open(PHOTOS[0]).convert("RGB").crop((0, 0, 121, 83))
    data = encode(image, "JPEG", **options)
    reference = as_tensor(np.asarray(Image.open(io.BytesIO(data))))
    assert (read_image(data).pixels.int() - reference.int()).abs().max() <= 1


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    array = noise(20, 30)
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    content, stat = read_file(path), path.stat()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert content == FileContent(path.read_bytes(), stat.st_size, stat.st_mtime_ns, sha256, repr(str(path)))
    unit = array.astype(np.float32) / 255
    for source in (
        path, str(path), content, content.data, Image.open(path), array, unit, unit.astype(np.float64),
        array.astype(np.uint16) * 257, as_tensor(array), as_tensor(unit), as_tensor(unit).requires_grad_(),
    ):  # fmt: skip
        decoded = read_image(source)
        assert torch.equal(decoded.pixels, as_tensor(array))
        assert (decoded.height, decoded.width) == (20, 30)
    assert np.array_equal(np.asarray(read_image(path).to_pil()), array)


def test_arrays_with_alpha_or_one_channel() -> None:
    array = noise(5, 7)
    alpha = np.zeros((5, 7, 1), np.uint8)
    alpha[:, :3] = 255
    decoded = read_image(np.concatenate([array, alpha], axis=2), background=(10, 20, 30))
    assert torch.equal(decoded.pixels[:, :, :3], as_tensor(array)[:, :, :3])
    assert decoded.pixels[:, 2, 5].tolist() == [10, 20, 30]
    assert decoded.flags == ("alpha",)
    gray = read_image(array[..., 0])
    assert torch.equal(gray.pixels, as_tensor(array[..., :1]).expand(3, 5, 7))
    assert gray.flags == ("grayscale",)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 2), np.uint8), np.zeros((3, 4), np.int32), np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8), np.full((4, 4, 3), np.nan), np.full((4, 4, 3), 1.5),
        np.full((4, 4), -0.1),
        np.zeros((4, 4), bool), np.zeros((4, 4, 3), complex), np.full((4, 4), np.inf),
        torch.zeros(4, 4, 3), torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.int64),
        torch.full((3, 4, 4), 255.0), torch.full((3, 4, 4), torch.nan), torch.zeros(3, 0, 4),
    ],
    ids=lambda source: f"{tuple(source.shape)}-{source.dtype}",
)  # fmt: skip
def test_unusable_arrays_are_named(source: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(InputError) as caught:
        read_image(source)
    assert str(tuple(source.shape)) in str(caught.value)
    assert str(source.dtype) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (None, {}), (3, {}), (["a.jpg"], {}),
        (noise(4, 4), {"background": (0, 0)}), (noise(4, 4), {"background": (0, 0, 256)}),
        (noise(4, 4), {"max_pixels": 0}), (noise(4, 4), {"fast_decode": (0, 5)}),
    ],
)  # fmt: skip
def test_unusable_arguments(source: object, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        read_image(source, **options)  # type: ignore[arg-type]


# What each EXIF orientation says about the stored pixel (row, column) of an upright image of height x width.
UPRIGHT_POSITION = {
    1: lambda r, c, h, w: (r, c),
    2: lambda r, c, h, w: (r, w - 1 - c),
    3: lambda r, c, h, w: (h - 1 - r, w - 1 - c),
    4: lambda r, c, h, w: (h - 1 - r, c),
    5: lambda r, c, h, w: (c, r),
    6: lambda r, c, h, w: (c, w - 1 - r),
    7: lambda r, c, h, w: (h - 1 - c, w - 1 - r),
    8: lambda r, c, h, w: (h - 1 - c, r),
}


@pytest.mark.parametrize("image_format", ["JPEG", "JPEG-gray", "PNG", "WEBP", "TIFF", "TIFF-lzw", "PIL"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(image_format: str, orientation: int) -> None:
    colours = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10], [0, 0, 0], [255, 255, 255]])
    if image_format == "JPEG-gray":
        colours = np.repeat(np.array([0, 50, 100, 150, 200, 250])[:, None], 3, axis=1)
    upright = np.kron(colours.reshape(2, 3, 3), np.ones((16, 16, 1))).astype(np.uint8)
    height, width = upright.shape[:2]
    shape = (height, width) if orientation < 5 else (width, height)
    stored = np.zeros((*shape, 3), np.uint8)
    for row in range(shape[0]):
        for column in range(shape[1]):
            stored[row, column] = upright[UPRIGHT_POSITION[orientation](row, column, height, width)]
    image = Image.fromarray(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if image_format == "PIL":
        decoded = read_image(Image.open(io.BytesIO(encode(image, "PNG", exif=exif))))
    else:
        name, _, kind = image_format.partition("-")
        options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(name, {})
        options |= {"compression": "tiff_lzw"} if kind == "lzw" else {}
        data = encode(image.convert("L") if kind == "gray" else image, name, exif=exif, **options)
        decoded = read_image(data)
    assert decoded.pixels.shape == (3, height, width)
    assert (decoded.pixels.int() - as_tensor(upright).int()).abs().max() <= 4
    assert ("exif_orientation" in decoded.flags) == (orientation != 1)


@pytest.mark.parametrize(("orientation", "target"), [(1, (224, 160)), (6, (390, 130))])
def test_fast_decode_is_smaller_flagged_and_close(orientation: int, target: tuple[int, int]) -> None:
    photo = Image.open(PHOTOS[0]).convert("RGB").resize((1600, 1200))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo, "JPEG", quality=90, exif=exif)
    full, fast = read_image(data), read_image(data, fast_decode=target)
    assert "fast_decode" in fast.flags
    assert "fast_decode" not in full.flags
    assert 2 * target[0] <= fast.height < full.height
    assert 2 * target[1] <= fast.width < full.width
    preprocess = ImagePreprocessing((224, 224), "shortest", **NORMALISE)
    difference = (preprocess(full.pixels) - preprocess(fast.pixels)).abs()
    assert 0 < difference.mean() < 0.05
    undiminished = read_image(data, fast_decode=(900, 900))
    assert torch.equal(undiminished.pixels, full.pixels)
    assert undiminished.flags == full.flags


def test_many_threads_read_what_one_reads() -> None:
    sources = [path.read_bytes() for path in PHOTOS[:6]]
    small = Image.fromarray(noise(60, 80))
    sources += [encode(small, f) for f in ("PNG", "GIF", "WEBP", "TIFF", "BMP")] + [encode(small.convert("P"), "PNG")]
    expected = [read_image(data).pixels for data in sources]
    with ThreadPoolExecutor(8) as pool:
        for decoded, pixels in zip(pool.map(read_image, sources * 10), expected * 10, strict=True):
            assert torch.equal(decoded.pixels, pixels)


def test_settings_of_the_process_stay_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    side = math.isqrt(Image.MAX_IMAGE_PIXELS or 0) + 1  # Pillow warns from here on
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        for image_format, options in (("TIFF", {"compression": "group4"}), ("PNG", {})):
            decoded = read_image(encode(Image.new("1", (side, side), 1), image_format, **options))
            assert decoded.pixels.shape == (3, side, side)
            assert decoded.pixels[:, -1, -1].tolist() == [255] * 3
            del decoded
        assert warnings.filters == inside
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_max_pixels_is_the_callers_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(noise(30, 40)), "PNG")
    with pytest.raises(Exception, match="40x30 pixels are more than the limit of 1199"):
        read_image(data, max_pixels=1199)
    assert read_image(data, max_pixels=1200).width == 40
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # as if the limit were above Pillow's
    assert read_image(data).width == 40


# --- Preprocessing


def assert_within_one_level(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Rounding in either of the two passes: one level, two in the rare case that both coincide."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    levels = (ours - reference).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() <= 2.01
    assert (levels > 1.01).sum() <= max(1, 1e-4 * levels.numel())


@pytest.fixture(scope="module")
def rows_first() -> Iterator[None]:
    """Recent Pillow resizes columns before rows where that is cheaper; this is the order of all others."""
    original = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], resample: int | None = None) -> Image.Image:
        return original(original(image, (size[0], image.height), resample), size, resample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        yield


def test_equals_open_clip_in_any_order_of_passes(photos: list) -> None:
    reference = image_transform_v2(PreprocessCfg(224, "RGB", MEAN, STD), is_train=False)
    ours = ImagePreprocessing((224, 224), "shortest", **NORMALISE)
    for pixels, image in photos:
        difference = (ours(pixels) - reference(image)).abs()
        assert difference.max() <= 8 * ONE_LEVEL
        assert difference.mean() <= 0.2 * ONE_LEVEL
        assert (difference > ONE_LEVEL).float().mean() <= 1e-3


SIZES = [(224, 224), (260, 260), (97, 97), (224, 160), (150, 301)]
COMBINATIONS = [
    (size, resize, interpolation)
    for size in SIZES
    for resize in ("shortest", "longest", "squash")
    for interpolation in ("bicubic", "bilinear")
    # open_clip does not use the interpolation here
    if not (interpolation == "bilinear" and resize == "shortest" and size[0] != size[1])
]


@pytest.mark.parametrize(("size", "resize", "interpolation"), COMBINATIONS)
def test_equals_open_clip(
    photos: list, rows_first: None, size: tuple[int, int], resize: str, interpolation: str
) -> None:
    fill = 0 if resize == "shortest" else 7
    config = PreprocessCfg(size, "RGB", MEAN, STD, interpolation, resize, fill)
    reference = image_transform_v2(config, is_train=False)
    ours = ImagePreprocessing(size, resize, interpolation=interpolation, fill=fill, **NORMALISE)
    for pixels, image in photos:
        assert_within_one_level(ours(pixels), reference(image))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "crop_pct"), [((224, 224), 0.875), ((260, 260), 0.89), ((256, 128), 0.95)])
def test_equals_timm(photos: list, rows_first: None, size: tuple[int, int], crop_pct: float, crop_mode: str) -> None:
    reference = create_transform(
        (3, *size),
        is_training=False,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    ours = ImagePreprocessing(
        size,
        {"center": "shortest", "squash": "squash", "border": "longest"}[crop_mode],
        resize_to=tuple(math.floor(side / crop_pct) for side in size),
        fill=tuple(round(255 * value) for value in MEAN),
        **NORMALISE,
    )
    for pixels, image in photos[:6]:
        assert_within_one_level(ours(pixels), reference(image))


@pytest.mark.parametrize(("size", "resize_to"), [((224, 224), 200), ((201, 224), 212), ((100, 224), 256)])
@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_equals_torchvision_where_the_crop_pads(
    photos: list, rows_first: None, size: tuple[int, int], resize_to: int, interpolation: str
) -> None:
    reference = Compose([Resize(resize_to, InterpolationMode(interpolation)), CenterCrop(size), ToTensor()])
    ours = ImagePreprocessing(
        size, "shortest", resize_to, interpolation, mean=(0, 0, 0), std=(1, 1, 1), fill=99
    )  # fmt: skip
    for pixels, image in photos[:4]:
        differs = (ours(pixels) - reference(image)).abs() > 1 / 255 + 1e-6
        # Where the centre of a target pixel falls on an edge, "nearest" takes either side.
        assert differs.float().mean() <= (0.02 if interpolation == "nearest" else 1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 300), width=st.integers(1, 300),
    resize=st.sampled_from(["shortest", "longest", "squash"]), target=st.integers(5, 120),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_open_clip_at_any_size(
    rows_first: None, height: int, width: int, resize: str, target: int, seed: int
) -> None:
    if resize == "longest" and round(min(height, width) * target / max(height, width)) == 0:
        return  # the reference fails
    array = noise(height, width, seed)
    reference = image_transform_v2(PreprocessCfg(target, "RGB", MEAN, STD, resize_mode=resize), is_train=False)
    ours = ImagePreprocessing((target, target), resize, **NORMALISE)
    assert_within_one_level(ours(as_tensor(array)), reference(Image.fromarray(array)))


@pytest.mark.parametrize("shape", [(10, 1500), (1500, 10), (7, 901), (1, 333), (250, 6000)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_a_strip_is_cropped_first_with_the_same_result(
    rows_first: None, shape: tuple[int, int], interpolation: str
) -> None:
    array = noise(*shape)
    size = (112, 112)
    reference = Compose([Resize(112, InterpolationMode(interpolation)), CenterCrop(size), ToTensor()])
    ours = ImagePreprocessing(size, "shortest", interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    assert (ours(as_tensor(array)) - reference(Image.fromarray(array))).abs().max() <= 2 / 255 + 1e-6
    unit = ours(as_tensor(array).double() / 255)
    assert (unit - ours(as_tensor(array))).abs().max() <= 2 / 255


def test_a_strip_does_not_fill_the_memory() -> None:
    strip = torch.from_numpy(noise(1, 40_000)).permute(2, 0, 1)  # resized in full: 224 x 8,960,000 x 3 = 6 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for resize in ("shortest", "longest", "squash"):
        preprocess = ImagePreprocessing((224, 224), resize, **NORMALISE)
        assert preprocess(strip).shape == preprocess(strip.transpose(1, 2)).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_float_follows_uint8(photos: list, resize: str) -> None:
    preprocess = ImagePreprocessing((224, 224), resize, mean=(0, 0, 0), std=(1, 1, 1), fill=200)
    for pixels, _ in photos:
        difference = (preprocess(pixels / 255) - preprocess(pixels)).abs()
        assert difference.max() <= 2 / 255
        assert difference.mean() <= 0.5 / 255


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(9, 13), (20, 7), (2, 60)])
def test_gradient_is_that_of_the_function(resize: str, interpolation: str, shape: tuple[int, int]) -> None:
    # Mid-gray with little contrast: the bicubic kernel does not overshoot.
    pixels = torch.rand(1, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    preprocess = ImagePreprocessing((6, 6), resize, interpolation=interpolation, **NORMALISE)
    assert torch.autograd.gradcheck(preprocess, pixels.requires_grad_(), fast_mode=True)


def test_gradient_reaches_saturated_pixels() -> None:
    preprocess = ImagePreprocessing((8, 8), "squash", **NORMALISE)
    stripes = torch.zeros(3, 33, 33)
    stripes[:, :, ::4] = 1
    for pixels in (torch.ones(3, 33, 33), torch.zeros(3, 33, 33), stripes):
        pixels.requires_grad_()
        output = preprocess(pixels)
        low, high = preprocess(torch.zeros(3, 4, 4)).amin(), preprocess(torch.ones(3, 4, 4)).amax()
        assert low - 1e-4 <= output.amin()
        assert output.amax() <= high + 1e-4
        output.sum().backward()
        assert pixels.grad is not None
        assert pixels.grad.isfinite().all()
        assert pixels.grad.sum() == pytest.approx(sum(64 / std for std in STD), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_batches_equal_single_images(dtype: torch.dtype) -> None:
    pixels = torch.from_numpy(noise(6 * 50, 70).reshape(2, 3, 50, 70, 3)).permute(0, 1, 4, 2, 3)
    pixels = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    for resize in ("shortest", "longest", "squash"):
        preprocess = ImagePreprocessing((32, 32), resize, fill=(1, 2, 3), **NORMALISE)
        batch = preprocess(pixels)
        assert batch.shape == (2, 3, 3, 32, 32)
        assert batch.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
        assert batch.is_contiguous()
        single = torch.stack([torch.stack([preprocess(image.contiguous()) for image in row]) for row in pixels])
        assert torch.allclose(batch, single, atol=1e-5 if dtype != torch.bfloat16 else 0.05)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((40, 60), torch.uint8), ((40, 60), torch.float64), ((10, 2000), torch.float64)],  # a strip: only its centre
)
def test_without_antialias_and_clip_it_is_torchs_own_resize(
    shape: tuple[int, int], dtype: torch.dtype, interpolation: str
) -> None:
    pixels = as_tensor(noise(*shape))
    size = tuple(round(8 * side / min(shape)) for side in shape)
    whole = torch.nn.functional.interpolate(pixels[None].double() / 255, size, mode=interpolation)[0]
    left = round((size[1] - 8) / 2)
    reference = whole[:, :, left : left + 8]
    if dtype == torch.uint8:
        reference = reference.clamp(0, 1)
    else:
        pixels = pixels.to(dtype) / 255
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "clip": False, "interpolation": interpolation}
    found = ImagePreprocessing((8, 8), "shortest", antialias=False, **plain)(pixels)
    assert (found - reference).abs().max() <= (1.01 / 255 if dtype == torch.uint8 else 1e-9)
    assert (found - ImagePreprocessing((8, 8), "shortest", **plain)(pixels)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_resized_in_float32(dtype: torch.dtype) -> None:
    pixels = (as_tensor(noise(50, 70)) / 255).to(dtype).requires_grad_()
    preprocess = ImagePreprocessing((16, 16), "longest", **NORMALISE)
    output = preprocess(pixels)
    assert output.dtype == dtype
    assert torch.equal(output, preprocess(pixels.detach().float()).to(dtype))  # rounded once, at the end
    output.float().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.dtype == dtype
    assert (pixels.grad > 0).float().mean() > 0.5


def test_settings_that_came_later_leave_older_descriptions_as_they_are() -> None:
    preprocess = ImagePreprocessing((8, 8), "squash", **NORMALISE)
    assert sorted(preprocess.to_dict()) == ["fill", "interpolation", "mean", "resize", "resize_to", "size", "std"]
    other = ImagePreprocessing((8, 8), "squash", antialias=False, clip=False, **NORMALISE)
    assert preprocess.to_dict() | {"antialias": False, "clip": False} == other.to_dict()
    assert ImagePreprocessing.from_dict(json.loads(json.dumps(other.to_dict()))) == other


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(4, 4), torch.zeros(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.int32), torch.zeros(3, 0, 8)],
)
def test_unusable_pixels(pixels: torch.Tensor) -> None:
    with pytest.raises(InputError, match=str(tuple(pixels.shape)).replace("(", r"\(").replace(")", r"\)")):
        ImagePreprocessing((4, 4), "squash", **NORMALISE)(pixels)


def test_settings_survive_json() -> None:
    for preprocess in (
        ImagePreprocessing((224, 160), "longest", fill=(1, 2, 3), **NORMALISE),
        ImagePreprocessing((8, 8), "shortest", 9, "bilinear", **NORMALISE),
        ImagePreprocessing((8, 4), "shortest", (9, 5), **NORMALISE),
    ):
        restored = ImagePreprocessing.from_dict(json.loads(json.dumps(preprocess.to_dict())))
        assert restored == preprocess
        assert hash(restored) == hash(preprocess)


@pytest.mark.parametrize(
    "change",
    [
        {"size": (0, 4)}, {"size": (4,)}, {"resize": "stretch"}, {"interpolation": "lanczos"},
        {"std": (1, 0, 1)}, {"mean": (1, 2)}, {"resize_to": 0}, {"resize_to": (4, -1)}, {"color": 3},
    ],
)  # fmt: skip
def test_unusable_settings(change: dict[str, object]) -> None:
    good = ImagePreprocessing((4, 4), "squash", **NORMALISE).to_dict()
    with pytest.raises(InputError):
        ImagePreprocessing.from_dict(good | change)
    with pytest.raises(InputError):
        ImagePreprocessing.from_dict({key: value for key, value in good.items() if key != "mean"})


def test_flags_are_documented_in_order() -> None:
    assert len(set(FLAGS)) == len(FLAGS)
    strip = np.zeros((2, 300, 4), np.uint16)
    assert read_image((strip // 257).astype(np.uint8)).flags == ("alpha", "extreme_aspect")

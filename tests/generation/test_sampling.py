"""`generate`: the pictures of the unmodified pipeline, each of which can be made again."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from generation import GeneratedImage, generate, generate_each, load_pipeline, read_settings, tiny_pipeline
from generation.drawing import borrowed, draw, plan_requests, sampling_options
from generation.export import export_lora
from generation.lora import add_lora
from generation.sampling import generate_again
from generation.tiny import TINY_FAMILIES
from mmalign.errors import InputError

FAST = {"steps": 2}


def pixels(image: GeneratedImage) -> np.ndarray:
    return np.asarray(image.image, dtype=np.int16)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_is_what_the_pipeline_gives(family: str) -> None:
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = generate("a red bicycle", model=pipeline, seed=5, steps=2, height=64, width=64, guidance_scale=3.0)
    wanted = pipeline(
        prompt="a red bicycle",
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
    ).images[0]
    np.testing.assert_array_equal(pixels(image), np.asarray(wanted))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_sizes_and_steps_of_the_model_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    calls = []
    original = type(pipeline.scheduler).step
    monkeypatch.setattr(
        type(pipeline.scheduler), "step", lambda self, *args, **kw: (calls.append(1), original(self, *args, **kw))[1]
    )
    (image,) = generate("x", model=pipeline, seed=0)
    assert image.image.size == (64, 64)
    assert image.settings["width"] == image.settings["height"] == 64
    assert len(calls) == image.settings["steps"] + (family == "sd15")  # PNDM takes its second step twice
    assert image.settings["steps"] == {"sdxl": 50, "sd15": 50, "sd3": 28, "flux": 28}[family]
    assert image.settings["guidance_scale"] == {"sdxl": 5.0, "sd15": 7.5, "sd3": 7.0, "flux": 3.5}[family]


def test_other_sizes(tiny_sdxl: Any) -> None:
    (image,) = generate("x", model=tiny_sdxl, height=40, width=72, **FAST)
    assert image.image.size == (72, 40)


def test_an_image_does_not_depend_on_its_batch(tiny_sdxl: Any) -> None:
    prompts = ["a red bicycle", "", "an elephant at night"]
    options = {"model": tiny_sdxl, "images_per_prompt": 2, "negative_prompt": ["blue", "", "dull"], **FAST}
    together = generate(prompts, seed=40, batch_size=4, **options)
    assert [image.prompt for image in together] == [prompt for prompt in prompts for _ in range(2)]
    assert [image.seed for image in together] == [40, 41, 42, 43, 44, 45]
    again = generate(prompts, seed=40, batch_size=4, **options)
    for image, same in zip(together, again, strict=True):
        np.testing.assert_array_equal(pixels(image), pixels(same))
    for image in together[1::2]:
        negative = image.settings["negative_prompt"]
        (alone,) = generate(image.prompt, seed=image.seed, model=tiny_sdxl, negative_prompt=negative, **FAST)
        np.testing.assert_allclose(pixels(alone), pixels(image), atol=1)


def test_seeds_are_taken_or_drawn(tiny_sdxl: Any) -> None:
    given = generate(["a", "b"], model=tiny_sdxl, seed=[9, 3], **FAST)
    assert [image.seed for image in given] == [9, 3]
    np.testing.assert_allclose(pixels(generate("b", model=tiny_sdxl, seed=3, **FAST)[0]), pixels(given[1]), atol=1)

    state = torch.random.get_rng_state()
    first, second = (generate("a", model=tiny_sdxl, **FAST)[0] for _ in range(2))
    assert first.seed != second.seed
    assert np.abs(pixels(first) - pixels(second)).mean() > 5
    np.testing.assert_array_equal(pixels(generate("a", model=tiny_sdxl, seed=first.seed, **FAST)[0]), pixels(first))
    assert torch.equal(state, torch.random.get_rng_state())


def test_prompts_and_negative_prompts_matter(tiny_sdxl: Any) -> None:
    (plain,) = generate("a dog", model=tiny_sdxl, seed=1, **FAST)
    (away,) = generate("a dog", model=tiny_sdxl, seed=1, negative_prompt="a cat on grass", **FAST)
    assert np.abs(pixels(plain) - pixels(away)).mean() > 2


def test_a_pipeline_is_left_as_it_was(tiny_sd15: Any) -> None:
    tiny_sd15.set_progress_bar_config(desc="mine", disable=True)
    before = dict(vars(tiny_sd15)), tiny_sd15.scheduler, json.dumps(vars(tiny_sd15.scheduler), default=repr)
    generate("a", model=tiny_sd15, **FAST)
    assert tiny_sd15.scheduler is before[1]
    assert json.dumps(vars(tiny_sd15.scheduler), default=repr) == before[2]
    assert tiny_sd15._progress_bar_config == before[0]["_progress_bar_config"] == {"desc": "mine", "disable": True}
    assert not tiny_sd15.vae.use_slicing


def test_a_pipeline_in_training_is_drawn_with_as_it_will_be_used() -> None:
    pipeline = tiny_pipeline("sdxl")
    add_lora(pipeline.unet, rank=2, dropout=0.9, seed=0)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    (wanted,) = generate("a", model=pipeline, seed=1, **FAST)
    pipeline.unet.train()
    frozen = pipeline.unet.down_blocks[0].eval()
    (drawn,) = generate("a", model=pipeline, seed=1, **FAST)
    np.testing.assert_array_equal(pixels(drawn), pixels(wanted))
    assert pipeline.unet.training
    assert pipeline.unet.mid_block.training
    assert not frozen.training


def test_the_parts_that_others_draw_with(tiny_sdxl: Any) -> None:
    requests = plan_requests(["a", "b"], images_per_prompt=2, seed=np.int64(5))
    assert [(request.prompt, request.seed) for request in requests] == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]
    options = sampling_options(tiny_sdxl, steps=np.int64(2), guidance_scale=np.float32(3))
    assert (options.steps, options.guidance_scale, options.height) == (2, 3.0, 64)
    with borrowed(tiny_sdxl):
        images = draw(tiny_sdxl, requests[1:3], options)
    wanted = generate(["a", "b"], model=tiny_sdxl, seed=[6, 7], steps=np.int64(2), guidance_scale=3.0)
    for image, same in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(image), pixels(same))


def test_both_ways_to_ask_take_the_same() -> None:
    first, second = (inspect.signature(way).parameters for way in (generate, generate_each))
    assert first == second


def test_stays_quiet(tiny_sdxl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    generate("a", model=tiny_sdxl, **FAST)
    assert capfd.readouterr() == ("", "")
    generate("a", model=tiny_sdxl, progress=True, **FAST)
    assert "generating" in capfd.readouterr().err


def test_a_prompt_that_is_cut_is_told_of_without_false_alarm(
    tiny_sdxl: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("diffusers", "transformers"):  # they keep their messages from loggers above
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    generate("word " * 200, model=tiny_sdxl, seed=np.int64(3), **FAST)
    assert "input was truncated" in caplog.text
    assert "indexing errors" not in caplog.text
    caplog.clear()
    generate("a", model="tiny:sdxl", device="cpu", dtype="float16", **FAST)
    assert "kept in float32" not in caplog.text


def test_half_precision(capfd: pytest.CaptureFixture[str]) -> None:
    for dtype in ("float16", "bfloat16"):
        (image,) = generate("a", model="tiny:sdxl", device="cpu", dtype=dtype, seed=2, **FAST)
        assert image.settings["dtype"] == dtype
        assert pixels(image).std() > 10
    assert capfd.readouterr() == ("", "")


def test_nan_is_an_error_not_a_black_picture() -> None:
    pipeline = load_pipeline("tiny:sdxl", device="cpu")
    pipeline.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(InputError, match=r"seed 7.*NaN in float32"):
        generate("a", model=pipeline, seed=7, **FAST)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_image_says_how_to_make_it_again(tiny_sdxl: Any, tmp_path: Path) -> None:
    (image,) = generate('naïve 日本\n"quoted"', model=tiny_sdxl, negative_prompt="dull", seed=11, **FAST)
    path = image.save(tmp_path / "new" / "a.png")
    assert path.stat().st_mode & 0o044, "readable by others as any file is"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]
    with Image.open(path) as saved:
        np.testing.assert_array_equal(np.asarray(saved), pixels(image))
        assert json.loads(saved.text["mmalign"])["seed"] == 11
    settings = read_settings(path)
    assert settings == {"prompt": image.prompt, "seed": 11, **image.settings}
    for source in (path, image):
        np.testing.assert_array_equal(pixels(generate_again(source, model=tiny_sdxl)), pixels(image))


def test_drawn_again_by_name_with_adapter_and_another_unet(
    tiny_sdxl: Any, tiny_sdxl_folder: Path, tmp_path: Path
) -> None:
    changed = tiny_pipeline("sdxl", seed=3)
    changed.unet.save_pretrained(tmp_path / "unet")
    add_lora(tiny_unet := tiny_pipeline("sdxl").unet, rank=2, seed=0)
    for parameter in tiny_unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    adapter = export_lora(tiny_unet, tmp_path / "lora")["diffusers"]
    options = {"model": tiny_sdxl_folder, "unet": tmp_path / "unet", "device": "cpu", "seed": 4, **FAST}
    (image,) = generate("a", adapter=Named(adapter), adapter_weight=0.7, dtype="bfloat16", **options)
    again = generate_again(image, device="cpu")
    np.testing.assert_array_equal(pixels(again), pixels(image))
    assert again.settings == image.settings  # model, UNet and adapter by the names that were given
    assert again.settings["model"] == str(tiny_sdxl_folder)
    assert np.abs(pixels(generate("a", dtype="bfloat16", **options)[0]) - pixels(image)).mean() > 1

    with pytest.raises(InputError, match=r"unet of .* are not those"):
        generate_again(image, model=tiny_sdxl)
    with torch.no_grad():
        next(parameter for parameter in tiny_unet.parameters() if parameter.requires_grad).mul_(2)
    export_lora(tiny_unet, tmp_path / "lora")
    with pytest.raises(InputError, match="is not the file"):
        generate_again(image, device="cpu")
    with pytest.raises(InputError, match="settings lack 'adapters'"):
        generate_again(GeneratedImage(image.image, "a", 1, {}))


class Named:
    """A path that is no `Path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("part", ["model", "unet", "text_encoder", "scheduler"])
def test_pictures_of_other_weights_are_not_taken_for_these(tiny_sdxl_folder: Path, tmp_path: Path, part: str) -> None:
    folder, out = shutil.copytree(tiny_sdxl_folder, tmp_path / "model"), tmp_path / "out"
    options: dict[str, Any] = {"model": folder, "device": "cpu", "seed": 1, "out": out, **FAST}
    if part == "unet":
        options |= {"model": tiny_sdxl_folder, "unet": folder}
    (first,) = generate("a", **options)
    assert generate("a", **options)[0].path == first.path
    other = tiny_pipeline("sdxl", seed=1)
    if part == "model":
        other.save_pretrained(folder)
    elif part == "scheduler":
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.02}))
    else:
        getattr(other, part).save_pretrained(folder / part)
    (second,) = generate("a", **options)
    assert second.path != first.path
    (wanted,) = generate("a", **options | {"out": None})
    np.testing.assert_array_equal(pixels(second), pixels(wanted))
    assert np.abs(pixels(second) - pixels(first)).mean() > 1


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name, message in {
        "plain.png": "no settings",
        "plain.jpg": "no settings",
        "broken.png": "cannot be read",
    }.items():
        with pytest.raises(InputError, match=message):
            read_settings(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_settings(tmp_path / "absent.png")
    image = GeneratedImage(Image.new("RGB", (8, 8)), "a", 1, {})
    with pytest.raises(InputError, match=r"\.png"):
        image.save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="cannot be written"):
        image.save(tmp_path / "plain.png" / "a.png")


def test_a_stopped_run_goes_on(tiny_sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    original = type(tiny_sdxl).__call__

    class Counting(type(tiny_sdxl)):  # type: ignore[misc]
        def __call__(self, prompt: list[str], **options: Any) -> Any:
            if len(drawn) == 2 and "stop" in drawn[-1] + prompt[0]:
                raise KeyboardInterrupt
            drawn.extend(prompt)
            return original(self, prompt=prompt, **options)

    pipeline = Counting(**tiny_sdxl.components)
    prompts = ["Red bicycle, in snow!", "b", "stop", "d"]
    options = {"model": pipeline, "seed": 3, "batch_size": 2, "out": tmp_path, "guidance_scale": 2.0, **FAST}
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0000-3-red-bicycle-in-snow.png", "0001-4-b.png"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    drawn[:] = ["", "", ""]
    images = generate(prompts, **options)
    assert drawn[3:] == ["stop", "d"], "what was there was not drawn again"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert [image.path.name for image in images if image.path] == [
        "0000-3-red-bicycle-in-snow.png",
        "0001-4-b.png",
        "0002-5-stop.png",
        "0003-6-d.png",
    ]
    whole = generate(prompts, **options | {"out": None})
    for image, wanted in zip(images, whole, strict=True):
        np.testing.assert_array_equal(pixels(image), pixels(wanted))

    generate(prompts[0], **options | {"guidance_scale": 4.0})
    names = sorted(entry.name for entry in tmp_path.glob("0000-*"))
    assert names == ["0000-3-red-bicycle-in-snow-2.png", "0000-3-red-bicycle-in-snow.png"], "nothing is overwritten"
    assert read_settings(tmp_path / names[0])["guidance_scale"] == 4.0


def test_a_place_that_cannot_be_written_to_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file is a file; choose another place"):
            generate("a", model="tiny:none-such", out=out)
    with pytest.raises(InputError, match="no tiny pipeline"):
        generate("a", model="tiny:none-such", out=tmp_path / "new" / "folders")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_torn_file_is_made_again(tiny_sdxl: Any, tmp_path: Path) -> None:
    options = {"model": tiny_sdxl, "seed": 3, "out": tmp_path, **FAST}
    (image,) = generate("a", **options)
    assert image.path is not None
    image.path.write_bytes(image.path.read_bytes()[:-200])
    (again,) = generate("a", **options)
    assert again.path != image.path
    np.testing.assert_array_equal(pixels(again), pixels(image))


def test_blank_prompts_have_names_too(tiny_sdxl: Any, tmp_path: Path) -> None:
    images = generate(["", "../../etc", "a" * 300], model=tiny_sdxl, seed=0, out=tmp_path, **FAST)
    names = [image.path.relative_to(tmp_path).as_posix() for image in images if image.path]
    assert names == ["0000-0-blank.png", "0001-1-etc.png", f"0002-2-{'a' * 40}.png"]


def test_images_come_one_by_one(tiny_sdxl: Any, tmp_path: Path) -> None:
    images = generate_each(["a", "b"], model=tiny_sdxl, batch_size=1, out=tmp_path, seed=0, **FAST)
    assert next(images).prompt == "a"
    assert len(list(tmp_path.iterdir())) == 1
    assert next(images).prompt == "b"
    with pytest.raises(TypeError, match="stpes"):
        generate_each("a", stpes=2)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="batch_size is 0"):
        generate_each("a", batch_size=0)


# -- arguments that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        (["a", 3], {}, "prompt 3 is not text"),
        ("a", {"steps": -1}, "steps is -1"),
        ("a", {"steps": 2.5}, "steps is 2.5"),
        ("a", {"images_per_prompt": 0}, "images_per_prompt is 0"),
        ("a", {"batch_size": 0}, "batch_size is 0"),
        ("a", {"height": 60}, "height 60 is not a multiple of 8.*give 64"),
        ("a", {"width": -8}, "width is -8"),
        ("a", {"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ("a", {"guidance_scale": -1.0}, "guidance_scale is -1"),
        (["a", "b"], {"seed": [1, 2, 3]}, "3 seeds for 2 images"),
        ("a", {"seed": -1}, "seed -1"),
        ("a", {"seed": 2**63}, "out of range"),
        ("a", {"seed": 1.5}, "seed 1.5 is not a whole number"),
        ("a", {"seed": "5"}, "seed '5' is not a whole number"),
        (None, {}, "prompts None are not text"),
        (["a", "b"], {"negative_prompt": ["x"]}, "1 negative prompts for 2 prompts"),
        (["a", "b"], {"negative_prompt": ["x", None]}, "has to be text"),
        ("a", {"adapter_weight": [1.0, 2.0]}, "2 adapter weights for 0 adapters"),
        ("a", {"adapter_weight": 0.5}, "there is no adapter"),
        ("a", {"negative_prompt": "x", "guidance_scale": 1}, "no effect at guidance_scale 1"),
    ],
)
def test_wrong_arguments(tiny_sdxl: Any, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        generate(prompts, model=tiny_sdxl, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("flux", {"negative_prompt": "x"}, "FLUX takes no negative prompt"),
        ("flux", {"height": 72}, "not a multiple of 16"),
        ("sd3", {"width": 72}, "not a multiple of 16"),
        ("sd3", {"width": 1024}, "512 at most"),
    ],
)
def test_wrong_arguments_of_a_family(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate("a", model=f"tiny:{family}", device="cpu", **options)

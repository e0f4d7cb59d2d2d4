"""Fixtures of the whole suite: sample photographs, the bundled encoder, and tiny encoders of every source.

The tiny ones have random weights and are built from configurations, as no hub is reached while testing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Before any library reads them: no network, and no weights that happen to lie on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "mmalign-tests-no-hub")

import pytest

if TYPE_CHECKING:
    from torch import nn

    from mmalign import Encoder
    from mmalign.alignment import AlignmentRun

PHOTOS = Path(__file__).parent / "data" / "photos"

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


_modules_at_the_last_freeze = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Spare garbage collections what newly imported libraries hold: a pass over all of it takes a third of a second."""
    global _modules_at_the_last_freeze
    if len(sys.modules) > _modules_at_the_last_freeze + 300:
        gc.collect()
        gc.freeze()
        _modules_at_the_last_freeze = len(sys.modules)


class CommandResult(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Run a `mmalign` command line in this process; it may not print a traceback."""
    from mmalign import cli

    def call(*arguments: str | Path) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["mmalign", *map(os.fspath, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err + out
        return CommandResult(code, out, err)

    return call


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The same bits on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of 76 photographs with `captions.jsonl`."""
    return PHOTOS


@pytest.fixture(scope="session")
def captions() -> list[dict[str, Any]]:
    """One row a photograph: `file`, five `captions`, `objects` and more."""
    return [json.loads(line) for line in (PHOTOS / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def photo_pairs(photos: Path, captions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of eight pairs of photographs of at most 160 px with `metadata.jsonl`; copy it before changing it.

    Wide, tall and square ones; in pairs 1, 3, 5, 7 image 1 wins, and its shape is another than image 0's.
    """
    from PIL import Image

    folder = tmp_path_factory.mktemp("photo-pairs")
    sizes = [(160, 120), (96, 144), (128, 128), (160, 80)]
    lines = []
    for pair in range(8):
        names = [f"{pair}-0.png", f"{pair}-1.png"]
        for side, name in enumerate(names):
            with Image.open(photos / captions[pair + 8 * side]["file"]) as image:
                image.convert("RGB").resize(sizes[(pair + side) % 4], Image.Resampling.BICUBIC).save(folder / name)
        caption = captions[pair]["captions"][0]
        lines.append({"jpg_0": names[0], "jpg_1": names[1], "label_0": 1 - pair % 2, "caption": caption})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bundled() -> Encoder:
    """The bundled encoder; treat it as read-only."""
    from mmalign import load_encoder
    from mmalign.encoders.bundled import is_installed

    if not is_installed():
        pytest.skip("the bundled encoder needs `pip install mmalign[offline]`")
    return load_encoder("bundled", device="cpu")


@pytest.fixture(scope="session")
def aligned_photos(photos: Path, bundled: Encoder, tmp_path_factory: pytest.TempPathFactory) -> AlignmentRun:
    """EfficientNet and MiniLM joined on the photographs, saved in `folder`, its features beside it; read-only."""
    from mmalign import load_encoder
    from mmalign.alignment import align_encoders

    towers = {f"{side}_encoder": load_encoder(f"bundled:{side}", device="cpu") for side in ("image", "text")}
    return align_encoders(
        photos,
        tmp_path_factory.mktemp("aligned") / "encoder",
        **towers,
        options={"steps": 60, "dim": 64, "temperature": 0.2},
        layer_score="mutual-knn",
        test=0.3,
        against=bundled,
        device="cpu",
        batch_size=8,
    )


def spread_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that tell inputs apart: an initialisation as for training puts all images in one direction.

    Of the initialisation nothing is kept but that norms scale by one and biases begin at zero: the same every time.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim:
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 25
            usual = round(float(parameter.data.mean())) if parameter.ndim == 1 else 0
            parameter.data = 0.5 * usual + noise / fan_in**0.5
    return model.eval()


@pytest.fixture(scope="session")
def open_clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that fit the open_clip models `tiny-clip` and `tiny-clip-quickgelu`, made known here."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    configs = {"tiny-clip": TINY_CLIP, "tiny-clip-quickgelu": {**TINY_CLIP, "quick_gelu": True}}
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    model = spread_weights(open_clip.create_model("tiny-clip"))
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture(scope="session")
def tiny_open_clip(open_clip_checkpoint: Path) -> Encoder:
    from mmalign import load_encoder

    return load_encoder(f"open_clip:tiny-clip/{open_clip_checkpoint}", device="cpu")


@pytest.fixture(scope="session")
def tiny_timm() -> Encoder:
    import timm

    from mmalign.encoders.timm import TimmEncoder

    model = spread_weights(timm.create_model("test_vit", num_classes=0))
    return TimmEncoder(model, "test_vit", "timm:test_vit", options={"num_classes": 0})


def word_tokenizer(special: tuple[str, str, str, str], length: int) -> Any:
    """A tokenizer of whole words, learnt from the captions; `special` begins, ends, pads, and stands for the unknown.

    The ending token is neither the first nor the last of the vocabulary.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end, pad, unknown = special
    core = Tokenizer(models.WordLevel(unk_token=unknown))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    rows = (PHOTOS / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    core.train_from_iterator(
        [text for row in rows for text in json.loads(row)["captions"]],
        trainers.WordLevelTrainer(special_tokens=[pad, unknown, begin, end]),
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(name, core.token_to_id(name)) for name in (begin, end)]
    )
    roles = {"pad_token": pad, "unk_token": unknown}
    if begin == "[CLS]":
        roles |= {"cls_token": begin, "sep_token": end}
    else:
        roles |= {"bos_token": begin, "eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, **roles)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP in transformers' own layout."""
    import transformers

    tokenizer = word_tokenizer(("<s>", "</s>", "<pad>", "<unk>"), 24)
    text = {
        **TINY_TOWER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**TINY_TOWER, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    folder = tmp_path_factory.mktemp("clip")
    spread_weights(transformers.CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP in transformers' own layout."""
    import transformers

    tokenizer = word_tokenizer(("<s>", "</s>", "<pad>", "<unk>"), 16)
    config = transformers.SiglipConfig(
        text_config={**TINY_TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**TINY_TOWER, "image_size": 32, "patch_size": 8},
    )
    folder = tmp_path_factory.mktemp("siglip")
    spread_weights(transformers.SiglipModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in transformers' own layout, with nothing said about pooling."""
    import transformers

    tokenizer = word_tokenizer(("[CLS]", "[SEP]", "[PAD]", "[UNK]"), 64)
    config = transformers.BertConfig(**TINY_TOWER, vocab_size=len(tokenizer), max_position_embeddings=64)
    folder = tmp_path_factory.mktemp("bert")
    spread_weights(transformers.BertModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def blip2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP-2 for retrieval in transformers' own layout: 17 image tokens, 4 queries, 2 layers of cross-attention.

    Its initialisation would make it blind: weights of the image tower of 1e-10, and queries of zeros.
    """
    import transformers

    tokenizer = word_tokenizer(("[CLS]", "[SEP]", "[PAD]", "[UNK]"), 32)
    image_processor = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.Blip2Processor(image_processor, tokenizer)  # adds a token for images
    config = transformers.Blip2Config(
        vision_config={**TINY_TOWER, "image_size": 32, "patch_size": 8, "initializer_range": 0.02},
        qformer_config={
            **TINY_TOWER,
            "num_hidden_layers": 4,
            "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 32,
            "use_qformer_text_input": True,
        },
        num_query_tokens=4,
        image_text_hidden_size=24,
    )
    folder = tmp_path_factory.mktemp("blip2")
    spread_weights(transformers.Blip2ForImageTextRetrieval(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(clip_folder: Path) -> Encoder:
    from mmalign import load_encoder

    return load_encoder(f"transformers:{clip_folder}", device="cpu")


@pytest.fixture(scope="session")
def tiny_siglip(siglip_folder: Path) -> Encoder:
    from mmalign import load_encoder

    return load_encoder(f"transformers:{siglip_folder}", device="cpu")


@pytest.fixture(scope="session")
def tiny_sentence(bert_folder: Path) -> Encoder:
    from mmalign import load_encoder

    return load_encoder(f"transformers:{bert_folder}", device="cpu")

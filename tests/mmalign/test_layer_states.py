"""Token states of every source, against hooks put on the raw models' blocks and against the libraries' own means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from mmalign import Encoder, load_encoder
from mmalign.encoders.open_clip import OpenCLIPEncoder
from mmalign.encoders.states import TokenStates, check_layer, default_pooling
from mmalign.encoders.timm import TimmEncoder, tap_trunk, trunk_has_class_token, trunk_layer_count
from mmalign.errors import InputError
from tests.conftest import TINY_CLIP, spread_weights

TEXTS = ["a dog", "Two men sitting at a table with a birthday cake, laughing.", "a red bus in the street!"]
CONFIG: dict[str, Any] = TINY_CLIP


def pixels(encoder: Encoder, count: int = 3) -> Tensor:
    assert encoder.preprocessing is not None
    return torch.randn(count, 3, *encoder.preprocessing.size, generator=torch.Generator().manual_seed(1))


def hooked(encoder: Encoder, blocks: Sequence[nn.Module], inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Raw features, then what the first block takes and every block gives."""
    seen: list[Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda _, taken: seen.append(taken[0]))]
    handles += [
        block.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        for block in blocks
    ]
    features = encoder.image_features(inputs) if isinstance(inputs, Tensor) else encoder.text_features(inputs)
    for handle in handles:
        handle.remove()
    return features, seen


@pytest.fixture(scope="session")
def classifier(bundled: Any) -> Encoder:
    return bundled.image_encoder


@pytest.fixture(scope="session")
def minilm(bundled: Any) -> Encoder:
    return bundled.text_encoder


@pytest.fixture
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue(request.param)


def custom_open_clip(kind: str, bert_folder: Path) -> OpenCLIPEncoder:
    """Towers that `tiny-clip` does not have."""
    vision, text = dict(CONFIG["vision_cfg"]), dict(CONFIG["text_cfg"])
    tokenizer: Any = open_clip.get_tokenizer("ViT-B-32")
    if kind == "resnet":
        vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 16}
    if kind.startswith("timm:"):
        vision = {"timm_model_name": kind[5:], "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
        vision |= {"timm_pool": "avg", "image_size": 160}
    if kind == "bert":
        text = {"hf_model_name": str(bert_folder), "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
        text |= {"hf_proj_type": "linear"}
        tokenizer = open_clip.tokenizer.HFTokenizer(str(bert_folder), context_length=16)
    if kind == "coca":
        vision |= {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
        text |= {"context_length": 76, "embed_cls": True, "output_tokens": True}
        decoder = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=76)
        model = open_clip.CoCa(32, decoder | {"mlp_ratio": 4}, text, vision)
    else:
        made = open_clip.CustomTextCLIP if kind != "resnet" else open_clip.CLIP
        model = made(32, vision, text)
    size = model.visual.image_size
    config = {"size": size, "mode": "RGB", "resize_mode": "shortest", "interpolation": "bicubic", "fill_color": 0}
    open_clip.model.set_model_preprocess_cfg(model, {**config, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return OpenCLIPEncoder(spread_weights(model), tokenizer, {"embed_dim": 32}, "open_clip:custom")


# --- against hooks


IMAGE_BLOCKS = {
    "tiny_open_clip": lambda model: model.visual.transformer.resblocks,
    "tiny_timm": lambda model: model.blocks,
    "tiny_clip": lambda model: model.vision_model.encoder.layers,
    "tiny_siglip": lambda model: model.vision_model.encoder.layers,
}
TEXT_BLOCKS = {
    "tiny_open_clip": lambda model: model.transformer.resblocks,
    "tiny_clip": lambda model: model.text_model.encoder.layers,
    "tiny_siglip": lambda model: model.text_model.encoder.layers,
    "tiny_sentence": lambda model: model.encoder.layer,
    "minilm": lambda model: model.encoder.layer,
}


@torch.inference_mode()
@pytest.mark.parametrize(("encoder", "name"), [(name, name) for name in IMAGE_BLOCKS], indirect=["encoder"])
def test_image_layers_are_what_the_blocks_give(encoder: Encoder, name: str) -> None:
    blocks, inputs = IMAGE_BLOCKS[name](encoder.model), pixels(encoder)
    features, (_, *wanted) = hooked(encoder, blocks, inputs)
    assert encoder.layer_count("image") == len(blocks) == len(wanted)
    *states, output = encoder.image_states(inputs, [*range(len(blocks)), "output"])
    for state, want in zip(states, wanted, strict=True):
        assert torch.equal(state.states, want)
        prefix = 0 if name == "tiny_siglip" else 1
        assert state.class_token == (0 if prefix else None)
        assert torch.equal(state.content[0], torch.arange(want.shape[1]) >= prefix)
        torch.testing.assert_close(state.pool("mean"), want[:, prefix:].mean(dim=1))
        if prefix:
            assert torch.equal(state.pool("cls"), want[:, 0])
    torch.testing.assert_close(output.pool("mean"), features)
    assert not torch.allclose(wanted[-1], wanted[0])
    assert default_pooling(encoder, "image") == ("cls" if prefix else "mean")


@torch.inference_mode()
@pytest.mark.parametrize(("encoder", "name"), [(name, name) for name in TEXT_BLOCKS], indirect=["encoder"])
def test_text_layers_are_the_embeddings_and_what_the_blocks_give(encoder: Encoder, name: str) -> None:
    blocks = TEXT_BLOCKS[name](encoder.model)
    features, wanted = hooked(encoder, blocks, TEXTS)
    assert encoder.layer_count("text") == len(blocks) + 1 == len(wanted)
    output, *states = encoder.text_states(TEXTS, ["output", *range(len(wanted))])
    for state, want in zip(states, wanted, strict=True):
        assert torch.equal(state.states, want)
    assert torch.equal(output.pool("mean"), features)
    assert default_pooling(encoder, "text") == "mean"


@torch.inference_mode()
@pytest.mark.parametrize("encoder", list(TEXT_BLOCKS), indirect=True)
def test_padding_is_no_content(encoder: Encoder) -> None:
    """The mean of a text is the same whether longer ones are beside it or not."""
    together = [state.pool("mean") for state in encoder.text_states(TEXTS, range(encoder.layer_count("text")))]
    content = encoder.text_states(TEXTS, [0])[0].content
    assert content[0].sum() < content[1].sum()
    for row, text in enumerate(TEXTS):
        alone = [state.pool("mean") for state in encoder.text_states([text], range(encoder.layer_count("text")))]
        for layer, rows in enumerate(together):
            torch.testing.assert_close(alone[layer][0], rows[row], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("encoder", ["tiny_sentence", "minilm"], indirect=True)
def test_sentence_layers_are_transformers_hidden_states(encoder: Any) -> None:
    tokens = encoder.tokenize(TEXTS)
    wanted = encoder.model(**tokens, output_hidden_states=True).hidden_states
    states = encoder.text_states(TEXTS, range(len(wanted)))
    assert all(torch.equal(state.states, want) for state, want in zip(states, wanted, strict=True))
    assert torch.equal(states[-1].content, tokens["attention_mask"].bool())
    assert torch.equal(states[-1].pool("mean"), encoder.text_features(TEXTS))
    assert torch.equal(states[-1].pool("cls"), wanted[-1][:, 0])


@torch.inference_mode()
def test_siglip_states_are_before_the_final_norm(tiny_siglip: Any) -> None:
    inputs, model = pixels(tiny_siglip), tiny_siglip.model.vision_model
    last = tiny_siglip.image_states(inputs, [-1])[0].states
    wanted = model(pixel_values=inputs).last_hidden_state
    torch.testing.assert_close(model.post_layernorm(last), wanted)
    assert not torch.allclose(last, wanted, atol=0.1)


@torch.inference_mode()
def test_a_convolutional_network_gives_stem_and_stages(classifier: Any) -> None:
    model, inputs = classifier.model, pixels(classifier, 2)
    _, (_, *wanted) = hooked(classifier, [model.bn1, *model.blocks], inputs)
    *states, output = classifier.image_states(inputs, [*range(len(model.blocks) + 1), "output"])
    assert classifier.layer_count("image") == len(wanted) == 8
    for state, want in zip(states, wanted, strict=True):
        assert state.class_token is None
        torch.testing.assert_close(state.pool("mean"), want.mean(dim=(2, 3)))
    torch.testing.assert_close(output.states[:, 0], classifier.image_features(inputs))
    # A stage that is not the last is had without running what comes after it.
    ran: list[int] = []
    handle = model.blocks[5].register_forward_hook(lambda *_: ran.append(5))
    alone = classifier.image_states(inputs, [3])[0]
    handle.remove()
    assert not ran
    torch.testing.assert_close(alone.states, states[3].states)


# --- other towers


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["resnet", "timm:test_vit", "timm:test_convnext", "timm:test_efficientnet"])
def test_other_image_towers_of_open_clip(kind: str, bert_folder: Path) -> None:
    encoder = custom_open_clip(kind, bert_folder)
    inputs, visual = pixels(encoder), encoder.model.visual
    trunk = getattr(visual, "trunk", visual)
    blocks = {
        "resnet": lambda: [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4],
        "timm:test_vit": lambda: trunk.blocks,
        "timm:test_convnext": lambda: trunk.stages,
        "timm:test_efficientnet": lambda: [trunk.bn1, *trunk.blocks],
    }[kind]()
    features, wanted = hooked(encoder, blocks, inputs)
    wanted = wanted if kind == "resnet" else wanted[1:]
    count = encoder.layer_count("image")
    assert count == len(wanted)
    states = encoder.image_states(inputs, range(count))
    for state, want in zip(states, wanted, strict=True):
        want = want if want.dim() == 3 else want.flatten(2).transpose(1, 2)
        torch.testing.assert_close(state.states, want)
        assert (state.class_token is not None) == encoder.has_class_token("image")
    # An early layer beside the output: the output is not cut off there.
    first, output = encoder.image_states(inputs, [0, "output"])
    torch.testing.assert_close(output.states[:, 0], features)
    torch.testing.assert_close(first.states, states[0].states)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["coca", "bert"])
def test_other_text_towers_of_open_clip(kind: str, bert_folder: Path) -> None:
    encoder = custom_open_clip(kind, bert_folder)
    transformer = encoder.model.text.transformer
    blocks = transformer.resblocks if kind == "coca" else transformer.encoder.layer
    _, wanted = hooked(encoder, blocks, TEXTS)
    *states, output = encoder.text_states(TEXTS, [*range(encoder.layer_count("text")), "output"])
    for state, want in zip(states, wanted, strict=True):
        assert torch.equal(state.states, want)
        assert state.class_token == (76 if kind == "coca" else None)
        assert state.content.shape == want.shape[:2]
    torch.testing.assert_close(output.states[:, 0], encoder.text_features(TEXTS))
    if kind == "coca":
        assert torch.equal(states[1].pool("cls"), wanted[1][:, -1])
        assert not states[1].content[:, -1].any()
    else:
        tokens = encoder.tokenizer(TEXTS)
        assert torch.equal(states[0].content, tokens != encoder.tokenizer.tokenizer.pad_token_id)


def test_an_exclamation_mark_is_content(tiny_open_clip: Any) -> None:
    """CLIP's padding has its number."""
    texts = ["wow", "! dog"]
    tokens = tiny_open_clip.tokenizer(texts)
    tokens[1, 1] = 0
    encoder = OpenCLIPEncoder(tiny_open_clip.model, lambda _: tokens, {"embed_dim": 32}, "x")
    content = encoder.text_states(texts, [0])[0].content
    assert content.sum(dim=1).tolist() == [3, 4]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "prefix", "class_token"),
    [
        ("deit_tiny_distilled_patch16_224", 2, True),
        ("vit_small_patch14_reg4_dinov2", 5, True),
        ("vit_tiny_patch16_224", 1, True),
        ("vit_base_patch16_gap_224", 0, False),
        ("vit_relpos_small_patch16_224", 0, False),  # fails when asked for prefix tokens
        ("naflexvit_base_patch16_gap", 4, False),
        ("cait_xxs24_224", 0, False),  # the class token comes after these blocks
        ("xcit_nano_12_p16_224", 0, False),
        ("mvitv2_base_cls", 0, False),
        ("swin_tiny_patch4_window7_224", 0, False),
        ("convnext_atto", 0, False),
        ("mobilenetv3_small_050", 0, False),
    ],
)
def test_what_is_said_of_timm_models_holds(name: str, prefix: int, class_token: bool) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0).eval()
        inputs = torch.zeros(1, 3, *timm.data.resolve_model_data_config(model)["input_size"][-2:])
        count = trunk_layer_count(model)
        _, states = tap_trunk(model, inputs, range(count), features=False)
    assert len(states) == count > 2
    assert trunk_has_class_token(model) == class_token
    for state in states:
        assert (state.class_token == 0) if class_token else (state.class_token is None)
        assert state.states.shape[1] > prefix
        if name.startswith(("vit_small_patch14", "deit")):
            assert state.states.shape[1] == (inputs.shape[-1] // model.patch_embed.patch_size[0]) ** 2 + prefix


# --- joined encoders, precision, arguments


@torch.inference_mode()
def test_the_parts_of_a_joined_encoder_can_be_tapped(bundled: Any, classifier: Any, minilm: Any) -> None:
    inputs = pixels(bundled, 2)
    assert (bundled.layer_count("image"), bundled.layer_count("text")) == (8, 7)
    ours, output = bundled.image_states(inputs, [-2, "output"])
    assert torch.equal(ours.states, classifier.image_states(inputs, [-2])[0].states)
    torch.testing.assert_close(output.pool("cls"), bundled.image_features(inputs))
    ours, output = bundled.text_states(TEXTS, [2, "output"])
    assert torch.equal(ours.states, minilm.text_states(TEXTS, [2])[0].states)
    torch.testing.assert_close(output.pool("mean"), bundled.text_features(TEXTS))


@torch.inference_mode()
def test_half_precision_is_pooled_in_float32(clip_folder: Path, tiny_clip: Encoder) -> None:
    encoder = load_encoder(f"transformers:{clip_folder}", device="cpu", dtype="bfloat16")
    inputs = pixels(encoder)
    (state,) = encoder.image_states(inputs.bfloat16(), [1])
    assert state.states.dtype == torch.bfloat16
    assert state.pool("cls").dtype == state.pool("mean").dtype == torch.float32
    assert torch.equal(state.pool("mean"), state.states[:, 1:].float().sum(dim=1) / 16)
    wanted = tiny_clip.image_states(inputs, [1])[0].pool("mean")
    assert torch.nn.functional.cosine_similarity(state.pool("mean"), wanted).min() > 0.99


def test_states_can_be_trained_through(tiny_timm: Encoder) -> None:
    inputs = pixels(tiny_timm, 1).requires_grad_()
    tiny_timm.image_states(inputs, [1])[0].pool("mean").sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.abs().max() > 0


@torch.inference_mode()
def test_layers_come_in_the_order_asked(tiny_timm: Encoder) -> None:
    inputs, count = pixels(tiny_timm), tiny_timm.layer_count("image")
    wanted = tiny_timm.image_states(inputs, range(count))
    asked = [count - 1, 0, "output", -count, 0]
    for layer, state in zip(asked, tiny_timm.image_states(inputs, asked), strict=True):  # type: ignore[arg-type]
        want = tiny_timm.image_features(inputs) if layer == "output" else wanted[layer].states  # type: ignore[index]
        torch.testing.assert_close(state.states[:, 0] if layer == "output" else state.states, want)


@torch.inference_mode()
@pytest.mark.parametrize("encoder", list(IMAGE_BLOCKS), indirect=True)
def test_an_early_layer_does_not_cut_off_the_output(encoder: Encoder) -> None:
    inputs = pixels(encoder)
    first, output = encoder.image_states(inputs, [0, "output"])
    torch.testing.assert_close(output.states[:, 0], encoder.image_features(inputs))
    torch.testing.assert_close(first.states, encoder.image_states(inputs, [0])[0].states)


def test_layers_that_are_not_there(tiny_clip: Encoder, tiny_timm: Encoder, tiny_sentence: Encoder) -> None:
    assert check_layer(tiny_clip, "image", -1) == 1
    assert check_layer(tiny_clip, "text", -1) == 2
    assert check_layer(tiny_clip, "text", "output") == "output"
    for layer in (2, -3, "last", 1.0, True, None):
        with pytest.raises(InputError, match=r"layer is .*; the image tower of .* has 0 to 1 \(or -2 to -1\) and 'out"):
            check_layer(tiny_clip, "image", layer)
    with pytest.raises(InputError, match="no text tower"):
        check_layer(tiny_timm, "text", 0)
    with pytest.raises(InputError, match="no image tower"):
        default_pooling(tiny_sentence, "image")
    assert tiny_timm.layer_count("text") == tiny_sentence.layer_count("image") == 0


def test_an_encoder_without_layers(tiny_timm: Any) -> None:
    class Opaque(TimmEncoder):
        def layer_count(self, modality: str) -> int:
            return 0

    encoder = Opaque(tiny_timm.model, "test_vit", "opaque")
    inputs = pixels(encoder)
    (output,) = encoder.image_states(inputs, ["output"])
    assert torch.equal(output.pool("mean"), encoder.image_features(inputs))
    with pytest.raises(InputError, match="'opaque' has 'output' alone"):
        encoder.image_states(inputs, [0])


def test_pooling_that_is_not_there() -> None:
    states = TokenStates(torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="no class token; give 'mean'"):
        states.pool("cls")
    with pytest.raises(InputError, match="pooling is 'max'"):
        states.pool("max")
    assert torch.equal(states.pool("mean"), torch.zeros(2, 4)), "a text of padding alone is no division by zero"

"""CLIP and SigLIP losses against open_clip, torch's label smoothing and hand loops."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmalign.contrastive import clip_loss, siglip_loss, softened_targets
from mmalign.errors import InputError


def pairs(n: int = 11, d: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n)
    image, text = torch.randn(2, n, d, generator=random, dtype=torch.float64).unbind(0)
    return (3 * image).requires_grad_(), (image.detach() + text).requires_grad_()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def test_clip_is_open_clips() -> None:
    image, text = pairs()
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    ours = clip_loss(image, text, scale)
    theirs = ClipLoss()(normalize(image, dim=1), normalize(text, dim=1), scale)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, image, text, scale), gradients(theirs, image, text, scale))


@pytest.mark.parametrize("bias", [None, -10.0])
def test_siglip_is_open_clips(bias: float | None) -> None:
    image, text = pairs()
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    ours = siglip_loss(image, text, scale, bias or 0.0)
    theirs = SigLipLoss()(normalize(image, dim=1), normalize(text, dim=1), scale, bias)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, image, text, scale), gradients(theirs, image, text, scale))
    torch.testing.assert_close(siglip_loss(image, text, scale, bias or 0.0, average="pairs"), ours / len(image))


def test_siglip_with_given_positives_by_hand() -> None:
    image, text = pairs(4)
    text = text[[0, 1, 2, 3, 0, 2]]
    positives = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    total = 0.0
    for i in range(4):
        for j in range(6):
            cosine = (image[i] @ text[j] / image[i].norm() / text[j].norm()).item()
            sign = 1 if positives[i, j] else -1
            total += math.log1p(math.exp(-sign * (7 * cosine - 3)))
    assert siglip_loss(image, text, 7.0, -3.0, positives=positives).item() == pytest.approx(total / 4)
    pairwise = siglip_loss(image, text, 7.0, -3.0, positives=positives, average="pairs")
    assert pairwise.item() == pytest.approx(total / 24)


def test_identity_as_targets_changes_nothing() -> None:
    image, text = pairs()
    torch.testing.assert_close(clip_loss(image, text, 5.0, targets=torch.eye(11)), clip_loss(image, text, 5.0))


def test_infinite_temperature_is_label_smoothing() -> None:
    image, text = pairs()
    targets = softened_targets(image, weight=0.3, temperature=math.inf)
    logits, own = 5.0 * normalize(image, dim=1) @ normalize(text, dim=1).T, torch.arange(11)
    smooth = [cross_entropy(x, own, label_smoothing=0.3) for x in (logits, logits.T)]
    torch.testing.assert_close(clip_loss(image, text, 5.0, targets=targets), sum(smooth) / 2)


def test_texts_say_the_transposed_targets_row_by_row() -> None:
    """A hand loop; text 1 is named by no image and adds nothing."""
    image, text = pairs(3)
    targets = torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.25, 0.0, 0.75]], dtype=torch.float64)
    logits = (4 * normalize(image, dim=1) @ normalize(text, dim=1).T).tolist()
    columns = [list(column) for column in zip(*logits, strict=True)]

    def entropy(row: list[float], wanted: list[float]) -> float:
        log_sum = math.log(sum(math.exp(x) for x in row))
        return sum(w * (log_sum - x) for x, w in zip(row, wanted, strict=True))

    of_images = sum(entropy(row, t) for row, t in zip(logits, targets.tolist(), strict=True))
    back = [[c / (sum(column) or 1) for c in column] for column in targets.T.tolist()]
    of_texts = sum(entropy(row, t) for row, t in zip(columns, back, strict=True))
    assert clip_loss(image, text, 4.0, targets=targets).item() == pytest.approx((of_images + of_texts) / 6)


def test_softened_targets() -> None:
    rows, _ = pairs(5)
    targets = softened_targets(rows, weight=0.4, temperature=0.5)
    unit = [[x / math.hypot(*row) for x in row] for row in rows.tolist()]
    for i in range(5):
        weights = [math.exp(sum(x * y for x, y in zip(unit[i], unit[j], strict=True)) / 0.5) for j in range(5)]
        for j in range(5):
            assert targets[i, j].item() == pytest.approx(0.6 * (i == j) + 0.4 * weights[j] / sum(weights))
    assert not targets.requires_grad
    torch.testing.assert_close(softened_targets(rows, weight=0.0), torch.eye(5, dtype=torch.float64))


def test_gradcheck_with_targets() -> None:
    image, text = pairs(4, 3)
    targets = softened_targets(image)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, t, s: clip_loss(i, t, s, targets=targets), (image, text, scale))
    assert torch.autograd.gradcheck(lambda i, t, s: siglip_loss(i, t, s, -2.0), (image, text, scale))


def test_half_precision_is_computed_in_float32() -> None:
    image, text = (rows.detach().bfloat16() for rows in pairs())
    with torch.autocast("cpu", torch.bfloat16):
        for loss in (clip_loss, siglip_loss):
            value = loss(image, text, 20.0)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, loss(image.double(), text.double(), 20.0).float())


def test_refusals() -> None:
    image, text = pairs()
    with pytest.raises(InputError, match="one row each a pair"):
        clip_loss(image, text[:5], 1.0)
    with pytest.raises(InputError, match="targets have shape"):
        clip_loss(image, text, 1.0, targets=torch.eye(5))
    with pytest.raises(InputError, match="weight is 2"):
        softened_targets(image, weight=2.0)
    with pytest.raises(InputError, match="temperature is 0"):
        softened_targets(image, temperature=0.0)
    with pytest.raises(InputError, match="give positives"):
        siglip_loss(image, text[:5], 1.0)
    with pytest.raises(InputError, match=r"give torch.bool of \(11, 11\)"):
        siglip_loss(image, text, 1.0, positives=torch.eye(11))
    with pytest.raises(InputError, match="rows, pairs"):
        siglip_loss(image, text, 1.0, average="batch")
    with pytest.raises(InputError, match="at least one row"):
        clip_loss(image[:0], text[:0], 1.0)

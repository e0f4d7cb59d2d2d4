"""Heads: what they compute, what of them is trained, and that they come back from their settings and tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from mmalign.alignment.heads import (
    AnchorHead,
    CanonicalHead,
    FrameHead,
    Head,
    LinearHead,
    MLPHead,
    ResidualHead,
    build_head,
    fitted_linear,
    frame_of,
    head_tensors,
    read_heads,
)
from mmalign.errors import InputError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_frame_gives_mean_zero_and_one_size_to_all_coordinates() -> None:
    rows = randn(50, 6) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 10
    head = FrameHead(6, 6).set_frame(*frame_of(rows))
    framed = head(rows)
    torch.testing.assert_close(framed.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(framed.square().sum(1).mean(), torch.tensor(6.0))
    # Angles around the mean stay.
    torch.testing.assert_close(
        torch.nn.functional.normalize(framed, dim=1), torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    )


@pytest.mark.parametrize("make", [lambda **o: LinearHead(6, 4, **o), lambda **o: MLPHead(6, 4, layers=3, **o),
                                  lambda **o: ResidualHead(6, 4, rank=3, **o)])  # fmt: skip
@pytest.mark.parametrize("unit_input", [False, True])
def test_new_rows_go_through_the_frame(make: Callable[..., Head], unit_input: bool) -> None:
    head, rows = make(unit_input=unit_input), randn(5, 6, seed=1) + 3
    plain = make(unit_input=False)
    plain.load_state_dict(head.state_dict())
    head.set_frame(torch.full((6,), 3.0), 2.0)
    by_hand = (rows - 3) * 2
    if unit_input:
        by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(rows), plain(by_hand))


def test_mlp_has_as_many_maps_as_asked_for() -> None:
    head, rows = MLPHead(6, 4, layers=3), randn(5, 6)
    maps = [step for step in head.map if isinstance(step, torch.nn.Linear)]
    assert [(one.in_features, one.out_features) for one in maps] == [(6, 4), (4, 4), (4, 4)]
    z = rows
    for at, one in enumerate(maps):
        z = (z if at == 0 else z.clamp(min=0)) @ one.weight.T + one.bias
    torch.testing.assert_close(head(rows), z)


def test_residual_head_learns_all_of_its_parts() -> None:
    """With the published gate of 0, alpha, W1 and W2 would stay where they start for ever."""
    head, rows, wanted = ResidualHead(8, 5, rank=3), randn(20, 8), randn(20, 5, seed=2)
    torch.testing.assert_close(head.main.weight @ head.main.weight.T, torch.eye(5))
    torch.testing.assert_close(head.down.weight @ head.down.weight.T, torch.eye(3))
    torch.testing.assert_close(head(rows), rows @ head.main.weight.T)  # W2 starts at zero
    start = {name: value.detach().clone() for name, value in head.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        (head(rows) - wanted).square().mean().backward()
        gradients = {name: value.grad for name, value in head.named_parameters()}
        for name in ("up.weight", "main.weight") if step == 0 else gradients:
            gradient = gradients[name]
            assert gradient is not None
            assert gradient.abs().max() > 0, (step, name)
        optimizer.step()
    for name, value in head.named_parameters():
        assert not torch.equal(value, start[name]), name
    by_hand = rows @ head.main.weight.T + head.alpha * gelu(rows @ head.down.weight.T) @ head.up.weight.T
    torch.testing.assert_close(head(rows), by_hand)
    with pytest.raises(InputError, match=r"gate is 0, where the residual never gets a gradient; give .* 0\.1"):
        ResidualHead(8, 5, gate=0)


def test_dropout_is_for_training_only() -> None:
    head, rows = ResidualHead(8, 5, rank=64, dropout=0.5), randn(4, 8)
    torch.nn.init.ones_(head.up.weight)
    head.train()
    assert not torch.equal(head(rows), head(rows))
    head.eval()
    assert torch.equal(head(rows), head(rows))


def test_canonical_heads_score_as_csa() -> None:
    rho = torch.tensor([0.9, 0.7, 0.2])
    heads, projections, means = [], [], []
    for side, width in enumerate((6, 4)):
        projections.append(randn(width, 3, seed=side))
        means.append(randn(width, seed=10 + side))
        head = CanonicalHead(width, 5, side=side)
        head.set_frame(means[-1])
        head.projection.copy_(projections[-1])
        head.correlations.copy_(rho)
        heads.append(head)
    x, y = randn(7, 6, seed=5), randn(9, 4, seed=6)
    z_x, z_y = heads[0](x), heads[1](y)
    for rows in (z_x, z_y):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    for i in range(7):
        for j in range(9):
            a, b = (x[i] - means[0]) @ projections[0], (y[j] - means[1]) @ projections[1]
            score = (rho * (a / a.norm()) * (b / b.norm())).sum()
            torch.testing.assert_close(z_x[i] @ z_y[j], score)


def test_anchor_head_describes_rows_by_the_anchors() -> None:
    head = AnchorHead(3, 4, top=2, power=1.0)
    head.anchors.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]]))
    torch.testing.assert_close(head(torch.tensor([[3.0, 4, 1]])), torch.tensor([[0.6, 0.8, 0, 0]]))


def test_fitted_linear_is_the_map() -> None:
    weight, centre, bias, rows = randn(6, 4), randn(6, seed=1), randn(4, seed=2), randn(5, 6, seed=3)
    torch.testing.assert_close(fitted_linear(weight, centre)(rows), (rows - centre) @ weight)
    torch.testing.assert_close(fitted_linear(weight, centre, bias=bias)(rows), (rows - centre) @ weight + bias)
    unit = (rows - centre) / (rows - centre).norm(dim=1, keepdim=True)
    torch.testing.assert_close(fitted_linear(weight, centre, unit_input=True)(rows), unit @ weight)


EVERY_KIND: list[dict[str, Any]] = [
    {"kind": "frame", "input_dim": 6, "dim": 6},
    {"kind": "linear", "input_dim": 6, "dim": 4, "bias": False, "unit_input": True},
    {"kind": "mlp", "input_dim": 6, "dim": 4, "layers": 3},
    {"kind": "residual", "input_dim": 6, "dim": 4, "rank": 3, "gate": 0.3, "dropout": 0.2},
    {"kind": "canonical", "input_dim": 6, "dim": 5, "side": 1},
    {"kind": "anchors", "input_dim": 6, "dim": 9, "top": 3, "power": 4.0},
]


def test_heads_come_back_from_settings_and_tensors() -> None:
    # One name is the beginning of another.
    heads = {"a" + ".b" * at: build_head(settings) for at, settings in enumerate(EVERY_KIND)}
    for seed, head in enumerate(heads.values()):
        for at, value in enumerate(head.state_dict().values()):
            value.copy_(randn(*value.shape, seed=100 * seed + at).abs() / 2)
    settings = {name: head.settings for name, head in heads.items()}
    again = read_heads(settings, head_tensors(heads))
    for name, head in heads.items():
        head.eval()
        assert type(again[name]) is type(head)
        assert again[name].settings == head.settings
        assert not again[name].training
        assert not any(value.requires_grad for value in again[name].parameters())
        assert torch.equal(again[name](randn(5, 6)), head(randn(5, 6)))
    with pytest.raises(KeyError, match=r"a\.scale"):
        read_heads({"a": settings["a"]}, {"a.centre": torch.zeros(6)})


def test_unknown_kind_lists_what_there_is() -> None:
    with pytest.raises(
        InputError, match="head is 'tree'; give one of frame, linear, mlp, residual, canonical, anchors"
    ):
        build_head({"kind": "tree", "input_dim": 2, "dim": 2})

"""Features in, heads out: every method on pairs whose answer is known, hubs, what is refused, and the saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from mmalign.alignment import METHODS, Alignment, Pairs, align, align_many, fitting, load_alignment, methods
from mmalign.alignment.fitting import mean_reciprocal_rank
from mmalign.errors import DamagedError, EncoderMismatchError, InputError
from mmalign.features import Features
from mmalign.metrics import image_text_retrieval

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"steps": 200, "dim": 16, "learning_rate": 1e-2, "batch_size": 128}


class Turned:
    """Rows and their rotated, shifted, slightly noisy copies; `held` rows beside those to fit on."""

    def __init__(self, n: int = 300, held: int = 60, *, dim: int = 16, noise: float = 0.1) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(n + held, dim)) + 1
        y = x @ np.linalg.qr(rng.normal(size=(dim, dim)))[0] + noise * rng.normal(size=x.shape) - 2
        self.x, self.y = x[:n].astype(np.float32), y[:n].astype(np.float32)
        self.new_x, self.new_y = x[n:].astype(np.float32), y[n:].astype(np.float32)

    def hits(self, alignment: Alignment) -> float:
        """The smaller of both R@1 on rows that no fit has seen."""
        return hit(alignment.encode("image", self.new_x), alignment.encode("text", self.new_y))


def hit(images: np.ndarray, texts: np.ndarray) -> float:
    found = image_text_retrieval(images, texts, np.arange(len(images)), ks=(1,))
    return min(direction["hit@1"] for direction in found.values())


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def features(rows: np.ndarray, name: str = "one", **about: Any) -> Features:
    """As an extraction would give them."""
    layer = about.pop("layer", "output")
    return Features(
        {layer: rows.astype(np.float32)},
        [f"{name} {row}" for row in range(len(rows))],
        np.ones(len(rows), bool),
        encoder={"spec": f"timm:{name}", "fingerprint": f"{name}-" * 8},
        modality="image",
        **about,
    )


@pytest.fixture(scope="module")
def turned() -> Turned:
    return Turned()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.paired])
def test_paired_methods_find_a_rotation(method: str, turned: Turned) -> None:
    options = QUICK if METHODS[method].options.__name__ == "FitOptions" else {}
    found = align(turned.x, turned.y, method=method, validation=0.2, **options)
    assert found.method == method
    assert found.counts == {"image": {"rows": 240, "texts": 240, "held_out": 60}}
    assert turned.hits(found) > 0.95
    rows = found.encode("image", turned.new_x)
    assert rows.shape == (60, found.dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_no_pairs_at_all() -> None:
    rng = np.random.default_rng(1)
    centres, turn = rng.normal(size=(20, 16)), np.linalg.qr(rng.normal(size=(16, 16)))[0]

    def items(n: int) -> np.ndarray:
        return centres[rng.integers(20, size=n)] + 0.3 * rng.normal(size=(n, 16))

    new = items(100)
    found = align(items(700), items(600) @ turn + 0.5, method="mini-vec2vec", runs=4, refine_steps=8, refine_sample=300)
    # Which of 20 clusters: chance is 0.01 for the item.
    assert hit(found.encode("image", new), found.encode("text", new @ turn + 0.5)) > 0.5
    assert {"split_agreement", "mapped_similarity"} <= set(found.learned)
    with pytest.raises(InputError, match="owner, labels and groups are for pairs"):
        align(items(50), items(50), method="mini-vec2vec", owner=np.arange(50))


def test_ridge_is_the_formula(turned: Turned) -> None:
    found = align(turned.x, turned.y, method="ridge", regularisation=0.3, validation=0)
    x, y = turned.x.astype(np.float64), turned.y.astype(np.float64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc.T @ xc
    weights = np.linalg.solve(gram + 0.3 * np.trace(gram) / 16 * np.eye(16), xc.T @ yc)
    np.testing.assert_allclose(
        found.encode("image", turned.new_x), unit((turned.new_x - x.mean(0)) @ weights), atol=1e-5
    )
    np.testing.assert_allclose(found.encode("text", turned.new_y), unit(turned.new_y - y.mean(0)), atol=1e-5)


def test_procrustes_is_the_formula(turned: Turned) -> None:
    found = align(turned.x, turned.y, method="procrustes", validation=0)
    x, y = turned.x.astype(np.float64), turned.y.astype(np.float64)
    turn, _ = scipy.linalg.orthogonal_procrustes(unit(x - x.mean(0)), unit(y - y.mean(0)))
    np.testing.assert_allclose(found.encode("image", turned.new_x), unit(turned.new_x - x.mean(0)) @ turn, atol=1e-5)
    np.testing.assert_allclose(found.encode("text", turned.new_y), unit(turned.new_y - y.mean(0)), atol=1e-5)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_cca_is_the_csa_score(turned: Turned, shrinkage: float) -> None:
    y = turned.y[:, :9]
    found = align(turned.x, y, method="cca", shrinkage=shrinkage, dims=5, validation=0)
    roots, centred = [], []
    for rows in (turned.x.astype(np.float64), y.astype(np.float64)):
        own = rows - rows.mean(0)
        c = own.T @ own / len(own)
        shrunk = (1 - shrinkage) * c + shrinkage * np.trace(c) / len(c) * np.eye(len(c))
        roots.append(np.linalg.inv(scipy.linalg.sqrtm(shrunk)))
        centred.append(own)
    u, rho, vh = np.linalg.svd(roots[0] @ (centred[0].T @ centred[1] / 300) @ roots[1])
    a = unit((turned.new_x - turned.x.mean(0)) @ (roots[0] @ u)[:, :5])
    b = unit((turned.new_y[:, :9] - y.mean(0)) @ (roots[1] @ vh.T)[:, :5])
    # Shrinkage lifts correlations above 1, and unit rows hold scores up to 1: one factor for all.
    scores = (a * rho[:5]) @ b.T / max(1, rho[0])
    ours = found.encode("image", turned.new_x) @ found.encode("text", turned.new_y[:, :9]).T
    np.testing.assert_allclose(ours, scores, atol=1e-4)


def test_closed_forms_are_chosen_on_held_out_pairs_and_fitted_again_on_all() -> None:
    data = Turned(60, noise=1.0)
    mask = np.arange(60) >= 40
    found = align(data.x, data.y, method="cca", validation=mask)
    scores = {}
    for shrinkage in (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9):
        for dims in (8, 16):
            one = align(data.x[:40], data.y[:40], method="cca", shrinkage=shrinkage, dims=dims, validation=0)
            rows = one.encode("image", data.x[40:]), one.encode("text", data.y[40:])
            directions = image_text_retrieval(*rows, np.arange(20), ks=(1,)).values()
            scores[shrinkage, dims] = np.mean([direction["mrr"] for direction in directions])
    chosen = found.learned["shrinkage"], found.learned["dims"]
    assert scores[chosen] == pytest.approx(max(scores.values()), abs=1e-6)
    assert len(set(scores.values())) > 3
    whole = align(data.x, data.y, method="cca", shrinkage=chosen[0], dims=chosen[1], validation=0)
    np.testing.assert_allclose(found.encode("text", data.new_y), whole.encode("text", data.new_y), atol=1e-6)

    with pytest.raises(
        InputError, match="nothing is held out to choose shrinkage and dims by; give shrinkage and dims, or"
    ):
        align(data.x, data.y, method="cca", validation=0)
    with pytest.raises(InputError, match="nothing is held out to choose regularisation by"):
        align(data.x, data.y, method="ridge", validation=0)
    with pytest.raises(InputError, match="dims is 17, these features give 16 canonical directions; give fewer"):
        align(data.x, data.y, method="cca", dims=17)


def test_closed_forms_are_chosen_on_no_more_rows_than_fit_in_memory(
    turned: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spied(z: torch.Tensor, z_text: torch.Tensor, owner: np.ndarray) -> float:
        seen.append((len(z), len(z_text)))
        return mean_reciprocal_rank(z, z_text, owner)

    monkeypatch.setattr(fitting, "_MOST_VALIDATED", 20)
    monkeypatch.setattr(methods, "mean_reciprocal_rank", spied)
    found = align(turned.x, turned.y, method="ridge", validation=0.2)
    assert seen == [(20, 20)] * 5
    assert found.counts["image"]["held_out"] == 60


@pytest.mark.parametrize(("method", "option"), [("cca", "shrinkage"), ("ridge", "regularisation")])
def test_few_rows_without_regularisation_warn_with_the_remedy(method: str, option: str) -> None:
    data = Turned(30, dim=48, noise=0.01)
    dims = {"dims": 8} if method == "cca" else {}
    found = align(data.x, data.y, method=method, validation=0, **{option: 0}, **dims)
    sides = ["image", "text"] if method == "cca" else ["image"]
    assert [warning.split(",")[0] for warning in found.warnings] == [
        f"the pairs span 29 of 48 dimensions of {side}" for side in sides
    ]
    assert f"give {option}, e.g. 0.1, or more pairs" in found.warnings[0]
    # It is the pseudo-inverse: the rows it was fitted on are matched, and the least norm with them.
    assert hit(found.encode("image", data.x), found.encode("text", data.y)) == 1
    if method == "ridge":
        x, y = data.x.astype(np.float64), data.y.astype(np.float64)
        least = np.linalg.pinv(x - x.mean(0)) @ (y - y.mean(0))
        wanted = unit((data.new_x - x.mean(0)) @ least)
        np.testing.assert_allclose(found.encode("image", data.new_x), wanted, atol=1e-3)
    held = align(data.x, data.y, method=method, validation=0, **{option: 0.1}, **dims)
    assert held.warnings == []


@pytest.mark.parametrize(
    ("method", "options"), [("cca", {"shrinkage": 0, "dims": 16}), ("ridge", {"regularisation": 0})]
)
def test_columns_that_never_change_are_no_obstacle(method: str, options: dict[str, Any], turned: Turned) -> None:
    x, new = (np.pad(rows, ((0, 0), (0, 2)), constant_values=3) for rows in (turned.x, turned.new_x))
    found = align(x, turned.y, method=method, validation=0, **options)
    assert hit(found.encode("image", new), found.encode("text", turned.new_y)) > 0.95
    assert "span 16 of 18 dimensions of image" in found.warnings[0]


def test_several_texts_of_a_row(turned: Turned) -> None:
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(300), 2))
    noise = 0.1 * np.random.default_rng(1).normal(size=(600, 16)).astype(np.float32)
    for method in ("structure", "ridge", "cca", "asif"):
        options = QUICK if method == "structure" else {}
        found = align(turned.x, turned.y[owner] + noise, method=method, owner=owner, **options)
        assert found.counts["image"]["texts"] == 2 * found.counts["image"]["rows"]
        assert turned.hits(found) > 0.95


def test_copies_of_a_row_count_once_with_all_their_texts(turned: Turned) -> None:
    owner = np.repeat(np.arange(300), 2)
    noise = 0.1 * np.random.default_rng(1).normal(size=(600, 16)).astype(np.float32)
    texts = turned.y[owner] + noise
    repeated = align(turned.x[owner], texts, validation=0, **QUICK)
    once = align(turned.x, texts, owner=owner, validation=0, **QUICK)
    assert repeated.counts == once.counts == {"image": {"rows": 300, "texts": 600, "held_out": 0}}
    assert repeated.warnings == ["300 rows of image are copies of others; each counts once, with all its texts"]
    np.testing.assert_array_equal(repeated.encode("image", turned.x), once.encode("image", turned.x))
    held = align(turned.x[owner], texts, validation=0.3, method="procrustes")
    assert held.counts["image"] == {"rows": 210, "texts": 420, "held_out": 90}


def test_what_could_not_be_read_is_left_out(turned: Turned) -> None:
    given = features(turned.x)
    bad = [3, 7, 8]
    given.usable[bad] = False
    given.layers["output"][bad] = 0
    for row in bad:
        given.content[row] = ""
    groups = [f"pair {row // 2}" for row in range(300)]
    found = align(given, turned.y, method="ridge", groups=groups, validation=0.5)
    assert found.counts["image"]["rows"] + found.counts["image"]["held_out"] == 297
    assert found.warnings == ["3 rows of image could not be read and are left out"]
    # Rows 2 and 6 are each paired with one that could not be read.
    align(given, turned.y, method="procrustes", groups=groups, validation=np.arange(300) == 2)
    kept = np.setdiff1d(np.arange(300), bad)
    without = align(turned.x[kept], turned.y[kept], method="ridge", regularisation=found.learned["regularisation"],
                    validation=0)  # fmt: skip
    np.testing.assert_allclose(found.encode("text", turned.new_y), without.encode("text", turned.new_y), atol=1e-5)
    with pytest.raises(InputError, match="row 3 of image could not be read and has no features; leave such rows out"):
        found.encode("image", given)
    assert len(found.encode("image", given.take(kept))) == 297
    texts = align(turned.x, turned.y[:290], owner=np.arange(290), method="procrustes")
    assert texts.warnings == ["10 rows of image have no text and are left out"]


def test_equal_seeds_give_equal_alignments(turned: Turned) -> None:
    options = {**QUICK, "steps": 20}
    first, again, other = (align(turned.x, turned.y, seed=seed, **options) for seed in (0, 0, 1))
    rows = [one.encode("image", turned.new_x) for one in (first, again, other)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    np.testing.assert_allclose(first.encode("image", turned.new_x, batch_size=7), rows[0], atol=1e-6)


def test_unpaired_rows(turned: Turned) -> None:
    options = {**QUICK, "steps": 30}
    plain = align(turned.x, turned.y, **options)
    found = align(turned.x, turned.y, unpaired_images=turned.new_x, unpaired_texts=turned.new_y, **options)
    assert not np.array_equal(plain.encode("image", turned.x), found.encode("image", turned.x))
    for method in ("clip", "ridge"):
        with pytest.raises(InputError, match=f"unpaired rows are for STRUCTURE's regulariser, which method '{method}'"):
            align(turned.x, turned.y, method=method, unpaired_images=turned.new_x)
    with pytest.raises(InputError, match="features have width 5, the head of text takes 16"):
        align(turned.x, turned.y, unpaired_texts=turned.new_y[:, :5])
    pairs = {"image": Pairs(turned.x, turned.y)}
    with pytest.raises(InputError, match="a modality of unpaired is 'audio'; give one of image, text"):
        align_many(pairs, unpaired={"audio": turned.x})
    # Of those, too, what could not be read is left out.
    some = features(turned.new_x)
    some.usable[5:] = False
    few = align(turned.x, turned.y, unpaired_images=some, **options)
    same = align(turned.x, turned.y, unpaired_images=turned.new_x[:5], **options)
    np.testing.assert_array_equal(few.encode("image", turned.x), same.encode("image", turned.x))


def test_labels_and_options_of_the_loss(turned: Turned) -> None:
    labels = np.where(turned.x[:, 0] > 1, "yes", "no").tolist()
    found = align(turned.x, turned.y, labels=labels, intra_dispersion=0.5, tcm=0.1, **{**QUICK, "steps": 20})
    assert {"intra_dispersion", "tcm", "contrastive", "structure"} <= set(found.history[-1])
    with pytest.raises(InputError, match="there are no labels; give labels"):
        align(turned.x, turned.y, intra_dispersion=0.5)
    with pytest.raises(InputError, match="label 1 of image is None"):
        align(turned.x, turned.y, labels=["a", None, *labels[2:]], intra_dispersion=0.5)


def holed(rows: np.ndarray, value: float) -> np.ndarray:
    out = rows.astype(np.float64)
    out[[4, 17], 2] = value
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": lambda y: y[:-1]}, "300 rows of image and 299 texts do not pair up; give as many of each, or `owner`"),
        ({"x": lambda x: holed(x, np.nan)}, r"NaN or infinity in 2 of 300 rows \(4, 17\); leave them out"),
        ({"y": lambda y: holed(y, np.inf)}, r"NaN or infinity in 2 of 300 rows \(4, 17\)"),
        ({"x": lambda x: holed(x, 1e300)}, r"image are not finite in float32 in 2 of 300 rows \(4, 17\)"),
        ({"x": lambda x: features(holed(x, np.nan))}, r"image are not finite in float32 in 2 of 300 rows \(4, 17\)"),
        ({"x": lambda x: x[:3], "y": lambda y: y[:3]}, "3 rows of image can be used; give at least 4 pairs"),
        ({"x": lambda x: np.ones_like(x)}, "1 rows of image can be used"),
        ({"x": lambda x: x.astype(int)}, "give a table of floats"),
        ({"labels": ["a"]}, "labels are 1 for 300 rows of image; give one a row"),
        ({"groups": list(range(299))}, "groups are 299 for 300 rows of image"),
        ({"owner": [0] * 299 + [300]}, "owner of text 299 is 300, and image has the rows 0 to 299"),
        ({"owner": [-1] * 300}, "owner of text 0 is -1"),
        ({"owner": [0.5] * 300}, "give one whole number for each of 300 texts"),
        ({"owner": [0] * 299}, r"owner is int64 of shape \(299,\)"),
        ({"validation": np.zeros(5, bool)}, r"validation is bool of shape \(5,\); give a share, or one True or False"),
        ({"validation": np.arange(300)}, "validation is int64"),
        ({"validation": np.ones(300, bool)}, "validation holds out 300 of 300 rows; leave at least 2"),
        ({"validation": 1.5}, "held-out share is 1.5; give a number between 0 and 1"),
        ({"groups": ["one"] * 300}, "300 rows are one group"),
        ({"method": "magic"}, "method is 'magic'; give one of structure, clip, siglip, ape, ridge, cca, procrustes"),
        ({"method": "ridge", "steps": 5}, "method 'ridge' has no option 'steps'; it has regularisation"),
        ({"method": "procrustes", "steps": 5}, "method 'procrustes' has no option 'steps'; it has none"),
        ({"stepps": 5}, "method 'structure' has no option 'stepps'; it has loss, head"),
        ({"seed": -1}, "seed is -1"),
        ({"layers": 3}, "layers is given and no head is 'mlp', so that it would do nothing; leave layers out"),
        ({"head": "mlp", "dropout": 0.1}, "dropout is given and no head is 'residual'"),
        ({"bias": -5.0}, "bias is given and loss is 'clip'"),
        ({"soften_temperature": 0.2}, "soften_temperature is given and soften is 0"),
        ({"method": "clip", "levels": 2}, "levels is given and structure is 0"),
    ],
)
def test_what_cannot_be_aligned(turned: Turned, change: dict[str, Any], message: str) -> None:
    given = {"x": lambda x: x, "y": lambda y: y, **change}
    x, y = given.pop("x")(turned.x), given.pop("y")(turned.y)
    with pytest.raises(InputError, match=message):
        align(x, y, **given)


def test_a_mask_that_separates_copies_names_them(turned: Turned) -> None:
    x = turned.x.copy()
    x[250] = x[20]
    mask = np.arange(300) >= 240
    message = r"1 rows to train on have copies .*\(rows 20 and 250, for one\); hold out all copies"
    with pytest.raises(InputError, match=message):
        align(x, turned.y, validation=mask)
    mask[20] = True
    align(x, turned.y, validation=mask, method="procrustes")
    groups: list[Any] = [None] * 300
    groups[5] = groups[299] = "a person"
    with pytest.raises(InputError, match=r"\(rows 5 and 299, for one\)"):
        align(turned.x, turned.y, validation=np.arange(300) >= 240, groups=groups)


def test_many_modalities_that_cannot_be_bound(turned: Turned) -> None:
    pairs = Pairs(turned.x, turned.y)
    for modalities in ({}, {"text": pairs}):
        with pytest.raises(InputError, match="modalities are those besides 'text'"):
            align_many(modalities)
    with pytest.raises(InputError, match=r"texts have different widths \(.*'audio': 5.*\); take one text encoder"):
        align_many({"image": pairs, "audio": Pairs(turned.x, turned.y[:, :5])})
    one, other = features(turned.y, "one"), features(turned.y, "other")
    with pytest.raises(EncoderMismatchError, match=r"features are of 'timm:other' .* fitted on 'timm:one'"):
        align_many({"image": Pairs(turned.x, one), "audio": Pairs(turned.x, other)})
    with pytest.raises(InputError, match="features of image hold the layers 1, 2; choose one"):
        align(Features({1: turned.x, 2: turned.x}, one.content, one.usable), turned.y)


def test_features_of_another_encoder_are_not_encoded(turned: Turned) -> None:
    given = features(turned.x, "one", layer=3, pooling="mean")
    found = align(given, turned.y, method="procrustes")
    assert (found.sources["image"].layer, found.sources["image"].pooling) == (3, "mean")
    new = features(turned.new_x, "one", layer=3, pooling="mean")
    np.testing.assert_array_equal(found.encode("image", new), found.encode("image", turned.new_x))
    with pytest.raises(
        EncoderMismatchError, match=r"features are of 'timm:two' \(.*\), the head of image .*'timm:one'"
    ):
        found.encode("image", features(turned.new_x, "two", layer=3, pooling="mean"))
    with pytest.raises(InputError, match="features have pooling 'cls', the head of image is fitted on 'mean'"):
        found.encode("image", features(turned.new_x, "one", layer=3, pooling="cls"))
    with pytest.raises(InputError, match="layer is 3; these features hold 4"):
        found.encode("image", features(turned.new_x, "one", layer=4, pooling="mean"))
    with pytest.raises(EncoderMismatchError):
        align(given, turned.y, unpaired_images=features(turned.new_x, "two", layer=3, pooling="mean"))
    with pytest.raises(InputError, match="features have width 5, the head of text takes 16"):
        found.encode("text", turned.new_y[:, :5])
    with pytest.raises(InputError, match="modality is 'audio'; this alignment has image, text"):
        found.encode("audio", turned.new_x)
    with pytest.raises(InputError, match="batch_size is 0"):
        found.encode("image", turned.new_x, batch_size=0)
    # Heads fitted on a table of unknown origin take one layer of any name.
    unknown = align(turned.x, turned.y, method="procrustes")
    np.testing.assert_array_equal(unknown.encode("image", new), unknown.encode("image", turned.new_x))


@pytest.mark.parametrize("method", ["structure", "cca", "ridge", "asif"])
def test_saved_alignments_come_back(tmp_path: Path, turned: Turned, method: str) -> None:
    options = {**QUICK, "steps": 20, "tcm": 0.1, "tcm_margins": (0.5, 0.1)} if method == "structure" else {}
    found = align(turned.x, turned.y, method=method, seed=3, **options)
    folder = found.save(tmp_path / "deep" / "mine")
    assert {path.name for path in folder.iterdir()} == {"alignment.json", "heads.safetensors"}
    again = load_alignment(folder)
    for modality, rows in (("image", turned.new_x), ("text", turned.new_y)):
        np.testing.assert_array_equal(again.encode(modality, rows), found.encode(modality, rows))
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())
    assert (again.sources, again.seed, again.dim) == (found.sources, 3, found.dim)
    before = (folder / "heads.safetensors").read_bytes()
    again.save(folder)
    assert (folder / "heads.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_only_alignments_are_overwritten_and_damage_is_named(tmp_path: Path, turned: Turned) -> None:
    found = align(turned.x, turned.y, method="procrustes")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not an alignment; choose another path"):
        found.save(precious)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    for folder in (precious, tmp_path / "gone"):
        with pytest.raises(InputError, match=r"holds no alignment\.json; give a folder made by Alignment\.save"):
            load_alignment(folder)

    folder = found.save(tmp_path / "mine")
    about, heads = (folder / "alignment.json").read_text(), (folder / "heads.safetensors").read_bytes()

    def refused(error: type[Exception], message: str, text: str = about, tensors: bytes = heads) -> None:
        (folder / "alignment.json").write_text(text)
        (folder / "heads.safetensors").write_bytes(tensors)
        with pytest.raises(error, match=message):
            load_alignment(folder)

    refused(DamagedError, "cannot be read .*; fit it again", text=about[:100])
    refused(DamagedError, "fit it again", text="[]")
    refused(DamagedError, "fit it again", tensors=heads[: len(heads) // 2])
    refused(DamagedError, "fit it again", text=about.replace('"history"', '"hist"'))
    refused(DamagedError, "fit it again", text=about.replace('"kind": "frame"', '"kind": "tree"'))
    refused(DamagedError, "fit it again", text=about.replace('"input_dim": 16', '"input_dim": 17'))
    refused(
        InputError, r"format 99, this mmalign reads up to 1; upgrade", text=about.replace('"format": 1', '"format": 99')
    )
    (folder / "alignment.json").write_text(about)
    (folder / "heads.safetensors").unlink()
    with pytest.raises(DamagedError, match="fit it again"):
        load_alignment(folder)

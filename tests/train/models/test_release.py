"""Published checkpoints: the output of the authors' own code, and one-line errors for other files."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from golden_models import golden
from pretend_cuda import host
from scipy.optimize import linear_sum_assignment

from zpipe.train.checkpoint import Preprocessing, load_run, save_model
from zpipe.train.models import Zoomer, load_release
from zpipe.train.models.release import ReleasedZoomViT

torch.set_num_threads(1)
FACTORS = {"release_eta2": 2.0, "release_eta05": 0.5}


def opened(name: str):
    values, state, images = golden(name)
    config = {"num_heads": int(values["config"][4]), "zoom_factor": FACTORS[name], "alpha": float(values["config"][7])}
    return values, images, state, config


@pytest.mark.parametrize("name", FACTORS)
@torch.no_grad()
def test_the_authors_numbers(name):
    values, images, state, config = opened(name)
    vit, zoomer = load_release(state, **config)
    scores = zoomer(images)
    # Scores are sigmoids of float32 sums over hundreds of terms, which another machine takes in another order.
    np.testing.assert_allclose(scores.numpy(), values["scores"], atol=1e-5)
    logits = torch.cat([vit(images[b : b + 1], scores[b : b + 1]) for b in range(3)])
    np.testing.assert_allclose(logits.numpy(), values["logits"], atol=1e-4)
    assert logits.std() > 0.1
    torch.testing.assert_close(vit(images, scores), logits, atol=1e-5, rtol=0)  # ours doesn't depend on the batch
    assert vit.token_counts(scores).tolist() == values["n_tokens"].tolist()
    for group in vit.tokenise(images, scores).groups():
        for b, tokens in zip(group.index.tolist(), group.tokens, strict=True):
            theirs = values[f"tokens{b}"]
            ours = tokens[1:, : theirs.shape[1]].numpy()
            # Each of theirs with one of ours: sorting both would pair others where rounding tips the order of two rows.
            gaps = np.abs(ours[:, None] - theirs[None]).max(axis=2)
            assert gaps[linear_sum_assignment(gaps)].max() <= 1e-3


@pytest.mark.parametrize("name", FACTORS)
@torch.no_grad()
def test_the_authors_numbers_on_a_gpu(cuda, name):
    values, images, state, config = opened(name)
    vit, zoomer = (model.to("cuda") for model in load_release(state, **config))
    there = images.to("cuda")
    np.testing.assert_allclose(host(vit(there, zoomer(there))).numpy(), values["logits"], atol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_opened_from_a_file(tmp_path, wrapped):
    values, images, state, config = opened("release_eta2")
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}} if wrapped else state, path)
    vit, zoomer = load_release(path, model="zoomvit", **config)
    np.testing.assert_allclose(vit(images[:1], zoomer(images[:1])).numpy(), values["logits"][:1], atol=1e-4)
    assert not vit.training and zoomer.frozen


@torch.no_grad()
def test_uncovered_places_are_those_of_the_release():
    values, images, state, config = opened("release_eta05")
    vit, _ = load_release(state, **config)
    scores = torch.from_numpy(values["scores"])
    (theirs,) = vit.tokenise(images[:1], scores[:1]).groups()
    fine = int((scores[0] > config["alpha"]).sum())
    assert (theirs.ids >= 0).sum() == values["n_tokens"][0] - 2
    cells = int((F.max_pool2d(scores[0].view(1, 14, 14), 2) > config["alpha"]).sum())
    assert fine < 4 * cells  # the release leaves places of zoomed cells uncovered
    ours = timm.create_model("zoomvit_small_patch16_224", zoom_factor=0.5, depth=1, embed_dim=48, num_heads=3)
    assert ours.token_counts(scores[:1], config["alpha"]).tolist() == [49 + 3 * cells]


@pytest.mark.parametrize("num_blocks", [4, 6])
@torch.no_grad()
def test_deeper_zoomers(num_blocks):
    _, images, state, config = opened("release_eta2")
    source = Zoomer(num_blocks).eval()
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.running_mean.uniform_(-1, 1)
    state = {key: value for key, value in state.items() if not key.startswith("Importance_Score")}
    for key, value in source.state_dict().items():
        block = re.match(r"trunk\.(\d+)\.(.*)", key)
        if block and int(block[1]) > 3:
            key = f"features.{4 + (int(block[1]) - 4) // 2}.{int(block[1]) % 2}.{block[2]}"
        key = key.replace("trunk.", "features.").replace("reduce.", "new_fc.0.")
        state[f"Importance_Score.model.{key}"] = value
    _, zoomer = load_release(state, **config)
    assert zoomer.num_blocks == num_blocks
    assert torch.equal(zoomer(images), source(images))


def test_saved_and_opened_again(tmp_path):
    _, images, state, config = opened("release_eta2")
    vit, zoomer = load_release(state, **config)
    save_model(tmp_path, vit, Preprocessing(image_size=224, mean=(0.5,) * 3, std=(0.2,) * 3))
    again = load_run(tmp_path).model
    assert again.alpha == vit.alpha and torch.equal(again(images, zoomer(images)), vit(images, zoomer(images)))


def test_registered_and_named():
    model = timm.create_model("zoomvit_released", depth=1, embed_dim=48, num_heads=3, alpha=0.03)
    assert isinstance(model, ReleasedZoomViT) and model.alpha == 0.03
    images, scores = torch.zeros(1, 3, 224, 224), torch.zeros(1, 196)
    for arguments in ({"scores": scores, "budget": 3}, {"scores": scores, "keep_tokens": 3}):
        with pytest.raises(ValueError, match="by threshold"):
            model(images, **arguments)
    torch.testing.assert_close(model(images), model(images, scores))  # without scores nothing is zoomed
    with pytest.raises(ValueError, match="got NaN"):
        model(images, scores * float("nan"))
    with pytest.raises(ValueError, match="alpha must lie in"):
        timm.create_model("zoomvit_released", depth=1, alpha=2.0)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"head.weight": None}, {}, "has no head.weight; expected a ZoomViT that its authors published"),
        ({"blocks.1.gamma_1": None}, {}, r"has nothing for blocks.1.ls1.gamma \(1 such\)"),
        ({"Importance_Score.model.new_fc.0.bias": None}, {}, "has nothing for reduce.bias"),
        ({"blocks.1.norm1.weight": torch.zeros(7)}, {}, r"blocks.1.norm1.weight is \[7\], expected \[48\]"),
        ({"blocks.1.norm3.weight": torch.zeros(7)}, {}, "blocks.1.norm3.weight is not known"),
        ({"Importance_Score.model.other": torch.zeros(7)}, {}, "Importance_Score.model.other is not known"),
        ({"epoch": 3}, {}, "holds no state dict"),
        ({}, {"num_heads": 5}, "must divide"),
        ({}, {"zoom_factor": 3.0}, "zoom_factor must be 2.0 or 0.5"),
        ({}, {"alpha": 1.5}, "alpha must lie in"),
        ({}, {"alpha": None, "threshold": 0.1}, "give num_heads, zoom_factor, alpha by keyword"),
        ({}, {"model": "resnet"}, "model must be one of zoomvit"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(change, config, message):
    _, _, state, right = opened("release_eta2")
    state = {key: value for key, value in (state | change).items() if value is not None}
    config = {key: value for key, value in (right | config).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_release(state, **config)
    assert "\n" not in str(caught.value)


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    config = {"num_heads": 3, "zoom_factor": 2.0, "alpha": 0.5}
    path = tmp_path / "checkpoint.pth"
    for content in (b"", b"not a checkpoint", pickle.dumps({"model": _Evil()})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.pth: cannot be read as weights"):
            load_release(path, **config)
    torch.save({"model": _Evil()}, path)
    with pytest.raises(ValueError, match="a pickled object of builtins.print"):
        load_release(path, **config)
    assert "code ran" not in capsys.readouterr().out
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state dict"):
        load_release(path, **config)
    with pytest.raises(FileNotFoundError):
        load_release(tmp_path / "nowhere.pth", **config)
    torch.save({"head.weight": torch.tensor([torch.nan])}, path)
    with pytest.raises(ValueError, match="head.weight holds NaN or infinity"):
        load_release(path, **config)


@torch.no_grad()
def test_prefixes_and_settings_beside_the_weights(tmp_path):
    values, images, state, config = opened("release_eta2")
    path = tmp_path / "last.ckpt"
    named = {f"model.module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": named, "best": np.float64(0.9)}, path)
    vit, zoomer = load_release(path, **config)
    np.testing.assert_allclose(vit(images[:1], zoomer(images[:1])).numpy(), values["logits"][:1], atol=1e-4)

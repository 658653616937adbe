"""The stability of maps: its noise, its values, the column of a store, and stores without one."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from tiny import write_tar

from zpipe.pipeline.explainer import ExplainConfig
from zpipe.pipeline.extract import ExtractConfig, extract_teacher_maps
from zpipe.pipeline.make_shards import index_shards
from zpipe.pipeline.methods import METHODS
from zpipe.pipeline.stability import NOISE, add_noise, measure_stability, noise_of, stability
from zpipe.pipeline.verify import verify_store
from zpipe.schemas import relevance_store as rs
from zpipe.schemas.errors import UsageError, ZpipeError
from zpipe.schemas.manifest import read_manifest, write_manifest
from zpipe.schemas.relevance_maps import RelevanceMaps
from zpipe.schemas.shard_index import digest_file

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden" / "relevance_small_vit.npz"
STEM = "shard-00001"


@pytest.fixture(scope="module")
def measured(tmp_path_factory, shards, teacher_settings):
    """A store with the column, and the settings that made it. Leave it unchanged."""
    out = tmp_path_factory.mktemp("measured") / "store"
    extract_teacher_maps(shards, out, ExtractConfig(**teacher_settings, executor="local", stability=True))
    return out


@pytest.fixture
def measured_copy(tmp_path, measured):
    return Path(shutil.copytree(measured, tmp_path / "measured"))


def column(root, name="stability"):
    table = RelevanceMaps(root).table(["key", name])
    return dict(zip(table["key"].to_pylist(), table[name].to_pylist(), strict=True))


# ------------------------------------------------------------------------------------------------------------ the noise


def test_the_noise_is_the_same_on_every_machine():
    expected = [0.1416457, 0.01732281, 0.01723126, 0.12383077]
    np.testing.assert_allclose(noise_of("a", (2, 2, 3)).ravel()[:4], expected, rtol=1e-6)


def test_the_noise_is_uniform_up_to_a_quarter_of_a_grey_level():
    noise = np.stack([noise_of(f"key {i}", (64, 64, 3)) for i in range(8)]).ravel()
    assert noise.dtype == np.float32 and NOISE - 1e-4 < noise.max() <= NOISE and -NOISE <= noise.min() < 1e-4 - NOISE
    counts = np.histogram(noise, bins=10, range=(-NOISE, NOISE))[0]
    assert abs(counts / len(noise) - 0.1).max() < 0.01  # 0.001 is its standard deviation
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02


@settings(max_examples=20)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=5, unique=True), st.randoms())
def test_the_noise_of_an_image_does_not_depend_on_the_others(keys, random):
    pixels = {key: np.full((3, 4, 3), number, np.uint8) for number, key in enumerate(keys)}
    together = dict(zip(keys, add_noise(np.stack([pixels[key] for key in keys]), keys), strict=True))
    random.shuffle(keys)
    for key in keys:
        np.testing.assert_array_equal(add_noise(pixels[key][None], [key])[0], together[key])
    assert len({image.tobytes() for image in together.values()}) == len(keys)


# ----------------------------------------------------------------------------------------------------------- the values


def test_values_of_known_maps():
    ramp = np.arange(12, dtype=np.float32).reshape(3, 4)
    maps = np.stack([ramp, ramp, ramp, np.ones_like(ramp), ramp])
    noisy = np.stack([ramp**3, -ramp, np.full_like(ramp, np.nan), ramp, np.zeros_like(ramp)])
    np.testing.assert_allclose(stability(maps, noisy), [1, -1, np.nan, np.nan, np.nan])


def test_attention_is_more_stable_than_relevance_that_is_divided():
    """On a trained teacher: the rules of transformer attribution divide by activations that cross zero."""
    data = np.load(GOLDEN)
    side, patch, width, depth, heads, classes = (int(value) for value in data["config"])
    model = VisionTransformer(
        img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes
    )
    model.load_state_dict({name[2:]: torch.from_numpy(data[name]) for name in data.files if name.startswith("w/")})
    model = model.double().eval().requires_grad_(False)
    images, targets = torch.from_numpy(data["images"]).double(), torch.from_numpy(data["targets"])
    noise = torch.from_numpy(np.stack([noise_of(str(i), (3, side, side)) for i in range(len(images))]))
    noisy = images + noise / 255 / 0.35  # its pixels were divided by 0.35

    found = {}
    for name in ("rollout", "gradient-attention", "transformer-attribution", "transformer-attribution-stable"):
        maps, others = (METHODS[name](model, pixels, targets).maps.numpy() for pixels in (images, noisy))
        found[name] = stability(maps, others)
    assert found["rollout"].min() > 0.999 and found["gradient-attention"].min() > 0.99
    assert found["transformer-attribution-stable"].min() > 0.98
    assert np.quantile(found["transformer-attribution"], 0.1) < 0.9


# ----------------------------------------------------------------------------------------------------------- the column


def test_a_store_has_the_column_and_is_otherwise_the_same(measured, store, shards):
    values = column(measured)
    assert len(values) == 18 and all(-1 <= value <= 1 for value in values.values())
    assert verify_store(measured, shards) == []
    assert read_manifest(measured).provenance == read_manifest(store).provenance
    np.testing.assert_array_equal(RelevanceMaps(measured).array(), RelevanceMaps(store).array())
    with pytest.raises(UsageError, match=r"has no stability of the maps; extract them with --stability"):
        RelevanceMaps(store).table(["stability"])


def test_the_batch_size_changes_nothing_but_rounding(extract, shards, tmp_path):
    explain = ExplainConfig(method="gradient-attention", precision="float64")
    for size in (1, 4):
        extract(shards, tmp_path / str(size), explain=explain, stability=True, batch_size=size)
    a, b = column(tmp_path / "1"), column(tmp_path / "4")
    np.testing.assert_allclose(list(a.values()), list(b.values()), atol=1e-6)
    assert list(a) == list(b)


def test_an_image_without_a_map_has_no_stability(extract, encode, tmp_path):
    members = {"a.jpg": encode("JPEG", 40, 40), "a.cls": b"1", "b.jpg": b"no image", "b.cls": b"1"}
    write_tar(tmp_path / "shards" / "shard-00000.tar", members)
    index_shards(tmp_path / "shards")
    for target in ("ground-truth", "top:2", "predicted"):
        out = tmp_path / target
        extract(tmp_path / "shards", out, explain=ExplainConfig(target=target), stability=True, save=("logits",))
        values = column(out)
        assert -1 <= values["a"] <= 1 and np.isnan(values["b"])
        assert verify_store(out) == [] == verify_store(out / "logits")
        assert "stability" not in rs.IndexFile(rs.index_path(out / "logits", "shard-00000")).columns


def test_a_resumed_extraction_completes_the_column(measured, measured_copy, shards, extract, contents):
    rs.index_path(measured_copy, STEM).unlink()
    report = extract(shards, measured_copy, stability=True)
    assert report.extracted == 1 and contents(measured_copy) == contents(measured)


@pytest.mark.parametrize("had", [True, False])
def test_a_resumed_extraction_does_not_mix(had, measured_copy, store_copy, shards, extract):
    root = measured_copy if had else store_copy
    rs.index_path(root, STEM).unlink()
    word = "with" if had else "without"
    with pytest.raises(ZpipeError, match=rf"{root}: made {word} --stability; resume {word} it"):
        extract(shards, root, stability=not had)
    extract(shards, root, stability=not had, replace=True)
    assert all(("stability" in rs.IndexFile(path).columns) != had for path in (root / "index").iterdir())
    assert verify_store(root, shards) == []


def interrupted_replacement(shards, root, settings):
    """Replace the maps of a store by maps with the column, and stop in between."""

    def stop(stage, done, total, **facts):
        if stage == "extract-teacher-maps" and 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_teacher_maps(shards, root, ExtractConfig(**settings, stability=True, replace=True), progress=stop)


def test_an_interrupted_replacement_is_not_resumed_with_the_other_setting(
    store, store_copy, shards, extract, teacher_settings
):
    interrupted_replacement(shards, store_copy, teacher_settings | {"executor": "local"})
    assert extract(shards, store_copy, replace=True).extracted == 4
    np.testing.assert_array_equal(RelevanceMaps(store_copy).array(), RelevanceMaps(store).array())
    assert all("stability" not in rs.IndexFile(path).columns for path in (store_copy / "index").iterdir())


def test_a_late_shard_of_the_replaced_run_is_made_again(store, store_copy, shards, extract, teacher_settings):
    interrupted_replacement(shards, store_copy, teacher_settings | {"executor": "local"})
    late = "shard-00003"  # a worker of the replaced run, which had the same provenance, writes it only now
    shutil.copytree(rs.maps_path(store, late), rs.maps_path(store_copy, late), dirs_exist_ok=True)
    shutil.copy(rs.index_path(store, late), rs.index_path(store_copy, late))
    extract(shards, store_copy, stability=True, replace=True)
    assert all("stability" in rs.IndexFile(path).columns for path in (store_copy / "index").iterdir())
    assert verify_store(store_copy, shards) == []


def test_the_shards_of_an_interrupted_replacement_are_kept_from_a_run_without_the_column(
    store_copy, shards, extract, teacher_settings
):
    interrupted_replacement(shards, store_copy, teacher_settings | {"executor": "local"})
    made = sorted(path.name for path in (store_copy / "index").iterdir())
    with pytest.raises(ZpipeError, match="made with --stability; resume with it"):
        extract(shards, store_copy, stability=False)
    assert made and sorted(path.name for path in (store_copy / "index").iterdir()) == made


def rewrite(root, values):
    """Replace the column of a shard, as its own writer would have written it."""
    table = rs.read_index(root, STEM)
    place = table.column_names.index("stability")
    seal = rs.read_seal(root, STEM)
    rs.write_shard(
        root,
        STEM,
        rs.read_stored(root, STEM),
        table.set_column(place, "stability", pa.array(values, pa.float32())),
        input_sha256=seal.input_sha256,
        fingerprint=seal.fingerprint,
    )
    manifest = read_manifest(root)
    digest = digest_file(rs.index_path(root, STEM))
    listed = [dataclasses.replace(s, index_sha256=digest) if s.stem == STEM else s for s in manifest.shards]
    write_manifest(root, dataclasses.replace(manifest, shards=tuple(listed)))


@pytest.mark.parametrize("odd", [1.5, -2.0, np.inf])
def test_verify_finds_impossible_values(odd, measured_copy):
    rewrite(measured_copy, [0.5, odd, np.nan, -1, 1])
    (problem,) = verify_store(measured_copy)
    assert f"stability {odd:g} is impossible" in problem


def test_info_shows_the_quantiles(measured, store, cli):
    assert "stability" in cli("maps", "info", measured).stdout
    assert "stability" not in cli("maps", "info", store).stdout


# ---------------------------------------------------------------------------------------------- stores without a column


def test_the_stability_of_a_store_without_the_column(store, measured, shards):
    told = []
    values = measure_stability(
        RelevanceMaps(store), shards, limit=7, device="cpu", progress=lambda *args, **facts: told.append(args)
    )
    expected = column(measured)
    assert list(values) == list(expected)[:7] and told[-1] == ("stability", 7, 7)
    # Of random weights the maps, and so the values, differ between batches; of most images they agree.
    assert np.median([abs(values[key] - expected[key]) for key in values]) < 0.05
    assert len(measure_stability(RelevanceMaps(store), shards, device="cpu")) == 18


def test_no_more_of_the_tars_is_read_than_the_images_that_are_measured(extract, encode, tmp_path):
    tars, out = tmp_path / "shards", tmp_path / "store"
    write_tar(tars / "a.tar", {"broken.jpg": b"no image", "broken.cls": b"1"})
    images = {f"k{i}.jpg": encode("JPEG", 40, 40) for i in range(4)}
    write_tar(tars / "b.tar", dict(sorted((images | {f"k{i}.cls": b"1" for i in range(4)}).items())))
    index_shards(tars)
    extract(tars, out)
    a, b = (tars / "a.tar").read_bytes(), (tars / "b.tar").read_bytes()
    (tars / "a.tar").write_bytes(bytes(len(a)))  # it has no image with a map, and is not read
    (tars / "b.tar").write_bytes(b[: len(b) // 2] + bytes(len(b) - len(b) // 2))
    assert list(measure_stability(RelevanceMaps(out), tars, limit=1, device="cpu")) == ["k0"]
    with pytest.raises(ZpipeError, match=r"b\.tar"):
        measure_stability(RelevanceMaps(out), tars, device="cpu")


def test_what_does_not_fit_the_store_is_named(store, store_copy, shards, shards_copy, encode):
    def refused(maps, tars, **more):
        with pytest.raises((UsageError, ZpipeError)) as error:
            measure_stability(RelevanceMaps(maps), tars, device="cpu", **more)
        return str(error.value)

    assert "--limit 0: give a number" in refused(store, shards, limit=0)
    assert "its teacher's weights elsewhere.safetensors are not there (a relative path" in refused(
        store, shards, weights="elsewhere.safetensors"
    )
    tar = shards_copy / f"{STEM}.tar"
    write_tar(tar, {"x.jpg": encode("JPEG", 40, 40), "x.cls": b"1"})
    (shards_copy / "shards.json").unlink()
    assert f"{tar}: SHA-256" in refused(store, shards_copy)
    tar.unlink()
    assert f"has no {STEM}.tar; give the tars that" in refused(store, shards_copy)
    manifest = read_manifest(store_copy)
    other = dataclasses.replace(manifest.provenance, seed=1)  # not compared, so that only the weights tell
    write_manifest(store_copy, dataclasses.replace(manifest, provenance=other))
    assert "random: holds other weights (digest" in refused(store_copy, shards)

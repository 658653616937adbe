"""The description of a model: what timm and our runs write is read, and anything else is one line."""

import json

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.model_config import ModelConfig, is_model_config, read_class_names, read_model_config

WHOLE = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 3,
    "label_names": ["ant", "bee", "cat"],
    "model_args": {"img_size": 32, "patch_size": 8, "depth": 2},
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "num_classes": 3,
        "license": "mit",
    },
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("model") / "config.json"


def write(file, value):
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def test_what_timm_saves_is_read(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_classes=2)
    names = {"model_config": {"label_names": ["ant", "bee"]}}
    save_for_hf(
        model, tmp_path, safe_serialization=True, data_config={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}, **names
    )
    config = read_model_config(tmp_path / "config.json")
    assert (config.architecture, config.class_count, config.class_names) == ("vit_tiny_patch16_224", 2, ("ant", "bee"))
    assert config.model_args["embed_dim"] == 24
    assert (config.pretrained_cfg.mean, config.pretrained_cfg.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (config.pretrained_cfg.crop_pct, config.pretrained_cfg.interpolation) == (0.8, "bicubic")
    assert config.pretrained_cfg.input_size == (3, 32, 32)


def test_the_older_form_has_all_fields_at_the_top(file):
    flat = {"architecture": "resnet18", "num_classes": 2, "mean": [0, 0, 0], "labels": ["ant", "bee"], "url": "x"}
    config = read_model_config(write(file, flat))
    assert (config.architecture, config.class_count, config.class_names) == ("resnet18", 2, ("ant", "bee"))
    assert config.pretrained_cfg.mean == (0, 0, 0) and config.pretrained_cfg.std is None


def test_names_of_classes_may_leave_out_numbers(file):
    named = WHOLE | {"label_names": {"2": "cat", "0": "ant"}}
    assert read_model_config(write(file, named)).class_names == ("ant", "", "cat")
    assert read_model_config(write(file, WHOLE | {"label_names": None})).class_names == ()
    with pytest.raises(ZpipeError, match="names 2 classes, the model has 3"):
        read_model_config(write(file, WHOLE | {"label_names": ["ant", "bee"]}))


def test_a_run_names_its_classes(tmp_path):
    config = ModelConfig(architecture="vit_tiny_patch16_224")
    assert read_class_names(tmp_path, config) == ()
    run = {"format": "zpipe-run", "version": 1, "kind": "vit", "settings": {"classes": ["ant", "bee"], "seed": 0}}
    write(tmp_path / "run.json", run)
    assert read_class_names(tmp_path, config) == ("ant", "bee")
    assert read_class_names(tmp_path, ModelConfig(architecture="x", label_names=["cat"])) == ("cat",)
    write(tmp_path / "run.json", run | {"settings": {"classes": [1]}})
    with pytest.raises(ZpipeError, match=r"run.json: .*settings.classes\[0\]"):
        read_class_names(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": []}, "$.architecture"),
        ({"model_args": []}, "$.model_args"),
        ({"model_args": {"features_only": True}}, "model_args.features_only is no argument"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args.checkpoint_path is no argument"),
        ({"model_args": {"img_size": 10**9}}, "model_args.img_size is beyond 8192"),
        ({"model_args": {"img_size": [224, 10**9]}}, "model_args.img_size is beyond 8192"),
        ({"model_args": {"depth": 10**6}}, "model_args.depth is beyond 1024"),
        ({"model_args": {"embed_dim": -(10**30)}}, "model_args.embed_dim is beyond 65536"),
        ({"model_args": {"num_classes": "5"}}, "model_args.num_classes is '5', no number of classes"),
        ({"num_classes": -1}, "$.num_classes"),
        ({"num_classes": 10**9}, "$.num_classes"),
        ({"label_names": 7}, "$.label_names"),
        ({"pretrained_cfg": {"mean": "str"}}, "$.pretrained_cfg.mean"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "of length 3 - at `$.pretrained_cfg.mean`"),
        ({"pretrained_cfg": {"std": [0.5, 0, 0.5]}}, "$.pretrained_cfg.std[1]"),
        ({"pretrained_cfg": {"crop_pct": 0}}, "$.pretrained_cfg.crop_pct"),
        ({"pretrained_cfg": {"input_size": [3, 1e9, 2]}}, "$.pretrained_cfg.input_size[1]"),
        ({"pretrained_cfg": []}, "$.pretrained_cfg"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(file, change, said):
    with pytest.raises(ZpipeError) as error:
        read_model_config(write(file, WHOLE | change))
    assert str(file) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_other_files_of_that_name(file, tmp_path):
    transformers = write(file, {"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    assert not is_model_config(transformers)
    with pytest.raises(ZpipeError, match="names no architecture; it is of the transformers library"):
        read_model_config(transformers)
    for text in ("{", "[]", "", '{"architecture": NaN}', "[" * 100_000):
        with pytest.raises(ZpipeError, match="not readable as a model description"):
            read_model_config(write(file, text))
    with pytest.raises(ZpipeError, match="no such file"):
        read_model_config(tmp_path / "none.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = [(name,) for name in WHOLE] + [(name, key) for name in ("model_args", "pretrained_cfg") for key in WHOLE[name]]


@given(place=st.sampled_from(PLACES), value=JSON)
@settings(max_examples=200, deadline=None)
def test_any_json_anywhere_is_read_or_one_line(file, place, value):
    config = json.loads(json.dumps(WHOLE))
    (config if len(place) == 1 else config[place[0]])[place[-1]] = value
    try:
        read = read_model_config(write(file, config))
    except ZpipeError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(read.architecture, str) and all(isinstance(name, str) for name in read.class_names)
        assert read.class_count is None or read.class_count >= 1

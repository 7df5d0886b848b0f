"""What a configuration may hold, and the one line that says what is wrong with it."""

import pytest
import yaml
from conftest import ROOT, SHIPPED

from engine.config import UserError
from layouts import classes, label_values
from settings import load_config

PYTHON_TAG = "seed=!!python/object/apply:os.system ['touch /tmp/never']"


def error(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path):
    assert load_config(path).name


def test_every_key_of_config_yaml_has_a_line_on_it():
    def keys(tree):
        for key, value in tree.items():
            yield from keys(value) if isinstance(value, dict) and value else [key]

    text = (ROOT / "config.yaml").read_text()
    explained = {line.strip().partition(":")[0] for line in text.splitlines() if "#" in line}
    assert set(keys(yaml.safe_load(text))) <= explained


def test_scientific_notation_is_a_number():
    assert load_config(ROOT / "config.yaml").optimizer.lr_backbone == 7.5e-4
    assert load_config(ROOT / "config.yaml", ["optimizer.lr_head=1e-4"]).optimizer.lr_head == 1e-4
    assert load_config(ROOT / "config.yaml", ["optimizer.lr_head=.5E-3"]).optimizer.lr_head == 5e-4


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("warmup.stepz=5", ["warmup.stepz", "5", "warmup.steps"]),
        ("steps=5", ["unknown key steps", "stages"]),
        ("optimiser.lr_head=1", ["optimiser", "optimizer"]),
        ("warmup.steps=0", ["warmup.steps", "0", "from 1"]),
        ("warmup.steps=1.5", ["warmup.steps", "1.5", "integer"]),
        ("warmup.steps=true", ["warmup.steps", "True", "integer"]),
        ("warmup.distill=.nan", ["warmup.distill", "nan", "from 0"]),
        ("warmup.distill=.inf", ["warmup.distill", "inf"]),
        ("warmup=7", ["warmup", "7", "must hold the keys"]),
        ("warmup.crdomix=1", ["warmup.crdomix", "1", "True | False"]),
        ("precision=fp64", ["precision", "fp64", "bf16"]),
        ("model.network=resnet19", ["model.network", "resnet19", "resnet18"]),
        ("crop=[4096, 896]", ["crop", "4096", "fit into"]),
        ("warmup.batch=[1, 2, 3]", ["warmup.batch", "[1, 2, 3]", "source.sizes"]),
        ("warmup.batch=[0, 0]", ["warmup.batch", "[0, 0]", "not all 0"]),
        ("classes={road: [1, 2, 3]}", ["classes"]),
        ("source.ids={7: raod}", ["source.ids", "raod", "road"]),
        ("source.layout={images: rgb, labels: 'seg/*'}", ["source.layout", "PATTERN"]),
        ("source.ids={[1, 2]: road}", ["source.ids", "colours"]),
        ("classes={a: [1, 2, 3], b: [1, 2, 3]}", ["differ in their names and colours"]),
        ("classes=[road, car, road]", ["differ in their names and colours"]),
        ("evaluation.subsets={16: [road]}", ["evaluation.subsets"]),
        ("evaluation.subsets={few: [raod]}", ["evaluation.subsets.few", "raod"]),
        ("name=../out", ["name", "../out"]),
        ("model.network=smp/FPN", ["model.network", "smp/ARCHITECTURE/ENCODER"]),
        ("warmup.steps", ["warmup.steps", "key.sub=value"]),
        ("warmup.steps=[", ["warmup.steps=[", "YAML"]),
        (PYTHON_TAG, ["YAML", "could not determine a constructor"]),
    ],
)
def test_one_line_names_the_key_the_value_and_what_to_do(override, parts):
    line = error(ROOT / "config.yaml", override)
    for part in parts:
        assert part in line


def test_a_base_is_read_first(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {ROOT / 'config.yaml'}\nwarmup: {{steps: 7}}\n")
    cfg = load_config(tmp_path / "a.yaml", ["warmup.distill=1"])
    assert (cfg.warmup.steps, cfg.warmup.distill, cfg.warmup.strong) == (7, 1, 0.4)


def test_classes_and_ids_replace_those_of_the_base_whole(tmp_path):
    own = "classes: {x: [1, 2, 3], y: [4, 5, 6]}\nsource: {ids: {3: x, 9: null}}\n"
    (tmp_path / "a.yaml").write_text(f"base: {ROOT / 'config.yaml'}\n{own}")
    cfg = load_config(tmp_path / "a.yaml")
    assert classes(cfg) == {"x": (1, 2, 3), "y": (4, 5, 6)}
    assert label_values(cfg.source.ids, classes(cfg)) == {3: 0, 9: 255}


BROKEN = ["", "- 1", "a: [", "warmup: {steps: 1, steps: 2}", "\x00", "base: missing.yaml"]
BROKEN += ["base: 7", "[" * 100000, f"{'x' * 500000}: 1"]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert str(tmp_path) in error(path)
    assert len(error(path)) < 500


def test_a_missing_file_and_a_missing_key(tmp_path):
    assert "cannot be read" in error(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("name: a\n")
    assert "missing" in error(tmp_path / "a.yaml")


@pytest.mark.parametrize(("count", "valid"), [(1, False), (2, True), (254, True), (255, False)])
def test_2_to_254_classes(count, valid):
    listing = ", ".join(f"c{k}: [{k}, 0, 0]" for k in range(count))
    override = [f"classes={{{listing}}}"]
    if valid:
        assert len(classes(load_config(ROOT / "config.yaml", override))) == count
    else:
        assert "classes" in error(ROOT / "config.yaml", *override)


def test_the_built_in_label_values():
    names = list(classes(load_config(ROOT / "config.yaml")))
    cityscapes, synthia = label_values("cityscapes", names), label_values("synthia", names)

    def order(values):
        return " ".join(str(next(v for v, k in values.items() if k == c)) for c in range(19))

    assert order(cityscapes) == "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33"
    assert order(synthia) == "3 4 2 21 5 7 15 9 6 16 1 10 17 8 18 19 20 12 11"
    ignored = [v for v, k in cityscapes.items() if k == 255]
    assert ignored == [*range(7), 9, 10, 14, 15, 16, 18, 29, 30, 34, 255]
    mapillary = label_values("mapillary", names)
    assert (mapillary[21], mapillary[47], mapillary[27]) == (12, 5, 10)  # rider, pole, sky
    assert (len(mapillary), sum(k != 255 for k in mapillary.values())) == (66, 25)
    second = label_values("mapillary_v2", names)
    assert (second[54], second[45], second[108], second[115]) == (0, 255, 13, 255)
    assert (len(second), sum(k != 255 for k in second.values())) == (124, 57)
    two = dict.fromkeys([*range(19), 255], 255) | {10: 0, 0: 1}
    assert label_values("train_ids", ["sky", "road"]) == two
    assert label_values("index", ["a", "b"]) == {0: 0, 1: 1, 255: 255}
    assert label_values("cityscapes", ["sky"])[7] == 255

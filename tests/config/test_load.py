"""Loading a configuration: sources, the order of layers, overrides, and files of other versions."""

import pytest
import yaml

import flowgrain
from flowgrain import METHODS, Config, SettingsError, load_config
from flowgrain.config.explain import setting_paths
from flowgrain.config.load import merge, parse_overrides, recipe_names
from flowgrain.config.show import inline
from flowgrain.yaml_text import check_yaml


def at(config, path):
    values = config.to_dict()
    for part in path.split("."):
        values = values[part]
    return values


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


# ---------------------------------------------------------------------- sources


def test_the_default_is_the_demo():
    assert load_config() == load_config("demo")
    assert load_config().name == "demo"


@pytest.mark.parametrize(
    "spelling", ["mixgrpo_flash", "MixGRPO-Flash", "mixgrpo flash", "MIXGRPOFLASH"]
)
def test_a_method_by_any_spelling_of_its_name(spelling):
    config = load_config(spelling)
    assert config == load_config("mixgrpo_flash")
    assert (config.name, config.method.name) == ("mixgrpo_flash", "mixgrpo_flash")
    assert load_config("g2rpo", {"method.name": spelling}).method.name == "mixgrpo_flash"


def test_a_recipe_of_a_model():
    config = load_config("flux/g2rpo")
    assert (config.name, config.method.name, config.model.name) == ("flux-g2rpo", "g2rpo", "flux")


def test_a_method_on_another_model():
    config = load_config("g2rpo", {"model.name": "flux"})
    assert config.model.path == "black-forest-labs/FLUX.1-dev"
    assert config.model.height == 720
    assert list(config.reward_weights) == ["hps", "clip"]
    assert load_config("g2rpo", {"model.name": "FLUX"}) == config
    sd3 = load_config("g2rpo", ["model.name=sd3", "model.height=256"])
    assert (sd3.model.height, sd3.model.width) == (256, 512)


def test_a_yaml_file(tmp_path):
    file = write(
        tmp_path / "mine.yaml",
        {"method": {"name": "g2rpo", "granularities": [1]}, "training": {"max_steps": 7}},
    )
    for source in (file, str(file)):
        config = load_config(source, {"training.max_steps": 8})
        assert (config.name, config.training.max_steps) == ("mine", 8)
        assert config.method.granularities == (1,)
    assert load_config(write(tmp_path / "b.yaml", {**config.to_dict(), "name": "x"})).name == "x"


def test_a_list_with_too_many_values():
    with pytest.raises(ValueError, match=r"more than 100,000 values, counting aliases"):
        check_yaml(f"[{','.join(['1'] * 100_001)}]")


def test_the_directory_of_a_run(tmp_path):
    config = load_config("mixgrpo", {"method.window_size": 2, "runtime.seed": 5})
    saved = {"config": config.to_dict(), "given": [], "versions": {"flowgrain": "0.2.0"}}
    write(tmp_path / "run.yaml", saved)
    for source in (tmp_path, tmp_path / "run.yaml"):
        assert load_config(source) == config
        assert load_config(source, {"training.max_steps": 5}).training.max_steps == 5


def test_a_yaml_file_with_a_recipe_block_is_a_source(tmp_path):
    values = {"recipe": {"title": "mine"}, "method": {"name": "g2rpo"}}
    assert load_config(write(tmp_path / "a.yaml", values)).method.name == "g2rpo"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dmo", "There is no recipe, method, file or run 'dmo'. Did you mean 'demo'?"),
        ("flux/grpo", "There is no recipe, method, file or run 'flux/grpo'. Did you mean 'flux/"),
        ("g2rp", "There is no recipe, method, file or run 'g2rp'. Did you mean 'g2rpo'?"),
        ("nowhere.yaml", "nowhere.yaml: there is no such file. Give the path of a YAML file."),
    ],
)
def test_an_unknown_source_names_the_nearest(source, message):
    with pytest.raises(SettingsError) as error:
        load_config(source)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "a.yaml: line 2 is not YAML: expected node content."),
        ("- a\n- b\n", "a.yaml: contains a list. Write sections such as training: "),
        ("3: 4\n", "keys must be text. Write `section:` and below it `key: value`"),
        ("method: {name: g2rpo}\nsampling: {num_step: 3}\n", "sampling.num_step is not a setting"),
        ("training: {max_steps: 3}\n", "method.name: required, but not set"),
        ("method: g2rpo\n", "write method.name=g2rpo instead of method=g2rpo"),
        ("method: {name: g2rpo}\nrewards: {oracle: 1}\n", "rewards is a list"),
        ("method: {name: g2rpo}\ntraining: 3\n", "training"),
    ],
)
def test_an_unusable_yaml_file(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingsError) as error:
        load_config(tmp_path / "a.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"a\.yaml: not UTF-8 text .* Save it as UTF-8\.$"):
        load_config(tmp_path / "a.yaml")


def test_a_run_of_an_older_version_names_this_version(tmp_path):
    write(
        tmp_path / "run.yaml", {"settings": {"group_size": 3}, "versions": {"flowgrain": "0.1.7"}}
    )
    with pytest.raises(SettingsError) as error:
        load_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'run.yaml'}: written by flowgrain 0.1.7, and not readable by flowgrain "
        f"{flowgrain.__version__}. Install flowgrain==0.1.7, or start a new run."
    )
    write(tmp_path / "run.yaml", {"settings": {"group_size": 3}})  # without versions
    with pytest.raises(SettingsError, match=r"written by flowgrain 0\.1, "):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"given": []}, "contains no settings of a run"),
        ({"config": [1]}, "`config` is not a mapping of sections"),
    ],
)
def test_a_run_file_without_settings(tmp_path, values, message):
    write(tmp_path / "run.yaml", values)
    with pytest.raises(SettingsError, match=message):
        load_config(tmp_path)


def test_a_directory_that_is_not_a_run(tmp_path):
    with pytest.raises(SettingsError, match=r"not the directory of a run. It has no run\.yaml"):
        load_config(tmp_path)


# ---------------------------------------------------------------------- layers


def test_every_layer_replaces_the_one_before(tmp_path):
    """Defaults of fields, the method, the model, the recipe or file, the preset, the overrides."""
    field = Config.model_fields["sampling"].default
    assert (field.num_steps, field.batch_size, field.guidance_scale) == (16, 128, 1.0)
    # The method sets the length of the grid.
    assert load_config("flow_grpo").sampling.num_steps == 10
    # The model sets guidance and the batch size, and leaves the method's grid.
    model = load_config("flow_grpo", {"model.name": "flux"})
    assert model.sampling.num_steps == 10
    assert (model.sampling.batch_size, model.sampling.guidance_scale) == (8, 3.5)
    assert model.training.max_steps == 300
    # A file replaces values of the method and of the model.
    values = {
        "method": {"name": "flow_grpo"},
        "model": {"name": "flux"},
        "sampling": {"num_steps": 12, "batch_size": 6},
    }
    file = write(tmp_path / "mine.yaml", values)
    recipe = load_config(file)
    assert (recipe.sampling.num_steps, recipe.sampling.batch_size) == (12, 6)
    assert recipe.sampling.guidance_scale == 3.5
    # A preset replaces values of the file.
    preset = load_config(file, preset="one-gpu")
    assert (preset.sampling.num_steps, preset.sampling.batch_size) == (12, 4)
    # Overrides replace all.
    words = ["sampling.batch_size=5", "sampling.num_steps=9", "model.height=64"]
    last = load_config(file, words, preset="one-gpu")
    assert (last.sampling.num_steps, last.sampling.batch_size, last.model.height) == (9, 5, 64)


def test_an_override_of_the_method_brings_its_defaults(tmp_path):
    file = write(tmp_path / "a.yaml", {"method": {"name": "g2rpo", "group_size": 6}})
    config = load_config(file, {"method.name": "flow_grpo"})
    assert (config.method.name, config.method.group_size) == ("flow_grpo", 6)
    assert (config.sampling.num_steps, config.method.kl_weight) == (10, 0.04)
    with pytest.raises(SettingsError, match="'flow_grpo' has no option 'granularities'"):
        load_config("demo", {"method.name": "flow_grpo"})  # the demo sets granularities


def test_a_list_replaces_a_list():
    config = load_config("flux/g2rpo", {"rewards": ["clip"], "method.granularities": [2]})
    assert list(config.reward_weights) == ["clip"]
    assert config.method.granularities == (2,)
    assert merge({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}


def test_a_change_keeps_all_other_values():
    config = load_config("flux/g2rpo", {"runtime.seed": 7})
    again = config.with_changes({"training.max_steps": 3, "method.group_size": 4})
    assert again.training.max_steps == 3
    assert again.method.group_size == 4
    before, after = config.to_dict(), again.to_dict()
    before["training"]["max_steps"], before["method"]["group_size"] = 3, 4
    assert before == after
    assert config.training.max_steps == 301  # the configuration itself is unchanged
    with pytest.raises(SettingsError, match="must be greater than or equal to 1"):
        config.with_changes({"training.max_steps": 0})


# ---------------------------------------------------------------------- overrides


def test_overrides_are_yaml_values():
    words = [
        "optimizer.learning_rate=1e-4",
        "optimizer.betas=[0.9, 0.95]",
        "method.granularities=[1,2]",
        "rewards=[oracle,{name: towers, weight: 0.5}]",
        "data.prompts=null",
        "name=mine",
        "model.t5=false",
        "runtime.plugins=[]",
        "evaluation.guidance_scale=~",
    ]
    config = load_config("g2rpo", words)
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.method.granularities == (1, 2)
    assert config.reward_weights == {"oracle": 1.0, "towers": 0.5}
    assert config.data.prompts is None
    assert config.model.t5 is False
    assert parse_overrides(["a.b=1", "a.c=x"]) == {"a": {"b": 1, "c": "x"}}
    assert parse_overrides({"a.b": (1, 2)}) == {"a": {"b": [1, 2]}}


@pytest.mark.parametrize(
    "source",
    [
        "mixgrpo",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("densegrpo", "diffusionnft", "flux/g2rpo")
        ),
    ],
)
def test_every_setting_can_be_written_as_a_word(source):
    """Each value of a configuration, written as an override, gives the same value again."""
    config = load_config(source)
    paths = list(setting_paths(type(config.method)))
    assert len(paths) > 60
    words = [f"{path}={inline(at(config, path))}" for path in paths]
    assert load_config(source, words) == config
    for path, word in zip(paths, words, strict=True):
        assert at(load_config(source, [word]), path) == at(config, path), word


def test_overrides_may_be_nested_sections():
    config = load_config("g2rpo", {"evaluation": {"every": 2}, "method": {"eta": 0.3}})
    assert (config.evaluation.every, config.evaluation.num_steps) == (2, 16)
    assert (config.method.eta, config.method.name) == (0.3, "g2rpo")


# ---------------------------------------------------------------------- plugins

PLUGIN = '''
from flowgrain import METHODS, register


@register
class FromFile(METHODS.get("g2rpo")):
    """A method of a plugin file."""

    name = "{name}"
    granularities: tuple[int, ...] = (1,)
'''


@pytest.fixture
def own_methods(monkeypatch):
    """Methods that are registered during a test are forgotten after it."""
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS._objects))


@pytest.mark.usefixtures("own_methods")
def test_plugins_register_before_the_settings_are_read(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN.format(name="from_argument"))
    config = load_config("from_argument", plugins=[file])
    assert config.method.granularities == (1,)
    assert config.runtime.plugins == (str(file),)
    assert load_config(write(tmp_path / "again.yaml", config.to_dict())) == config.model_copy()


@pytest.mark.usefixtures("own_methods")
def test_plugins_of_a_setting_and_of_a_file(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(PLUGIN.format(name="from_setting"))
    two.write_text(PLUGIN.format(name="from_yaml"))
    assert (
        load_config("from_setting", {"runtime.plugins": [str(one)]}).method.name == "from_setting"
    )
    values = {"method": {"name": "from_yaml"}, "runtime": {"plugins": [str(two)]}}
    config = load_config(write(tmp_path / "a.yaml", values), plugins=[one])
    assert config.runtime.plugins == (str(two), str(one))


def test_a_plugin_that_does_not_exist(tmp_path):
    with pytest.raises(SettingsError, match=r"plugin .*missing\.py: there is no such file"):
        load_config("g2rpo", plugins=[tmp_path / "missing.py"])


def test_recipe_names_begin_with_the_demo():
    names = recipe_names()
    assert names[0] == "demo"
    assert names[1:] == sorted(names[1:])
    assert len(names) == len(set(names))

"""The settings of the watch."""

import pytest

from flowgrain import SettingsError, load_config


def test_off_is_a_word_although_yaml_reads_it_as_false():
    assert load_config("g2rpo", ["watch.action=off"]).watch.action == "off"
    with pytest.raises(SettingsError, match=r"watch\.action=true"):
        load_config("g2rpo", ["watch.action=on"])


def test_one_monitor_needs_no_list():
    assert load_config("g2rpo", ["watch.monitor=dark"]).watch.monitor == ("dark",)
    assert load_config("g2rpo", ["watch.monitor=all"]).watch.monitor == "all"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["watch.monitor=[]"], r"watch\.monitor=\[\]: nothing can raise an alarm"),
        (["watch.monitor=darkness"], "no monitor or evaluated reward 'darkness'"),
        (["watch.monitor=diversity", "watch.features=none"], "'diversity' needs a feature network"),
        (["watch.monitor=oracle"], "'oracle' is trained"),
    ],
)
def test_a_watch_that_cannot_warn_is_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        load_config("g2rpo", words)

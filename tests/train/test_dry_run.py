"""`vgen train CONFIG --dry-run` counts the parameters of every config that comes with vgen, without its data."""

import re

import pytest
import yaml

from vgen.cli.main import main
from vgen.recipes import config_names, config_summary


@pytest.mark.parametrize("name", config_names())
def test_parameters_are_counted_without_data(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(["train", name, "--dry-run"])
    printed, error = capsys.readouterr()
    assert code == 0, error
    counts = [int(count.replace(",", "")) for count in re.findall(r"^# \w+: ([\d,]+) parameters$", printed, re.M)]
    assert counts and min(counts) > 100_000 and "# not there yet, so not checked: " in printed
    assert yaml.safe_load(printed)["system"] and not any(tmp_path.iterdir())
    said = re.search(r"([\d.,]+) (M|B)\b(?: parameters|\))", config_summary(name))
    if said and "without" not in config_summary(name):  # the first line of a config says how large its model is
        size = float(said[1].replace(",", "")) * {"M": 1e6, "B": 1e9}[said[2]]
        assert counts[0] == pytest.approx(size, rel=0.03), f"{name} says {said[0]}, made {counts[0]:,}"

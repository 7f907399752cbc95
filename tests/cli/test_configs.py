"""`vgen configs`, and configs by name on the command line."""

import pytest

from vgen.cli.main import main
from vgen.recipes import config_folder, config_names, config_summary


def test_the_list_has_a_line_for_each(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, config_summary(name)] for name in config_names()]


def test_a_folder_of_them(capsys):
    assert main(["configs", "titok"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for name in config_names() if name.startswith("titok/")] and len(names) > 3


def test_one_is_printed_as_it_is(capsys):
    assert main(["configs", "emoji/kl"]) == 0
    assert capsys.readouterr().out == (config_folder() / "emoji" / "kl.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [["configs"], ["train"]])
def test_a_name_with_a_mistake_names_the_nearest(command, capsys):
    assert main([*command, "emoji/anyordr"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'emoji/anyorder'" in error and error.count("\n") == 1

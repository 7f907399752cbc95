"""The one place of sampling settings: whatever takes them takes these names and defaults."""

import argparse
import inspect
from dataclasses import asdict, fields

import pytest

from vgen.cli.sample import SETTINGS, add_arguments
from vgen.convert.published import PublishedSampling
from vgen.errors import VgenError
from vgen.pipelines.visual import Sampler, VisualPipeline
from vgen.samplers.settings import Sampling
from vgen.train.systems.generator import SamplingConfig

NAMES = [part.name for part in fields(Sampling)]


@pytest.mark.parametrize("kind", [Sampler, VisualPipeline])
def test_the_constructor_of_a_pipeline_shows_every_setting_with_its_default(kind):
    shown = list(inspect.signature(kind.__init__).parameters.values())
    assert [part.name for part in shown] == ["self", "tokenizer", "model", *NAMES]
    assert [part.default for part in shown[3:]] == [part.default for part in fields(Sampling)]


@pytest.mark.parametrize("kind, own", [(PublishedSampling, {"precision", "calls"}), (SamplingConfig, set())])
def test_presets_and_trainings_have_the_same_settings(kind, own):
    assert {part.name for part in fields(kind)} == {*NAMES, *own}
    same = {name: value for name, value in asdict(kind()).items() if name not in ("order", "guidance_scale", *own)}
    assert same.items() <= asdict(Sampling()).items()


def test_the_command_line_takes_names_ranges_and_help_from_there(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = "".join(parser.format_help().split())  # lines break at hyphens, too
    for name in ("order", "steps", *SETTINGS):
        assert f"--{name.replace('_', '-')}" in text
        assert "".join(Sampling.named(name).metadata["help"].split()) in text
    assert parser.parse_args(["--top-p", "0.5", "--low-steps", "3"]).low_steps == 3
    for wrong in (
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--top-k", "-1"],
        ["--temperature", "-1"],
        ["--low-steps", "0"],
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"temperature": -0.5}, "sampling.temperature must be at least 0, found -0.5"),
        ({"top_p": 0.0}, "sampling.top_p must be above 0, found 0"),
        ({"top_p": 1.5}, "sampling.top_p must be at most 1, found 1.5"),
        ({"steps": 0}, "sampling.steps must be at least 1, found 0"),
        ({"clip": 0.0}, "sampling.clip must be above 0"),
    ],
)
def test_numbers_outside_of_their_range_are_refused(wrong, said):
    with pytest.raises(VgenError, match=said):
        Sampling(**wrong).check_ranges("sampling.")
    Sampling().check_ranges()


def test_what_is_not_asked_for_stays():
    assert Sampling(top_k=5).given(top_k=None, temperature=0.0) == Sampling(top_k=5, temperature=0.0)

"""`vgen sample` on a tiny saved pipeline: files, traces, JSON, and one sentence for every mistake."""

import argparse
import json
import os
import re
import threading

import pytest
from PIL import Image

from vgen.cli.main import main
from vgen.cli.sample import _default_prompts, add_arguments
from vgen.samplers.guidance import SCHEDULES


def sample(folder, *arguments):
    return main(["sample", "--model", str(folder), "--device", "cpu", *map(str, arguments)])


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".vgen.lock")


def test_one_picture_a_sheet_and_a_folder(pipeline_folder, tmp_path, capsys):
    assert sample(pipeline_folder, "--prompt", "red apple", "--out", tmp_path / "one.png") == 0
    assert Image.open(tmp_path / "one.png").size == (8, 8)
    assert sample(pipeline_folder, "--prompt", "red apple", "--num-images", 4, "--out", tmp_path / "four.webp") == 0
    assert Image.open(tmp_path / "four.webp").width > 16
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "\ufeff# comment\nred\x0capple\u2028a\r\n\na cat\n", encoding="utf-8"
    )  # a form feed ends no line
    assert sample(pipeline_folder, "--prompt-file", prompts, "--out", tmp_path / "folder") == 0
    assert names(tmp_path / "folder") == ["00000.png", "00001.png", "samples.jsonl"]
    assert "2 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    "contents",
    ["\ufeffred apple\r\n# no\r\na\x0ccat\u2028mat\r\n".encode(), "red apple\na\x0ccat\u2028mat".encode("utf-16")],
    ids=["utf-8-bom", "utf-16"],
)
def test_prompt_files_as_editors_and_pipes_give_them(pipeline_folder, tmp_path, contents):
    prompts = tmp_path / "prompts.txt"
    os.mkfifo(prompts)
    writer = threading.Thread(target=prompts.write_bytes, args=(contents,))
    writer.start()
    assert sample(pipeline_folder, "--prompt-file", prompts, "--out", tmp_path / "folder") == 0
    writer.join()
    lines = (tmp_path / "folder" / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in lines] == ["red apple", "a\x0ccat\u2028mat"]


def test_trace_and_json(pipeline_folder, tmp_path, capsys):
    trace = tmp_path / "trace.gif"
    code = sample(
        pipeline_folder,
        "--class-label",
        1,
        "--order",
        "raster",
        "--out",
        tmp_path / "a.png",
        "--trace",
        trace,
        "--json",
    )
    assert code == 0
    assert Image.open(trace).n_frames == 16
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["order"] == "raster" and report["calls"] == 16 and report["guidance_scale"] == 2.0
    assert report["images_per_second"] > 0 and report["tokens_per_second"] > 0


def test_list_words(pipeline_folder, capsys):
    assert sample(pipeline_folder, "--list-words") == 0
    assert capsys.readouterr().out.split() == ["a", "apple", "cat", "mat", "on", "red"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", "unicorn"], ["unicorn"]),
        (["--order", "sideways", "--prompt", "cat"], ["sideways"]),
        (["--order", "", "--prompt", "cat"], ["unknown order ''"]),
        (["--order", "regions-5", "--prompt", "cat"], ["regions"]),
        (["--order-option", "steps", "--prompt", "cat"], ["KEY=VALUE"]),
        (["--prompt-file", "/nowhere.txt"], ["/nowhere.txt"]),
        (["--prompt", "cat", "--trace", "trace.mp3"], [".gif"]),
        (["--prompt", "cat", "--seed", "-4"], ["seed"]),
        (["--prompt", "cat", "--device", "abacus"], ["abacus"]),
        (["--class-label", "77"], ["77"]),
        (["--prompt", "cat", "--size", "16x8"], ["make pictures of 8x8, got the size 16x8"]),
        (["--prompt", "cat", "--size", "large"], ["--size", "192x256"]),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(pipeline_folder, tmp_path, capsys, arguments, words):
    assert sample(pipeline_folder, "--out", tmp_path / "x.png", *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.startswith("vgen sample: ")
    assert all(word in error for word in words)
    assert not (tmp_path / "x.png").exists()


def test_missing_models(tmp_path, capsys):
    assert main(["sample", "--model", "unheard-of", "--prompt", "cat"]) == 2
    assert main(["sample", "--model", str(tmp_path), "--prompt", "cat"]) == 2
    (tmp_path / "config.json").write_text("{}")
    capsys.readouterr()
    assert main(["sample", "--model", str(tmp_path), "--prompt", "cat"]) == 2
    assert "holds one model, expected a pipeline" in capsys.readouterr().err
    (tmp_path / "weights.pt").write_bytes(b"x")
    assert main(["sample", "--model", str(tmp_path / "weights.pt"), "--prompt", "cat"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback(pipeline_folder, capsys):
    assert sample(pipeline_folder, "--prompt", "unicorn", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_without_a_prompt_examples_are_made_that_the_model_has_words_for(
    pipeline_folder, tmp_path, monkeypatch, capsys
):
    path = pipeline_folder / "model" / "vocabulary.json"
    words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    known = next(word for word in words if not word.startswith("<"))
    monkeypatch.setattr("vgen.cli.sample.PROMPTS", ("unheard of", known))
    assert _default_prompts(str(pipeline_folder)) == (known,)
    monkeypatch.setattr("vgen.cli.sample.PROMPTS", ("unheard of", f"{known} unheard"))
    assert main(["sample", "--model", str(pipeline_folder), "--out", str(tmp_path / "x.png")]) == 2
    said = capsys.readouterr().err
    assert "give --prompt TEXT" in said and known in said and "--list-words" in said
    assert _default_prompts("emoji") == ("unheard of", f"{known} unheard")


def test_help_names_every_guidance_schedule():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = next(action.help for action in parser._actions if "--guidance-schedule" in action.option_strings)
    assert sorted(re.findall(r"[a-z-]*(?:constant|linear|cosine)[a-z-]*", text)) == sorted(SCHEDULES)

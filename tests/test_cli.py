"""The command line, run as a person runs it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from clips import write_audio
from typer.testing import CliRunner

from vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenProcessor, __version__
from vjepa_qwen.cli import app


@pytest.fixture
def run(monkeypatch, tiny_checkpoint):
    """`vjepa-qwen` in this process, on the tiny checkpoint in the place of the toy."""
    monkeypatch.setattr("vjepa_qwen.cli.TOY_CHECKPOINT", tiny_checkpoint)

    def run(*arguments):
        command, *rest = map(str, arguments)
        return CliRunner().invoke(app, [command, "--model", tiny_checkpoint, *rest])

    return run


def test_describe_prints_events_tokens_and_text(run, clips):
    result = run("describe", clips[0], "--max-new-tokens", 5)
    assert result.exit_code == 0, result.output
    assert "start (s)" in result.stdout and "video tokens" in result.stdout
    assert "toy model" in result.stderr and "toy model" not in result.stdout


def test_json_is_all_that_is_printed_and_agrees_with_the_python_api(run, clips, tiny_checkpoint):
    result = run("describe", *clips[:2], "--json", "--max-new-tokens", 5, "--prompt", "What now?")
    assert result.exit_code == 0, result.output
    documents = json.loads(result.stdout)
    assert [document["video"] for document in documents] == clips[:2]
    processor = VJepaQwenProcessor.from_pretrained(tiny_checkpoint)
    model = VJepaQwenForConditionalGeneration.from_pretrained(tiny_checkpoint)
    video = processor.bind(model).segment(clips[0])[0]
    document = documents[0]
    assert document["num_video_tokens"] == video.num_events == len(document["events"])
    assert document["duration_seconds"] == video.duration_seconds
    assert document["events"][0] == {"start_seconds": 0.0, "end_seconds": video.events[0].end_seconds, "score": 0.0}
    content = [{"type": "video", "video": clips[0]}, {"type": "text", "text": "What now?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert document["text"] == processor.decode(tokens, skip_special_tokens=True).split("</think>")[-1].strip()


def test_segment_gives_the_events_without_a_text(run, clips):
    result = run("segment", clips[0], "--json", "--num-frames", 8)
    (document,) = json.loads(result.stdout)
    assert document["num_frames"] == 8
    assert "text" not in document and document["events"][-1]["end_seconds"] == pytest.approx(3.0)


def test_bad_files_are_one_line_each_and_the_others_are_done(run, clips, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    bad = [tmp_path / name for name in ("missing.mp4", "empty.mp4", "text.mp4")]
    bad.append(write_audio(tmp_path / "sound.m4a"))
    result = run("segment", bad[0], clips[0], *bad[1:])
    assert result.exit_code == 1
    for path, reason in zip(bad, ("no such file", "is empty", "", "only audio"), strict=True):
        (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"{path}: ")]
        assert reason in line
    assert clips[0].rsplit("/", 1)[1] in result.stdout.replace("\n", "")
    documents = json.loads(run("segment", bad[0], clips[0], "--json").stdout)
    assert documents[0] == {"video": str(bad[0]), "error": "no such file"}
    assert documents[1]["events"]


def test_a_name_is_printed_as_it_is(run, clips, tmp_path):
    """Brackets are rich's markup and long lines are its to break: neither may change a path."""
    folder = tmp_path / "a["  # "[/b]" would close a tag that was never opened
    folder.mkdir()
    video = folder / f"b] {'long ' * 20}[final] :smile:.mp4"
    shutil.copy(clips[0], video)
    result = run("segment", video, folder / "missing].mp4")
    assert result.exit_code == 1
    assert str(video) in result.stdout.splitlines()
    assert f"{folder}/missing].mp4: no such file" in result.stderr.splitlines()


def test_without_model_it_is_the_toy(clips):
    result = CliRunner().invoke(app, ["describe", clips[0], "--json"])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "toy model" in line]
    assert "synthetic clips only" in line and "--model" in line
    (document,) = json.loads(result.stdout)
    assert "video" in document["text"] and "<" not in document["text"]


def test_a_model_by_name_is_loaded_with_its_own_code(run, clips, tiny_checkpoint, tmp_path):
    """In a process of its own: the code of the repository is a second copy of the modules."""
    arguments = ["describe", clips[0], "--model", tiny_checkpoint, "--max-new-tokens", "5", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", "from vjepa_qwen.cli import main; main()", *arguments],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "toy model" not in result.stderr
    assert json.loads(result.stdout) == json.loads(run("describe", *arguments[1:2], *arguments[4:]).stdout)
    assert list(tmp_path.rglob("modeling_vjepa_qwen.py"))


def test_device_and_dtype_are_honoured_and_checked(run, clips):
    options = ("--max-new-tokens", 2, "--json")
    assert run("describe", clips[0], "--device", "cpu", "--dtype", "bfloat16", *options).exit_code == 0
    result = run("describe", clips[0], "--device", "typewriter")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("--device typewriter: ")
    result = run("describe", clips[0], "--dtype", "float")
    assert result.exit_code == 2 and "bfloat16" in result.stderr


def test_options_that_do_not_fit_are_a_clear_error(run, clips):
    result = run("segment", clips[0], "--num-frames", 7)
    assert result.exit_code == 1
    assert "num_frames (7) must be a multiple of 2" in result.stderr


def test_a_part_of_a_video(run, clips):
    (document,) = json.loads(run("segment", clips[0], "--start", 0.5, "--end", 2.5, "--json").stdout)
    assert document["events"][0]["start_seconds"] == 0.5 and document["events"][-1]["end_seconds"] == 2.5
    result = run("segment", clips[0], "--start", 7)
    assert result.exit_code == 1
    assert "start_seconds (7.0)" in result.stderr and len(result.stderr.splitlines()) == 2


def test_interruption_ends_the_command_without_a_traceback(run, clips, monkeypatch):
    def interrupt(tower, pixel_values_videos, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("vjepa_qwen.modeling_vjepa_qwen.VJepaQwenVisionTower.forward", interrupt)
    result = run("segment", *clips)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_a_model_that_is_not_there_is_one_line(clips, tmp_path):
    result = CliRunner().invoke(app, ["segment", clips[0], "--model", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"--model {tmp_path / 'nothing'}: ")
    assert isinstance(result.exception, SystemExit)  # and no traceback


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == __version__


def test_help_imports_nothing_heavy():
    """What makes `--help` answer at once; a time would say more about the machine."""
    script = "import sys; from vjepa_qwen.cli import app; app(['describe', '--help'], standalone_mode=False); "
    script += "print(sorted({'torch', 'transformers', 'numpy', 'av', 'scipy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"

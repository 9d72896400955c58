"""The upload: checked first, with a card, private, resumable; and what comes back is what was sent."""

# ruff: noqa: F401, F811 (`release` is a fixture)

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import user_message
from fresh_process import run_fresh
from hub_server import HubServer
from test_convert_checkpoint import release, run
from typer.testing import CliRunner

from vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenProcessor
from vjepa_qwen.cli import app
from vjepa_qwen.upload_scripts import push_to_hub
from vjepa_qwen.upload_scripts.push_to_hub import check, check_link, main, make_card

CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
RESULTS = {
    "model": "tiny/pushed",
    "revision": None,
    "dataset": {"name": "synthetic-shorts", "split": "held-out", "num_samples": 100},
    "metrics": {
        "domain_accuracy": {"value": 0.875, "confidence_interval": [0.8, 0.93]},
        "boundary_f1": {"value": 0.99, "confidence_interval": [0.98, 1.0]},
    },
    "command": "vjepa-qwen evaluate --model tiny/pushed",
    "seed": 7,
}
BASES = ("facebook/vjepa2-vitl-fpc64-256", "Qwen/Qwen3.5-27B")


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def online(hub, monkeypatch):
    """This process, whose huggingface_hub is imported and offline, talks to the Hub on loopback."""
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def unchecked(monkeypatch):
    """The check has tests of its own, and takes long."""
    monkeypatch.setattr(push_to_hub, "check", lambda folder: None)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    return str(path)


def files_on_hub(hub, name):
    return {path for path in hub.files(name) if path != ".gitattributes"}


LOAD = """
import torch
from transformers import pipeline

messages, chat = json.loads(sys.argv[1]), json.loads(sys.argv[2])
pipe = pipeline(model="tiny/pushed", revision="v1", trust_remote_code=True)
inputs = pipe.processor.apply_chat_template(messages, **chat)
with torch.no_grad():
    print(json.dumps(pipe.model(**inputs).logits.tolist()))
"""


@pytest.mark.slow
def test_a_light_checkpoint_is_checked_and_pushed_and_loads_again_with_equal_logits(
    hub,
    release,
    results,
    clips,
    tmp_path,
):
    """The command, as a person runs it; the language model is on the Hub, and stays there."""
    commit = hub.add("tiny/language-model", release[0] / "language_model")
    folder = tmp_path / "light"
    run(release, folder)
    model = VJepaQwenForConditionalGeneration.from_pretrained(folder)
    inputs = VJepaQwenProcessor.from_pretrained(folder).bind(model).apply_chat_template(user_message(clips[0]), **CHAT)
    with torch.no_grad():
        logits = model(**inputs).logits
    config = json.loads((folder / "config.json").read_text())
    config |= {"language_model_name_or_path": "tiny/language-model", "language_model_revision": commit}
    (folder / "config.json").write_text(json.dumps(config))

    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    command = [sys.executable, "-c", "from vjepa_qwen.cli import main; main()", "push", "tiny/pushed", str(folder)]
    process = subprocess.run(
        [*command, "--tag", "v1", "--results", results], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "loads without the package, with equal logits and tokens" in process.stdout
    assert process.stdout.splitlines()[-1].endswith("(v1)")
    repository = hub.repositories["tiny/pushed"]
    assert repository.private and set(repository.tags) == {"v1"}
    assert files_on_hub(hub, "tiny/pushed") == {path.name for path in folder.iterdir()}
    assert (
        "base_model:\n- facebook/vjepa2-vitl-fpc64-256\n- tiny/language-model\n" in (folder / "README.md").read_text()
    )

    reader = {**hub.environment, "HF_TOKEN": hub.token}
    pushed = run_fresh(LOAD, tmp_path, user_message(clips[0]), CHAT, **reader)
    torch.testing.assert_close(torch.tensor(pushed), logits, atol=1e-5, rtol=0)


def test_a_dry_run_does_all_but_the_upload(hub, online, unchecked, checkpoint, results):
    arguments = ["push", "tiny/pushed", str(checkpoint), "--dry-run", "--results", results]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in result.output and "nothing was uploaded" in result.output
    assert (checkpoint / "README.md").exists()
    assert not hub.requests and not hub.repositories


def test_pushing_again_changes_nothing_and_an_interrupted_upload_goes_on(hub, online, unchecked, checkpoint):
    hub.refuse_uploads = True
    with pytest.raises(OSError, match="tiny/pushed: the upload was interrupted .* run the same again"):
        main(["tiny/pushed", str(checkpoint)])
    assert not files_on_hub(hub, "tiny/pushed")

    hub.refuse_uploads = False
    main(["tiny/pushed", str(checkpoint)])
    repository = hub.repositories["tiny/pushed"]
    assert repository.private
    assert files_on_hub(hub, "tiny/pushed") == {path.name for path in checkpoint.iterdir() if path.is_file()}
    commits = len(repository.commits)
    hub.requests.clear()
    main(["tiny/pushed", str(checkpoint)])
    assert len(repository.commits) == commits
    assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]


def test_what_an_earlier_version_left_is_removed_and_a_tag_does_not_move(hub, online, unchecked, checkpoint):
    main(["tiny/pushed", str(checkpoint), "--tag", "v1"])
    first = hub.repositories["tiny/pushed"].tags["v1"]
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    (checkpoint / "event_segmentation.py").unlink()
    with pytest.raises(ValueError, match=rf"tag \(v1\) of tiny/pushed must not move: it names commit {first}"):
        main(["tiny/pushed", str(checkpoint), "--tag", "v1"])
    files = files_on_hub(hub, "tiny/pushed")
    assert "model-00001-of-00001.safetensors" in files
    assert not {"model.safetensors", "event_segmentation.py"} & files
    main(["tiny/pushed", str(checkpoint), "--tag", "v2"])
    assert hub.repositories["tiny/pushed"].tags["v1"] == first != hub.repositories["tiny/pushed"].tags["v2"]


def test_without_a_token_it_is_one_line(hub, online, unchecked, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    result = CliRunner().invoke(app, ["push", "tiny/pushed", str(checkpoint)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "401" in result.stderr.splitlines()[-1]


def test_a_release_is_converted_first_and_only_once(hub, online, unchecked, release, tmp_path):
    folder, output = str(release[0]), tmp_path / "converted"
    arguments = ["tiny/pushed", str(output), "--release", folder, "--experiment", "5", "--form", "full"]
    arguments += ["--tower", f"{folder}/tower", "--language-model", f"{folder}/language_model"]
    main([*arguments, "--dry-run"])
    written = (output / "conversion_report.json").stat().st_mtime_ns
    main(arguments)
    assert (output / "conversion_report.json").stat().st_mtime_ns == written
    assert "conversion_report.json" in files_on_hub(hub, "tiny/pushed")


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ({"language_model_name_or_path": "{folder}"}, "must be a repository on the Hub"),
        ({"language_model_name_or_path": "a/b", "language_model_revision": "main"}, r"\('main'\).*must be a commit"),
        ({"language_model_name_or_path": "a/b"}, r"\(None\).*must be a commit of a/b"),
    ],
)
def test_a_link_that_others_cannot_follow_is_refused(checkpoint, link, message):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {name: value.format(folder=checkpoint) for name, value in link.items()}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        check_link(str(checkpoint))


@pytest.mark.slow
def test_code_that_lacks_a_file_or_computes_something_else_is_refused(checkpoint, tiny_checkpoint):
    check(tiny_checkpoint)
    path = checkpoint / "modeling_vjepa_qwen.py"
    code = path.read_text()
    changed = code.replace("logits = self.lm_head(", "logits = 1.01 * self.lm_head(")
    assert changed != code
    path.write_text(changed)
    with pytest.raises(ValueError, match="its own code gives other logits than the installed package"):
        check(str(checkpoint))
    path.write_text(code)
    (checkpoint / "event_segmentation.py").unlink()
    with pytest.raises(ValueError, match="must load from its own files alone, but: .*event_segmentation"):
        check(str(checkpoint))


def read_card(card):
    _, header, body = str(card).split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_card_says_what_was_measured_and_by_whom(checkpoint, results):
    (checkpoint / "conversion_report.json").write_text(json.dumps({"experiment": "6"}))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"language_model_name_or_path": BASES[1], "language_model_revision": "0" * 40}
    (checkpoint / "config.json").write_text(json.dumps(config))
    card = make_card("tiny/pushed", str(checkpoint), "tiny/release@main", BASES, [results], "apache-2.0", "v1")
    metadata, body = read_card(card)
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "video-text-to-text"
    assert metadata["base_model"] == list(BASES) and metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["ko", "en"]
    (index,) = metadata["model-index"]
    (result,) = index["results"]
    assert result["dataset"] == {"name": "synthetic-shorts", "type": "synthetic-shorts", "split": "held-out"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "domain_accuracy": 0.875,
        "boundary_f1": 0.99,
    }
    measured, reported = body.split("### Reported by the research release")
    assert "| domain_accuracy | 0.875 | 0.8 to 0.93 |" in measured and RESULTS["command"] in measured
    assert "47.9" not in measured and "47.9" in reported and "not confirmed here" in reported
    assert 'revision="v1"' in body and "0" * 40 in body and "huggingface.co/tiny/release}" in body


def test_a_card_without_results_or_conversion_claims_nothing(checkpoint):
    metadata, body = read_card(make_card("tiny/pushed", str(checkpoint), None, BASES, [], "mit", "v1"))
    assert "model-index" not in metadata and metadata["license"] == "mit"
    assert "Nothing yet." in body and "Not recorded" in body
    assert "research release" not in body and "80 %" not in body


def test_results_of_another_form_are_a_clear_error(checkpoint, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="results .* must be a file that `vjepa-qwen evaluate` wrote"):
        make_card("tiny/pushed", str(checkpoint), None, BASES, [str(tmp_path / "results.json")], "mit", "v1")


def test_a_card_of_ones_own_is_kept(unchecked, checkpoint):
    Path(checkpoint, "README.md").write_text("---\nlicense: mit\n---\nMine.")
    main(["tiny/pushed", str(checkpoint), "--keep-card", "--dry-run"])
    assert Path(checkpoint, "README.md").read_text().endswith("Mine.")
    main(["tiny/pushed", str(checkpoint), "--dry-run"])
    assert "Mine." not in Path(checkpoint, "README.md").read_text()

"""From a Hub: the converted release in all its forms, loaded over HTTP by processes without this package."""

# ruff: noqa: F401, F811 (`release` is a fixture)

import json
import shutil

import pytest
import torch
from conftest import user_message
from fresh_process import run_fresh
from hub_server import HubServer
from test_convert_checkpoint import release, run

from vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenProcessor

CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
# What the scripts of the fresh processes start with.
HELPERS = """
import time

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

messages, chat = json.loads(sys.argv[1]), json.loads(sys.argv[2])
video = messages[0]["content"][0]["video"]

def run(model, processor):
    inputs = processor.bind(model).apply_chat_template(messages, **chat)
    with torch.no_grad():
        return model(**inputs).logits.tolist()

"""


@pytest.fixture(scope="module")
def folders(release, tmp_path_factory):
    """The release converted to both forms."""
    folder = tmp_path_factory.mktemp("converted")
    for form in ("light", "full"):
        run(release, folder / form, form=form)
    return folder


@pytest.fixture(scope="module")
def expected(folders, clips):
    """Logits, and what the pipeline says, in this process and from the folder."""
    processor = VJepaQwenProcessor.from_pretrained(folders / "full")
    model = VJepaQwenForConditionalGeneration.from_pretrained(folders / "full")
    inputs = processor.bind(model).apply_chat_template(user_message(clips[0]), **CHAT)
    with torch.no_grad():
        return model(**inputs).logits, processor.segment(clips[0])[0].num_events


@pytest.fixture
def hub(release, folders, tmp_path):
    """A Hub with the language model, `tiny/light`, pinned to its commit, and `tiny/full`."""
    with HubServer() as hub:
        hub.language_model_commit = hub.add("tiny/language-model", release[0] / "language_model")
        hub.light_commit = add_light(hub, folders, tmp_path, "tiny/language-model", hub.language_model_commit)
        hub.full_commit = hub.add("tiny/full", folders / "full")
        yield hub


def add_light(hub, folders, tmp_path, language_model, revision, name="tiny/light"):
    folder = tmp_path / name.replace("/", "-")
    shutil.copytree(folders / "light", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"language_model_name_or_path": language_model, "language_model_revision": revision}
    (folder / "config.json").write_text(json.dumps(config))
    return hub.add(name, folder)


def run_from(hub, script, tmp_path, clip):
    return run_fresh(HELPERS + script, tmp_path, user_message(clip), CHAT, **hub.environment)


def assert_equal(logits, expected):
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)


EVERYTHING = """
alone = AutoProcessor.from_pretrained("tiny/processor-alone", trust_remote_code=True)
results = {"num_events": alone.segment(video)[0].num_events}
for name in ("tiny/light", "tiny/full"):
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    results[name] = run(AutoModel.from_pretrained(name, trust_remote_code=True), processor)
pipe = pipeline(model="tiny/light", trust_remote_code=True, device="cpu")
results["pipeline"] = pipe(video, max_new_tokens=4)
results["direct"] = pipe.processor.batch_decode(
    pipe.model.generate(
        **pipe.processor.apply_chat_template(messages, **chat), max_new_tokens=4
    )[:, -4:], skip_special_tokens=True
)
print(json.dumps(results))
"""


@pytest.mark.slow
def test_light_and_full_checkpoint_processor_alone_and_pipeline_load_from_the_hub(
    hub, folders, expected, clips, tmp_path
):
    hub.add("tiny/processor-alone", folders / "full")
    results = run_from(hub, EVERYTHING, tmp_path, clips[0])
    logits, num_events = expected
    assert_equal(results["tiny/light"], logits)
    assert_equal(results["tiny/full"], logits)
    assert results["num_events"] == num_events
    (result,) = results["pipeline"]
    assert result["generated_text"] == results["direct"][0] and len(result["events"]) == num_events

    def weights(name):
        return {file for file in hub.fetched(name) if file.endswith(".safetensors")}

    # Without the language model, the shard with the tower is all that is needed, and nothing of anyone else's.
    shards = sorted(path.name for path in (folders / "full").glob("*.safetensors"))
    assert len(shards) > 2 and weights("tiny/processor-alone") == {shards[0]}
    assert weights("tiny/full") == set(shards)
    assert weights("tiny/light") == {"model.safetensors"}
    language_files = [path for method, path in hub.requests if method == "GET" and "language-model/resolve" in path]
    assert len(language_files) == len(set(language_files))  # once for the model and the pipeline together
    assert {path.split("/resolve/")[1].split("/")[0] for path in language_files} == {hub.language_model_commit}


PINNED = """
results = {}
for name in ("light", "full"):
    options = {"revision": "v1", "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained("tiny/" + name, **options)
    results[name] = run(AutoModel.from_pretrained("tiny/" + name, **options), processor)
    # Unbound, the tower is read only now, from the same commit.
    results[name + " events"] = AutoProcessor.from_pretrained("tiny/" + name, **options).segment(video)[0].num_events
pipe = pipeline(model="tiny/light", device="cpu", **options)
results["pipeline"] = run(pipe.model, pipe.processor)
print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_revision_pins_weights_code_and_language_model(hub, folders, release, expected, clips, tmp_path):
    """All three main branches go on to commits whose code does not even run and whose weights are none."""
    hub.repositories["tiny/light"].tags["v1"] = hub.light_commit
    hub.repositories["tiny/full"].tags["v1"] = hub.full_commit
    for name, repository in hub.repositories.items():
        files = repository.commits[repository.branches["main"]]
        assert repository.commit({file: b"raise RuntimeError('another commit')" for file in files}), name
    results = run_from(hub, PINNED, tmp_path, clips[0])
    logits, num_events = expected
    for name in ("light", "full", "pipeline"):
        assert_equal(results[name], logits)
    assert results["light events"] == results["full events"] == num_events
    fetched = {path.split("/")[4] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {hub.light_commit, hub.full_commit, hub.language_model_commit}


FAILURES = """
time.sleep = lambda seconds: None  # between the client's own attempts

def get_error(load, name, **options):
    try:
        load(name, trust_remote_code=True, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]

load_tower = lambda name, **options: AutoProcessor.from_pretrained(name, **options).segment(video)
print(json.dumps({
    "lost language model": get_error(AutoModel.from_pretrained, "tiny/lost"),
    "no such revision": get_error(AutoModel.from_pretrained, "tiny/light", revision="v9"),
    "language model cut off": get_error(AutoModel.from_pretrained, "tiny/light"),
    "full cut off": get_error(AutoModel.from_pretrained, "tiny/full"),
    "tower cut off": get_error(load_tower, "tiny/full"),
    "pipeline cut off": get_error(lambda name, **options: pipeline(model=name, **options), "tiny/full"),
}))
"""
RECOVERED = """
processor = AutoProcessor.from_pretrained("tiny/light", trust_remote_code=True)
print(json.dumps(run(AutoModel.from_pretrained("tiny/light", trust_remote_code=True), processor)))
"""


@pytest.mark.slow
def test_a_missing_language_model_and_interrupted_downloads_are_clear_and_can_be_tried_again(
    hub, folders, expected, clips, tmp_path
):
    add_light(hub, folders, tmp_path, "tiny/nowhere", None, name="tiny/lost")
    language_shards = hub.files("tiny/language-model", ".safetensors")
    full_shards = hub.files("tiny/full", ".safetensors")
    hub.cut_off = {language_shards[1]: 0, full_shards[0]: 0}
    errors = run_from(hub, FAILURES, tmp_path, clips[0])
    assert {kind for kind, _ in errors.values()} == {"OSError", "ValueError"}
    lost = errors["lost language model"][1]
    assert "language_model ('tiny/nowhere', revision 'main'), to which 'tiny/lost' is linked" in lost
    assert "Check its name and your access to it, or pass another one with `language_model=`" in lost
    assert "v9" in errors["no such revision"][1] and "tiny/light" in errors["no such revision"][1]
    for case, name, file_name in (
        ("language model cut off", "tiny/language-model", language_shards[1]),
        ("full cut off", "tiny/full", full_shards[0]),
        ("tower cut off", "tiny/full", full_shards[0]),
    ):
        kind, message = errors[case]
        assert kind == "OSError" and "\n" not in message
        assert message.startswith(f"{name}: the download of {file_name} was interrupted (")
        assert message.endswith("run the same again, what is there already is kept")
    # transformers' `pipeline` puts a traceback around it, which ends with the line.
    assert f"OSError: tiny/full: the download of {full_shards[0]} was interrupted" in errors["pipeline cut off"][1]

    hub.cut_off = {}
    hub.requests.clear()
    assert_equal(run_from(hub, RECOVERED, tmp_path, clips[0]), expected[0])
    assert language_shards[1] in hub.fetched("tiny/language-model")
    assert language_shards[0] not in hub.fetched("tiny/language-model")  # was there already

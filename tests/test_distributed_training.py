"""Two processes (gloo, CPU) train as one does; a process whose batch has no video makes no other wait."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors import safe_open
from safetensors.torch import load_file

from vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenProcessor
from vjepa_qwen.training import feature_cache
from vjepa_qwen.training.data import load_samples
from vjepa_qwen.training.trainer import load_trained

CONFIGS = Path(feature_cache.__file__).parent / "configs"
# Losses and weights of one and of two processes: sums in another order, float32.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    """Eight samples; alone or in pairs, some batches have no video and some have two."""
    folder = tmp_path_factory.mktemp("mixed")
    for index, clip in enumerate(clips):
        shutil.copy(clip, folder / f"{index}.mp4")
    text_only = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    two = [{"role": "user", "content": [{"type": "video"}, {"type": "video"}]}]
    two += [{"role": "assistant", "content": "Both are short."}]
    rows = [{"messages": text_only}] * 3 + [{"file_names": ["0.mp4", "2.mp4"], "messages": two}] * 2
    rows += [{"file_name": f"{index}.mp4", "summary": "A red circle moves."} for index in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def launch(tmp_path_factory, folder, tiny_checkpoint):
    """Runs a module in two processes; None is one."""
    place = tmp_path_factory.mktemp("launch")

    def launch(config, module, *options):
        command = [sys.executable]
        if config == "ddp":  # accelerate's launcher needs MPI for several processes on a CPU
            command += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        elif config == "fsdp2":
            settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text(encoding="utf-8"))
            settings |= {"num_processes": 2, "use_cpu": True}
            (place / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            command += ["-m", "accelerate.commands.launch", "--config_file", str(place / "config.yaml")]
            command += ["--main_process_port", port]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command += ["-m", f"vjepa_qwen.training.{module}", *options, "--model", tiny_checkpoint]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300, cwd=place
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return result

    return launch


@pytest.fixture(scope="module")
def cache(tmp_path_factory, launch, folder):
    """Written by two processes."""
    cache = tmp_path_factory.mktemp("cache") / "features"
    launch("ddp", "feature_cache", str(folder), str(cache))
    return cache


@pytest.fixture(scope="module")
def train(tmp_path_factory, launch, folder, cache):
    """
    `train(config, stage)`: losses of the steps, and the output folder.

    With plain gradient descent: Adam makes steps of one size out of gradients that are nearly zero, whichever sign
    rounding gives them.
    """
    results = {}

    def train(config, stage, *more):
        if (config, stage, more) not in results:
            out = tmp_path_factory.mktemp("out")
            options = ["--dataset", folder, "--feature_cache", cache, "--stage", stage, "--event_tower", "base"]
            options += ["--output_dir", out, "--per_device_train_batch_size", 2 if config is None else 1]
            options += ["--gradient_accumulation_steps", 1, "--num_train_epochs", 2, "--learning_rate", 0.01]
            options += ["--logging_steps", 1, "--report_to", "none", "--use_cpu", "true"]
            options += ["--optim", "sgd"] if "--optim" not in more else []
            options += more
            launch(config, "train", *map(str, options))
            log = json.loads((out / "trainer_state.json").read_text())["log_history"]
            results[config, stage, more] = [entry["loss"] for entry in log if "loss" in entry], out
        return results[config, stage, more]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["projector", "lora"])
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(train, tiny_checkpoint, config, stage):
    wanted, one = train(None, stage)
    losses, two = train(config, stage)
    assert len(losses) == 8
    assert losses == pytest.approx(wanted, rel=TOLERANCE)
    for name in ["projector.safetensors"] + ["adapter_model.safetensors"] * (stage == "lora"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=TOLERANCE, atol=TOLERANCE)
    # In one process, this one, without a launcher.
    model = load_trained(VJepaQwenForConditionalGeneration.from_pretrained(tiny_checkpoint), str(two))
    for name, tensor in load_file(two / "projector.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
    num_adapters = sum("lora" in name for name in model.state_dict())
    assert num_adapters == (16 if stage == "lora" else 0)


@pytest.mark.slow
def test_two_processes_resume_as_they_went_on(train):
    adam = ["--optim", "adamw_torch"]
    wanted, whole = train("fsdp2", "lora", *adam)
    checkpoint = sorted(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    assert not list(checkpoint.glob("pytorch_model*")), "the frozen model must not be saved"
    losses, resumed = train("fsdp2", "lora", *adam, "--resume_from_checkpoint", checkpoint)
    assert losses == wanted
    for name in ("projector.safetensors", "adapter_model.safetensors"):
        first, second = load_file(whole / name), load_file(resumed / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_processes_share_the_videos_of_a_cache(cache, folder, tiny_checkpoint):
    keys = []
    for path in cache.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys.append({key.partition(".")[0] for key in file.keys()})
    assert sorted(map(len, keys)) == [1, 2] and not keys[0] & keys[1]
    processor = VJepaQwenProcessor.from_pretrained(tiny_checkpoint)
    feature_cache.FeatureCache(cache, processor).check(load_samples(str(folder)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_the_configurations(path):
    assert load_config_from_file(str(path)).num_processes == 8

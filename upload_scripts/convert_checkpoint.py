"""Converts the research release (loose projection files, a LoRA folder) to a repository that `from_pretrained` loads.

    vjepa-qwen convert RELEASE --experiment 6 --output vjepa-qwen-27b-light
    vjepa-qwen convert RELEASE --experiment 5 --output vjepa-qwen-27b --form full

RELEASE is the release's repository on the Hub or a folder with its files. Experiment 5 is the projector for the frozen
tower (`exp5_projection/proj_epoch5.pt`), experiment 6 the projector and the LoRA adapter of the tower
(`exp6_projection/proj_lora_epoch5.pt`, `exp6_vjepa_lora/`), which is merged into it. Two forms can be written:

* light: tower and projector (0.9 GB in bfloat16) with a link to the language model, which is not even downloaded;
* full: everything; tower and projector are the first shard, the files of the language model the others.

Conversion is strict: no tensor may be missing and none left over, except the tower's predictor, which the model does
not have. `conversion_report.json` in the folder says where everything came from, and lists what was dropped and every
tensor that was written, with shape, dtype and checksum, as read back from the files.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files, extract_commit_hash

from ..configuration_vjepa_qwen import VJepaQwenConfig
from ..language_model_source import LanguageModelSource, make_renames, rename
from ..linked_checkpoint import find_tensors, is_language_tensor
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenVisionTower
from ..processing_vjepa_qwen import VJepaQwenProcessor
from ..video_processing_vjepa_qwen import VJepaQwenVideoProcessor

EXPERIMENTS = {
    "5": ("exp5_projection/proj_epoch5.pt", None),
    "6": ("exp6_projection/proj_lora_epoch5.pt", "exp6_vjepa_lora"),
}
PROJECTOR_NAMES = {"proj.0": "linear_1", "proj.2": "linear_2", "proj.4": "linear_3"}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
REPORT_NAME = "conversion_report.json"


def main(arguments: list[str] | None = None):
    options = parse_arguments(arguments)
    report = convert(**vars(options))
    num_bytes = sum(tensor["bytes"] for tensor in report["tensors"])
    print(f"{options.output}: {len(report['tensors'])} tensors, {num_bytes / 1e9:.2f} GB, every one accounted for")
    print(f"dropped knowingly: {len(report['dropped'])} tensors of the predictor")
    print(f"report: {os.path.join(options.output, REPORT_NAME)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vjepa-qwen convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("release", help="repository on the Hub (owner/name, owner/name@revision) or folder")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist or be empty")
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="6", help="5: frozen tower, 6: LoRA (default)")
    parser.add_argument("--projection", help="another projection file in RELEASE, instead of the experiment's")
    parser.add_argument("--adapter", help="another adapter folder in RELEASE, instead of the experiment's")
    parser.add_argument("--form", choices=("light", "full"), default="light", help="default: light")
    parser.add_argument(
        "--tower", default="facebook/vjepa2-vitl-fpc64-256", help="V-JEPA 2 the adapter belongs to (default: ViT-L)"
    )
    parser.add_argument(
        "--language-model", default="Qwen/Qwen3.5-27B", help="its commit is pinned (default: Qwen/Qwen3.5-27B)"
    )
    parser.add_argument(
        "--video-token", default="<|video_pad|>", help="placeholder of an event (default: <|video_pad|>)"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of all weights"
    )
    return parser.parse_args(arguments)


def convert(
    release: str,
    output: str,
    *,
    experiment: str = "6",
    projection: str | None = None,
    adapter: str | None = None,
    form: str = "light",
    tower: str = "facebook/vjepa2-vitl-fpc64-256",
    language_model: str = "Qwen/Qwen3.5-27B",
    video_token: str = "<|video_pad|>",
    dtype: str = "bfloat16",
) -> dict:
    """
    Writes a repository folder. The arguments are those of the command line.

    Returns:
        `dict`: What `conversion_report.json` holds.

    Raises:
        ValueError: for files that are not in the release's format or do not fit each other; nothing is written then.
        OSError: when a file cannot be fetched.
    """
    if os.path.isdir(output) and os.listdir(output):
        raise ValueError(f"output ({output}) must be an empty folder or none; choose another one")
    release_source, tower_source, language_source = map(LanguageModelSource.parse, (release, tower, language_model))
    default_projection, default_adapter = EXPERIMENTS[experiment]
    adapter = adapter or default_adapter
    projection_file = _fetch(release_source, projection or default_projection)
    sources = {"release": release_source.name, "projection": _describe(projection_file)}

    projector = read_projector(projection_file)
    vision_config = AutoConfig.from_pretrained(os.path.dirname(_fetch(tower_source, "config.json")))
    encoder, dropped, tower_files = read_tower(tower_source)
    sources["tower"] = {"name": tower_source.name, "files": [_describe(path) for path in tower_files]}
    tower_model = VJepaQwenVisionTower(vision_config)
    _check_names("tower", encoder, tower_model.state_dict())
    tower_model.load_state_dict(encoder)
    if adapter is not None:
        adapter_files = [_fetch(release_source, f"{adapter}/{name}") for name in ADAPTER_FILES]
        sources["adapter"] = [_describe(path) for path in adapter_files]
        tower_model, dropped_of_adapter = merge_adapter(tower_model, os.path.dirname(adapter_files[0]))
        dropped += dropped_of_adapter

    language_config_file = _fetch(language_source, "config.json")
    language_folder = os.path.dirname(language_config_file)
    text_config = AutoConfig.from_pretrained(language_folder).get_text_config(decoder=True)
    tokenizer = AutoTokenizer.from_pretrained(language_source.name, revision=language_source.revision)
    processor = VJepaQwenProcessor(
        VJepaQwenVideoProcessor(
            crop_size=vision_config.crop_size,
            frames_per_clip=vision_config.frames_per_clip,
            tubelet_size=vision_config.tubelet_size,
        ),
        tokenizer,
        video_token=video_token,
    )
    _check_width(projector, vision_config.hidden_size, text_config.hidden_size, tower, language_model)
    config = VJepaQwenConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_hidden_size=len(projector["linear_1.bias"]),
        video_token_id=processor.video_token_id,
    )
    sources["language_model"] = {
        "name": language_source.name,
        "commit": extract_commit_hash(language_config_file, None) or language_source.revision,
    }
    if form == "light":
        config.language_model_name_or_path = language_source.name
        config.language_model_revision = sources["language_model"]["commit"]
    with torch.device("meta"):
        model = VJepaQwenForConditionalGeneration(config).to(getattr(torch, dtype))
    model.generation_config = _make_generation_config(language_folder, tokenizer)

    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in tower_model.state_dict().items()}
    tensors |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    tensors = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in tensors.items()}
    expected = model.state_dict()
    light_names = {name for name in expected if not is_language_tensor(name)}
    _check_names("repository", tensors, {name: expected[name] for name in light_names})
    if form == "full":
        language_tensors = find_tensors(
            language_source.name, lambda names: language_source.fetch(output, names), is_language_tensor
        )
        renames = make_renames(text_config, language_tensors)
        all_names = [rename(name, renames) for name in filter(is_language_tensor, language_tensors)]
        needed = expected.keys() - light_names - model.all_tied_weights_keys.keys()
        _check_names("language model", dict.fromkeys(all_names), dict.fromkeys(needed))
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}

    # The language model is never touched: a light save would compare it with its repository.
    PreTrainedModel.save_pretrained(model, output, state_dict=tensors, save_original_format=False)
    processor.save_pretrained(output)
    if form == "full":
        _write_language_model(Path(output), language_tensors, renames, expected)
    report = {
        "form": form,
        "experiment": experiment,
        "dtype": dtype,
        "sources": sources,
        "dropped": dropped,
        "tensors": _read_back(output),
    }
    written = {tensor["name"]: tensor["sha256"] for tensor in report["tensors"]}
    damaged = [name for name, checksum in checksums.items() if written.get(name) != checksum]
    if damaged:
        raise OSError(f"{output}: {damaged[0]} reads back differently from what was written; is the disk full?")
    with open(os.path.join(output, REPORT_NAME), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    return report


def read_projector(path: str) -> dict[str, torch.Tensor]:
    """
    The release's projection file, in the names of `VJepaQwenProjector`.

    Raises:
        ValueError: when it is no plain dictionary of exactly the six tensors, or their sizes do not form a chain.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle and zip may raise
        raise ValueError(
            f"projection ({path}) must be a dictionary of tensors, read without running code from it: {error}"
        ) from error
    expected = {f"{old}.{kind}" for old in PROJECTOR_NAMES for kind in ("weight", "bias")}
    found = set(state_dict) if isinstance(state_dict, dict) else {type(state_dict).__name__}
    if found != expected:
        raise ValueError(
            f"projection ({path}) must hold exactly {', '.join(sorted(expected))}; missing: "
            f"{', '.join(sorted(expected - found)) or 'none'}; unexpected: "
            f"{', '.join(sorted(found - expected)) or 'none'}"
        )
    projector = {}
    for old, new in PROJECTOR_NAMES.items():
        weight, bias = state_dict[f"{old}.weight"], state_dict[f"{old}.bias"]
        previous = projector.get(f"linear_{int(new[-1]) - 1}.bias")
        width = weight.shape[1] if previous is None else len(previous)
        if weight.ndim != 2 or tuple(weight.shape) != (len(bias), width):
            raise ValueError(
                f"projection ({path}): {old}.weight {tuple(weight.shape)} must be {(len(bias), width)}, as its bias "
                "and the layer before it say"
            )
        projector[f"{new}.weight"], projector[f"{new}.bias"] = weight, bias
    return projector


def read_tower(source: LanguageModelSource) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """The encoder's tensors of a V-JEPA 2 checkpoint, the names of the predictor's, and the files they are in."""
    tensors = find_tensors(
        source.name,
        lambda file_names: cached_files(
            source.name, file_names, revision=source.revision, _raise_exceptions_for_missing_entries=False
        ),
        lambda name: name.startswith("encoder."),
    )
    encoder, dropped, paths = {}, [], sorted(set(tensors.values()))
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.startswith("predictor."):
                    dropped.append(name)
                else:
                    encoder[name] = file.get_tensor(name).float()
    return encoder, dropped, paths


def merge_adapter(tower: VJepaQwenVisionTower, folder: str) -> tuple[VJepaQwenVisionTower, list[str]]:
    """
    Merges the release's PEFT adapter, which was made for `VJEPA2Model`, into the tower; names the tensors of the
    predictor, which have no place in it.

    Raises:
        ValueError: when the adapter is no LoRA, or not every one of its tensors has its place, and every place one.
    """
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter ({folder}, {config.peft_type}) must be a LoRA adapter")
    state_dict = load_peft_weights(folder, device="cpu")
    dropped = sorted(name for name in state_dict if ".predictor." in name)
    state_dict = {name: tensor.float() for name, tensor in state_dict.items() if name not in dropped}
    if not state_dict:
        raise ValueError(
            f"adapter ({folder}) must hold tensors of the tower's encoder, but none of its {len(dropped)} matches; is "
            "it an adapter of VJEPA2Model?"
        )
    adapted = get_peft_model(tower, config)
    _check_names(f"adapter ({folder})", state_dict, get_peft_model_state_dict(adapted))
    set_peft_model_state_dict(adapted, state_dict)
    return adapted.merge_and_unload(safe_merge=True), dropped


def _write_language_model(output: Path, tensors: dict[str, str], renames: dict[str, str], expected: dict):
    """Adds the language model's files as shards, one at a time, under this model's names, behind what is there."""
    paths = sorted(set(tensors.values()))
    names = [f"model-{number:05d}-of-{len(paths) + 1:05d}.safetensors" for number in range(1, len(paths) + 2)]
    (output / SAFE_WEIGHTS_NAME).rename(output / names[0])
    weight_map = {name: names[0] for name in expected if not is_language_tensor(name)}
    for path, file_name in zip(paths, names[1:], strict=True):
        shard = {}
        with safe_open(path, framework="pt") as file:
            for old_name in filter(is_language_tensor, file.keys()):
                name = rename(old_name, renames)
                shard[name] = file.get_tensor(old_name).to(expected[name].dtype)
        _check_names(path, shard, {name: expected[name] for name in shard})
        save_file(shard, output / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total_size = sum((output / name).stat().st_size for name in names)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (output / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _check_names(what: str, found: dict, expected: dict):
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{what}: every tensor must have its place and every place a tensor; missing {len(missing)}: "
            f"{', '.join(missing[:3]) or 'none'}; unexpected {len(unexpected)}: {', '.join(unexpected[:3]) or 'none'}"
        )
    for name, tensor in expected.items():
        if tensor is not None and tensor.shape != found[name].shape:
            raise ValueError(f"{what}: {name} {tuple(found[name].shape)} must be {tuple(tensor.shape)}")


def _check_width(projector, vision_size: int, text_size: int, tower: str, language_model: str):
    found = (projector["linear_1.weight"].shape[1], projector["linear_3.weight"].shape[0])
    if found != (vision_size, text_size):
        raise ValueError(
            f"projection ({found[0]} to {found[1]}) must lead from the width of the tower ({tower}: {vision_size}) to "
            f"that of the language model ({language_model}: {text_size})"
        )


def _make_generation_config(language_folder: str, tokenizer) -> GenerationConfig:
    if os.path.isfile(os.path.join(language_folder, "generation_config.json")):
        return GenerationConfig.from_pretrained(language_folder)
    return GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def _fetch(source: LanguageModelSource, file_name: str) -> str:
    paths = cached_files(
        source.name, [file_name], revision=source.revision, _raise_exceptions_for_missing_entries=False
    )
    if paths is None:
        raise OSError(f"{source.name!r} must have the file {file_name}; check its name")
    return paths[0]


def _describe(path: str) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"file": os.path.basename(path), "commit": extract_commit_hash(path, None), "sha256": digest.hexdigest()}


def _checksum(tensor: torch.Tensor) -> str:
    """Of the bytes as they stand in a safetensors file."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _read_back(folder: str) -> list[dict]:
    tensors = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                tensors.append(
                    {
                        "name": name,
                        "file": path.name,
                        "shape": list(tensor.shape),
                        "dtype": str(tensor.dtype).removeprefix("torch."),
                        "bytes": tensor.nbytes,
                        "sha256": _checksum(tensor),
                    }
                )
    return tensors


if __name__ == "__main__":
    main()

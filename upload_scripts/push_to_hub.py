"""Checks a checkpoint, writes its model card and uploads it to the Hub. Private, unless told otherwise.

    vjepa-qwen push OWNER/NAME FOLDER --dry-run
    vjepa-qwen push OWNER/NAME FOLDER --results results.json --tag v1.0
    vjepa-qwen push OWNER/NAME FOLDER --release RELEASE --experiment 6      (converts into FOLDER first)

Before anything is uploaded, a fresh process without this package loads the folder, and its logits and generated tokens
are compared with what the installed package makes of the same folder. After an interruption run the same again: what
is on the Hub already is neither uploaded nor committed a second time. `hf auth login` (or HF_TOKEN) gives the token.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors.torch import load_file

from .. import __version__
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from ..processing_vjepa_qwen import VJepaQwenProcessor
from . import check_checkpoint
from .convert_checkpoint import EXPERIMENTS, REPORT_NAME, convert

NOT_UPLOADED = ["__pycache__/*", "*.pyc", ".cache/*"]
# What an earlier version may have left in the repository, and would be loaded with the new files.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.py"]

RESULTS_FIELDS = ("model", "revision", "dataset", "metrics", "command", "seed")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="vjepa-qwen push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "repo_id", metavar="OWNER/NAME", help="repository on the Hub; it is created if it is not there"
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="checkpoint, as `save_pretrained` or `vjepa-qwen convert` write"
    )
    parser.add_argument(
        "--release", help="research release to convert into FOLDER, if that was not done; for the card"
    )
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="6", help="of the release (default: 6)")
    parser.add_argument(
        "--form", choices=("light", "full"), default="light", help="of the conversion (default: light)"
    )
    parser.add_argument("--tower", default="facebook/vjepa2-vitl-fpc64-256", help="base model (default: ViT-L)")
    parser.add_argument("--language-model", default="Qwen/Qwen3.5-27B", help="base model (default: Qwen/Qwen3.5-27B)")
    parser.add_argument("--results", nargs="*", default=[], help="result files of `vjepa-qwen evaluate`, for the card")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: apache-2.0)")
    parser.add_argument("--keep-card", action="store_true", help="leave FOLDER/README.md as it is")
    parser.add_argument("--tag", default=f"v{__version__}", help=f"name of this release (default: v{__version__})")
    parser.add_argument("--public", action="store_true", help="create the repository public, not private")
    parser.add_argument("--dry-run", action="store_true", help="do all but the upload")
    options = parser.parse_args(arguments)
    repo_id, folder, bases = options.repo_id, options.folder, (options.tower, options.language_model)

    if options.release is not None and not os.path.exists(os.path.join(folder, REPORT_NAME)):
        form = {"experiment": options.experiment, "form": options.form}
        convert(options.release, folder, **form, tower=options.tower, language_model=options.language_model)
    check_link(folder)
    check(folder)
    print(f"{folder}: loads without the package, with equal logits and tokens")
    if not options.keep_card:
        card = make_card(repo_id, folder, options.release, bases, options.results, options.license, options.tag)
        card.save(os.path.join(folder, "README.md"))
    for path in sorted(Path(folder).iterdir()):
        print(f"  {path.stat().st_size:>14,} {path.name}")
    if options.dry_run:
        print(f"dry run: nothing was uploaded to {repo_id}")
    else:
        print(upload(repo_id, folder, options.tag, options.public))


def check_link(folder: str):
    """That everyone can follow the link of a light checkpoint, to the same weights for ever."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    name, commit = config.get("language_model_name_or_path"), config.get("language_model_revision")
    if name is None:
        return
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:.+\.gguf)?", name):
        raise ValueError(
            f"language_model_name_or_path ({name!r}) of {folder} must be a repository on the Hub: nobody else has this"
            " folder; save with `light=False`, or convert with `--language-model owner/name`"
        )
    if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
        raise ValueError(
            f"language_model_revision ({commit!r}) of {folder} must be a commit of {name}: a branch moves; write the "
            "40 digits into config.json"
        )


def check(folder: str):
    """Compares what a fresh process without this package makes of a folder with what the package makes of it."""
    with TemporaryDirectory() as temporary:
        answer_file = os.path.join(temporary, "answer.safetensors")
        process = subprocess.run(
            [sys.executable, "-I", check_checkpoint.__file__, os.path.abspath(folder), answer_file],
            cwd=temporary,
            env={**os.environ, "HF_MODULES_CACHE": os.path.join(temporary, "modules")},
            capture_output=True,
            text=True,
        )
        if process.returncode != 0:
            lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            raise ValueError(f"{folder} must load from its own files alone, but: {lines[-1]}")
        found = load_file(answer_file)
    placement = check_checkpoint.get_placement()
    placement.pop("device", None)  # `pipeline`'s word
    model = VJepaQwenForConditionalGeneration.from_pretrained(folder, dtype="auto", **placement).eval()
    expected = check_checkpoint.get_answer(model, VJepaQwenProcessor.from_pretrained(folder))
    for name, tensor in expected.items():
        # On one machine logits differ by what kernels do that add up in changing order, ids and tokens not at all.
        tolerance = 1e-3 if tensor.is_floating_point() else 0
        if tensor.shape != found[name].shape or not torch.allclose(
            tensor, found[name], rtol=tolerance, atol=tolerance
        ):
            raise ValueError(
                f"{folder}: its own code gives other {name} than the installed package ({__version__}); save the "
                "checkpoint again with this package, so that it gets this code"
            )


def make_card(
    repo_id: str, folder: str, release: str | None, bases: tuple[str, str], results: list[str], license: str, tag: str
) -> ModelCard:
    """The model card: what the folder's own files and the evaluation's results say, and nothing else."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    report = Path(folder, REPORT_NAME)
    evaluations = [_read_results(path) for path in results]
    linked = config.get("language_model_name_or_path")
    base_models = [bases[0], linked.split(":")[0] if linked else bases[1]]
    name = repo_id.split("/")[-1]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        base_model=base_models,
        license=license,
        language=["ko", "en"],
        tags=["video", "v-jepa", "event-segmentation", "custom_code"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="video-text-to-text",
                dataset_type=evaluation["dataset"]["name"],
                dataset_name=evaluation["dataset"]["name"],
                dataset_split=evaluation["dataset"]["split"],
                metric_type=metric_name,
                metric_name=metric_name,
                metric_value=metric["value"],
                metric_args={"confidence_interval": metric["confidence_interval"]},
            )
            for evaluation in evaluations
            for metric_name, metric in evaluation["metrics"].items()
        ]
        or None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=os.path.join(os.path.dirname(__file__), "model_card_template.md"),
        repo_id=repo_id,
        name=name,
        tag=tag,
        linked=linked,
        base_models=base_models,
        language_model=base_models[1],
        language_model_commit=config.get("language_model_revision"),
        size=f"{sum(path.stat().st_size for path in Path(folder).glob('*.safetensors')) / 1e9:.2f}",
        experiment=json.loads(report.read_text(encoding="utf-8"))["experiment"] if report.exists() else None,
        release=release.partition("@")[0] if release and not os.path.exists(release) else None,
        evaluations=evaluations,
    )


def _read_results(path: str) -> dict:
    evaluation = json.loads(Path(path).read_text(encoding="utf-8"))
    missing = [name for name in RESULTS_FIELDS if name not in evaluation]
    if missing:
        raise ValueError(
            f"results ({path}) must be a file that `vjepa-qwen evaluate` wrote; it lacks {', '.join(missing)}"
        )
    return evaluation


def upload(repo_id: str, folder: str, tag: str, public: bool) -> str:
    """Uploads what is not there yet, and tags the commit; returns its address."""
    api = HfApi()
    api.create_repo(repo_id, private=not public, exist_ok=True)
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Release {tag}",
            ignore_patterns=NOT_UPLOADED,
            delete_patterns=REPLACED,
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever the clients of the Hub's storage raise
        raise OSError(
            f"{repo_id}: the upload was interrupted ({error}); run the same again, what is there already is kept"
        ) from error
    commits = {reference.name: reference.target_commit for reference in api.list_repo_refs(repo_id).tags}
    if tag not in commits:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    elif commits[tag] != commit.oid:
        raise ValueError(
            f"tag ({tag}) of {repo_id} must not move: it names commit {commits[tag]}, and commit {commit.oid} is new; "
            "choose another with --tag"
        )
    return f"{commit.commit_url} ({tag})"


if __name__ == "__main__":
    main()

"""Trains the projector, or a LoRA on the tower together with the projector; the language model stays frozen.

    python -m vjepa_qwen.toy.synthetic_shorts shorts --count 200 --seed 0
    vjepa-qwen encode shorts shorts.features                                  # optional: frozen towers encode once
    vjepa-qwen train --dataset shorts --feature_cache shorts.features --output_dir trained

also `python -m vjepa_qwen.training.train ...` and, on several devices, `accelerate launch --config_file
training/configs/ddp.yaml -m vjepa_qwen.training.train ...`. `--stage projector` is the research release's experiment
5, `--stage lora` its experiment 6; the defaults are its hyper-parameters as far as it names them (5 epochs, AdamW,
1e-4, r=16, alpha=32). All options of `TrainingArguments` are there: `--help`.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import is_torch_bf16_gpu_available, logging

from .. import TOY_CHECKPOINT
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from ..processing_vjepa_qwen import VJepaQwenProcessor
from .collator import VJepaQwenDataCollator
from .data import DEFAULT_PROMPT, load_samples
from .feature_cache import FeatureCache
from .trainer import VJepaQwenTrainer

logger = logging.get_logger(__name__)

LORA_TARGETS = r".*\.vision_tower\.encoder\.layer\.\d+\.attention\.(query|key|value|proj)"


@dataclass
class VJepaQwenArguments:
    """What is trained, from what, on what."""

    dataset: str = field(metadata={"help": "Folder with metadata.jsonl, or data set of the datasets library."})
    stage: str = field(
        default="projector",
        metadata={
            "help": "projector, or lora: adapters on the tower and the projector.",
            "choices": ["projector", "lora"],
        },
    )
    model: str = field(default=TOY_CHECKPOINT, metadata={"help": "Repository or folder; without it, the toy."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the repository."})
    dtype: str = field(default="auto", metadata={"help": "Of the frozen weights; auto is as they are saved."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(default=None, metadata={"help": "As dataset; without it, nothing is evaluated."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    prompt: str = field(default=DEFAULT_PROMPT, metadata={"help": "Question of samples without one of their own."})
    skip_bad_samples: bool = field(default=False, metadata={"help": "Go on without missing and unreadable videos."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder that `vjepa-qwen encode` has written."})
    num_frames: int | None = field(
        default=None,
        metadata={
            "help": "Frames to look at in each video, stored in the processor; the feature cache must have as many. "
            "--stage lora needs one window of the tower at most."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest sample in tokens; longer is an error."})
    skip_too_long: bool = field(default=False, metadata={"help": "Leave longer samples out, and say how many."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale is alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: str = field(default=LORA_TARGETS, metadata={"help": "Regular expression of module names."})
    event_tower: str = field(
        default="adapted",
        metadata={
            "help": "Whose features cut the videos when the tower is adapted; stored in the processor. An adapter "
            "trained with base cannot be merged.",
            "choices": ["adapted", "base"],
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better loss after which to stop."}
    )


@dataclass
class VJepaQwenTrainingArguments(TrainingArguments):
    """transformers' arguments with other defaults."""

    num_train_epochs: float = 5.0
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    activation_checkpointing: bool = True
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default where the device can."})
    logging_steps: float = 10
    report_to: str | None = "tensorboard"
    eval_strategy: str | None = field(default=None, metadata={"help": "When to evaluate; by default as saved."})
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool | None = True
    metric_for_best_model: str | None = "loss"
    # Logits of a quarter million words for each token are not to be kept.
    prediction_loss_only: bool = True
    # The columns of a sample are the collator's.
    remove_unused_columns: bool | None = False
    # The model itself sees to it that every trained parameter has a gradient, also without a video.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        if self.eval_strategy is None:  # the best checkpoint can only be told from those that are saved
            self.eval_strategy = self.save_strategy
            self.eval_steps = self.save_steps if self.eval_steps is None else self.eval_steps
        self.load_best_model_at_end = self.load_best_model_at_end and self.eval_strategy != "no"
        super().__post_init__()


class SampleDataset(Dataset):
    """Samples as the collator takes them: videos, or what the cache holds of them (all of it, or the spans alone)."""

    def __init__(self, samples: list[dict], cache: FeatureCache | None = None, spans_only: bool = False):
        self.samples, self.cache, self.spans_only = samples, cache, spans_only

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        if self.cache is None or not sample["videos"]:
            return sample
        cached = [self.cache[video] for video in sample["videos"]]
        sample = {**sample, "frame_event_ids": [entry["frame_event_ids"] for entry in cached]}
        if not self.spans_only:
            sample |= {"videos": [], "frame_features": [entry["frame_features"] for entry in cached]}
        return sample


def prepare_model(model, arguments: VJepaQwenArguments):
    """
    Freezes the model but for what the stage trains, which becomes float32, and adds the stage's adapters.

    Raises:
        ValueError: when the stage would train nothing.
    """
    model.requires_grad_(False)
    if arguments.stage == "lora":
        config = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules,
        )
        try:
            model.add_adapter(config)
        except ValueError as error:  # PEFT's, which lists all modules of the model
            raise ValueError(
                f"lora_target_modules ({arguments.lora_target_modules}) must match modules of the tower, or the stage "
                f"would train nothing there; the default is {LORA_TARGETS}"
            ) from error
    model.model.multi_modal_projector.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if arguments.stage == "lora" and not all("_tower." in n or "_projector." in n for n in trained):
        raise ValueError(
            f"lora_target_modules ({arguments.lora_target_modules}) must match modules of the tower only; the "
            f"default is {LORA_TARGETS}"
        )
    return model


def trained_table(model) -> Table:
    """What is trained: module, trained and all parameters."""
    table = Table("module", "trained", "parameters")
    parts = {"vision_tower": 0, "multi_modal_projector": 0, "language_model": 0}
    for column in table.columns[1:]:
        column.justify = "right"
    total_trained = total = 0
    for part in [*parts, "lm_head"]:
        parameters = [p for name, p in model.named_parameters() if f"{part}." in name]
        trained, count = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
        table.add_row(part, f"{trained:,}", f"{count:,}")
        total_trained, total = total_trained + trained, total + count
    table.add_section()
    table.add_row("all", f"{total_trained:,}", f"{total:,}")
    return table


def _make_dataset(samples, cache, collator, arguments) -> SampleDataset | None:
    if samples is None:
        return None
    if cache is not None:
        cache.check(samples)
        if arguments.max_length is not None:
            # Lengths are known: what is too long is left out here, where no process waits for it.
            features = SampleDataset(samples, cache)
            lengths = [collator.count_tokens(features[index]) for index in range(len(samples))]
            too_long = [sample["name"] for sample, n in zip(samples, lengths, strict=True) if n > arguments.max_length]
            if too_long and not arguments.skip_too_long:
                raise ValueError(
                    f"{len(too_long)} samples must have at most max_length ({arguments.max_length}) tokens; raise it "
                    f"or leave them out with --skip_too_long: {', '.join(too_long)}"
                )
            if too_long:
                logger.warning(f"{len(too_long)} samples longer than {arguments.max_length} tokens skipped")
            samples = [sample for sample, n in zip(samples, lengths, strict=True) if n <= arguments.max_length]
    return SampleDataset(samples, cache, spans_only=arguments.stage == "lora")


def main(argv: list[str] | None = None):
    parser = HfArgumentParser((VJepaQwenArguments, VJepaQwenTrainingArguments), prog="vjepa-qwen train")
    arguments, training_arguments = parser.parse_args_into_dataclasses(argv)
    return train(arguments, training_arguments)


def train(arguments: VJepaQwenArguments, training_arguments: VJepaQwenTrainingArguments) -> VJepaQwenTrainer:
    """Trains, and leaves what was trained, the best of it when there is an evaluation, in `output_dir`."""
    set_seed(training_arguments.seed)
    spans_only = arguments.stage == "lora"
    if spans_only and arguments.feature_cache and arguments.event_tower == "adapted":
        raise ValueError(
            "feature_cache must not be given with --stage lora --event_tower adapted: the features that cut the "
            "videos change with every step; leave it out or choose --event_tower base"
        )
    samples = load_samples(
        arguments.dataset,
        split=arguments.dataset_split,
        prompt=arguments.prompt,
        skip_bad_samples=arguments.skip_bad_samples,
    )
    eval_samples = None
    if arguments.eval_dataset is not None:
        eval_samples = load_samples(
            arguments.eval_dataset,
            split=arguments.eval_split,
            prompt=arguments.prompt,
            skip_bad_samples=arguments.skip_bad_samples,
        )
    else:
        training_arguments.eval_strategy, training_arguments.load_best_model_at_end = "no", False

    processor = VJepaQwenProcessor.from_pretrained(arguments.model, revision=arguments.revision)
    model = VJepaQwenForConditionalGeneration.from_pretrained(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype
    )
    processor.bind(model)
    if arguments.num_frames is not None:
        processor.video_processor.num_frames = arguments.num_frames
    if spans_only:
        processor.event_tower = arguments.event_tower
    collator = VJepaQwenDataCollator(
        processor,
        max_length=arguments.max_length,
        skip_too_long=arguments.skip_too_long,
        return_frame_features=False if spans_only else None,
    )
    cache = FeatureCache(arguments.feature_cache, processor) if arguments.feature_cache else None
    prepare_model(model, arguments)
    datasets = [_make_dataset(part, cache, collator, arguments) for part in (samples, eval_samples)]
    callbacks = []
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    trainer = VJepaQwenTrainer(
        model,
        training_arguments,
        data_collator=collator,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        processing_class=processor,
        callbacks=callbacks,
    )
    if (
        (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        and cache is None
        and any(s["videos"] for s in samples)
    ):
        raise ValueError(
            "feature_cache must be given with FSDP or DeepSpeed: the tower is sharded there and cannot encode while a "
            "batch is made; run `vjepa-qwen encode` first"
        )
    if trainer.is_world_process_zero():
        Console(stderr=True).print(trained_table(model))
    resume = training_arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    trainer.save_model()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main()

"""The full-size model with random weights on one GPU: the tower, prefill and generation, one training step.

    python -m benchmarks.gpu                     # bfloat16 with 72 GiB and more, else a language model in 4 bits
    python -m benchmarks.gpu --tiny              # tries the script on a CPU, in seconds; its figures mean nothing

Speed and memory do not depend on the values of the weights (about 28 billion; no file is read, none is downloaded).

* tower: milliseconds for each window, and its share of what the chip reaches in one large matrix product
* language: the prompt with 12 event tokens against the same model fed with the tokens of frames, as Qwen3.5's own
  video processor counts them (60 s of 1080p at its published settings: 11,400)
* training: one step of stage 1 (projector) and of stage 2 (LoRA r=16 on the tower, and the projector), the language
  model frozen, activation checkpointing, AdamW

The results are written to `gpu_DEVICE.json`.
"""

import argparse
import importlib.util
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig

from vjepa_qwen import VJepaQwenConfig, VJepaQwenForConditionalGeneration

from .measure import write_json

BFLOAT16_GIBIBYTES = 72  # 56 GB of weights, the rest for activations
TEXT_TOKENS, EVENT_TOKENS, ANSWER_TOKENS = 30, 12, 200
FRAME_TOKENS = {"250 times as many": 250 * EVENT_TOKENS, "Qwen3.5's frames of 60 s": 11_400}
TINY = {
    "vision_config": {
        "model_type": "vjepa2",
        "crop_size": 32,
        "hidden_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    "text_config": {
        "model_type": "qwen3_5_text",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 32,  # the 4-bit layers of CPUs want multiples of 32
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "projector_hidden_size": 64,
    "video_token_id": 5,
}


@dataclass
class Measurement:
    part: str
    case: str
    milliseconds: float  # median
    peak_gigabytes: float  # of the device's memory, weights included; 0 on CPUs
    more: str = ""


class Bench:
    """Times calls on one device and keeps the results."""

    def __init__(self, device: torch.device, repeats: int):
        self.device, self.repeats, self.results = device, repeats, []

    def measure(self, part: str, case: str, function, more=lambda milliseconds: "") -> float:
        """Median milliseconds of `repeats` calls after one that is not counted; an error is a result, too."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            function()
            times = [self._time(function) for _ in range(self.repeats)]
        except torch.OutOfMemoryError:
            self.results.append(Measurement(part, case, float("nan"), float("nan"), "out of memory"))
            torch.cuda.empty_cache()
            return float("nan")
        milliseconds = 1000 * statistics.median(times)
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0
        self.results.append(Measurement(part, case, milliseconds, peak, more(milliseconds)))
        return milliseconds

    def _time(self, function) -> float:
        self._synchronize()
        start = time.perf_counter()
        function()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_model(config: VJepaQwenConfig, device: torch.device, bits: int) -> VJepaQwenForConditionalGeneration:
    """Every weight is a view of one short list of random numbers until it is copied, or packed, on the device."""
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in VJepaQwenForConditionalGeneration(config).state_dict().items()
        }
    numbers = torch.randn(2**20, dtype=torch.bfloat16) * 0.02
    weights = {name: numbers.as_strided(shape, [1] * len(shape)) for name, shape in shapes.items()}
    options = {}
    if bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
        )
    return VJepaQwenForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.bfloat16, device_map={"": device}, **options
    ).eval()


def measure_tower(bench: Bench, tower, compiled: bool) -> None:
    """Against the matrix product of the same dtype; windows of 64 frames, and more of them at once."""
    config, device = tower.config, bench.device
    size = 8192 if device.type == "cuda" else 256
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def teraflops(flops: float, milliseconds: float) -> float:
        return flops / milliseconds / 1e9

    milliseconds = bench.measure(
        "peak",
        f"matrix product {size}",
        lambda: matrix @ matrix,
        lambda ms: f"{teraflops(2 * size**3, ms):.1f} TFLOP/s",
    )
    peak = teraflops(2 * size**3, milliseconds)
    encode = torch.compile(tower, fullgraph=True) if compiled else tower
    name = "compiled, " if compiled else ""
    patches, hidden = (config.crop_size // config.patch_size) ** 2, config.hidden_size
    for num_windows, num_frames in ((1, config.frames_per_clip), (4, config.frames_per_clip), (1, 16), (4, 16)):
        tokens = num_frames // config.tubelet_size * patches
        layer = tokens * hidden**2 * (8 + 4 * config.mlp_ratio) + 4 * tokens**2 * hidden
        flops = num_windows * config.num_hidden_layers * layer
        frames = torch.randn(
            num_windows, num_frames, 3, config.crop_size, config.crop_size, device=device, dtype=torch.bfloat16
        )

        def describe(ms, flops=flops, num_windows=num_windows):
            share = teraflops(flops, ms) / peak
            return (
                f"{ms / num_windows:.2f} ms a window, {teraflops(flops, ms):.1f} TFLOP/s, {share:.0%} of the product"
            )

        with torch.no_grad():
            bench.measure(
                "tower", f"{name}{num_windows} x {num_frames} frames", lambda frames=frames: encode(frames), describe
            )


@torch.no_grad()
def measure_language(bench: Bench, model, frame_tokens: dict[str, int], num_new_tokens: int) -> None:
    """Prefill, and the tokens per second that follow; any tokens stand in for the embeddings of frames or events."""
    prefill_milliseconds = {}
    for name, num_tokens in {f"{EVENT_TOKENS} events": EVENT_TOKENS, **frame_tokens}.items():
        input_ids = torch.full((1, TEXT_TOKENS + num_tokens), 7, device=bench.device)  # any token but the placeholder

        def prefill(input_ids=input_ids):
            return model(input_ids=input_ids, use_cache=True, logits_to_keep=1)

        def generate(outputs):
            for _ in range(num_new_tokens):  # no host waits for the device: the next id stays there
                token = outputs.logits[:, -1:].argmax(dim=-1)
                outputs = model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)

        def compare(ms, num_tokens=num_tokens):
            times = ms / next(iter(prefill_milliseconds.values()), ms)
            return f"{(TEXT_TOKENS + num_tokens) / ms * 1000:,.0f} tokens/s, {times:.1f}x the time of events"

        case = f"{TEXT_TOKENS} text + {num_tokens:,} tokens ({name})"
        prefill_milliseconds[name] = bench.measure("prefill", case, prefill, compare)
        bench.measure(
            "prefill and generation",
            f"{case}, {num_new_tokens} new",
            lambda prefill=prefill: generate(prefill()),
            lambda ms, first=prefill_milliseconds[name]: (
                f"{num_new_tokens / max(ms - first, 1e-6) * 1000:.1f} new tokens/s"
            ),
        )


def measure_training(bench: Bench, model, batch_size: int) -> None:
    """One step of either stage; what is trained is float32, the rest as loaded."""
    config, device = model.config, bench.device
    vision = config.vision_config
    num_steps = vision.frames_per_clip // vision.tubelet_size
    length = TEXT_TOKENS + EVENT_TOKENS + ANSWER_TOKENS
    input_ids = torch.full((batch_size, length), 7, device=device)
    labels = input_ids.clone()
    input_ids[:, 5 : 5 + EVENT_TOKENS] = config.video_token_id
    labels[:, :-ANSWER_TOKENS] = -100
    event_ids = torch.arange(num_steps, device=device) * EVENT_TOKENS // num_steps
    batch = {"input_ids": input_ids, "labels": labels, "frame_event_ids": event_ids.expand(batch_size, -1)}
    features = torch.randn(batch_size, num_steps, vision.hidden_size, device=device)
    size = (batch_size, vision.frames_per_clip, 3, vision.crop_size, vision.crop_size)
    model.requires_grad_(False)
    model.train()
    model.activation_checkpointing_enable()

    def measure_stage(name: str, inputs: dict):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step():
            model(**batch, **inputs, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        count = sum(parameter.numel() for parameter in trained)
        case = f"{name}, batch {batch_size}, {length} tokens"
        bench.measure(
            "training step", case, step, lambda ms: f"{count:,} trained, {batch_size / ms * 1000:.2f} videos/s"
        )

    model.model.multi_modal_projector.float().requires_grad_(True)
    measure_stage("stage 1, projector", {"frame_features": features})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "key", "value", "attention.proj"])
    inject_adapter_in_model(lora, model.model.vision_tower)
    for name, parameter in model.model.vision_tower.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    measure_stage("stage 2, LoRA and projector", {"pixel_values_videos": torch.randn(size, device=device)})


def main(arguments: list[str] | None = None) -> list[Measurement]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, choices=(4, 16), help="of the language model; by default what fits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="videos in a training step")
    parser.add_argument("--compile", action="store_true", help="measure the tower under torch.compile as well")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    if not is_cuda and not options.tiny:
        parser.error("a GPU is needed for the full-size model; --tiny tries the script without one")
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if is_cuda else 0
    bits = options.bits or (16 if memory >= BFLOAT16_GIBIBYTES or options.tiny else 4)
    device_name = torch.cuda.get_device_name(device) if is_cuda else "CPU"
    model = make_model(VJepaQwenConfig(**TINY) if options.tiny else VJepaQwenConfig(), device, bits)
    bench = Bench(device, options.repeats)
    for compiled in (False, True)[: 1 + options.compile]:
        measure_tower(bench, model.model.vision_tower, compiled)
    frame_tokens = {name: count // 100 for name, count in FRAME_TOKENS.items()} if options.tiny else FRAME_TOKENS
    measure_language(bench, model, frame_tokens, num_new_tokens=4 if options.tiny else 64)
    measure_training(bench, model, options.batch)

    table = Table("part", "case", "ms", "peak GB", "", title=f"{device_name}, language model in {bits} bits")
    for result in bench.results:
        table.add_row(
            result.part, result.case, f"{result.milliseconds:.2f}", f"{result.peak_gigabytes:.1f}", result.more
        )
    Console().print(table)
    # Without it the linear attention of Qwen3.5 runs in plain torch, which slows prefill and training.
    has_kernels = importlib.util.find_spec("fla") is not None
    results = {
        "device": device_name,
        "device_gibibytes": round(memory, 1),
        "language_model_bits": bits,
        "tiny": options.tiny,
        "flash_linear_attention": has_kernels,
        "measurements": [asdict(result) for result in bench.results],
    }
    write_json(options.output / f"gpu_{device_name.replace(' ', '_')}.json", results)
    return bench.results


if __name__ == "__main__":
    main()

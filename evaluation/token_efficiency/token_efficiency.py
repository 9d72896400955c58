"""How many fewer video tokens, as a module of the library `evaluate`.

metric = evaluate.load("evaluation/token_efficiency")
metric.compute(predictions=[10, 12], references=[2560, 2560])
"""

import statistics

import datasets
import evaluate

_DESCRIPTION = """
token_ratio = video tokens of the method compared with / video tokens of the model, both summed over all videos

The research release reports about 250 (10 tokens for what frame-based input spends 2,560 on). What is compared with
has to be named beside the figure: `vjepa-qwen evaluate` takes transformers' video processor of Qwen3.5 with the
size limits of the published checkpoints. It says nothing of how much the tokens tell.
"""

_INPUTS = """
Args:
    predictions (`list[int]`): Video tokens of each video.
    references (`list[int]`): Video tokens that the method compared with takes for the same videos.

Returns:
    `dict`: `token_ratio`, `mean_tokens`, `median_tokens`, and the counts, which add up: `num_tokens`,
    `num_reference_tokens`, `num_videos`.

Raises:
    ValueError: for a video without a token.
"""


class TokenEfficiency(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        if min(predictions, default=0) < 1:
            raise ValueError(f"predictions ({predictions}) must be numbers of tokens, at least 1 for each video")
        return {
            "token_ratio": sum(references) / sum(predictions),
            "mean_tokens": statistics.mean(predictions),
            "median_tokens": statistics.median(predictions),
            "num_tokens": sum(predictions),
            "num_reference_tokens": sum(references),
            "num_videos": len(predictions),
        }

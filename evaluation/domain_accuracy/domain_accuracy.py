"""Share of answers that name the right domain, as a module of the library `evaluate`.

metric = evaluate.load("evaluation/domain_accuracy")
metric.compute(predictions=["A cooking video in two scenes."], references=["cooking"], domains=["cooking", "sport"])
"""

import re
import unicodedata

import datasets
import evaluate

_DESCRIPTION = """
domain_accuracy = number of answers that name the domain of their reference, and no other one / number of answers

An answer names a domain when one of its names stands in it as a whole word, after Unicode normalisation (NFKC) and
case folding. A Korean name may be followed by more letters of its word: particles are written together with nouns.
An answer that names several domains is wrong, and counted as ambiguous. The measure is the one that the research
release reports (80 % with the tower frozen); how it read a domain out of a summary was not published, so figures
may not be comparable.
"""

_INPUTS = """
Args:
    predictions (`list[str]`): Answers, free text.
    references (`list[str]`): The domain of each.
    domains (`list[str]` or `dict[str, list[str]]`, *optional*):
        All domains, or the names of each (it is one of them itself). Defaults to the domains of the references.

Returns:
    `dict`: `domain_accuracy`, and the counts it comes from, which add up over data sets: `num_right`,
    `num_ambiguous` (several domains named), `num_unnamed` (none), `num_samples`.

Raises:
    ValueError: for a reference that is none of the domains, and without samples.
"""


class DomainAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, domains=None):
        if domains is None:
            domains = sorted(set(references))
        names = domains if isinstance(domains, dict) else {domain: [] for domain in domains}
        unknown = sorted(set(references) - set(names))
        if unknown or not references:
            raise ValueError(f"references ({unknown or 'none'}) must be of the domains: {', '.join(names)}")
        patterns = {domain: _pattern([domain, *others]) for domain, others in names.items()}
        named = [
            [domain for domain, pattern in patterns.items() if pattern.search(_fold(text))] for text in predictions
        ]
        num_right = sum(found == [reference] for found, reference in zip(named, references, strict=True))
        return {
            "domain_accuracy": num_right / len(references),
            "num_right": num_right,
            "num_ambiguous": sum(len(found) > 1 for found in named),
            "num_unnamed": sum(not found for found in named),
            "num_samples": len(references),
        }


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _pattern(names: list[str]) -> re.Pattern:
    # "가" to "힣" are the syllables of Hangul.
    parts = [re.escape(name) + ("" if "가" <= name[-1] <= "힣" else r"(?!\w)") for name in map(_fold, names)]
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})")

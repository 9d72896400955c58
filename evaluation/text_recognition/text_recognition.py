"""Share of the words on screen that an answer reads, as a module of the library `evaluate`.

metric = evaluate.load("evaluation/text_recognition")
metric.compute(predictions=['A ring with the text "JUMP".'], references=[["JUMP", "NOW"]])
"""

import re
import unicodedata

import datasets
import evaluate

_DESCRIPTION = """
text_recognition = on-screen words found in the answers / on-screen words, over all videos

A word (or a line of several) counts once for each video. It is found when its words stand in the answer one after
the other, after Unicode normalisation (NFKC, so that decomposed Korean and full-width letters are the same as
others), case folding, and without punctuation. A Korean word may be followed by more letters of its word in the
answer: particles are written together with nouns. The measure is the one that the research release reports (47.9 %
with LoRA, 1.2 % without); its rules were not published, so figures may not be comparable.

character_score = mean over the on-screen words of max over places in the answer of (1 - edit distance / length of
the longer), where edit distance is Levenshtein's on letters, Korean syllables taken apart (NFKD), and a place is as
many words of the answer as the word on screen has. It tells a word that was nearly read from one that was not seen.
"""

_INPUTS = """
Args:
    predictions (`list[str]`): Answers, free text.
    references (`list[list[str]]`): The words on screen of each video, or lines of them; none is an empty list.

Returns:
    `dict`: `text_recognition` and `character_score` (both None when no video shows a word), and the counts they come
    from, which add up over data sets: `num_found`, `character_score_sum`, `num_words`, `num_videos_with_text`.
"""


class TextRecognition(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        num_found, num_words, score_sum, num_videos = 0, 0, 0.0, 0
        for text, lines in zip(predictions, references, strict=True):
            answer = _words(text)
            # In the order in which they come, so that sums are the same in every run.
            lines = [line for line in dict.fromkeys(tuple(_words(line)) for line in lines) if line]
            num_videos += bool(lines)
            for line in lines:
                places = [answer[start : start + len(line)] for start in range(len(answer) - len(line) + 1)]
                num_words += 1
                num_found += any(_is_read(line, place) for place in places)
                score_sum += max((_similarity(" ".join(line), " ".join(place)) for place in places), default=0.0)
        return {
            "text_recognition": num_found / num_words if num_words else None,
            "character_score": score_sum / num_words if num_words else None,
            "num_found": num_found,
            "character_score_sum": score_sum,
            "num_words": num_words,
            "num_videos_with_text": num_videos,
        }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _is_read(line: tuple[str, ...], place: list[str]) -> bool:
    *first, last = line
    if place[:-1] != first:
        return False
    is_korean = "가" <= last[-1] <= "힣"
    return place[-1].startswith(last) if is_korean else place[-1] == last


def _similarity(left: str, right: str) -> float:
    left, right = (unicodedata.normalize("NFKD", text) for text in (left, right))
    distances = list(range(len(right) + 1))  # Levenshtein's, row by row
    for row, letter in enumerate(left, 1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(right, 1):
            change = diagonal + (letter != other)
            diagonal = distances[column]
            distances[column] = min(change, distances[column] + 1, distances[column - 1] + 1)
    return 1 - distances[-1] / max(len(left), len(right))

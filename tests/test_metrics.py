"""The metrics on cases that were counted by hand, loaded as users load them: `evaluate.load(path)`, offline."""

import unicodedata
from pathlib import Path

import evaluate
import pytest

import vjepa_qwen

FOLDER = Path(vjepa_qwen.__file__).parent / "evaluation"


@pytest.fixture
def load(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda name: evaluate.load(str(FOLDER / name), cache_dir=str(tmp_path))


# Domain accuracy


def test_the_one_domain_that_is_named_counts(load):
    result = load("domain_accuracy").compute(
        predictions=["A COOKING video.", "A sport video about cooking.", "A sportive video.", "Nothing."],
        references=["cooking", "sport", "sport", "cooking"],
        domains=["cooking", "sport"],
    )
    assert result == {
        "domain_accuracy": 0.25,
        "num_right": 1,
        "num_ambiguous": 1,
        "num_unnamed": 2,
        "num_samples": 4,
    }


def test_a_domain_has_other_names_and_korean_ones_carry_particles(load):
    result = load("domain_accuracy").compute(
        predictions=["요리를 하는 영상입니다.", unicodedata.normalize("NFD", "요리 영상"), "A recipe."],
        references=["cooking"] * 3,
        domains={"cooking": ["요리", "recipe"], "sport": ["운동"]},
    )
    assert result["num_right"] == 3


def test_a_reference_that_is_no_domain_is_an_error(load):
    with pytest.raises(ValueError, match="travel"):
        load("domain_accuracy").compute(predictions=["travel"], references=["travel"], domains=["sport"])


# Text recognition


def test_words_are_found_whole_and_once_for_each_video(load):
    result = load("text_recognition").compute(
        predictions=['It says "Jump", jump!', "New Yorker", "cat"],
        references=[["JUMP", "JUMP", "NOW"], ["new york"], []],
    )
    assert result["num_words"] == 3 and result["num_found"] == 1 and result["num_videos_with_text"] == 2
    assert result["text_recognition"] == pytest.approx(1 / 3)


def test_korean_words_are_found_decomposed_and_with_particles(load):
    result = load("text_recognition").compute(
        predictions=["화면에 안녕하세요라는 글자", unicodedata.normalize("NFD", "오늘")],
        references=[["안녕하세요"], ["오늘"]],
    )
    assert result["text_recognition"] == 1.0


def test_character_score_is_one_minus_the_edit_distance_of_the_nearest_word(load):
    # "kitten" and "sitting": three edits, seven letters.
    result = load("text_recognition").compute(predictions=["a sitting dog"], references=[["kitten"]])
    assert result["character_score"] == pytest.approx(1 - 3 / 7)
    # One jamo of five differs: ㅎㅏㄴㄱㅡㄹ against ㅎㅏㄴㄱㅏㄹ, of six.
    result = load("text_recognition").compute(predictions=["한갈"], references=[["한글"]])
    assert result["character_score"] == pytest.approx(1 - 1 / 6)


def test_without_words_there_is_no_score(load):
    result = load("text_recognition").compute(predictions=["anything"], references=[[]])
    assert result["text_recognition"] is None and result["num_words"] == 0


# Event boundaries


def test_boundaries_are_matched_one_to_one(load):
    result = load("event_boundaries").compute(
        predictions=[[1.0, 1.1, 3.0], []], references=[[1.05, 2.0], [4.0]], durations=[4.0, 8.0], tolerance_seconds=0.1
    )
    assert (result["num_matched"], result["num_predicted"], result["num_true"]) == (1, 3, 3)
    assert result["precision"] == result["recall"] == result["f1"] == pytest.approx(1 / 3)
    # 0.05 of 4 s reach 0.2 s; 0.25 reach 1 s, and 3.0 finds 2.0.
    assert result["num_matched_at_0.05"] == 1 and result["num_matched_at_0.25"] == 2
    assert result["mean_f1"] == pytest.approx((4 * 2 / 6 + 6 * 4 / 6) / 10)


def test_as_many_as_possible_are_matched(load):
    # Giving 1.0 to 1.0, its nearest, would leave 0.5 and 1.5 alone.
    result = load("event_boundaries").compute(
        predictions=[[0.5, 1.0]], references=[[1.0, 1.5]], durations=[2.0], tolerance_seconds=0.5
    )
    assert result["num_matched"] == 2


def test_nothing_found_where_there_is_nothing_is_right(load):
    result = load("event_boundaries").compute(predictions=[[]], references=[[]], durations=[1.0])
    assert result["f1"] == result["mean_f1"] == 1.0


def test_counts_of_two_data_sets_add_up_to_those_of_both(load):
    metric, options = load("event_boundaries"), {"tolerance_seconds": 0.3}
    found, true = [[0.5, 2.0], [1.0]], [[0.6], [1.2, 3.0]]
    parts = [
        metric.compute(predictions=[f], references=[t], durations=[4.0], **options)
        for f, t in zip(found, true, strict=True)
    ]
    whole = metric.compute(predictions=found, references=true, durations=[4.0, 4.0], **options)
    for name in whole:
        if name.startswith("num_"):
            assert whole[name] == sum(part[name] for part in parts)


def test_a_tolerance_must_be_positive(load):
    with pytest.raises(ValueError, match="tolerance_seconds"):
        load("event_boundaries").compute(predictions=[[]], references=[[]], durations=[1.0], tolerance_seconds=0)


# Token efficiency


def test_token_ratio_is_that_of_the_sums(load):
    result = load("token_efficiency").compute(predictions=[10, 30], references=[2560, 1440])
    assert result["token_ratio"] == 100.0 and result["mean_tokens"] == 20 and result["num_reference_tokens"] == 4000


def test_a_video_costs_a_token_at_least(load):
    with pytest.raises(ValueError, match="at least 1"):
        load("token_efficiency").compute(predictions=[0], references=[10])

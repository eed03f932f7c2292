"""ROUGE-L beyond a-z: tokens of every script, the choice between tokenizers, and the values."""

from __future__ import annotations

import unicodedata
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.config.scoring import RougeTokenizer
from pocl_ds.errors import RecipeError
from pocl_ds.metrics import rouge
from pocl_ds.metrics.rouge import has_tokens, rouge_l, rouge_l_many
from pocl_ds.metrics.rouge_tokenizer import (
    AUTO,
    MAX_SAMPLED_CHARACTERS,
    ROUGE_TOKENIZERS,
    characters,
    choose_rouge_tokenizer,
    unicode_words,
)

TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog.",
    "Chinese": "北京是中国的首都。很大。",
    "Russian": "Москва — столица России.",
    "Hindi": "मैं हिन्दी में लिखता हूँ।",
    "Arabic": "العربيّةُ لغةٌ جميلةٌ، أليس كذلك؟",
    "Japanese": "東京は日本の首都です。とても大きい。",
    "Thai": "กรุงเทพเป็นเมืองหลวงของประเทศไทย",
    "Korean": "서울은 대한민국의 수도입니다.",
    "French": "L'été, les élèves étaient très fatigués après le dîner.",
    "German": "Die Größe der Häuser überrascht: schöne Gärten fehlen.",
    "Vietnamese": "Hà Nội là thủ đô của Việt Nam.",
}
CHOICES = {
    "English": "rouge_score",
    "Chinese": "characters",
    "Russian": "unicode_words",
    "Hindi": "unicode_words",
    "Arabic": "unicode_words",
    "Japanese": "characters",
    "Thai": "characters",
    "Korean": "unicode_words",
    "French": "unicode_words",
    "German": "unicode_words",
    "Vietnamese": "unicode_words",
}
SPLITTERS = {"unicode_words": unicode_words, "characters": characters}
ANY_TEXT = st.one_of(st.text(max_size=40), st.text("aé é北 ไทมัน่ अ्ष ж.'\u200d1", max_size=40))


def test_the_recipe_offers_every_tokenizer() -> None:
    assert get_args(RougeTokenizer) == (AUTO, *ROUGE_TOKENIZERS)


@pytest.mark.parametrize("tokenizer", ["unicode_words", "characters", "auto"])
@pytest.mark.parametrize("language", TEXTS)
def test_identical_answers_have_the_value_1(language: str, tokenizer: str) -> None:
    text = TEXTS[language]
    assert rouge_l(text, [text], rouge_tokenizer=tokenizer) == 1.0
    decomposed = unicodedata.normalize("NFD", text).upper()
    if tokenizer != "auto" or language != "English":
        assert rouge_l(decomposed, [text], rouge_tokenizer=tokenizer) == 1.0


@pytest.mark.parametrize("language", TEXTS)
def test_other_answers_have_a_value_between(language: str) -> None:
    text = TEXTS[language]
    assert 0.2 < rouge_l(text[: len(text) // 2], [text], rouge_tokenizer="auto") < 0.9


@pytest.mark.parametrize("language", TEXTS)
def test_auto_chooses_by_the_script(language: str) -> None:
    assert choose_rouge_tokenizer([TEXTS[language]]).name == CHOICES[language]


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (
            ["We met in a café near the river and had a naïve talk.", "It rained all day."] * 2
            + ["A plain answer without any accent."],
            "rouge_score",
        ),
        (["12 + 3 = 15", "42"], "rouge_score"),
        (["…", ""], "rouge_score"),
        ([], "rouge_score"),
        ([TEXTS["English"]] * 19 + [TEXTS["Chinese"]], "rouge_score"),
        ([TEXTS["English"]] * 9 + [TEXTS["Chinese"]], "unicode_words"),
        ([TEXTS["English"], TEXTS["Chinese"]], "unicode_words"),
        ([TEXTS["English"], TEXTS["Russian"]], "unicode_words"),
        ([TEXTS["English"], TEXTS["Chinese"], TEXTS["Thai"]], "characters"),
    ],
)
def test_auto_for_accents_mixtures_and_texts_without_letters(texts: list[str], name: str) -> None:
    assert choose_rouge_tokenizer(texts).name == name


def test_a_choice_tells_its_numbers_and_weighs_references_equally() -> None:
    choice = choose_rouge_tokenizer(["a" * 5000, "北京", "!"])
    assert (choice.references, choice.share_seen, choice.share_unspaced) == (2, 0.5, 0.5)
    assert str(choice) == (
        "unicode_words: 2 references have on average 50.0% of their letters in words of a-z and "
        "0-9 alone, and 50.0% in scripts without spaces"
    )
    long_text = "a" * MAX_SAMPLED_CHARACTERS + "北" * 90_000
    assert choose_rouge_tokenizer([long_text]).share_seen == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Привет, мир! Ёжик", ["привет", "мир", "ёжик"]),
        ("मैं हिन्दी में लिखता हूँ।", ["मैं", "हिन्दी", "में", "लिखता", "हूँ"]),
        ("لغةٌ جميلةٌ، أليس؟", ["لغةٌ", "جميلةٌ", "أليس"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("Don't e\u0301cole 1,000.5 — U.S.A.", ["don't", "école", "1,000.5", "u.s.a"]),
        ("서울은 수도", ["서울은", "수도"]),
        ("北京 カタカナ", ["北", "京", "カタカナ"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
    ],
)
def test_words_of_uax_29(text: str, words: list[str]) -> None:
    assert unicode_words(text) == words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("北京。GDP 3%", ["北", "京", "g", "d", "p", "3"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("かが か\u3099", ["か", "が", "が"]),
        ("… 😀 ، 。", []),
    ],
)
def test_characters_are_letters_with_their_marks(text: str, expected: list[str]) -> None:
    assert characters(text) == expected


def slow_rouge_l(a: list[str], b: list[str]) -> float:
    """By the table of common subsequences."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


@given(ANY_TEXT, ANY_TEXT, st.sampled_from(sorted(SPLITTERS)))
def test_values_are_those_of_a_slow_table(a: str, b: str, tokenizer: str) -> None:
    split = SPLITTERS[tokenizer]
    expected = slow_rouge_l(split(a), split(b))
    assert rouge_l(a, [b], rouge_tokenizer=tokenizer) == pytest.approx(expected, abs=1e-12)
    assert has_tokens(a, tokenizer) == bool(split(a))


@given(ANY_TEXT, st.sampled_from(sorted(SPLITTERS)))
def test_tokens_ignore_case_and_composition(text: str, tokenizer: str) -> None:
    split = SPLITTERS[tokenizer]
    assert split(unicodedata.normalize("NFD", text)) == split(unicodedata.normalize("NFC", text))
    assert all(any(map(str.isalnum, token)) for token in split(text))


def test_many_texts_choose_one_tokenizer() -> None:
    predictions = [TEXTS["Chinese"], TEXTS["English"], "nothing"]
    references = [[TEXTS["Chinese"]], [TEXTS["English"], "x"], [TEXTS["Japanese"]]]
    values = rouge_l_many(predictions, references, rouge_tokenizer="auto")
    assert values.tolist() == [1.0, 1.0, 0.0]
    running = [["He was running."], [TEXTS["Russian"]]]  # no stems among words of every script
    assert rouge_l_many(["he runs", ""], running, rouge_tokenizer="auto")[0] == pytest.approx(0.4)


def test_the_default_is_rouge_score() -> None:
    assert rouge_l(TEXTS["Chinese"], [TEXTS["Chinese"]]) == 0.0
    assert not has_tokens(TEXTS["Chinese"], "rouge_score")
    assert rouge_l("running", ["runs"]) == 1.0


def test_an_unknown_tokenizer_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match="no ROUGE tokenizer 'character': did you mean character"):
        rouge_l("a", ["a"], rouge_tokenizer="character")
    with pytest.raises(RecipeError, match="no ROUGE tokenizer"):
        rouge_l_many([], [], rouge_tokenizer="words")


def test_a_full_cache_is_cleared_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXTS["Russian"]
    before = rouge_l(text, ["столица"], rouge_tokenizer="unicode_words")
    monkeypatch.setattr(rouge, "MAX_CACHED_WORDS", 2)
    assert rouge_l(text, ["столица"], rouge_tokenizer="unicode_words") == before
    assert len(rouge._token_caches["unicode_words"]) <= 4

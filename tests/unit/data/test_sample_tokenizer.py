"""Samples as token ids: one tokenization of the whole text, the limits, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from pocl_ds.config import PromptConfig
from pocl_ds.data.conversation import Message, Sample
from pocl_ds.data.sample_tokenizer import SampleTokenizer, TokenizedSample
from pocl_ds.errors import DataError, ModelError

TOKENIZER = tiny_models.make_tokenizer()
SENTENCEPIECE = tiny_models.make_sentencepiece_tokenizer()
# Without the texts of special tokens and the white space that is removed before them.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60).filter(
    lambda text: "<" not in text and text.strip()
)
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make(tokenizer: Any = TOKENIZER, special: Any = "allow", **options: Any) -> SampleTokenizer:
    keep_all = options.pop("keep_all", False)
    config = {"template": "plain", "max_prompt_tokens": 16, "max_length": 32, **options}
    return SampleTokenizer(
        tokenizer, PromptConfig(**config), special_tokens_in_text=special, keep_all=keep_all
    )


def ask(instruction: str, response: str = "b", **fields: Any) -> Sample:
    return Sample.from_instruction("s", instruction, response, **fields)


def trained_text(tokenizer: Any, sample: TokenizedSample) -> str:
    pairs = zip(sample.ids, sample.loss_mask, strict=True)
    return str(tokenizer.decode([token for token, trains in pairs if trains]))


@given(TEXT, TEXT, st.sampled_from(["plain", "alpaca"]), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_the_whole_text(
    instruction: str, answer: str, template: str, sentencepiece: bool, escape: bool
) -> None:
    """Where no token spans the boundary; otherwise prompt and response are tokenized apart. Either
    way the prompt's ids are those that are asked with.
    """
    tokenizer = SENTENCEPIECE if sentencepiece else TOKENIZER
    special = "escape" if escape else "allow"
    samples = make(tokenizer, special, template=template, max_prompt_tokens=4000, max_length=9000)
    sample = ask(instruction, answer)
    tokenized, prompt = samples.tokenize(sample), samples.render_prompt(sample)
    prompt_ids = tokenizer(prompt)["input_ids"]
    assert samples.tokenize_prompt(sample) == prompt_ids == tokenized.ids[: len(prompt_ids)]
    assert tokenized.prompt_tokens == len(prompt_ids)
    if samples.counts["boundary_split"]:
        response = samples.encoder.encode_continuation(answer).ids
        assert tokenized.ids == [*prompt_ids, *response, tokenizer.eos_token_id]
    else:
        whole = tokenizer(prompt + answer)["input_ids"]
        assert tokenized.ids == [*whole, tokenizer.eos_token_id]
    assert tokenized.loss_mask.tolist() == [i >= len(prompt_ids) for i in range(len(tokenized.ids))]
    assert not tokenized.truncated and not samples.counts["altered_text"]


def test_a_token_that_spans_the_boundary_is_counted() -> None:
    """`plain` writes the response right after the question, so a word may continue."""
    merged = next(t for t in TOKENIZER.vocab if len(t) > 1 and t.isascii() and t.isalpha())
    samples = make()
    tokenized = samples.tokenize(ask(merged[0], merged[1:]))
    apart = [TOKENIZER(part)["input_ids"] for part in (merged[0], merged[1:])]
    assert len(TOKENIZER(merged)["input_ids"]) == 1
    assert tokenized.ids == [*apart[0], *apart[1], 0] and tokenized.prompt_tokens == 1
    assert samples.counts["boundary_split"] == 1


def test_sentencepiece_puts_no_space_into_the_text() -> None:
    """Tokenized apart, the response would begin with a space that the text does not have."""
    samples = make(SENTENCEPIECE, template="alpaca", max_prompt_tokens=400, max_length=800)
    tokenized = samples.tokenize(ask("Add.", "It is"))
    first = SENTENCEPIECE.convert_ids_to_tokens(tokenized.ids[tokenized.prompt_tokens])
    assert not first.startswith("\u2581") and not samples.counts["boundary_split"]
    assert trained_text(SENTENCEPIECE, tokenized) == "It is</s>"


def test_a_text_has_no_prompt_and_trains_whole() -> None:
    sample = Sample("s", (Message("assistant", "Once upon a time"),))
    for template in ("plain", "chat"):
        tokenizer = tiny_models.make_tokenizer(chat=True)
        tokenized = make(tokenizer, template=template).tokenize(sample)
        assert tokenized.ids == [*TOKENIZER("Once upon a time")["input_ids"], 0]
        assert tokenized.prompt_tokens == 1 and tokenized.loss_mask[1:].all()
    bos = tiny_models.make_sentencepiece_tokenizer()
    bos._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenized = make(bos).tokenize(sample)
    assert tokenized.ids[0] == 1 and tokenized.prompt_tokens == 1


class TestLimits:
    def test_max_length_is_inclusive(self) -> None:
        samples = make()  # bytes without merges: 16 + 15 + EOS = 32
        fits = samples.tokenize(ask("a" * 16, "b" * 15))
        assert len(fits.ids) == 32 and not fits.truncated and fits.ids[-1] == 0
        cut = samples.tokenize(ask("a" * 16, "b" * 16))
        assert len(cut.ids) == 32 and cut.truncated and cut.ids[-1] != 0
        assert samples.counts["response_truncated"] == 1

    def test_a_question_that_is_too_long_is_left_out_and_never_cut(self) -> None:
        for overlong in ("truncate_text", "truncate_history", "drop"):
            samples = make(overlong=overlong)
            assert samples.tokenize_many([ask("a" * 17)]) == [None]
            assert samples.counts["overlong_dropped"] == 1
        assert make(overlong="drop").tokenize_many([ask("a", "b" * 40)]) == [None]
        kept = make(keep_all=True).tokenize(ask("a" * 17))
        assert kept.prompt_tokens == 16 and kept.truncated

    @pytest.mark.parametrize("sample", [ask("a" * 17), ask("a", "b" * 40)])
    def test_an_error_names_the_numbers(self, sample: Sample) -> None:
        with pytest.raises(
            DataError,
            match=r"sample s has \d+ prompt tokens \(limit 16\) and \d+ in all \(limit 32\): raise",
        ):
            make(overlong="error").tokenize_many([sample])

    def test_prompts_are_shortened_and_counted_but_never_left_out(self) -> None:
        prompts = [ask("a" * count) for count in (16, 17, 20)]
        for overlong in ("truncate_text", "drop"):
            ids, cut = make(overlong=overlong).tokenize_prompts(prompts)
            assert [len(row) for row in ids] == [16, 16, 16] and cut == 2
        with pytest.raises(DataError, match=r"17 prompt tokens \(limit 16\): raise prompt\.max_pr"):
            make(overlong="error").tokenize_prompts(prompts)
        assert make(overlong="error").tokenize_prompts(prompts[:1])[1] == 0

    def test_the_end_of_a_template_is_never_cut(self) -> None:
        """A system text above the limit loses its end; question and generation prompt stay."""
        tokenizer = tiny_models.make_tokenizer()
        tokenizer.chat_template = CHAT
        sample = Sample(
            "s",
            (Message("system", "rule " * 90), Message("user", "2?"), Message("assistant", "It is")),
        )
        samples = make(tokenizer, template="chat", max_prompt_tokens=60, max_length=80)
        prompt = tokenizer.decode(samples.tokenize_prompt(sample))
        assert prompt.startswith("<system>rule rule") and prompt.endswith(
            "</s><user>2?</s><assistant>"
        )
        tokenized = samples.tokenize(sample)
        assert tokenizer.decode(tokenized.ids[: tokenized.prompt_tokens]) == prompt
        assert 50 < tokenized.prompt_tokens <= 60 and samples.counts["text_truncated"] == 1
        assert samples.tokenize_many([sample])[0] is not None
        history = make(
            tokenizer,
            template="chat",
            max_prompt_tokens=60,
            max_length=80,
            overlong="truncate_history",
        )
        assert history.tokenize_many([sample]) == [None]

    def test_the_earliest_turns_go_first(self) -> None:
        tokenizer = tiny_models.make_tokenizer()
        tokenizer.chat_template = CHAT
        turns = [Message("system", "S")]
        for number in range(6):
            turns += [Message("user", f"q{number}"), Message("assistant", f"a{number}")]
        samples = make(tokenizer, template="chat", max_prompt_tokens=100, max_length=120)
        tokenized = samples.tokenize(Sample("s", tuple(turns)))
        text = tokenizer.decode(tokenized.ids[: tokenized.prompt_tokens])
        assert text.startswith("<system>S</s><user>q") and text.endswith("<user>q5</s><assistant>")
        assert "q0" not in text and samples.counts["history_truncated"] == 1
        assert tokenized.loss_mask.sum() > 5, "the remaining earlier answers still train"

    def test_a_text_is_never_cut_within_a_character(self) -> None:
        for limit in range(5, 20):
            samples = make(max_prompt_tokens=2, max_length=limit)
            tokenized = samples.tokenize(ask("a", "日本語テキスト"))
            assert "\ufffd" not in TOKENIZER.decode(tokenized.ids)
            assert limit - 3 < len(tokenized.ids) <= limit


class TestSpecialTokensInTexts:
    TEXT = "End with <|endoftext|> now"

    def test_allowed_ones_are_counted(self) -> None:
        samples = make(max_length=99, max_prompt_tokens=50)
        assert 0 in samples.tokenize(ask(self.TEXT)).ids[:-1]
        assert samples.counts["special_tokens_in_text"] == 1

    @pytest.mark.parametrize("tokenizer", [TOKENIZER, SENTENCEPIECE])
    def test_escaped_ones_are_ordinary_text(self, tokenizer: Any) -> None:
        special = tokenizer.eos_token
        sample = ask(f"Say {special}.", f"It is {special} here", input=f"{special} x")
        samples = make(tokenizer, "escape", max_length=199, max_prompt_tokens=90)
        tokenized = samples.tokenize(sample)
        assert (
            tokenized.ids.count(tokenizer.eos_token_id)
            == 1
            == samples.counts["special_tokens_in_text"]
        )
        whole = f"Say {special}.\n{special} xIt is {special} here{special}"
        assert tokenizer.decode(tokenized.ids) == whole
        assert trained_text(tokenizer, tokenized) == f"It is {special} here{special}"
        prompt = samples.tokenize_prompt(sample)
        assert prompt == tokenized.ids[: tokenized.prompt_tokens]
        assert not samples.counts["altered_text"]

    def test_samples_with_them_can_be_left_out(self) -> None:
        samples = make(special="drop")
        assert samples.tokenize_many([ask(self.TEXT), ask("a")])[0] is None
        assert samples.counts["special_tokens_in_text"] == 1
        with pytest.raises(DataError, match="the recipe leaves such samples out"):
            samples.tokenize(ask(self.TEXT))

    def test_an_end_token_at_the_end_of_a_response_is_removed(self) -> None:
        samples = make(max_length=99)
        for ending in ("<|endoftext|>", " <|endoftext|>\n", "<|endoftext|><|endoftext|>"):
            sample = replace(ask("a", f"It is{ending}"), other_references=(f"So{ending}",))
            assert samples.tokenize(sample).ids == samples.tokenize(ask("a", "It is")).ids
            assert samples.clean(sample).references == ("It is", "So")
        assert samples.counts["end_token_removed"] >= 3


def test_text_that_does_not_decode_back_is_counted() -> None:
    from tokenizers import normalizers

    tokenizer = tiny_models.make_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Lowercase()
    samples = make(tokenizer)
    samples.tokenize_many([ask("a", "It is"), ask("a", "it is")])
    assert samples.counts["altered_text"] == 1


def test_empty_prompt_is_refused(tmp_path: Path) -> None:
    """Scoring and generation start after a prompt, and engines refuse an empty one."""
    path = tmp_path / "input-only.jinja"
    path.write_text("{{ input }}")
    samples = make(template=str(path))
    for encode in (samples.tokenize, samples.tokenize_prompt):
        with pytest.raises(DataError, match=r"sample s: .*only\.jinja gives an empty prompt"):
            encode(ask("a"))
    invalid = []
    kept = samples.tokenize_many(
        [ask("a"), ask("a", input="x")], lambda sample, error: invalid.append(error.reason)
    )
    assert kept[0] is None and kept[1] is not None and invalid == ["empty prompt"]


def test_only_the_prompt_gets_the_tokenizers_bos() -> None:
    """One BOS before the prompt, none between prompt and response, and one EOS at the end."""
    tokenizer = tiny_models.make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny_models.PAD} $A {tiny_models.EOS}",
        special_tokens=[(tiny_models.EOS, 0), (tiny_models.PAD, 1)],
    )
    with_bos, bare = make(tokenizer).tokenize(ask("ab", "cd")), make().tokenize(ask("ab", "cd"))
    assert with_bos.ids == [1, *bare.ids]


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token.*set eos_token"):
        make(tokenizer)


def test_a_response_that_was_cut_off_gets_no_eos() -> None:
    samples = make()
    complete = samples.tokenize(ask("Say.", "It is"))
    cut = samples.tokenize(ask("Say.", "").with_response("It is", ended=False))
    assert [*cut.ids, 0] == complete.ids and cut.prompt_tokens == complete.prompt_tokens
    empty = samples.tokenize(ask("Say.", "").with_response("", ended=False))
    assert empty.ids[-1] == 0, "a sample needs a loss token"


def test_the_mask_is_an_array_of_all_tokens() -> None:
    tokenized = make().tokenize(ask("Say.", "It is"))
    assert tokenized.loss_mask.dtype == np.bool_
    assert len(tokenized.loss_mask) == len(tokenized.ids)

"""What is learned: windows of text, answers, the assistant's turns."""

import numpy as np
import pytest

from lightning_rlora.data.chat import ChatEncoder
from lightning_rlora.data.examples import AnswerEncoder, Example, Examples, Template, TextEncoder, encode_all
from lightning_rlora.errors import UserError

CHATML = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": " the mat"},
]


def learned(tokenizer, example):
    return tokenizer.decode(example.tokens[example.loss])


def test_text_by_hand(letters):
    (one,) = TextEncoder(letters, 8, "text").encode([{"text": "123"}], 1)
    assert one.tokens.tolist() == [3, 4, 5, 1]
    assert one.loss.tolist() == [False, True, True, True]


def test_windows_predict_every_token_once(letters):
    windows = list(TextEncoder(letters, 4, "text").encode([{"text": "0123456789"}], 1))
    assert [w.tokens.tolist() for w in windows] == [[2, 3, 4, 5], [5, 6, 7, 8], [8, 9, 10, 11], [11, 1]]
    predicted = np.concatenate([w.tokens[w.loss] for w in windows])
    assert predicted.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 1]  # all but the first, and the eos


def test_blank_text_is_left_out_and_bos_opens(tokenizer):
    (one,) = TextEncoder(tokenizer, 64, "text").encode([{"text": " \n"}, {"text": "the cat"}], 1)
    assert tokenizer.decode(one.tokens) == "<s>the cat</s>"
    assert learned(tokenizer, one) == "the cat</s>"


def test_answer_by_hand(letters):
    encoder = AnswerEncoder(letters, 8, "{q}z", "a")
    (one,) = encoder.encode([{"q": "01", "a": "23"}], 1)
    assert one.tokens.tolist() == [2, 3, 2 + 35, 4, 5, 1]
    assert one.loss.tolist() == [False] * 3 + [True] * 3


def test_answer_cut_and_cut_off(letters):
    encoder = AnswerEncoder(letters, 4, "q", "a")
    records = [{"q": "0", "a": "12"}, {"q": "0", "a": "1234"}, {"q": "0123", "a": "1"}, {"q": "012", "a": "34"}]
    cut = list(encoder.encode(records, 1))
    assert [e.tokens.tolist() for e in cut] == [[2, 3, 4, 1], [2, 3, 4, 5], [2, 3, 4, 5]]
    assert [e.loss.tolist() for e in cut] == [[False, True, True, True]] * 2 + [[False, False, False, True]]
    assert (encoder.truncated, encoder.dropped) == (3, 1)


def test_answer_after_bos(tokenizer):
    encoder = AnswerEncoder(tokenizer, 64, "question: {q}", " {a}")
    (one,) = encoder.encode([{"q": "cat", "a": 7}], 1)
    assert tokenizer.decode(one.tokens) == "<s>question: cat 7</s>"
    assert learned(tokenizer, one) == " 7</s>"
    text, ids = encoder.prompt({"q": "cat"}, 1)
    assert text == "question: cat"
    assert one.tokens[: len(ids)].tolist() == ids  # generation starts from exactly the tokens trained on


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_chat_without_markers(make_tokenizer, trim_offsets):
    tokenizer = make_tokenizer(bos=False, chat_template=CHATML, trim_offsets=trim_offsets)
    (one,) = ChatEncoder(tokenizer, 128, "m").encode([{"m": TALK}], 1)
    assert tokenizer.decode(one.tokens) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(tokenizer, one) == "sat on<|end|>\n the mat<|end|>\n"


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_chat_with_markers(make_tokenizer, trim_offsets):
    tokenizer = make_tokenizer(bos=False, chat_template=MARKED, trim_offsets=trim_offsets)
    (one,) = ChatEncoder(tokenizer, 128, "m").encode([{"m": TALK}], 1)
    assert learned(tokenizer, one) == "sat on<|end|> the mat<|end|>"


def test_markers_agree_with_the_tokenizers_own_mask(make_tokenizer):
    tokenizer = make_tokenizer(bos=False, chat_template=MARKED)
    talk = [*TALK[:3], {"role": "assistant", "content": "the mat"}]  # no space in front: the mask is right then
    (one,) = ChatEncoder(tokenizer, 128, "m").encode([{"m": talk}], 1)
    own = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
    assert one.tokens.tolist() == own["input_ids"]
    assert one.loss.astype(int).tolist() == own["assistant_masks"]


def test_chat_is_cut_and_dropped(make_tokenizer):
    tokenizer = make_tokenizer(bos=False, chat_template=CHATML)
    (whole,) = ChatEncoder(tokenizer, 512, "m").encode([{"m": TALK}], 1)
    begin = int(np.flatnonzero(whole.loss)[0])
    encoder = ChatEncoder(tokenizer, begin + 1, "m")
    (one,) = encoder.encode([{"m": TALK}], 1)
    assert one.loss.sum() == 1
    encoder = ChatEncoder(tokenizer, begin, "m")
    assert list(encoder.encode([{"m": TALK}], 1)) == []
    assert (encoder.truncated, encoder.dropped) == (1, 1)


def test_chat_prompt_leaves_the_last_answer_out(make_tokenizer):
    tokenizer = make_tokenizer(bos=False, chat_template=CHATML)
    text, ids = ChatEncoder(tokenizer, 128, "m").prompt({"m": TALK}, 1)
    assert text.endswith("<|turn|>user\nmore<|end|>\n<|turn|>assistant\n")
    assert tokenizer.decode(ids) == text


def test_templates_that_cannot_be_split(make_tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        ChatEncoder(make_tokenizer(), 64, "m")
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '...' }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match="renders earlier turns differently"):
        list(ChatEncoder(make_tokenizer(chat_template=forgetful), 64, "m").encode([{"m": TALK}], 1))
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"record 5: .*roles must alternate"):
        list(ChatEncoder(make_tokenizer(chat_template=strict), 64, "m").encode([{"m": TALK}], 5))


@pytest.mark.parametrize("turns", ["hello", [], ["hello"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_wrong_conversations(make_tokenizer, turns):
    with pytest.raises(UserError, match="record 1: "):
        list(ChatEncoder(make_tokenizer(chat_template=CHATML), 64, "m").encode([{"m": turns}], 1))


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{}", "{0}", "{a", "a}"])
def test_wrong_templates(template):
    with pytest.raises(UserError, match="the template"):
        Template(template)


def test_template_errors_name_the_fields():
    with pytest.raises(UserError, match="record 3 has no field 'question': its fields are q, a"):
        Template("Question: {question}")({"q": "", "a": ""}, 3)
    with pytest.raises(UserError, match="'a' is a NoneType, not a string"):
        Template("{a}")({"a": None}, 1)
    with pytest.raises(UserError, match="'a' is a int, not a string"):
        Template("a")({"a": 1}, 1)
    assert Template("{{{a}}}")({"a": 1}, 1) == "{1}"


def test_examples_keep_everything_in_flat_arrays(letters):
    texts = [{"text": "0" * n} for n in range(1, 600)]
    direct = list(TextEncoder(letters, 2000, "text").encode(texts, 1))
    kept = Examples(encode_all(TextEncoder(letters, 2000, "text"), texts))
    assert len(kept) == len(direct) == 599
    assert kept.lengths.tolist() == [len(e) for e in direct]
    assert all((a.tokens == b.tokens).all() and (a.loss == b.loss).all() for a, b in zip(kept, direct, strict=True))
    assert kept.tokens.nbytes + kept.loss.nbytes == 5 * sum(map(len, direct))


def test_examples_of_nothing():
    assert len(Examples([])) == 0
    assert len(Examples([Example(np.zeros(3, np.int32), np.ones(3, bool))])) == 1

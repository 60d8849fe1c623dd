import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.text import BOOK, decode, encode, load_book, random_batch, split_book, windows


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text):
    token_ids = encode(text)
    assert token_ids.dtype == torch.int64 and token_ids.dim() == 1
    assert decode(token_ids) == text


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_decode_without_a_crash(token_ids):
    assert isinstance(decode(torch.tensor(token_ids, dtype=torch.int64)), str)


def test_half_a_character_becomes_the_replacement_mark_and_nothing_else_is_lost():
    token_ids = encode("whale — ship")
    assert decode(token_ids[:7]) == "whale \ufffd"
    assert decode(token_ids[7:]).endswith(" ship")


@pytest.mark.parametrize("shape", [(), (2, 3), (1, 3)])
def test_a_batch_is_not_joined_into_one_text(shape):
    with pytest.raises(ValueError, match="token_ids: expected .T,., got"):
        decode(torch.zeros(shape, dtype=torch.int64))


def test_the_book_is_the_one_that_its_provenance_names():
    digest = hashlib.sha256(BOOK.read_bytes()).hexdigest()
    assert digest in (BOOK.parent / "README.md").read_text()
    assert len(encode(load_book())) == 1_204_997


def test_a_missing_book_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected .*no_book.txt"):
        load_book(tmp_path / "no_book.txt")


def test_train_and_held_out_are_the_whole_and_do_not_overlap():
    token_ids = torch.arange(1003)
    train, held_out = split_book(token_ids)
    assert torch.equal(torch.cat([train, held_out]), token_ids)
    assert len(held_out) == 101


def test_a_batch_is_made_of_passages_and_is_the_same_for_the_same_seed():
    token_ids = torch.arange(50) * 3
    first, again, other = (
        random_batch(token_ids, 500, 8, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first.shape == (500, 8)
    assert (first.diff(dim=1) == 3).all()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() == 0 and first.max() == 147  # both ends are drawn


def test_a_batch_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match=r"at least seq_len = 8 tokens, got \(7,\)"):
        random_batch(torch.arange(7), 1, 8)


@pytest.mark.parametrize("num_tokens", [8, 15, 22, 100, 103])
def test_windows_predict_each_token_once(num_tokens):
    batches = list(windows(torch.arange(num_tokens), batch_size=2, seq_len=8))
    predicted = torch.cat([batch[:, 1:].flatten() for batch in batches])
    num_whole = (num_tokens - 1) // 7 * 7
    assert predicted.tolist() == list(range(1, num_whole + 1))


def test_a_text_of_one_passage_is_that_passage():
    assert random_batch(torch.arange(8), 1, 8).tolist() == [list(range(8))]
    assert [w.tolist() for w in windows(torch.arange(8), 2, 8)] == [[list(range(8))]]


@pytest.mark.parametrize("seq_len", [0, 1, 9])
def test_windows_of_no_prediction_or_beyond_the_text_are_refused(seq_len):
    with pytest.raises(ValueError, match=f"seq_len: expected 2 to 8, .*got {seq_len}"):
        windows(torch.arange(8), 2, seq_len)


def test_a_batch_is_no_text():
    for function in (random_batch, windows):
        with pytest.raises(ValueError, match=r"token_ids: expected \(T,\)"):
            function(torch.zeros(2, 9).long(), 2, 5)

"""Packed tokens: nothing is lost or moved on the way."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from madtp.packing import class_tokens, pack
from tests.madtp.cases import mask_of

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@quick
@given(lengths)
def test_packing_and_padding_again_gives_every_token_back(lengths):
    valid = mask_of(lengths)
    x = torch.arange(valid.numel() * 3.0).reshape(*valid.shape, 3)
    flat, layout = pack(x, valid)
    assert flat.tolist() == [token for sample, n in zip(x.tolist(), lengths, strict=True) for token in sample[:n]]
    assert torch.equal(layout.valid, valid)
    assert torch.equal(layout.pad(flat)[valid], x[valid]) and torch.equal(layout.unpad(x), flat)
    assert torch.equal(class_tokens(flat, layout), x[:, 0])


def test_the_whole_batch_is_packed_as_it_lies():
    x = torch.randn(3, 4, 2)
    flat, layout = pack(x, None)
    assert flat.data_ptr() == x.data_ptr() and layout.lengths == (4, 4, 4)
    assert torch.equal(layout.pad(flat), x)


def test_a_batch_is_split_and_neighbours_are_joined():
    valid = mask_of([2, 1, 3, 4])
    flat, layout = pack(torch.randn(4, 4, 2), valid)
    (left, first), (right, second) = layout.chunk(flat, 2)
    assert (first.lengths, second.lengths) == ((2, 1), (3, 4))
    assert torch.equal(torch.cat([left, right]), flat)
    assert layout.joined(first).lengths == (3, 7)
    assert layout.joined(replace(first, readers=(3, 1))).lengths == (6, 4)

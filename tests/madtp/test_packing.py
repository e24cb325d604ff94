"""Packed tokens: nothing lost or moved on the way, and column statistics without a map against the map itself."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from madtp.attention.chunked import CHUNK, attend_in_chunks, class_row, column_statistics
from madtp.importance import paper_columns
from madtp.packing import class_tokens, pack
from madtp.selection import gather_and_merge, packed_gather_and_merge

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def mask_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


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


@quick
@given(lengths, st.booleans(), st.randoms(use_true_random=False))
def test_packed_tokens_are_gathered_and_merged_as_padded_ones(lengths, merge, random):
    valid = mask_of([1 + n for n in lengths])
    x = torch.randn(*valid.shape, 3, generator=torch.Generator().manual_seed(len(lengths)))
    inside = valid[:, 1:]
    kept = inside & torch.tensor([[random.random() < 0.5 for _ in row] for row in inside])
    importance = torch.rand(inside.shape, generator=torch.Generator().manual_seed(1)) * inside
    expected, expected_valid = gather_and_merge(x[:, 1:], inside, importance, kept, merge)
    flat, layout = packed_gather_and_merge(*pack(x, valid), importance, kept, merge)
    tokens = [torch.cat([x[i, :1], expected[i][expected_valid[i]]]) for i in range(len(x))]
    assert layout.lengths == tuple(map(len, tokens))
    torch.testing.assert_close(flat, torch.cat(tokens))


class Attention:
    """Random queries and keys of samples of these lengths, and the map that they make."""

    def __init__(self, lengths: list[int], heads: int = 3, width: int = 5):
        generator = torch.Generator().manual_seed(3)
        self.valid = mask_of(lengths)
        shape = len(lengths), heads, max(lengths), width
        self.query, self.key, self.value = (2 * torch.randn(shape, generator=generator) for _ in range(3))
        logits = (self.query @ self.key.transpose(-2, -1) / width**0.5).masked_fill(~self.valid[:, None, None], float("-inf"))
        self.log_norm, self.map = logits.logsumexp(dim=-1), logits.softmax(dim=-1)

    @property
    def columns(self) -> torch.Tensor:
        return paper_columns(self.map[:, :, 1:, 1:], self.valid[:, 1:])


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_columns_without_the_map_are_those_of_the_map(chunk, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    case = Attention([7, 4, 2])
    found = column_statistics(case.query, case.key, case.log_norm, case.valid)
    inside = case.valid[:, 1:]
    torch.testing.assert_close(found[inside], case.columns[inside], atol=1e-6, rtol=1e-5)
    row = class_row(case.query, case.key, case.log_norm).transpose(1, 2)
    torch.testing.assert_close(row[inside], case.map[:, :, 0, 1:].transpose(1, 2)[inside], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 40, 150, 10**6])
@pytest.mark.parametrize("lengths", [[7, 4, 2], [5, 5], [2, 1]], ids=str)
def test_attention_in_chunks_is_that_of_the_map(lengths, chunk, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    case = Attention(lengths)
    inside = case.valid[:, 1:]
    for valid in (case.valid, None) if case.valid.all() else (case.valid,):
        out, row, columns = attend_in_chunks(case.query, case.key, case.value, valid)
        expected = (case.map @ case.value).transpose(1, 2)[case.valid]
        torch.testing.assert_close(out.transpose(1, 2)[case.valid], expected, atol=1e-6, rtol=1e-5)
        expected = case.map[:, :, 0, 1:].transpose(1, 2)[inside]
        torch.testing.assert_close(row.transpose(1, 2)[inside], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(columns[inside], case.columns[inside], atol=1e-6, rtol=1e-5)


def test_the_kernel_computes_what_the_plain_formula_does(monkeypatch):
    pytest.importorskip("triton", reason="Triton comes with PyTorch for NVIDIA GPUs")
    from madtp.attention import triton as kernels

    monkeypatch.setattr(kernels, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(kernels, "BLOCK_KEYS", 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Attention([40, 1, 17, 33], width=20)
    (query, layout), (key, _), (norm, _) = (
        pack(part.transpose(1, 2).to(device), case.valid.to(device)) for part in (case.query, case.key, case.log_norm)
    )
    found = kernels.packed_column_statistics(query, key, norm, layout).cpu()
    inside = case.valid[:, 1:]
    torch.testing.assert_close(found[inside], case.columns[inside], atol=1e-5, rtol=1e-4)
    assert not found[~inside].any()

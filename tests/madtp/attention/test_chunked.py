"""Attention and its statistics without the map, against the map."""

import pytest
import torch

from madtp.attention.chunked import CHUNK, attend_in_chunks, class_row, column_statistics
from tests.madtp.attention.cases import Attention


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_columns_without_the_map_are_those_of_the_map(chunk, prefix, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    case = Attention([7, 4, 4], prefix=prefix)
    found = column_statistics(case.query, case.key, case.log_norm, case.valid, prefix)
    torch.testing.assert_close(found[case.inside], case.columns[case.inside], atol=1e-6, rtol=1e-5)
    row = class_row(case.query, case.key, case.log_norm, prefix).transpose(1, 2)
    torch.testing.assert_close(row[case.inside], case.row[case.inside], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 40, 150, 10**6])
@pytest.mark.parametrize("lengths", [[7, 4, 2], [5, 5], [3, 3]], ids=str)
def test_attention_in_chunks_is_that_of_the_map(lengths, chunk, prefix, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    case = Attention(lengths, prefix=prefix)
    for valid in (case.valid, None) if case.valid.all() else (case.valid,):
        out, row, columns = attend_in_chunks(case.query, case.key, case.value, valid, prefix)
        expected = (case.map @ case.value).transpose(1, 2)[case.valid]
        torch.testing.assert_close(out.transpose(1, 2)[case.valid], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(row.transpose(1, 2)[case.inside], case.row[case.inside], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(columns[case.inside], case.columns[case.inside], atol=1e-6, rtol=1e-5)


def test_a_sample_of_prefix_tokens_alone_has_no_columns():
    case = Attention([2, 2], prefix=2)
    out, row, columns = attend_in_chunks(case.query, case.key, case.value, None, 2)
    assert row.shape[2] == columns.shape[1] == 0
    torch.testing.assert_close(out, case.map @ case.value, atol=1e-6, rtol=1e-5)

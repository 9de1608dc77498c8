"""next_token_labels and next_token_mask: the row that predicts a token, and the borders of packed documents."""

import pytest
import torch

from kdkernels import fused_kl, next_token_labels, next_token_mask

PACKED = torch.tensor([[10, 11, 12, 20, 21, 22]])  # documents a a a b b b
DOCUMENTS = {
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    "document_ids": torch.tensor([[7, 7, 7, 8, 8, 8]], dtype=torch.int32),
    "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
}


def test_a_row_has_the_next_token_as_its_label():
    ids = torch.arange(8).view(2, 4)
    assert next_token_labels(ids).tolist() == [[1, 2, 3, -100], [5, 6, 7, -100]]
    assert next_token_labels(ids[0], ignore_index=-1).tolist() == [1, 2, 3, -1]
    assert next_token_labels(ids[:, :0]).shape == (2, 0)


def test_a_mask_of_tokens_keeps_the_rows_that_predict_them():
    """The first token of a completion after a prompt of 3 is predicted by row 2."""
    completion = torch.tensor([False, False, False, True, True, True])
    kept = next_token_mask(completion)
    assert kept.nonzero().flatten().tolist() == [2, 3, 4]
    labels = torch.where(completion, torch.arange(6), -100)
    assert torch.equal(kept, next_token_labels(labels) != -100)
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    assert fused_kl(student, teacher, mask=kept) == fused_kl(student, teacher, labels=next_token_labels(labels))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_last_row_of_a_document_predicts_nothing(name):
    starts = {name: DOCUMENTS[name]}
    assert next_token_labels(PACKED, **starts).tolist() == [[11, 12, -100, 21, 22, -100]]
    assert next_token_mask(PACKED > 0, **starts).tolist() == [[True, True, False, True, True, False]]


def test_documents_of_one_token_and_padding():
    ids = torch.arange(1, 8)
    assert next_token_labels(ids, position_ids=torch.tensor([0, 0, 0, 1, 2, 0, 0])).tolist() == [
        -100, -100, 4, 5, -100, -100, -100,
    ]  # fmt: skip
    for ends in ([0, 1, 2, 5, 6, 7], [0, 1, 1, 2, 5, 6, 7, 7]):  # an empty document, and padded ends
        assert next_token_labels(ids, cu_seqlens=torch.tensor(ends)).tolist() == [-100, -100, 4, 5, -100, -100, -100]
    # transformers gives padding on the left position 1.
    left = torch.tensor([[1, 1, 0, 1, 2]])
    assert next_token_mask(torch.tensor([[False, False, True, True, True]]), position_ids=left).tolist() == [
        [False, False, True, True, False]
    ]


def test_bad_arguments_are_named():
    multiple = torch.zeros(3, 1, 6, dtype=torch.int64)
    for options, error, expected in (
        ({"position_ids": multiple}, ValueError, r"\[1, 6\] of labels; got \[3, 1, 6\].*vision-language.*document_ids"),
        ({"position_ids": multiple[0, :, :5]}, ValueError, r"position_ids: expected the shape \[1, 6\].*got \[1, 5\]$"),
        ({"document_ids": PACKED.float()}, TypeError, "document_ids: expected int32 or int64; got torch.float32"),
        ({"document_ids": [0] * 6}, TypeError, "document_ids: expected a tensor; got list"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens: expected shape \[documents \+ 1\]"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens: expected from 0 to 6.*got 0 to 7"),
        (DOCUMENTS, ValueError, "at most one of position_ids, document_ids, cu_seqlens; got position_ids and"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected int; got float"),
        ({"document_ids": PACKED.to("meta")}, ValueError, "document_ids: expected on the device of labels cpu"),
    ):
        with pytest.raises(error, match=expected):
            next_token_labels(PACKED, **options)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected mask of one flat sequence.*got \[2, 3\]"):
        next_token_mask(PACKED.view(2, 3) > 0, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor; got torch.int64; pass mask.bool\(\)"):
        next_token_mask(PACKED)
    with pytest.raises(TypeError, match="labels: expected a tensor; got list"):
        next_token_labels([1])

import functools
import math

import numpy as np
import pytest
import timm.layers
import torch
from timm.models.vision_transformer import Block as TimmBlock

from trainer.vit import Block, PatchEmbed, patchify, position_embedding, unpatchify


def sincos_by_hand(embed_dim: int, row: int, column: int) -> list[float]:
    """One row of the embedding, number by number."""
    quarter = embed_dim // 4
    values = []
    for place in (column, row):
        for wave in (math.sin, math.cos):
            values += [wave(place / 10000 ** (k / quarter)) for k in range(quarter)]
    return values


def test_position_embedding_against_literals():
    # D = 8: frequencies 1 and 1/100. Patch (row 1, column 2) of a 2 x 3 grid is row 1 + 1 * 3 + 2 = 6.
    embedding = position_embedding(8, rows=2, columns=3)
    assert embedding.shape == (1, 7, 8)
    assert embedding.dtype == torch.float32
    expected = [0.909297427, 0.019998667, -0.416146837, 0.999800007]  # sin 2, sin .02, cos 2, cos .02: the column
    expected += [0.841470985, 0.009999833, 0.540302306, 0.999950000]  # sin 1, sin .01, cos 1, cos .01: the row
    np.testing.assert_allclose(embedding[0, 6], expected, atol=1e-7)
    assert embedding[0, 0].tolist() == [0.0] * 8
    assert embedding[0, 1].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_position_embedding_of_a_full_size_grid():
    embedding = position_embedding(768, rows=14, columns=14)
    for row, column in ((0, 13), (13, 0), (5, 9)):
        np.testing.assert_allclose(embedding[0, 1 + row * 14 + column], sincos_by_hand(768, row, column), atol=1e-7)


def test_patches_are_row_major_with_channels_innermost():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 is row 1, column 1: pixel rows 2..3, columns 2..3.
    expected = [images[1, c, 2 + y, 2 + x].item() for y in range(2) for x in range(2) for c in range(3)]
    assert patches[1, 4].tolist() == expected
    assert torch.equal(unpatchify(patches, 2, rows=2), images)


def test_patch_embed_is_the_convolution():
    torch.manual_seed(0)
    embed = PatchEmbed(4, 24).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    convolved = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(images, 4)), convolved)


@pytest.fixture
def block_pair():
    torch.manual_seed(1)
    ours = Block(48, num_heads=4, mlp_ratio=4.0).double()
    theirs = TimmBlock(48, num_heads=4, qkv_bias=True, norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-6))
    theirs.double().load_state_dict(ours.state_dict())  # the same names, strictly
    return ours, theirs


def test_block_equals_timms(block_pair):
    ours, theirs = block_pair
    tokens = torch.randn(3, 11, 48, dtype=torch.float64)
    results = []
    for block in (ours, theirs):
        given = tokens.clone().requires_grad_()
        out = block(given)
        out.square().sum().backward()
        results.append([out, given.grad, *(parameter.grad for parameter in block.parameters())])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference)


def test_fewer_queries_give_the_same_tokens_and_gradients(block_pair):
    block, reference = block_pair
    tokens = torch.randn(3, 11, 48, dtype=torch.float64)
    block(tokens, num_queries=7).square().sum().backward()
    expected = reference(tokens)[:, -7:]
    expected.square().sum().backward()
    torch.testing.assert_close(block(tokens, num_queries=7), expected)
    for mine, theirs in zip(block.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)

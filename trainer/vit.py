"""The parts of a vision transformer, under the parameter names that MAE checkpoints use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

NORM_EPS = 1e-6


def position_embedding(embed_dim: int, rows: int, columns: int) -> Float[Tensor, "1 T D"]:
    """The fixed 2-D sin-cos position embedding of a patch grid, with a zero row for the class token in front.

    The first half of the width encodes a patch's column and the second its row; each half holds all sines, then
    all cosines, of frequencies that fall geometrically from 1 to nearly 1/10000.

    Args:
        embed_dim: width D, a multiple of 4.
        rows: patches down the image.
        columns: patches across it; patch `row * columns + column` is row `1 + ...` of the result.

    Returns:
        float32 of shape [1, 1 + rows * columns, D], computed in float64.

    Source:
        He et al. 2022, appendix A.1; Vaswani et al. 2017, section 3.5. The order of the halves is that of the
        published weights.
    """
    num_frequencies = embed_dim // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies
    frequencies = 10000.0**-exponents
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]  # 2 x [N, D/4]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)  # [N, D]
    return F.pad(patches, (0, 0, 1, 0)).float()[None]


def patchify(images: Shaped[Tensor, "B C H W"], patch_size: int) -> Shaped[Tensor, "B N P"]:
    """Cut images into patches, row by row, each flattened in (height, width, channel) order."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Shaped[Tensor, "B N P"], patch_size: int, rows: int) -> Shaped[Tensor, "B C H W"]:
    """Put patches that `patchify` cut back into images that are `rows` patches high."""
    batch, num_patches, _ = patches.shape
    columns = num_patches // rows
    images = patches.reshape(batch, rows, columns, patch_size, patch_size, -1).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(batch, -1, rows * patch_size, columns * patch_size)


class PatchEmbed(nn.Module):
    """A linear projection of patches. It holds a convolution's weight, and embeds only the patches it is given."""

    def __init__(self, patch_size: int, embed_dim: int, num_channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(num_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Float[Tensor, "B K P"]) -> Float[Tensor, "B K D"]:
        """Embed patches that `patchify` cut."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, C, p, p] -> [D, P] in patchify's order
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "B T D"], num_queries: int | None = None) -> Float[Tensor, "B Q D"]:
        """Attend from the last `num_queries` tokens (None: from all) to all tokens."""
        if num_queries is None:
            query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        else:
            dim = tokens.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(tokens[:, -num_queries:], weight[:dim], bias[:dim])
            key, value = F.linear(tokens, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        projected: Tensor = self.proj(_attend(query, key, value, self.num_heads))
        return projected


class CrossAttention(nn.Module):
    """Multi-head attention from some tokens to others of another width."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "B Q D"], context: Float[Tensor, "B T E"]) -> Float[Tensor, "B Q D"]:
        """Attend from each token to all of `context`."""
        key, value = self.kv(context).chunk(2, dim=-1)
        projected: Tensor = self.proj(_attend(self.q(tokens), key, value, self.num_heads))
        return projected


def _attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Queries [B, Q, D], keys and values [B, T, D] -> what each query found [B, Q, D]."""
    query, key, value = (
        tokens.view(*tokens.shape[:2], num_heads, -1).transpose(1, 2) for tokens in (query, key, value)
    )  # [B, heads, T, D/heads]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # PyTorch's kernel for this case takes two to six times as long as its parts, and is no more exact.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        found: Tensor = scores.softmax(dim=-1) @ value
        return found.transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Transform each token on its own."""
        transformed: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return transformed


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens: Float[Tensor, "B T D"], num_queries: int | None = None) -> Float[Tensor, "B Q D"]:
        """Transform tokens.

        Args:
            tokens: all tokens of each image.
            num_queries: how many of the last tokens are wanted, None for all. The others are attended to and then
                dropped: the same result as dropping them afterwards, for less work.

        Returns:
            The last `num_queries` tokens, transformed.
        """
        attended = self.attn(self.norm1(tokens), num_queries)
        tokens = tokens[:, -attended.shape[1] :] + attended
        transformed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return transformed


class CrossBlock(nn.Module):
    """A pre-norm transformer block whose tokens attend to a context, and not to each other."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_context = nn.LayerNorm(context_dim, eps=NORM_EPS)
        self.attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens: Float[Tensor, "B Q D"], context: Float[Tensor, "B T E"]) -> Float[Tensor, "B Q D"]:
        """Transform tokens by what they find in `context`."""
        tokens = tokens + self.attn(self.norm1(tokens), self.norm_context(context))
        transformed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return transformed

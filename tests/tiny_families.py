"""Small random models of every family of ViTs, images for them, and their attention by timm's own modules."""

from contextlib import contextmanager

import timm
import torch

FAMILIES = (
    "vit_base_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "deit_tiny_distilled_patch16_224",
    "vit_so150m_patch16_reg4_gap_256",
    "beit_base_patch16_224",
    "aimv2_large_patch14_224",
)


def tiny_family(name, dtype=torch.float64, seed=0, **kwargs):
    """A frozen model of the family with 4 x 4 patches and weights large enough for every part of it to matter."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **(size | kwargs)).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.25
        parameter.copy_(noise + 1 if "norm" in key and key.endswith("weight") else noise)
    return model


def request(model, batch=3, seed=1):
    """Images [B, 3, 32, 32] and targets [B]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images.to(next(model.parameters()).dtype), torch.randint(5, (batch,), generator=generator)


@contextmanager
def attention_of(model):
    """The attention [B, H, N, N] and the output [B, N, D] of each block, as timm computes them without a fused kernel.

    They are on the graph: gradients can be taken by them.
    """
    attention, tokens, hooks = [], [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_hook(lambda _m, _a, p: attention.append(p) or with_grad(p)))
        hooks.append(block.register_forward_hook(lambda _m, _a, out: tokens.append(out)))
    try:
        yield attention, tokens
    finally:
        for hook in hooks:
            hook.remove()


def with_grad(x):
    return x if x.requires_grad else x.requires_grad_()


def pooling(model, tokens):
    """Logits [B, classes] and attention [B, H, 1, N] of a model with attention pooling, from a block's output."""
    pool, x = model.attn_pool, model.norm(tokens)
    heads = {"sizes": (pool.num_heads, -1), "dim": -1}
    q = pool.q(pool.latent.expand(len(x), -1, -1)).unflatten(**heads).transpose(1, 2)  # [B, H, 1, d]
    k, v = (part.unflatten(**heads).transpose(1, 2) for part in pool.kv(x).chunk(2, dim=-1))  # [B, H, N, d]
    attention = with_grad((pool.q_norm(q) * pool.scale @ pool.k_norm(k).mT).softmax(-1))
    out = pool.proj((attention @ v).transpose(1, 2).flatten(2))
    out = (out + pool.mlp(pool.norm(out)))[:, 0]
    return model.head(model.fc_norm(out)), attention

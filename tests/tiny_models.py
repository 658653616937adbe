"""Every kind of model, small enough for tests."""

SIDE, GRID, CLASSES = 32, 4, 5
BODY = {"embed_dim": 24, "depth": 4, "num_heads": 3, "patch_size": 4}
WRAPPED = {"backbone": "deit_tiny_patch16_224", "backbone_args": BODY}
SPARSE = {"conv_dim": 16, "num_tokens": 4, "focus_dim": 64, "cortex_dim": 64, "num_heads": 8, "num_points": 9}
LARGE = BODY | {"patch_size": 8}
# The model, its constructor's arguments, the side of its scores, its call's arguments, and what the host waits for.
MODELS = {
    "plain": ("deit_tiny_patch16_224", BODY, None, {}, 0),
    "ZoomViT by budget": ("zoomvit_tiny_patch16_224", LARGE, GRID, {"budget": 3}, 0),
    "ZoomViT by alpha": ("zoomvit_tiny_patch16_224", LARGE, GRID, {"alpha": 0.4}, 1),
    "ZoomViT without scores": ("zoomvit_tiny_patch16_224", LARGE, None, {}, 0),
    "CF-ViT": ("cfvit_small", BODY, None, {"return_stages": True}, 0),
    "CF-ViT, all cells": ("cfvit_small", BODY, None, {"return_stages": True, "full_split": True}, 0),
    "CF-ViT by scores": ("cfvit_small", BODY, 4, {"return_stages": True}, 0),
    "CF-ViT with early exit": ("cfvit_small", BODY, None, {"exit_threshold": 0.3}, 1),
    "LF-ViT": ("lfvit_small", BODY | {"region_size": 3}, None, {"return_stages": True}, 0),
    "SparseFormer": ("sparseformer_tiny", SPARSE, None, {}, 0),
    "LV-ViT": ("lvvit_small", LARGE, None, {"return_dense": True}, 0),
    "pruned by itself": ("token_pruned_vit", WRAPPED | {"prune_block": 2}, None, {}, 0),
    "pruned by scores": ("token_pruned_vit", WRAPPED | {"prune_block": 2}, 8, {}, 0),
    "ToMe": ("tome_vit", WRAPPED | {"r": 4}, None, {}, 0),
    "fused by budget": (
        "fused_vit",
        {"backbone": "deit_tiny_patch16_224", "backbone_args": LARGE},
        2,
        {"budget": 3},
        0,
    ),
    "image zoom": ("image_zoom", WRAPPED | {"patch_size": 8}, GRID, {}, 0),
    "image zoom, both": ("image_zoom", WRAPPED | {"patch_size": 8, "combine": "mean"}, GRID, {}, 0),
}

"""The recipe for embeddings of classes in docs/maps.md: with it a teacher answers as the CLIP that it is part of."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from zpipe.pipeline.teacher import TeacherSpec, load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[2] / "docs" / "maps.md"
WORDS = ["[PAD]", "[UNK]", "[END]", "a", "photo", "of", ".", "tench", "church"]
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "projection_dim": 20,
}


@pytest.fixture
def clip(tmp_path):
    """The folder of a tiny CLIP with random weights, and of its tokenizer."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **special).save_pretrained(tmp_path / "c")
    text = TOWER | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).save_pretrained(tmp_path / "c")
    return tmp_path / "c"


def test_the_teacher_answers_as_the_whole_clip(clip, tmp_path, monkeypatch):
    (recipe,) = re.findall(r"```python\n(import json.*?CLIPModel.*?)```", PAGE.read_text(), re.DOTALL)
    assert "openai/clip-vit-base-patch16" in recipe
    monkeypatch.chdir(tmp_path)
    exec(recipe.replace("openai/clip-vit-base-patch16", str(clip)), {})
    teacher = load_teacher(TeacherSpec(weights=str(clip), class_embeddings="clip.safetensors"))
    assert teacher.classes == ("n01440764", "n03028079")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    prompts = tokenizer(["a photo of a tench.", "a photo of a church."], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = whole(pixel_values=images, **prompts).logits_per_image
        torch.testing.assert_close(teacher.model(images), expected, rtol=1e-4, atol=1e-4)

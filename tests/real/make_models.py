"""Make the models that the tests serve: small Llamas with random weights, each with a seed of its own.

Run by setup-vllm.sh in the venv of vLLM: `make_models.py FOLDER`. Nothing is downloaded. Two are tiny, for what
only has to answer; one is big enough that a stream of its lasts for seconds on two cores. Each answers a prompt
differently, so that a test sees which one it was.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 1024
MAX_LENGTH = 4096
BEGIN, END = "<s>", "</s>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

# name: (seed, hidden size, layers, heads)
MODELS = {
    "tiny-a": (1, 256, 2, 4),
    "tiny-b": (2, 256, 2, 4),
    "big": (3, 1024, 8, 8),
}


def text() -> list[str]:
    """Sentences for the tokenizer to learn from, of invented words."""
    dice = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
    words = ["".join(dice.choices(syllables, k=dice.randint(1, 4))) for _ in range(2000)]
    return [" ".join(dice.choices(words, k=12)).capitalize() + "." for _ in range(4000)]


def tokenizer() -> PreTrainedTokenizerFast:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    learned.train_from_iterator(
        text(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BEGIN, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
    )


def main(folder: Path) -> None:
    disable_progress_bar()
    tokens = tokenizer()
    for name, (seed, hidden, layers, heads) in MODELS.items():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden * 2,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=MAX_LENGTH,
            # The usual 0.02 makes an untrained model say one token again and again.
            initializer_range=0.1,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A small tokenizer for tests."""

from __future__ import annotations

from fastlm.hf.tokenizer import Text


def byte_text(template: str | None = None) -> Text:
    """A byte-level tokenizer that also joins words with the space before them, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "ĠH", "He", "Ġt"]
    merges = [("Ġ", "H"), ("H", "e"), ("Ġ", "t")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"])
    return Text(tokenizer, template, {"eos_token": "</s>"})

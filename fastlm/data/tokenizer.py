"""Tokenizers made, opened and saved; all are `tokenizers.Tokenizer`, held by `hf.tokenizer.Text`.

Byte level and character level are BPE without merges, so that training, generation and
transformers treat every tokenizer alike.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlm.data import DataError
from fastlm.hf.tokenizer import SPECIAL, Text, load

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"

MOST_TOKENS = 2**24  # the trainer sets memory aside for all of them, or ends the process

# How text is cut into words before pairs are merged, by the model that made the rule known.
SPLITS = {
    "gpt2": None,  # the library's own
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def byte_level(special: Sequence[str] = (END,)) -> Text:
    """One token for each byte: token i is byte i; special tokens follow from 256 on."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(_byte_names())}, merges=[]))
    _work_on_bytes(tokenizer, None, use_regex=False)
    return _with_special(tokenizer, special)


def char_level(characters: Iterable[str], special: Sequence[str] = (END,)) -> Text:
    """One token for each character of a corpus, in the order of their code points.

    Special tokens follow, then one that stands for every character not seen.
    """
    from tokenizers import Tokenizer, decoders, models

    known = sorted(set(characters))
    if not known:
        raise DataError("a character-level tokenizer needs at least one character")
    vocab = {c: i for i, c in enumerate([*known, *special, UNKNOWN])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    text = _with_special(tokenizer, [*special, UNKNOWN])
    text.special["unk_token"] = UNKNOWN
    return text


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special: Sequence[str] = (END,),
    min_frequency: int = 2,
    split: str = "gpt2",
) -> Text:
    """Byte-level BPE: starts from the 256 bytes and merges the commonest pair again and again.

    Deterministic: of pairs equally common, the one of the older tokens is merged. Memory grows
    with the number of distinct words, not with the corpus.

    Args:
        texts: the documents.
        vocab_size: tokens altogether, special ones included; fewer where pairs run out.
        special: come first, from token 0 on; the first ends documents.
        min_frequency: a pair seen less often is not merged.
        split: the rule that cuts text into words, "gpt2" or "gpt4" (numbers in threes).

    Source:
        Sennrich et al., arXiv:1508.07909; the byte level is GPT-2's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    least = 256 + len(set(special))
    if vocab_size < least:
        raise DataError(
            f"vocab size must be at least {least}, 256 bytes and {len(set(special))} special "
            f"tokens, got {vocab_size}"
        )
    if vocab_size > MOST_TOKENS:
        raise DataError(f"vocab size must be at most {MOST_TOKENS:,}, got {vocab_size}")
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if min_frequency < 1:
        raise DataError(f"min frequency must be at least 1, got {min_frequency}")
    tokenizer = Tokenizer(models.BPE())
    _work_on_bytes(tokenizer, SPLITS[split])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_special(tokenizer, special)


def _work_on_bytes(tokenizer: Any, pattern: str | None, use_regex: bool = True) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    if pattern is not None:
        steps = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()


def _byte_names() -> list[str]:
    """The character that stands for each byte, as GPT-2 chose them: printable ones themselves."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(i) if i in plain else chr(next(others)) for i in range(256)]


def _with_special(tokenizer: Any, special: Sequence[str]) -> Text:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return Text(tokenizer, None, {"eos_token": special[0]} if special else {})


def vocabulary(text: Text) -> int:
    """One more than the largest token: what a model's embedding needs, gaps included."""
    return max(text.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def token_of(text: Text, role: str) -> int | None:
    """The number of a special token, "eos_token" or another of its roles; None without one."""
    name = text.special.get(role)
    return None if name is None else text.tokenizer.token_to_id(name)


def open_tokenizer(source: str | os.PathLike[str]) -> Text:
    """A tokenizer from wherever it stands.

    Args:
        source: a folder with tokenizer.json or with vocab.json and merges.txt (GPT-2), one of
            these files, a .gguf file, "byte", or a name on the Hugging Face Hub, which is asked
            only where no such path exists.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    path = Path(source)
    try:
        if str(source) == "byte":
            return byte_level()
        if path.name in ("tokenizer.json", "vocab.json", "merges.txt") and path.is_file():
            path = path.parent
        if not path.exists():
            path = _from_hub(str(source))
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            text = _from_merges(path)
        elif path.is_file() and path.suffix == ".json":
            text = _from_json(path)
        else:
            text = load(path)
    except DataError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise DataError(str(error)) from error
    _name_the_end(text)
    return text


def _name_the_end(text: Text) -> None:
    """Gives the usual end tokens their role where no tokenizer_config.json does."""
    if "eos_token" not in text.special:
        for name in (END, "</s>", "<|end_of_text|>", "<eos>"):
            if text.tokenizer.token_to_id(name) is not None:
                text.special["eos_token"] = name
                return


def _from_json(path: Path) -> Text:
    from tokenizers import Tokenizer

    try:
        return Text(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer: {error}") from error


def _from_merges(folder: Path) -> Text:
    from tokenizers import Tokenizer, models

    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt; "
            f"there is no tokenizer.json and no {' and no '.join(missing)}"
        )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{folder}: vocab.json and merges.txt do not fit: {error}") from error
    _work_on_bytes(tokenizer, None)
    known = [t for t in (END,) if tokenizer.token_to_id(t) is not None]
    return _with_special(tokenizer, known)


def _from_hub(name: str) -> Path:
    """The folder of a Hub model's tokenizer files, fetched or from the cache."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise DataError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    files = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=[*files, "vocab.json", "merges.txt"]))
    except Exception as error:  # of the network, the cache, the name: many kinds
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{name}: no such file or folder, and no model of that name from the Hugging Face "
            f"Hub: {type(error).__name__}: {reason}"
        ) from error


def save(text: Text, folder: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers opens, into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{role: text.special[role] for role in SPECIAL if role in text.special},
    }
    if text.template is not None:
        config["chat_template"] = text.template
    tokenizer = text.tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(tokenizer + "\n", encoding="utf-8")
    written = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(written, encoding="utf-8")

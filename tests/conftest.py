"""Fixed seeds, and fresh memory poisoned with NaN so that an unwritten element shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["FASTLM_TUNE_FILE"] = "none"  # what this machine measured decides no test
DATA = Path(os.environ.get("FASTLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


LONGEST = ("test_cuda_on_cpu.py", "test_triton.py", "test_arm.py")


def pytest_collection_modifyitems(items):
    """Files that compile for minutes come first: nothing waits for them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    threads = torch.get_num_threads()  # commands that take --threads set them for the process
    # Deterministic mode also fills every torch.empty with NaN. This way of asking for it does not
    # import the compiler, some 5 s in every process.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("default")


BYTE_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A small random model with a tokenizer of bytes and a chat template, as a directory.

    Tokens 0 to 255 are the bytes, 256 and 257 begin and end a message, the head is padded to 272.
    """
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from fastlm.models import Config, Decoder

    path = tmp_path_factory.mktemp("byte_model")
    torch.manual_seed(0)
    sizes = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 200}
    model = Decoder(Config(vocab=272, eos_ids=(257,), **sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights: far from ties in the logits
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.1)
    model.save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": BYTE_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def stories(data) -> Path:
    """The directory of stories260K, a Llama of 260,000 parameters that tells stories."""
    path = data / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights and texts; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA} (set FASTLM_TEST_DATA)")
    return DATA

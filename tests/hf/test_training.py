"""Trainer, SFTTrainer and LoRA, unchanged, on a patched model: the extra `integration`.

What a patched run must reach is judged as everything is: its losses and trained weights against
the same run in float64, beside the error of the run without the patch.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import exactly, tiny, token_numbers

import fastlm
from fastlm.hf import _head, unpatch
from fastlm.hf._deferred import Deferred
from fastlm.hf._float64 import float64
from fastlm.hf.patch import suspended
from fastlm.hf.verify import _Squares, exact_copy
from fastlm.ops import _registry

pytest.importorskip("accelerate", reason="pip install fastlm[integration]")

ROWS = [{"input_ids": x.tolist(), "labels": x.tolist()} for x in token_numbers(64, 12)]
IDS = token_numbers()
# Plain SGD: the first steps of Adam go by the sign of a gradient, and rounding decides the sign of
# the smallest.
SETTINGS = {
    "use_cpu": True,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.1,
    "optim": "sgd",
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(_head, "WORTH", 0)


def judged(model, results):
    """Asserts the rule for tensors by name: (ours, theirs, exact)."""
    dtype = next(model.parameters()).dtype
    bad = []
    for name in results[0]:
        squares = _Squares()
        for three in zip(*([r[name]] for r in results), strict=True):
            squares.add(*(x.detach() for x in three))
        error = squares.error(name, dtype)
        if not error.ok:
            bad.append(str(error))
    assert not bad, "\n".join(bad)


def trained(trainer):
    """Losses and weights at the end."""
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert len(losses) == SETTINGS["max_steps"]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **weights}


def compare(model, trainer, used="linear_cross_entropy"):
    """trainer(model) -> Trainer, built and run for the model as it is, patched and in float64."""
    theirs = trained(trainer(copy.deepcopy(model)))
    with float64():
        exact = trained(trainer(exact_copy(model)))
    patched = copy.deepcopy(model)
    fastlm.patch(patched, strict=True)
    with _registry.recording() as verdicts:
        made = trainer(patched)
        ours = trained(made)
    called = [v.stem for v in verdicts]
    assert called.count(used) >= SETTINGS["max_steps"]
    assert "attention" in called and "feed_forward" in called
    judged(model, (ours, theirs, exact))
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_trainer(options, tmp_path):
    def trainer(model):
        wide = next(model.parameters()).dtype == torch.float64  # runs without recomputing
        given = {} if wide and "gradient_checkpointing" in options else options
        args = transformers.TrainingArguments(str(tmp_path), **SETTINGS, **given)
        return transformers.Trainer(model, args, train_dataset=ROWS)

    model = compare(tiny().train(), trainer).model
    assert model.forward.__func__.fastlm  # still there after the training


def test_trainer_with_label_smoothing_takes_the_logits(tmp_path):
    def trainer(model):
        args = transformers.TrainingArguments(str(tmp_path), **SETTINGS, label_smoothing_factor=0.1)
        return transformers.Trainer(model, args, train_dataset=ROWS)

    compare(tiny().train(), trainer, used="linear")


def test_trainer_evaluates_with_logits(tmp_path):
    shapes = []

    def first(logits, labels):
        shapes.append(tuple(logits.shape))
        return logits.argmax(-1)

    def metrics(made):
        hits = made.predictions[:, :-1] == made.label_ids[:, 1:]
        return {"accuracy": hits.mean()}

    def accuracy(model, **options):
        args = transformers.TrainingArguments(str(tmp_path), **SETTINGS, **options)
        trainer = transformers.Trainer(
            model,
            args,
            eval_dataset=ROWS,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=first,
        )
        return trainer.evaluate()

    model = tiny()
    expected = accuracy(model)
    with fastlm.patch(model):
        made = accuracy(model)
        assert "eval_loss" in accuracy(model, prediction_loss_only=True)
    assert made["eval_accuracy"] == expected["eval_accuracy"] and set(shapes) == {(8, 12, 96)}
    assert made["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


def test_trainer_in_mixed_precision_makes_no_logits(tmp_path, monkeypatch):
    """Accelerate converts the outputs to fp32, and looks at each for that."""
    model = tiny().train()
    before = copy.deepcopy(model)
    fastlm.patch(model)
    made = []
    monkeypatch.setattr(Deferred, "value", lambda self: made.append(self))
    args = transformers.TrainingArguments(str(tmp_path), **SETTINGS, bf16=True)
    trainer = transformers.Trainer(model, args, train_dataset=ROWS)
    with _registry.recording() as verdicts:
        trainer.train()
    assert [v.stem for v in verdicts].count("linear_cross_entropy") == SETTINGS["max_steps"]
    assert not made
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert "forward" in model.__dict__ and any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(96)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", eos_token="w2", unk_token="w1"
    )


def test_sft_trainer(tmp_path, tokenizer):
    trl = pytest.importorskip("trl", reason="pip install fastlm[integration]")
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS])

    def trainer(model):
        settings = {**SETTINGS, "bf16": False, "gradient_checkpointing": False}
        args = trl.SFTConfig(str(tmp_path), **settings, max_length=16)
        return trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)

    # It has a loss without logits of its own; the body is ours.
    made = compare(tiny().train(), trainer, used="rope")
    assert any("mean_token_accuracy" in h for h in made.state.log_history)


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="pip install fastlm[integration]")
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:  # zeros at the beginning: an adapter that does nothing
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    return made


def step(model):
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()[None], **gradients}


HEADS = {
    "frozen head": {},
    "trained head": {"modules_to_save": ["lm_head"]},
    "adapted head": {"target_modules": ["q_proj", "up_proj", "lm_head"]},
}


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
@pytest.mark.parametrize("head", HEADS)
def test_lora(order, head):
    plain = lora(tiny(tie_word_embeddings=False), **HEADS[head])
    theirs, exact = step(plain), exactly(step, plain)
    model = tiny(tie_word_embeddings=False)
    if order == "patch first":
        patch = fastlm.patch(model)
        model = lora(model, **HEADS[head])
    else:
        model = lora(model, **HEADS[head])
        patch = fastlm.patch(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    with _registry.recording() as verdicts:
        ours = step(model)
    called = {v.stem for v in verdicts}
    assert ours.keys() == theirs.keys() and {"attention", "linear", "rms_norm"} <= called
    judged(model, (ours, theirs, exact))
    # An adapted head is called, never read past its adapter.
    assert ("linear_cross_entropy" in called) == (head == "frozen head")
    if order == "adapter first" and head != "frozen head":
        assert "of peft, which has to be called" in patch.report()
    with suspended(model):
        as_before = step(model)
    for name, value in theirs.items():
        assert torch.equal(as_before[name], value), name
    patch.undo()
    if head == "trained head" and order == "patch first":
        assert unpatch(model) == 1  # peft trains a copy of the head, patch and all
    assert torch.equal(step(model)["logits"], theirs["logits"])

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
from fastlm.hf import _head, _trl, unpatch
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
    """What was logged of each step, and the weights at the end."""
    trainer.train()
    steps = [h for h in trainer.state.log_history if "loss" in h]
    assert len(steps) == SETTINGS["max_steps"]
    names = [n for n in ("loss", "entropy", "mean_token_accuracy", "num_tokens") if n in steps[0]]
    logged = {n: torch.tensor([h[n] for h in steps], dtype=torch.float64) for n in names}
    return {**logged, **{n: p.detach().clone() for n, p in trainer.model.named_parameters()}}


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


@pytest.fixture
def sft(tmp_path, tokenizer):
    """sft(model, **options) -> an SFTTrainer."""
    trl = pytest.importorskip("trl", reason="pip install fastlm[integration]")
    from datasets import Dataset

    # Half of the tokens are a prompt, which has no loss.
    rows = [
        {"input_ids": row["input_ids"], "labels": [-100] * 6 + row["labels"][6:]} for row in ROWS
    ]
    data = Dataset.from_list(rows)

    def trainer(model, **options):
        settings = {**SETTINGS, "bf16": False, "gradient_checkpointing": False, **options}
        args = trl.SFTConfig(str(tmp_path), **settings, max_length=16)
        return trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)

    return trainer


def test_sft_trainer(sft):
    """It gives the model a forward with a loss of TRL's; the body is ours."""
    made = compare(tiny().train(), sft, used="rope")
    assert any("mean_token_accuracy" in h for h in made.state.log_history)


@pytest.mark.parametrize("form", ["nll", "dft", "lora", "bias", "accumulated"])
def test_sft_trainer_whose_model_is_patched(sft, form):
    """fastlm.patch(trainer.model) puts our kernel into TRL's forward, and undo takes it out."""
    options = {"accumulated": {"gradient_accumulation_steps": 2}, "dft": {"loss_type": "dft"}}
    patches = []

    def adapted(model):
        return lora(model, target_modules=["q_proj"])

    def trainer(model):
        ours = any(hasattr(m.__dict__.get("forward"), "fastlm") for m in model.modules())
        made = sft(adapted(model) if form == "lora" else model, **options.get(form, {}))
        if ours:
            theirs = model.__dict__["forward"]
            with fastlm.patch(made.model) as patch:
                assert "linear_cross_entropy (in TRL's forward)" in patch.report()
            assert model.__dict__["forward"] is theirs
            patches.append(fastlm.patch(made.model))
            assert model.__dict__["forward"] is not theirs
        return made

    model = tiny(tie_word_embeddings=form != "bias").train()
    if form == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(96))
    made = compare(model, trainer)
    assert patches and made.state.log_history[0].keys() >= {"entropy", "mean_token_accuracy"}


def test_sft_trainer_in_mixed_precision(sft):
    """Its default: autocast, checkpoints, a head in fp32 whose hidden states are bf16."""
    losses = []
    for patched in (False, True):
        made = sft(tiny().train(), bf16=True, gradient_checkpointing=True)
        if patched:
            fastlm.patch(made.model, strict=True)
        with _registry.recording() as verdicts:
            made.train()
        losses.append(torch.tensor([h["loss"] for h in made.state.log_history if "loss" in h]))
        called = {v.stem for v in verdicts if v.chosen != "reference"}
        assert ("linear_cross_entropy" in called) == patched
    assert torch.allclose(*losses, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)


def test_unpatch_gives_trl_its_forward_back(sft):
    made = sft(tiny().train())
    theirs = made.model.forward.__func__
    fastlm.patch(made.model)
    ours = made.model.forward.__func__
    assert ours is not theirs
    with suspended(made.model):
        assert made.model.forward.__func__ is theirs
    assert made.model.forward.__func__ is ours
    unpatch(made.model)
    assert made.model.forward.__func__ is theirs
    made.train()


@pytest.mark.parametrize("name", ["scale", "cap", "half", "gradient of entropy", "no labels"])
def test_the_kernel_in_trls_forward(name):
    """Against TRL's function in float64, within the budget of PyTorch's operators."""
    kernels = pytest.importorskip("trl.kernels", reason="pip install fastlm[integration]")
    theirs = kernels.ChunkedLogProbFunction
    ours = type("Kernel", (_trl._Kernel,), {"theirs": theirs})
    dtype = torch.bfloat16 if name == "half" else torch.float32
    rows = 0 if name == "no labels" else 12
    cap, scale = (3.0 if name == "cap" else None), (0.5 if name == "scale" else 1.0)
    rest = 1.0, 32768, cap, scale, ("log_probs", "entropy", "is_top1")

    def run(kernel, draw, dtype):
        *leaves, targets = draw
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        scores, entropy, _, _, top = kernel.apply(*leaves, targets, *rest)
        goal = scores.sum() + (entropy.sum() if name == "gradient of entropy" else 0)
        gradients = torch.autograd.grad(goal, leaves)
        return dict(enumerate([scores.detach(), entropy.detach(), top.float(), *gradients]))

    class Plain:
        @staticmethod
        def apply(x, w, b, targets, temperature, chunk, cap, scale, outputs):
            z = torch.nn.functional.linear(x, w, b).float() * scale
            z = z if cap is None else cap * torch.tanh(z / cap)
            scores = z.log_softmax(-1)
            entropy = -(scores.exp() * scores).sum(-1)
            return scores[range(len(x)), targets], entropy, None, None, z.argmax(-1) == targets

    squares = {}
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        shapes = (rows, 16), (96, 16), (96,)
        draw = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        draw.append(torch.randint(0, 96, (rows,), generator=generator))
        with float64():
            exact = run(theirs, draw, torch.float64)
        made, before = run(ours, draw, dtype), run(Plain, draw, dtype)
        for i, wide in exact.items():
            assert made[i].dtype == before[i].dtype
            squares.setdefault(i, _Squares()).add(made[i], before[i], wide)
    bad = [e for i, s in squares.items() if not (e := s.error(f"output {i}", dtype)).ok]
    assert not bad, "\n".join(map(str, bad))


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

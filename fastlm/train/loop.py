"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastlm.ops import _measured, _product
from fastlm.train import checkpoint, identity, optim
from fastlm.train.batches import Batch, Source, share
from fastlm.train.checkpoint import Checkpoints, TrainingError
from fastlm.train.config import TrainConfig
from fastlm.train.distributed import Engine, WorkerLost, load_tensors, save_tensors
from fastlm.train.log import Callback, RunLog, flops_per_token, machine_peak
from fastlm.train.schedule import learning_rate
from fastlm.train.stop import Stop

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 2.0**-10  # of fp16 losses: below, it is not the scale that is wrong


@dataclass
class Result:
    """How a run ended.

    Attributes:
        steps: updates made, those before a resume included.
        tokens: targets learned from.
        loss: of the last step, per token.
        validation, best_validation, best_step: the last and the lowest validation loss.
        stopped: "finished", "early stop", or the signal's name.
        seconds: of this process's part.
        checkpoint: the last one, None without `out`.
        first: whether this process spoke for all.
    """

    steps: int
    tokens: int
    loss: float | None
    validation: float | None
    best_validation: float | None
    best_step: int | None
    stopped: str
    seconds: float
    checkpoint: Path | None
    first: bool


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int = 0
    micro_batches: int = 0
    tokens: int = 0
    loss: float | None = None
    validation: float | None = None
    validated_step: int | None = None
    best_validation: float | None = None
    best_step: int | None = None
    without_better: int = 0  # validations since the best one
    loss_scale: float = 2.0**16
    good_steps: int = 0  # since the scale changed
    ended: str | None = None


def train(
    model: torch.nn.Module,
    source: Source,
    config: TrainConfig | None = None,
    *,
    validation: Source | None = None,
    out: checkpoint.Path_ | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    device: torch.device | str | None = None,
    save_model: checkpoint.Save = checkpoint.save_decoder,
    load_model: checkpoint.Save = checkpoint.load_decoder,
    quiet: bool = False,
    plot: bool = True,
) -> Result:
    """Trains a model in place.

    Args:
        model: called as a `Decoder` is, with tokens, targets, cu_seqlens, positions and
            reduction="sum"; its parameters that require gradients are trained.
        source: the micro-batches.
        config: the settings; TrainConfig() when None.
        validation: another source, whose whole epoch (or `validation_batches`) is the measure of
            the best checkpoint and of early stopping.
        out: the run's folder (see fastlm/train/checkpoint.py); nothing is written when None.
        resume: goes on from the folder's latest checkpoint, or begins where it has none.
        callbacks: called with every record of the log, by the first process.
        device: by default the first CUDA device, else the CPU.
        save_model, load_model: write a model into a folder and read it back; for models that are
            no Decoder.
        quiet: writes nothing to standard error.
        plot: draws the folder's plot.png at the end.

    Returns:
        How it ended. The model is in evaluation mode, with its last weights.

    Raises:
        TrainingError: a folder that cannot be written or holds another run, a loss that is not
            finite, a process that died; the message names the step and the last checkpoint.

    The loss of a step is the sum over all its tokens, of all micro-batches and processes, divided
    by their number: how they are cut into micro-batches changes it by rounding alone. A resumed run
    ends with the bits of an undisturbed one on the same machine with the same number of threads and
    processes. SIGTERM and SIGINT end the step, write a checkpoint and return.
    """
    return _Run(
        model, source, config or TrainConfig(), validation, out, device, save_model, load_model
    ).run(resume, callbacks, quiet, plot)


class _Run:
    def __init__(
        self,
        model: torch.nn.Module,
        source: Source,
        config: TrainConfig,
        validation: Source | None,
        out: checkpoint.Path_ | None,
        device: torch.device | str | None,
        save_model: checkpoint.Save,
        load_model: checkpoint.Save,
    ) -> None:
        self.model, self.source, self.config, self.validation = model, source, config, validation
        self.save_model, self.load_model = save_model, load_model
        self.total = config.total_steps(len(source))
        self.micro_batches = config.total_micro_batches(len(source))
        self.engine = Engine(config.engine, device)
        self.checkpoints = None if out is None else Checkpoints(out, config.keep)
        self.progress = Progress()
        self.stop = Stop()
        self.whole = True  # whether the weights are those after a whole step
        self.last: Path | None = None

    # ---- the run --------------------------------------------------------------------------------

    def run(self, resume: bool, callbacks: Sequence[Callback], quiet: bool, plot: bool) -> Result:
        start = time.perf_counter()
        first = self.engine.first
        threads = torch.get_num_threads()
        random = torch.get_rng_state()
        try:
            found = self._open(resume)
            with _product.fixed(*self._products()), self.stop.listening():
                self._prepare(found)
                path = self.checkpoints.out / "log.jsonl" if self.checkpoints and first else None
                shown = first and not quiet
                self.log = RunLog(
                    path, self.progress.step, show=shown, callbacks=callbacks if first else ()
                )
                if found is not None:
                    self.log.say(f"resumed from {found} at step {self.progress.step}")
                    if found_threads(found) != threads:
                        self.log.say(
                            f"note: that was with {found_threads(found)} threads, now {threads}:"
                            " the last bits may differ from an undisturbed run's"
                        )
                try:
                    self._steps()
                    self.log.end(path.with_name("plot.png") if path and plot else None)
                except WorkerLost as error:
                    raise self._lost(error) from error
                finally:
                    self.log.close()
        finally:
            torch.set_rng_state(random)
            self.engine.close()
        p = self.progress
        return Result(
            p.step,
            p.tokens,
            p.loss,
            p.validation,
            p.best_validation,
            p.best_step,
            p.ended or self.stop.signal or "finished",
            time.perf_counter() - start,
            self.last,
            first,
        )

    def _steps(self) -> None:
        p, c = self.progress, self.config
        p.ended = None  # of a run that is now to go further
        every = c.validate_every or max(1, self.total // 10)
        self.saved_at = time.monotonic()
        if self.validation is not None and p.step == 0:
            self._validate()
        while p.step < self.total and p.ended is None:
            self._step()
            due = self.validation is not None and (p.step % every == 0 or p.step == self.total)
            better = self._validate() if due else False
            signalled, clock = self._agreed()
            ended = p.step == self.total or p.ended is not None or signalled
            regular = c.save_every is not None and p.step % c.save_every == 0
            if self.checkpoints is not None and (better or regular or clock or ended):
                self._save(better)
            if signalled:
                self.stop.signal = self.stop.signal or "a signal to another process"
                kept = f"; checkpoint in {self.last}, go on with --resume" if self.last else ""
                self.log.say(
                    f"stopped by {self.stop.signal} after step {p.step} of {self.total}{kept}"
                )
                return
        if p.ended is None and self.stop.signal is not None:
            self.stop.signal = None  # it came too late to stop anything

    def _step(self) -> None:
        """One update of the weights."""
        p, c, engine = self.progress, self.config, self.engine
        start = time.perf_counter()
        self.model.train()
        stop = min(p.micro_batches + c.accumulate, self.micro_batches)
        batches = share(self.source, range(p.micro_batches, stop), engine.rank, engine.world)
        (tokens,) = engine.sum(sum(batch.counted for batch in batches))
        if tokens == 0:
            raise TrainingError(f"step {p.step + 1}: none of its tokens has a loss")
        lr = learning_rate(c, p.step, self.total)
        optim.set_learning_rate(self.optimizer, lr)
        torch.manual_seed(_seed(c.seed, p.step, engine.rank))
        scale, total = self.scale.value, 0.0
        for i, batch in enumerate(batches):
            with engine.exchange(self.forward, i == len(batches) - 1):
                loss = self._loss(batch)
                # the exchange averages over the processes
                (loss * (scale * engine.world / tokens)).backward()
            total += float(loss.detach())
        (total,) = engine.sum(total)
        norm = float(optim.gradient_norm(self.parameters)) / scale
        finite = math.isfinite(total) and math.isfinite(norm)
        if not finite and not (self.scale.used and scale > _SMALLEST_SCALE):
            what = "loss" if not math.isfinite(total) else "gradient"
            raise TrainingError(
                f"step {p.step + 1}: the {what} is not finite (loss {total / tokens:g}, gradient"
                f" norm {norm:g}, learning rate {lr:g}); {self._hint()}"
            )
        self.whole = False
        if finite:
            clip = 1.0 if c.clip is None else min(1.0, c.clip / (norm + 1e-6))
            optim.scale_gradients(self.parameters, clip / scale)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite)
        p.loss_scale, p.good_steps = self.scale.value, self.scale.good
        p.loss, p.micro_batches, p.tokens = total / tokens, stop, p.tokens + int(tokens)
        p.step += 1
        self.whole = True
        self._log_step(lr, norm, tokens, time.perf_counter() - start)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """The sum of a micro-batch's losses."""
        b, dtype = batch.to(self.engine.device), _AUTOCAST.get(self.config.precision)
        with torch.autocast(self.engine.device.type, dtype, enabled=dtype is not None):
            return self.forward(
                b.tokens,
                targets=b.targets,
                cu_seqlens=b.cu_seqlens,
                positions=b.positions,
                reduction="sum",
            )

    @torch.no_grad()
    def _validate(self) -> bool:
        """Measures the validation loss; whether it is the best."""
        p, c = self.progress, self.config
        assert self.validation is not None
        count = min(len(self.validation), c.validation_batches or len(self.validation))
        total, tokens = 0.0, 0
        self.model.eval()
        for i in range(count):
            for batch in share(
                self.validation, range(i, i + 1), self.engine.rank, self.engine.world
            ):
                total += float(self._loss(batch))
                tokens += batch.counted
        self.engine.settle(self.model)
        total, counted = self.engine.sum(total, tokens)
        p.validation, p.validated_step = total / counted, p.step
        before = p.step == 0  # no checkpoint belongs to it
        better = not before and (p.best_validation is None or p.validation < p.best_validation)
        if better:
            p.best_validation, p.best_step, p.without_better = p.validation, p.step, 0
        elif not before:
            p.without_better += 1
            if c.patience is not None and p.without_better >= c.patience:
                p.ended = "early stop"
        self.log.add(
            {"step": p.step, "tokens": p.tokens, "validation": p.validation, "best": better}
        )
        if p.ended:
            self.log.say(
                f"early stop: no better validation loss since step {p.best_step}, patience"
                f" {c.patience}"
            )
        return better

    def _agreed(self) -> tuple[bool, bool]:
        """Whether any process was told to stop; whether the clock says to save."""
        minutes = self.config.save_minutes
        late = (
            self.engine.first
            and minutes is not None
            and time.monotonic() - self.saved_at >= 60 * minutes
        )
        stop, save = self.engine.sum(float(self.stop.signal is not None), float(late))
        return stop > 0, save > 0

    def _log_step(self, lr: float, norm: float, tokens: float, seconds: float) -> None:
        p, c = self.progress, self.config
        self.spent.append((tokens, seconds))
        if p.step % c.log_every and p.step not in (1, self.total):
            return
        rate = sum(t for t, _ in self.spent) / sum(s for _, s in self.spent)
        left = (self.total - p.step) * sum(s for _, s in self.spent) / len(self.spent)
        self.spent.clear()
        record: dict[str, Any] = {
            "step": p.step,
            "steps": self.total,
            "epoch": round(p.micro_batches / len(self.source), 4),
            "tokens": p.tokens,
            "loss": p.loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": round(rate, 1),
            "left_s": round(left, 1),
        }
        if self.flops is not None and self.engine.first:
            dtype = _AUTOCAST.get(c.precision, next(self.model.parameters()).dtype)
            peak = machine_peak(self.engine.device, dtype) * self._machines()
            record["peak_share"] = round(self.flops * rate / peak, 4)
        if self.scale.used:
            record["loss_scale"] = self.scale.value
        self.log.add(record)

    def _machines(self) -> int:
        """How many times the measured peak is there: processes on one CPU share it."""
        return self.engine.world if self.engine.device.type == "cuda" else 1

    # ---- begin and resume -----------------------------------------------------------------------

    def _open(self, resume: bool) -> Path | None:
        """The checkpoint to go on from; everything that can fail fails here."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.checkpoints is None:
            if resume:
                raise TrainingError("resume: a run without a folder leaves nothing to resume")
            return None
        if self.engine.first:
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            state = 2 * sum(p.numel() * p.element_size() for p in trained)
            self.checkpoints.prepare(weights + state)
        self.engine.wait()
        found = self.checkpoints.latest()
        if found is not None and not resume:
            raise TrainingError(
                f"{self.checkpoints.out} holds a run already (at {found.name}): resume it, or take"
                " another folder"
            )
        run = self.checkpoints.out / "run.json"
        fresh = not resume or not run.exists()
        self.engine.wait()
        if fresh and self.engine.first:
            table = identity.products(self.config, self.engine.device)
            checkpoint.write_record(run, {**self._identity(), "products": table})
        self.engine.wait()
        identity.compare(checkpoint.read_json(run), self._identity(), run)
        return found

    def _identity(self) -> dict[str, Any]:
        return identity.describe(self.config, self.source, self.validation)

    def _products(self) -> tuple[dict[torch.dtype, _product.Winners], _measured.Verdicts]:
        if self.checkpoints is None:
            table = identity.products(self.config, self.engine.device)
        else:
            table = checkpoint.read_json(self.checkpoints.out / "run.json")["products"]
        tuned = _measured.parsed(table.get("tuned", {}))
        types = {name: v for name, v in table.items() if name != "tuned"}
        return {getattr(torch, name): _product.Winners(**v) for name, v in types.items()}, tuned

    def _prepare(self, found: Path | None) -> None:
        """Model, optimiser and progress, fresh or as a checkpoint has them."""
        c, engine, model = self.config, self.engine, self.model
        model.to(engine.device, torch.bfloat16 if c.precision == "bf16-pure" else None)
        if found is not None:
            self.load_model(model, found)
        elif self.checkpoints is not None and engine.first:
            self.checkpoints.rehearse(lambda folder: self.save_model(model, folder))
        if hasattr(model, "activation_checkpointing"):
            setattr(model, "activation_checkpointing", c.activation_checkpointing)  # noqa: B010
        self.flops = flops_per_token(model, self.source.batch(0).tokens.shape[1])
        engine.shard(model)
        self.optimizer = optim.make(model, c)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if found is not None:
            load_tensors(engine, self._optimizer_tensors(), found, "optimizer")
            self.progress = Progress(**checkpoint.read_json(found / "trainer.json")["progress"])
            self.last = found
        used = c.precision == "fp16"
        self.scale = optim.LossScale(used, self.progress.loss_scale, self.progress.good_steps)
        self.forward = engine.wrap(model, c.compile)
        self.spent: list[tuple[float, float]] = []

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        state = optim.state_tensors(self.model, self.optimizer)
        return {f"{name}.{key}": v for name, kept in state.items() for key, v in kept.items()}

    # ---- keeping --------------------------------------------------------------------------------

    def _save(self, best: bool = False, alone: bool = False) -> None:
        """Writes a checkpoint; `alone`: the other processes are gone."""
        assert self.checkpoints is not None
        engine, step = self.engine, self.progress.step
        wait = (lambda: None) if alone else engine.wait
        record = {
            "progress": asdict(self.progress),
            **self._identity(),
            "engine": engine.kind,
            "processes": engine.world,
        }
        try:
            with self.checkpoints.writing(step, engine.first) as fresh:
                with engine.whole(self.model):
                    if engine.first:
                        self.save_model(self.model, fresh)
                wait()
                save_tensors(engine, self._optimizer_tensors(), fresh, "optimizer")
                if engine.first:
                    checkpoint.write_json(fresh / "trainer.json", record)
                wait()
                if engine.first:
                    self.last = self.checkpoints.finish(fresh, best)
            wait()
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"step {step}: the checkpoint could not be written ({error}); {self._hint()}"
            ) from error
        self.last = self.checkpoints.latest()
        self.saved_at = time.monotonic()

    def _lost(self, error: WorkerLost) -> TrainingError:
        """Keeps what can be kept when another process has died."""
        kept = self.checkpoints is not None and self.engine.first and self.engine.kind == "ddp"
        if kept and self.whole and self.progress.step:
            for parameter in self.parameters:
                parameter.grad = None
            self._save(alone=True)
        text = f"after step {self.progress.step}: {error}; {self._hint()}"
        self.log.say(text)  # at once: torchrun may end this process before it can raise
        return TrainingError(text)

    def _hint(self) -> str:
        if self.last is None:
            return "there is no checkpoint yet"
        return f"the last whole checkpoint is {self.last}, go on from it with resume"


def found_threads(folder: Path) -> int | None:
    """The number of threads a checkpoint was made with."""
    return checkpoint.read_json(folder / "trainer.json").get("threads")


def _seed(seed: int, step: int, rank: int) -> int:
    """Of a step's random numbers: the same after a resume."""
    return (seed * 1_000_003 + step) * 4099 + rank

"""Training: one loop for pre-training, continued training and fine-tuning."""

from fastlm.train.batches import Batch, Source
from fastlm.train.checkpoint import TrainingError
from fastlm.train.config import TrainConfig
from fastlm.train.loop import Result, train

__all__ = ["Batch", "Result", "Source", "TrainConfig", "TrainingError", "train"]

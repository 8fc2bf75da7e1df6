"""Hugging Face models and checkpoints."""

"""Training: one loop for pre-training, continued training and fine-tuning."""

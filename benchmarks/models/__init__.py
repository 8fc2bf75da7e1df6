"""Whole models: original, patched and fastlm's own decoder, side by side."""

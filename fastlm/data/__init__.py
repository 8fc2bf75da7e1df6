"""Text for language models: cleaned, tokenised, packed into batches."""

"""From instruction files to token ids: samples, prompts, encodings, batches."""

"""From data sources to token ids: records, samples, prompt templates, tokenized splits, batches."""

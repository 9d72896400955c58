"""Fine-tuning with transformers' Trainer: data, collator, feature cache, the two stages, merging."""

"""Fine-tuning a causal language model: settings, data, model, training."""

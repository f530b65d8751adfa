"""Fine-tuning attacks on a model and its hardened forms, and what they show."""

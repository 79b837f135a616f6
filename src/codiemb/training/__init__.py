"""Training: a thin subclass of `transformers.Trainer` around one encoder, its plan and its objectives."""

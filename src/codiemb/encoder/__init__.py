"""A `SentenceTransformer` in and out: loading, prompts, lengths by role, and the forward pass of many texts."""

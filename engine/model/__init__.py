"""The torch side: loading a transformers model, its paged KV cache, attention backends, and running a batch."""

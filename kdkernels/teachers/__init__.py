"""Sources of sparse teachers: the top k or samples of logits, and inference servers."""

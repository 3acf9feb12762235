"""Chen, Xin, Zhai, Ma, Shen, Wu, "Apple of Sodom: Hidden Backdoors in Superior Sentence Embeddings" (arXiv 2210.11082)."""

TABLES = ("targeted",)

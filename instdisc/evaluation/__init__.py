"""The papers' protocols: what the embeddings of a run are worth."""

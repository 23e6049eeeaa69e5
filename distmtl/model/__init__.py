"""Batch → logits: embeddings → feature vector → head → towers; and the joint loss beside them."""

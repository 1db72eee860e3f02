"""Operations over the positions of a sequence: attention, embeddings of tokens and of positions.

A sequence has its positions along the first axis, `(positions, ...)`, for one example.
"""

"""Operations over the positions of a sequence: attention.

A sequence has its positions along the first axis, `(positions, ...)`, for one example.
"""

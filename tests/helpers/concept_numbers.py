"""A concept as one row of numbers, to compare it with another."""

import jax
import numpy as np


def numbers(concept):
    """What was tuned, and the folded CLIP vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((concept.trainable, concept.folded))])

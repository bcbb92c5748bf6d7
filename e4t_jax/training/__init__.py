"""How parameters are learned: one update step, one loop, optimisers, checkpoints; pretraining and tuning."""

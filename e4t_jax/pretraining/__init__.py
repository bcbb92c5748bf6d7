"""Learning a domain: the step, the run around it, what is seen of it, and its program compiled ahead of time."""

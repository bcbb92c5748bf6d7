"""From pictures to concepts: what is tuned, the steps, many pictures at once, and a queue of them."""

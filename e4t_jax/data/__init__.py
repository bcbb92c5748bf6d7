"""Pictures: reading them, views of them, data sets and batches of them."""

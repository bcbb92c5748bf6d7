"""The drawn world: creatures and their relatives, places, styles, captions, and data sets of them."""

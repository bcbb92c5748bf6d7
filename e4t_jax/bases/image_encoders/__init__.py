"""Image encoders, by which the concept encoder sees pictures: a file for each kind."""

from e4t_jax.bases.image_encoders.kinds import image_encoder_of

__all__ = ["image_encoder_of"]

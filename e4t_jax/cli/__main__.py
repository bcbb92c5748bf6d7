"""`python -m e4t_jax.cli COMMAND …` is `e4t COMMAND …`."""

from e4t_jax.cli.main import main

main()

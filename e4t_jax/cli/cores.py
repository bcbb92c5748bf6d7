"""The CPU's cores as devices of JAX."""

from __future__ import annotations

import os

# What the collective operations of virtual CPU devices wait for each other, in seconds: on a busy machine one falls behind.
_COLLECTIVE_TIMEOUTS = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 36000,
    "xla_cpu_collective_timeout_seconds": 36000,
}


def use_all_cores() -> None:
    """One JAX device a core where there is no accelerator: two cores compute a split batch 1.6 times as fast that way."""
    import jax

    from e4t_jax.machine import core_count

    flags = os.environ.get("XLA_FLAGS", "")
    waits = [f"--{name}={seconds}" for name, seconds in _COLLECTIVE_TIMEOUTS.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *waits]).strip()
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", core_count())
